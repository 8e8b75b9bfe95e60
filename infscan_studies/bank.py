"""A bank of retrainings: what every query measures on models trained from scratch on half-subsets of a corpus.

One recipe is a size and a way of training; all recipes share the corpus, the subsets and the queries. Each training is
a file below <output>/<recipe>/lds/retrained, and its presence is the fact that it is done: a bank that was stopped goes
on. <output>/bank.parquet has a row per training, sorted; a later bank takes from it what it has in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.config import QueriesConfig
from infscan.corpus.addressable import AddressableCorpus, open_corpus
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import ConfigError, RunError
from infscan.model.folder import model_folder
from infscan.queries import Query, read_queries
from infscan.results.schema import footer_of, read_parquet, to_parquet
from infscan.storage import Store
from infscan_studies.config import BankJob, RetrainingConfig
from infscan_studies.retraining import MODEL, RetrainingStudy, save_full_model
from infscan_studies.truth.lds import half_subsets

TABLE = "bank.parquet"
# A query's column in the table.
MEASURED = "f_"


@dataclass(frozen=True)
class Cell:
    """A recipe's study, whose store is <output>/<recipe>."""

    name: str
    study: RetrainingStudy

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
            for recipe in job.recipes
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
        hours = sum(cell.study.afford(self._trainings()) for cell in self.cells)
        if hours > self.job.max_hours:
            raise ConfigError(
                f"the trainings of {len(self.cells)} recipes would take {hours:.2g} hours, more than max_hours="
                f"{self.job.max_hours}; take fewer, or raise max_hours (trainings that are finished are kept)."
            )
        for cell in self.cells:
            folder = cell.study.store.local_path(MODEL)
            if folder is None:
                raise ConfigError(f"output={self.job.output}: trained models are written to a local folder; give one.")
            if not folder.exists():
                save_full_model(cell.study, folder, self.job.tokenizer)

    def train(self, report: Callable[[str], None]) -> None:
        """Every training that is missing: recipe by recipe, subset by subset."""
        for cell in self.cells:
            missing = cell.study.retrainer.missing(self._trainings())
            for number, (chosen, seed) in enumerate(missing, 1):
                cell.study.retrainer.measure(chosen, seed)
                if number % 20 == 0 or number == len(missing):
                    report(f"{cell.name}: {number} of {len(missing)} trainings that were missing")

    def measured(self, cell: Cell) -> NDArray[np.float64]:
        """What every query measures after every training of a recipe, [subsets, seeds, Q]."""
        values = [cell.study.retrainer.measure(chosen, seed) for chosen, seed in self._trainings()]
        return np.array(values).reshape(self.job.subsets, self.job.seeds, -1)

    def write(self) -> pa.Table:
        """The table of everything that is trained; the same bytes however often the bank was stopped on the way."""
        tables = [self._rows(cell) for cell in self.cells]
        footer = {
            "of": TABLE,
            "corpus": self.corpus.fingerprint,
            "subsets_seed": self.job.seed,
            "recipes": {cell.name: cell.facts() for cell in self.cells},
        }
        table = pa.concat_tables(tables)
        self.store.write(TABLE, to_parquet(table, footer))
        return table

    def _rows(self, cell: Cell) -> pa.Table:
        settings = cell.study.study
        names = [cell.name] * (self.job.subsets * self.job.seeds)
        values_rq = self.measured(cell).reshape(len(names), -1)
        subsets = np.repeat(np.arange(self.job.subsets), self.job.seeds)
        columns: dict[str, Any] = {
            "recipe": names,
            "optimizer": [str(settings.training.optimizer.value)] * len(names),
            "layers": np.full(len(names), settings.model.layers),
            "width": np.full(len(names), settings.model.width),
            "subset": subsets,
            "seed": np.tile(np.arange(self.job.seeds), self.job.subsets),
            "kept": pa.array(list(self.kept_mn[subsets].tolist()), pa.list_(pa.bool_())),
        }
        columns |= {f"{MEASURED}{query.id}": values_rq[:, q] for q, query in enumerate(self.queries)}
        return pa.table(columns)

    def _trainings(self) -> list[tuple[NDArray[np.int64], int]]:
        return [(np.flatnonzero(kept_n), seed) for kept_n in self.kept_mn for seed in range(self.job.seeds)]

    def _take(self, uri: str) -> None:
        """Units for the rows of an earlier table that are of a recipe, the queries and the corpus of this bank."""
        folder, _, name = uri.rpartition("/")
        table = read_parquet(Store(folder or "."), name)
        recipes = footer_of(table.schema, uri).get("recipes")
        if not isinstance(recipes, dict):
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
    corpus = open_corpus(Store(job.corpus.path), foreign=True)
    tokenizer = load_tokenizer(str(model_folder(job.tokenizer))) if job.tokenizer else None
    queries = read_queries(
        QueriesConfig(path=job.queries.path),
        tokenizer,
        vocab_size=corpus.vocab_size,
        context=corpus.sequence_length,
        bos_id=None,
    )
    return Bank(job, corpus, queries, Store(job.output))
