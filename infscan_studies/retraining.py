"""Retraining studies on a small corpus: LDS and QLD of the scores that scans of the fully trained model gave.

One recipe trains everything: the full model, which is scanned with scan.scores=all, and the models on subsets that
judge the scores. What is trained is kept below <output>/lds/retrained and found again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import GPTNeoXForCausalLM

from infscan.config import Attention, QueriesConfig, fingerprint
from infscan.corpus.addressable import AddressableCorpus, open_corpus
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import ConfigError, RunError
from infscan.model.architecture import describe
from infscan.model.folder import model_folder
from infscan.queries import Query, queries_fingerprint, read_queries
from infscan.results.dense import score_column
from infscan.results.read import read_scores
from infscan.results.schema import read_any_parquet, read_parquet, to_parquet
from infscan.storage import MissingError, Store, open_input
from infscan.storage.foreign import parse_json
from infscan_studies.config import LdsJob, RetrainingConfig
from infscan_studies.truth import lds, qld
from infscan_studies.truth.retrain import LanguageModelTrainer, Retrainer, check_affordable, left_out, trainings
from infscan_studies.truth.train import build_model

FOLDER, RETRAINED, MODEL, RECIPE = "lds", "lds/retrained", "model", "lds/recipe.json"
RANDOM = "random"
# Written also where nothing was left out, so its columns are given.
_LEFT_OUT = pa.schema(
    [("trainings", pa.string()), ("query_id", pa.string()), ("rows", pa.list_(pa.int64())), ("of", pa.int64())]
)


TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "sentencepiece")


class RetrainingStudy:
    """A corpus, queries and a recipe, with the trainings they come to."""

    def __init__(
        self, study: RetrainingConfig, corpus: AddressableCorpus, queries: Sequence[Query], store: Store
    ) -> None:
        study.training.check()
        self.study, self.store = study, store
        self.queries = sorted(queries, key=lambda query: query.id)
        self.query_ids = [query.id for query in self.queries]
        self.corpus_fingerprint = corpus.fingerprint
        self.sequence_ids = np.arange(corpus.sequences)
        read = corpus.read(self.sequence_ids)
        if any(one.loss is not None for one in read):
            raise ConfigError(
                f"{corpus.store}: this study trains on every token; prepare it without prompt_field or mask_field."
            )
        sequences = [sequence.token_ids.tolist() for sequence in read]
        # The seed is the training's own; what it draws is part of the recipe.
        training = {name: value for name, value in asdict(study.training).items() if name != "seed"}
        self.recipe = {
            "model": asdict(study.model),
            "training": training,
            "vary_initial": study.vary_initial,
            "corpus": corpus.fingerprint,
            "threads": torch.get_num_threads(),
        }
        self.trainer = LanguageModelTrainer(
            lambda seed: build_model(study.model, corpus.vocab_size, corpus.sequence_length, seed),
            sequences,
            study.training,
            self.queries,
            vary_initial=study.vary_initial,
        )
        self.retrainer = Retrainer(
            store / RETRAINED,
            {**self.recipe, "measured": queries_fingerprint(self.queries)},
            self.query_ids,
            self.trainer,
        )

    def claim(self) -> None:
        """Write the recipe, or refuse an output whose full model was trained by another one.

        Raises:
            RunError: naming the recipe's file.
        """
        self.store.create(RECIPE, f"{json.dumps(self.recipe, indent=2)}\n".encode())
        if fingerprint(self.store.read_json(RECIPE)) != fingerprint(self.recipe):
            raise RunError(
                f"{self.store}/{RECIPE} is another recipe (model, training, corpus or thread count); give its own "
                "settings, or another output=..."
            )

    def full_model(self, seed: int = 0, until: int | None = None) -> GPTNeoXForCausalLM:
        """Trained on all sequences. until: as it was after so many epochs."""
        self.afford([(self.sequence_ids, seed)])
        model = self.trainer.train(self.sequence_ids, seed, until)
        assert isinstance(model, GPTNeoXForCausalLM)
        return model

    def afford(self, asked: Iterable[tuple[NDArray[np.int64], int]]) -> float:
        """Hours that the trainings still missing take, estimated from one epoch measured here.

        Raises:
            ConfigError: where they are more than `max_hours`.
        """
        sizes = [len(chosen) for chosen, _ in self.retrainer.missing(asked)]
        if not sizes:
            return 0.0
        mean = self.trainer.seconds(sum(sizes)) / len(sizes)
        return check_affordable(len(sizes), mean, self.study.max_hours)

    def scores(self, uri: str) -> NDArray[np.float64]:
        """A method's scores [N, Q]: a finished run's folder (scan.scores=all), or a Parquet file with its columns.

        Raises:
            RunError: where a run scanned another model or corpus, a file is no Parquet, or a sequence, a query or a
                finite score is missing.
        """
        if uri.endswith(".parquet"):
            folder, _, name = uri.rpartition("/")
            try:
                table = read_any_parquet(Store(folder or "."), name)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise RunError(f"{uri} cannot be read ({' '.join(str(error).split())}); give a Parquet file.") from None
        else:
            self._check_run(uri)
            table = read_scores(uri)
        return _aligned(table, self.sequence_ids, self.query_ids, uri)

    def _check_run(self, uri: str) -> None:
        try:
            plan = Store(uri).read_json("plan.json")
        except MissingError:
            raise RunError(f"{uri} holds no plan.json: it is no run folder; scan {self.store}/{MODEL} first.") from None
        model = describe(f"{self.store}/{MODEL}", "mlp").fingerprint
        for what, mine, its in (
            ("corpus", self.corpus_fingerprint, plan["corpus_fingerprint"]),
            ("model", model, plan["inputs"]["model"]),
        ):
            if mine != its:
                raise RunError(
                    f"{uri} scanned another {what} than this study trains on; scan model.path={self.store}/{MODEL} "
                    "with corpus.path=<this study's corpus>."
                )
        if plan["attention"] != Attention.across.value:
            raise RunError(
                f"{uri} was scanned with corpus.attention={plan['attention']}, and this study trains across documents; "
                "scan it with corpus.attention=across, or prepare the corpus with corpus.packing=document."
            )

    def run(
        self, methods: Mapping[str, NDArray[np.float64]], proponents: Mapping[str, Sequence[int]] | None = None
    ) -> list[dict[str, Any]]:
        """LDS (and QLD) of every method, of the random control, and of the first method less each other one.

        methods: scores [N, Q] by name. proponents: sequences known to state a query's fact, by query id; trainings
        without any of them are written to lds/left_out.parquet. Returns the rows of lds/lds.parquet.

        Raises:
            ConfigError: where the missing trainings would take longer than `max_hours`.
        """
        if not methods or RANDOM in methods:
            raise ConfigError(f"give scores of one method or more, none of them named {RANDOM!r}.")
        study, N = self.study, len(self.sequence_ids)
        seeds = range(study.seeds)
        control = lds.random_scores(N, len(self.queries), study.seed)
        everyone = {**methods, RANDOM: control}
        halves_mn = lds.half_subsets(N, study.subsets, study.seed)
        kept = {"lds": halves_mn}
        random_dn = qld.without_random(N, study.share, study.random_draws, study.seed)
        if study.qld:
            kept |= {f"qld {name}": qld.without_top(scores, study.share) for name, scores in everyone.items()}
            kept["qld baseline"] = random_dn
        self.afford(one for rows in kept.values() for one in trainings(rows, seeds))

        actual_mq = lds.actual(self.retrainer, halves_mn, seeds).mean(axis=1)
        predicted = {name: lds.predict(halves_mn, scores) for name, scores in everyone.items()}
        found = {name: lds.lds(values, actual_mq, study.seed) for name, values in predicted.items()}
        rows = [_row("lds", name, None, estimate) for name, estimate in found.items()]
        first, *others = predicted
        rows += [
            _row("lds", first, name, lds.lds_difference(predicted[first], predicted[name], actual_mq, study.seed))
            for name in others
        ]
        by_query = {("lds", name): estimate.by_query for name, estimate in found.items()}
        if study.qld:
            rises = {n: qld.loss_rises(self.retrainer, kept[f"qld {n}"], random_dn, seeds) for n in everyone}
            for name, rises_sq in rises.items():
                estimate = qld.qld(rises_sq, study.seed)
                rows.append(_row("qld", name, None, estimate))
                by_query["qld", name] = estimate.by_query
            rows += [
                _row("qld", first, name, qld.qld(rises[first] - rises[name], study.seed)) for name in list(rises)[1:]
            ]
        self._write("lds", rows)
        self._write("queries", self._by_query(by_query))
        self._write("measurements", self._by_subset(predicted, actual_mq))
        self._write("left_out", self._left_out(kept, proponents or {}), _LEFT_OUT)
        return rows

    def _by_query(self, by_query: Mapping[tuple[str, str], NDArray[np.float64]]) -> list[dict[str, Any]]:
        return [
            {"measure": measure, "method": method, "query_id": query_id, "value": value}
            for (measure, method), values_q in by_query.items()
            for query_id, value in zip(self.query_ids, values_q.tolist(), strict=True)
        ]

    def _by_subset(
        self, predicted: Mapping[str, NDArray[np.float64]], actual_mq: NDArray[np.float64]
    ) -> list[dict[str, Any]]:
        return [
            {
                "subset": subset,
                "query_id": query_id,
                "actual": float(actual_mq[subset, q]),
                **{f"predicted_{name}": float(values[subset, q]) for name, values in predicted.items()},
            }
            for subset in range(len(actual_mq))
            for q, query_id in enumerate(self.query_ids)
        ]

    def _left_out(
        self, kept: Mapping[str, NDArray[np.bool_]], proponents: Mapping[str, Sequence[int]]
    ) -> list[dict[str, Any]]:
        return [
            {"trainings": name, "query_id": query_id, "rows": rows, "of": len(kept_mn)}
            for name, kept_mn in kept.items()
            for query_id, rows in left_out(proponents, kept_mn, self.sequence_ids).items()
        ]

    def _write(self, name: str, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
        footer = {"recipe": self.retrainer.fingerprint, "optimiser": self.trainer.optimiser}
        self.store.write(f"{FOLDER}/{name}.parquet", to_parquet(pa.Table.from_pylist(rows, schema), footer))

    def missed(self) -> list[str]:
        """The sentences that lds/left_out.parquet comes to."""
        rows = read_parquet(self.store, f"{FOLDER}/left_out.parquet").to_pylist()
        return [
            f"{row['query_id']}: {len(row['rows'])} of {row['of']} trainings ({row['trainings']}) saw none of the "
            "sequences that state its fact"
            for row in rows
        ]


def corpus_and_queries(corpus: str, queries: str, tokenizer: str | None) -> tuple[AddressableCorpus, list[Query]]:
    """A prepared corpus, and the queries of a file for a model of its vocabulary and length.

    Raises:
        InfscanError: for inputs that cannot be used.
    """
    opened = open_corpus(Store(corpus), foreign=True)
    encoder = load_tokenizer(str(model_folder(tokenizer))) if tokenizer else None
    asked = QueriesConfig(path=queries)
    sizes = {"vocab_size": opened.vocab_size, "context": opened.sequence_length}
    return opened, read_queries(asked, encoder, **sizes, bos_id=None)


def open_study(job: LdsJob) -> RetrainingStudy:
    """A job's corpus, queries and recipe.

    Raises:
        InfscanError: for inputs or settings that cannot be used.
    """
    corpus, queries = corpus_and_queries(job.corpus.path, job.queries.path, job.tokenizer)
    return RetrainingStudy(job.study, corpus, queries, Store(job.output))


def save_full_model(
    study: RetrainingStudy, folder: Path, tokenizer: str | None, seed: int = 0, until: int | None = None
) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    study.full_model(seed, until).save_pretrained(partial)
    if tokenizer:
        for path in model_folder(tokenizer).iterdir():
            if path.name.startswith(TOKENIZER_FILES):
                shutil.copy(path, partial)
    partial.rename(folder)


def read_proponents(uri: str) -> dict[str, list[int]]:
    """query id -> sequence ids, of a JSONL file with rows `{"query_id", "sequence_ids"}`.

    Raises:
        ConfigError: naming the line that has not both.
    """
    found = {}
    with open_input(uri) as stream:
        for number, line in enumerate(stream.read().splitlines(), start=1):
            try:
                row = parse_json(line)
                found[str(row["query_id"])] = [int(number) for number in row["sequence_ids"]]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{uri}, line {number}: write query_id and a list of sequence_ids.") from None
    return found


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of lds/lds.parquet as a table for people: estimate and 95 % interval."""
    shown = [f"{'':4} {'method':<32} {'mean':>8}   95 % interval"]
    for row in rows:
        method = row["method"] + (f" minus {row['minus']}" if row["minus"] else "")
        interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        shown.append(f"{row['measure']:4} {method:<32} {row['mean']:>+8.3f}   {interval}")
    return shown


def _row(measure: str, method: str, minus: str | None, found: lds.Estimate) -> dict[str, Any]:
    return {
        "measure": measure,
        "method": method,
        "minus": minus,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "queries": len(found.by_query),
    }


def _aligned(
    table: pa.Table, sequence_ids: NDArray[np.int64], query_ids: Sequence[str], uri: str
) -> NDArray[np.float64]:
    wanted = ["sequence_id", *(score_column(query_id) for query_id in query_ids)]
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise RunError(f"{uri} has no column {missing[0]}; scan this study's queries, with scan.scores=all.")
    table = table.sort_by("sequence_id")
    if not np.array_equal(table["sequence_id"].to_numpy(), sequence_ids):
        raise RunError(
            f"{uri} scores {table.num_rows} sequences, not each of this corpus's {len(sequence_ids)} once; scan the "
            "whole of the study's corpus."
        )
    scores_nq: NDArray[np.float64] = np.stack(
        [table[name].to_numpy().astype(np.float64) for name in wanted[1:]], axis=1
    )
    if not np.isfinite(scores_nq).all():
        raise RunError(f"{uri} holds scores that are NaN or infinite; scan in float32, or leave that query out.")
    return scores_nq
