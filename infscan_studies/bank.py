"""A bank of retrainings: what every query measures on models trained from scratch on half-subsets of a corpus.

One recipe is a size and a way of training; all recipes share the corpus, the subsets and the queries. Each training is
a file below <output>/<recipe>/lds/retrained, and its presence is the fact that it is done: a bank that was stopped goes
on. <output>/bank.parquet has a row per training, sorted; a later bank takes from it what it has in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from infscan.config import plain
from infscan.corpus.addressable import AddressableCorpus
from infscan.errors import ConfigError, RunError
from infscan.queries import Query
from infscan.results.schema import footer_of, read_parquet, to_parquet
from infscan.storage import Store
from infscan.storage.host import processor
from infscan_studies.bank_judged import ALL, LEAD, ceilings, kinds_of, lds_by_query, over_queries, rows_of
from infscan_studies.bank_scores import Labelled, RecipeScores, at_random
from infscan_studies.config import BankJob, BankMethod, BankRecipe, RetrainingConfig
from infscan_studies.retraining import MODEL, RetrainingStudy, corpus_and_queries, save_full_model
from infscan_studies.truth.lds import half_subsets
from infscan_studies.truth.qld import without_random, without_top
from infscan_studies.truth.retrain import trainings

TABLE, JUDGED_TABLE = "bank.parquet", "judged.parquet"
JUDGED = pa.schema(
    [
        ("recipe", pa.string()),
        ("subsets", pa.int64()),
        *((name, pa.string()) for name in ("label", "method", "tracked")),
        ("damping", pa.float64()),
        ("sequences", pa.int64()),
        ("models", pa.int64()),
        ("epochs", pa.string()),
        ("kind", pa.string()),
        *((name, pa.float64()) for name in ("lds", "low", "high", "ceiling", "share", *LEAD)),
        ("queries", pa.int64()),
        *((name, pa.float64()) for name in ("seconds", "removal", "removal_low", "removal_high")),
        ("removal_queries", pa.int64()),
    ]
)
_ROWS = (
    *((name, pa.string()) for name in ("recipe", "optimizer")),
    *((name, pa.int64()) for name in ("layers", "width", "subset", "seed")),
    ("kept", pa.list_(pa.bool_())),
)
# Trainings from one line of progress to the next.
_REPORTED = 20
# Subsets that LDS needs.
_FEWEST = 3
# A query's column in the table.
MEASURED = "f_"


@dataclass(frozen=True)
class Cell:
    """A recipe's study, whose store is <output>/<recipe>."""

    name: str
    study: RetrainingStudy

    def model_store(self, seed: int, until: int | None = None) -> Store:
        """The folder of a full model, its factors and its scores. until: of that model after so many epochs."""
        if until is not None:
            return self.study.store / f"epoch-{until}"
        return self.study.store / f"seed-{seed}" if seed else self.study.store

    def facts(self) -> dict[str, Any]:
        """For the table's footer."""
        retrainer = self.study.retrainer
        return {"fingerprint": retrainer.fingerprint, **self.study.recipe, "trained": self.study.trainer.optimiser}


class Bank:
    """The recipes of a job, with the trainings they come to."""

    def __init__(self, job: BankJob, corpus: AddressableCorpus, queries: Sequence[Query], store: Store) -> None:
        self.job, self.store = job, store
        self.corpus, self.queries = corpus, sorted(queries, key=lambda query: query.id)
        self.kept_mn = half_subsets(corpus.sequences, job.subsets, job.seed)
        self.cells = [
            Cell(
                recipe.name,
                RetrainingStudy(
                    RetrainingConfig(
                        model=recipe.model,
                        training=recipe.training,
                        subsets=job.subsets,
                        seeds=job.seeds,
                        seed=job.seed,
                        max_hours=job.max_hours,
                    ),
                    corpus,
                    queries,
                    store / recipe.name,
                ),
            )
            for recipe in job.recipes or [BankRecipe()]
        ]

    def prepare(self) -> None:
        """Claim every recipe's folder, train the models on the whole corpus, and take what `known` has.

        Raises:
            RunError: where a folder is of another recipe, or `known` is no table of a bank.
            ConfigError: where the trainings still missing would take longer than `max_hours`.
        """
        for cell in self.cells:
            cell.study.claim()
        if self.job.known:
            self._take(self.job.known)
        hours = sum(
            cell.study.afford(cell.study.retrainer.missing(self._trainings())[: self.job.trainings])
            for cell in self.cells
        )
        if hours > self.job.max_hours:
            raise ConfigError(
                f"the trainings of {len(self.cells)} recipes would take {hours:.2g} hours, more than max_hours="
                f"{self.job.max_hours}; take fewer, or raise max_hours (trainings that are finished are kept)."
            )
        for cell in self.cells:
            models = [(seed, None) for seed in range(self.job.sweep.models)]
            for seed, until in [*models, *((0, epoch) for epoch in self._epochs(cell))]:
                folder = cell.model_store(seed, until).local_path(MODEL)
                if folder is None:
                    raise ConfigError(
                        f"output={self.job.output}: trained models are written to a local folder; give one."
                    )
                if not folder.exists():
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    save_full_model(cell.study, folder, self.job.tokenizer, seed, until)

    def _epochs(self, cell: Cell) -> list[int]:
        """Those below the recipe's last."""
        return sorted({one for one in self.job.sweep.epochs if one < cell.study.study.training.epochs})

    def train(self, report: Callable[[str], None]) -> None:
        """The trainings that are missing, as many as the job allows: recipe by recipe, subset by subset."""
        left = self.job.trainings
        for cell in self.cells:
            missing = cell.study.retrainer.missing(self._trainings())[:left]
            for number, (chosen, seed) in enumerate(missing, 1):
                cell.study.retrainer.measure(chosen, seed)
                if number % _REPORTED == 0 or number == len(missing):
                    report(f"{cell.name}: {number} of {len(missing)} trainings that were missing")
            left = None if left is None else left - len(missing)

    def finished(self, cell: Cell) -> NDArray[np.bool_]:
        """Which trainings of a recipe are done, [subsets, seeds]."""
        missing = {cell.study.retrainer.path(*one) for one in cell.study.retrainer.missing(self._trainings())}
        done = [cell.study.retrainer.path(*one) not in missing for one in self._trainings()]
        return np.array(done).reshape(self.job.subsets, self.job.seeds)

    def measured(self, cell: Cell, done_ms: NDArray[np.bool_]) -> NDArray[np.float64]:
        """What every query measures after these trainings of a recipe, subset by subset: [trainings, Q]."""
        asked = zip(self._trainings(), done_ms.flatten().tolist(), strict=True)
        values = [cell.study.retrainer.measure(*one) for one, done in asked if done]
        return np.array(values).reshape(-1, len(self.queries))

    def write(self) -> pa.Table:
        """The table of everything that is trained; the same bytes however often the bank was stopped on the way."""
        tables = [self._rows(cell) for cell in self.cells]
        footer = {
            "of": TABLE,
            # Other ones give other last bits.
            "made_with": {"torch": str(torch.__version__), "cpu": processor()},
            "corpus": self.corpus.fingerprint,
            "subsets_seed": self.job.seed,
            "recipes": {cell.name: cell.facts() for cell in self.cells},
        }
        table = pa.concat_tables(tables)
        self.store.write(TABLE, to_parquet(table, footer))
        return table

    def judge(self, report: Callable[[str], None]) -> pa.Table:
        """Every method, damping and set of layers that the sweep asks for, by recipe and kind of query."""
        rows: list[dict[str, Any]] = []
        for cell in self.cells:
            rows += self._judged(cell, report)
        table = pa.Table.from_pylist(rows, JUDGED)
        self.store.write(JUDGED_TABLE, to_parquet(table, {"of": JUDGED_TABLE, **self._footer()}))
        return table

    def _scored(self, cell: Cell, seed: int, until: int | None = None) -> RecipeScores:
        store, counts = cell.model_store(seed, until), (self.corpus.sequences, len(self.queries))
        model, sweep = str(store.local_path(MODEL)), self.job.sweep
        config = RecipeScores.config_of(
            model, self.job.corpus.path, self.job.queries.path, counts, store.uri, self.job.seed, sweep
        )
        return RecipeScores(store, config, sweep)

    def _judged(self, cell: Cell, report: Callable[[str], None]) -> list[dict[str, Any]]:
        sweep, seed = self.job.sweep, self.job.seed
        # Subsets that every seed was trained on.
        whole_m = np.asarray(self.finished(cell).all(axis=1))
        if whole_m.sum() < _FEWEST:
            raise ConfigError(
                f"{cell.name}: {whole_m.sum()} subsets are trained with every seed, and LDS needs at least {_FEWEST} "
                "(32 to say much); train more: trainings, subsets."
            )
        kept_mn = self.kept_mn[whole_m]
        done_ms = np.repeat(whole_m[:, None], self.job.seeds, axis=1)
        actual_msq = self.measured(cell, done_ms).reshape(len(kept_mn), self.job.seeds, -1)
        ceiling_q, actual_mq = ceilings(actual_msq), actual_msq.mean(axis=1)
        ids = [query.id for query in self.queries]
        rows: list[dict[str, Any]] = []
        wanted: dict[str, NDArray[np.float64]] = {}
        ekfac: dict[tuple[str, str], NDArray[np.float64]] = {}
        for one in self._added_up(cell, report):
            columns = [ids.index(name) for name in one.query_ids]
            lds_q = lds_by_query(kept_mn, one.scores_nq, actual_mq[:, columns])
            facts = {"recipe": cell.name, "subsets": len(kept_mn), "label": one.label, **one.facts}
            if facts["method"] == BankMethod.ekfac.value and one.same and one.same not in ekfac:
                ekfac[one.same] = lds_q
            before_q = ekfac.get(one.same) if one.same else None
            rows += rows_of(
                one.query_ids,
                lds_q,
                ceiling_q[columns],
                facts,
                seed,
                sweep.resamples,
                None if before_q is None else before_q[columns],
            )
            if one.label in sweep.removal:
                wanted[one.label] = one.scores_nq
        unknown = set(sweep.removal) - set(wanted)
        if unknown:
            raise ConfigError(
                f"sweep.removal: {', '.join(sorted(unknown))} is no row of the sweep; its rows are "
                f"{', '.join(dict.fromkeys(row['label'] for row in rows))}."
            )
        if wanted:
            removed = self._removed(cell, wanted, report)
            for row in rows:
                row |= removed.get((row["label"], row["kind"]), {})
        return rows

    def _added_up(self, cell: Cell, report: Callable[[str], None]) -> Iterator[Labelled]:
        """The rows of the first full model, of the first two added up, ...; of the first one's earlier epochs, and all
        of them added up; and random scores.

        Words are the same for every model: their row is of one.
        """
        sums, first = list[Labelled](), list[Labelled]()
        for number in range(1, self.job.sweep.models + 1):
            mine = list(self._scored(cell, number - 1).labelled(report))
            if number > 1:
                mine = [one for one in mine if one.facts["method"] != BankMethod.bm25.value]
                before = {one.label: one for one in sums}
                mine = [before[one.label].with_another(one) for one in mine]
            sums = mine
            first = first or mine
            yield from (one.of_models(number) for one in sums)
        epochs, path = self._epochs(cell), [one for one in first if one.facts["method"] != BankMethod.bm25.value]
        for epoch in epochs:
            then = {one.label: one for one in self._scored(cell, 0, epoch).labelled(report)}
            yield from (then[one.label].of_epochs(str(epoch)) for one in path)
            path = [one.with_another(then[one.label]) for one in path]
        if epochs:
            said = "+".join(map(str, [*epochs, cell.study.study.training.epochs]))
            yield from (one.of_epochs(said) for one in path)
        ids = tuple(query.id for query in self.queries)
        yield at_random(self.corpus.sequences, ids, self.job.seed).of_models(1)

    def _removed(
        self, cell: Cell, wanted: Mapping[str, NDArray[np.float64]], report: Callable[[str], None]
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """By label and kind: the rise of a query's loss without its strongest sequences, nats, over random removals."""
        sweep, retrainer = self.job.sweep, cell.study.retrainer
        chosen = [
            int(place)
            for kind, places in kinds_of([query.id for query in self.queries]).items()
            if kind != ALL
            for place in places[: sweep.removed_queries]
        ]
        random_dn = without_random(self.corpus.sequences, sweep.share, sweep.random_draws, self.job.seed)
        kept = {label: without_top(scores_nq, sweep.share)[chosen] for label, scores_nq in wanted.items()}
        seeds = range(sweep.removal_seeds)
        cell.study.afford(one for rows in [random_dn, *kept.values()] for one in trainings(rows, seeds))
        found: dict[tuple[str, str], dict[str, Any]] = {}
        names = [self.queries[place].id for place in chosen]
        for label, kept_kn in kept.items():
            rises_k = np.mean(
                [
                    np.mean([retrainer.measure(np.flatnonzero(row), seed)[chosen] for row in random_dn], axis=0)
                    - [
                        retrainer.measure(np.flatnonzero(row), seed)[place]
                        for row, place in zip(kept_kn, chosen, strict=True)
                    ]
                    for seed in seeds
                ],
                axis=0,
            )
            for kind, places in kinds_of(names).items():
                rise = over_queries(rises_k[places], self.job.seed, sweep.resamples)
                found[label, kind] = {
                    "removal": rise.mean,
                    "removal_low": rise.low,
                    "removal_high": rise.high,
                    "removal_queries": rise.queries,
                }
            report(f"{cell.name}: removal of {label}")
        return found

    def _footer(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.fingerprint,
            "subsets": self.job.subsets,
            "seeds": self.job.seeds,
            "subsets_seed": self.job.seed,
            "sweep": plain(self.job.sweep),
            "recipes": {cell.name: cell.facts() for cell in self.cells},
        }

    def _rows(self, cell: Cell) -> pa.Table:
        settings, done_ms = cell.study.study, self.finished(cell)
        values_rq = self.measured(cell, done_ms)
        subsets, seeds = np.nonzero(done_ms)
        columns: dict[str, Any] = {
            "recipe": [cell.name] * len(subsets),
            "optimizer": [settings.training.optimizer.value] * len(subsets),
            "layers": np.full(len(subsets), settings.model.layers),
            "width": np.full(len(subsets), settings.model.width),
            "subset": subsets,
            "seed": seeds,
            "kept": pa.array(list(self.kept_mn[subsets].tolist()), pa.list_(pa.bool_())),
        }
        columns |= {f"{MEASURED}{query.id}": values_rq[:, q] for q, query in enumerate(self.queries)}
        return pa.table(columns, pa.schema([*_ROWS, *((name, pa.float64()) for name in list(columns)[len(_ROWS) :])]))

    def _trainings(self) -> list[tuple[NDArray[np.int64], int]]:
        return trainings(self.kept_mn, range(self.job.seeds))

    def _take(self, uri: str) -> None:
        """Units for the rows of an earlier table that are of a recipe, the queries and the corpus of this bank."""
        folder, _, name = uri.rpartition("/")
        table = read_parquet(Store(folder or "."), name)
        recipes = footer_of(table.schema, uri).get("recipes")
        if not recipes or "kept" not in table.column_names:
            raise RunError(f"known={uri} is no table of a bank; give the bank.parquet of one.")
        by_fingerprint = {cell.study.retrainer.fingerprint: cell for cell in self.cells}
        for recipe, facts in recipes.items():
            cell = by_fingerprint.get(facts["fingerprint"])
            for row in _rows_of(table, recipe) if cell else ():
                assert cell is not None
                values = np.array([row[f"{MEASURED}{query.id}"] for query in self.queries])
                cell.study.retrainer.take(np.flatnonzero(row["kept"]), row["seed"], values)


def _rows_of(table: pa.Table, recipe: str) -> Iterator[dict[str, Any]]:
    return (row for row in table.to_pylist() if row["recipe"] == recipe)


def open_bank(job: BankJob) -> Bank:
    """A job's corpus, queries and recipes.

    Raises:
        InfscanError: for inputs or settings that cannot be used.
    """
    job.check()
    corpus, queries = corpus_and_queries(job.corpus.path, job.queries.path, job.tokenizer)
    return Bank(job, corpus, queries, Store(job.output))
