"""What a notebook imports: every command as a function of its settings, with a small result.

    import infscan
    found = infscan.scan("model=demo", "corpus=demo", "queries=demo", output="runs/demo")
    found.top().to_pandas()

Words are those of the command line; keywords are the same settings (`output="runs/demo"`, `scan={"top_k": 10}`), or a
typed `infscan.Config`. Progress is shown as in a terminal. What a user can fix is raised as an `InfscanError`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from infscan.config.arguments import read_arguments
from infscan.config.commands import assign, command_of, compose, settle, structured
from infscan.config.jobs import (
    AskJob,
    DuplicatesJob,
    ExplainJob,
    IndexJob,
    MasksJob,
    MergeJob,
    PlanJob,
    ReportJob,
    ServeJob,
    StatusJob,
    TfidfJob,
    VerifyJob,
)
from infscan.config.paths import absolute
from infscan.config.schema import Config
from infscan.errors import ConfigError, RunError

if TYPE_CHECKING:
    import pyarrow as pa

    from infscan.results.status import Status
    from infscan.sizing.estimate import Estimate
    from infscan.steps.ask import OpenIndex


def call(name: str, words: tuple[Any, ...], settings: Mapping[str, Any]) -> Any:
    """Run a command by name; the functions `infscan.scan`, `infscan.fit`, ... are this.

    Raises:
        InfscanError: for whatever a user can fix.
    """
    command = command_of(name)
    return command.function(settings_of_call(name, words, settings))


def settings_of_call(name: str, words: tuple[Any, ...], settings: Mapping[str, Any]) -> Any:
    """The typed settings of a call: words as on the command line or one typed settings object, and keywords.

    Raises:
        ConfigError: for a setting that there is not, or that cannot be used.
    """
    command = command_of(name)
    groups = (*command.groups, *command.variants)
    presets = [f"{key}={value}" for key, value in settings.items() if key in groups and isinstance(value, str)]
    values = dict(_flat({key: value for key, value in settings.items() if f"{key}={value}" not in presets}))
    typed = [word for word in words if not isinstance(word, str)]
    texts = read_arguments(command, [*(word for word in words if isinstance(word, str)), *presets])
    # Looks keywords up as words are; their values need no text.
    keys = [word.partition("=")[0].lstrip("+") for word in read_arguments(command, [f"{key}=null" for key in values])]
    if not typed:
        cfg = compose(command, texts)
    elif len(typed) == 1 and isinstance(typed[0], command.kind) and not texts:
        cfg = structured(typed[0])
    else:
        raise ConfigError(f"infscan.{name}: give words, or one {command.kind.__name__}, and keywords beside either.")
    for key, value in zip(keys, values.values(), strict=True):
        assign(command, cfg, key, value)
    return settle(command, cfg)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"scan": {"top_k": 10}}` as `scan.top_k`, 10."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class RunResult:
    """A finished run, by its folder."""

    uri: str

    def top(self) -> pa.Table:
        """The published rows: query_id, side, rank, sequence_id, score, ..."""
        from infscan.results.read import read_top

        return read_top(self.uri)

    def sequences(self) -> pa.Table:
        """The published sequences: text, tokens, documents."""
        from infscan.results.read import read_sequences

        return read_sequences(self.uri)

    def queries(self) -> pa.Table:
        """The queries as they were measured: texts, tokens, log-probabilities."""
        from infscan.results.read import read_queries

        return read_queries(self.uri)

    def answers(self) -> pa.Table:
        """Of each query, whether its strongest row stands out of all scanned sequences."""
        from infscan.results.read import read_answers

        return read_answers(self.uri)

    def documents(self) -> pa.Table:
        """Each published score, split over the documents of its sequence."""
        from infscan.results.read import read_documents

        return read_documents(self.uri)

    def layers(self) -> pa.Table:
        """Each published score, split over layers."""
        from infscan.results.read import read_layers

        return read_layers(self.uri)

    def tokens(self) -> pa.Table:
        """Each published score, split over input tokens."""
        from infscan.results.read import read_tokens

        return read_tokens(self.uri)

    def scores(self) -> pa.Table:
        """Every sequence's scan score for every query; only with scan.scores=all."""
        from infscan.results.read import read_scores

        return read_scores(self.uri)

    @property
    def summary(self) -> dict[str, Any]:
        """Counts, warnings, seconds by phase."""
        from infscan.results.read import read_summary

        return read_summary(self.uri)

    def show(self) -> None:
        """Print what the terminal shows at the end of a scan."""
        from infscan.report.terminal import show

        show(self.uri)


@dataclass(frozen=True)
class FitResult:
    """Fitted factors: where they are, and the fingerprint of what they are fitted to."""

    uri: str
    fingerprint: str | None

    def factors(self) -> dict[str, Any]:
        """A, S, their eigenbases and Lambda by layer."""
        from infscan.steps.factor_files import read_factors

        return read_factors(self.uri)

    def show(self) -> None:
        print(f"factors     {self.uri}\nfingerprint {self.fingerprint}")


@dataclass(frozen=True)
class PrepareResult:
    """A prepared corpus: where it is, its fingerprint, and what was read and became of it."""

    uri: str
    fingerprint: str
    statistics: dict[str, Any]

    def show(self) -> None:
        print(f"corpus      {self.uri}\nfingerprint {self.fingerprint}\n{json.dumps(self.statistics, indent=2)}")


@dataclass(frozen=True)
class PlanResult:
    """What a scan would cost."""

    estimate: Estimate
    settings: PlanJob

    def to_json(self) -> dict[str, Any]:
        return self.estimate.to_json()

    def show(self) -> None:
        from infscan.sizing.show import show

        if self.settings.plan.json:
            print(json.dumps(self.to_json(), indent=2))
        else:
            show(self.estimate, self.settings)


@dataclass(frozen=True)
class TfidfResult:
    """The sequences that the TF-IDF filter kept: query_id, rank, sequence_id, score."""

    uri: str
    table: pa.Table

    def show(self) -> None:
        print(f"candidates  {self.uri}/candidates.parquet ({self.table.num_rows} rows)")
        print(f"to scan     corpus.path={self.uri}")


@dataclass(frozen=True)
class IndexResult:
    """A finished index, by its folder."""

    uri: str

    @property
    def fields(self) -> Mapping[str, Any]:
        """What its codes are of, by name."""
        return self._opened.manifest.fields

    @property
    def rows(self) -> int:
        return self._opened.manifest.rows

    @cached_property
    def _opened(self) -> OpenIndex:
        from infscan.steps.ask import read_index

        return read_index(self.uri)

    def ask(self, prompt: str | None = None, completion: str | None = None, **settings: Any) -> RunResult:
        """A question's answer as a finished run; other settings are those of `infscan ask --help`."""
        given = {"prompt": prompt, "completion": completion}
        known = {key: value for key, value in given.items() if value is not None}
        result: RunResult = call("ask", (), {"index": self.uri, **known, **settings})
        return result

    def show(self) -> None:
        manifest = self._opened.manifest
        print(
            f"index       {self.uri}: {manifest.rows} rows of {manifest.row_bytes} bytes, {len(manifest.files)} files"
        )
        print(f"to ask      infscan ask index={self.uri} queries=<JSONL file> output=<folder>")
        if self._opened.made_with.asks:
            print(f"to read     infscan report {self.uri}")


@dataclass(frozen=True)
class ExplainResult:
    """The tables of an explanation by name, and where they are written."""

    uri: str
    tables: Mapping[str, pa.Table]
    queries: Mapping[str, Any]
    # The explained run's.
    run: str = ""

    def show(self) -> None:
        from infscan.report.explanation import show_explanation
        from infscan.report.terminal import by_id

        show_explanation(self.tables, self.queries, by_id(self.run, "queries") if self.run else None)
        print(f"\nAll of it as Parquet: {self.uri}/")


@dataclass(frozen=True)
class MasksResult:
    """The tokens to leave out of the loss: sequence_id, positions, scores."""

    uri: str
    table: pa.Table

    def show(self) -> None:
        tokens = sum(map(len, self.table["positions"].to_pylist()))
        print(f"masks       {self.uri}: {tokens} tokens of {self.table.num_rows} sequences")


@dataclass(frozen=True)
class ReportResult:
    """A page, and the cells of a sweep that are not finished and so not on it."""

    uri: str
    unfinished: tuple[str, ...]

    def show(self) -> None:
        from infscan.telemetry import console, shown

        for run in self.unfinished:
            console().print(shown(f"warning: {run} is not finished, and not on the page"), style="yellow", markup=False)
        print(self.uri)


@dataclass(frozen=True)
class MergeResult:
    uri: str

    def show(self) -> None:
        print(f"merged      {self.uri}")


@dataclass(frozen=True)
class VerifyResult:
    """A finished run or index, or both in one folder, whose files are those that were committed."""

    uri: str
    files: int
    # False where infscan 0.1 finished it: its tables were held to their own footers alone.
    has_manifest: bool = True
    is_run: bool = True
    is_index: bool = False

    def show(self) -> None:
        names = ["_SUCCESS"] * self.is_run + ["index.json"] * self.is_index
        against = f"what {' and '.join(names)} {'say' if len(names) > 1 else 'says'}"
        if not self.has_manifest:
            against = "their own checksums (an empty _SUCCESS, of infscan 0.1)"
        print(f"verified    {self.uri}: {self.files} files are {against}")


@dataclass(frozen=True)
class StatusResult:
    """How far a run is, or every cell of a sweep by name."""

    uri: str
    runs: Mapping[str, Status]
    is_sweep: bool
    json: bool = False

    @property
    def exit_code(self) -> int:
        """0 while a run goes on or is finished, 3 where one is not finished and nothing works on it."""
        from infscan.results.status import exit_code

        return exit_code(*self.runs.values())

    def to_json(self) -> dict[str, Any]:
        found = {name: status.to_json() for name, status in self.runs.items()}
        return found if self.is_sweep else next(iter(found.values()))

    def show(self) -> None:
        from infscan.report.status import show_status, show_sweep

        if self.json:
            print(json.dumps(self.to_json(), indent=2))
        elif self.is_sweep:
            show_sweep(self.uri, self.runs)
        else:
            show_status(next(iter(self.runs.values())))


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Within it Python looks for no cyclic garbage: importing torch and transformers makes half a million objects that
    stay, and looking at them again and again takes a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def run_scan(config: Config) -> RunResult:
    with _no_collecting():
        from infscan.pipeline import answer

    answer(config)
    return RunResult(config.output)


def run_prepare(config: Config) -> PrepareResult:
    from infscan.corpus.addressable import PreparedCorpus
    from infscan.steps.prepare import prepare_corpus
    from infscan.steps.run import open_run

    with open_run(config, needs_queries=False) as run:
        corpus = prepare_corpus(run)
    statistics = dict(corpus.counts)
    if isinstance(corpus, PreparedCorpus):
        statistics["document_lengths"] = corpus.manifest.lengths.to_json()
        if corpus.manifest.left_out.by_reason:
            statistics["left_out"] = corpus.manifest.left_out.by_reason
    return PrepareResult(corpus.store.uri, corpus.fingerprint, statistics)


def run_fit(config: Config) -> FitResult:
    with _no_collecting():
        from infscan.sizing.reserve import use_machine
        from infscan.steps.factors import fit
        from infscan.steps.prepare import prepare_factors_corpus
        from infscan.steps.run import open_run

    with open_run(config, needs_queries=False) as run:
        use_machine(run, prepare_factors_corpus(run).sequence_length)
        factors = fit(run)
    return FitResult(str(config.factors.path), factors.fingerprint)


def run_plan(config: PlanJob) -> PlanResult:
    with _no_collecting():
        from infscan.sizing.plan import estimate

        return PlanResult(estimate(config), config)


def run_tfidf(config: TfidfJob) -> TfidfResult:
    from infscan.steps.prepare import prepare_corpus
    from infscan.steps.run import open_run
    from infscan.steps.tfidf import tfidf_filter

    with open_run(config) as run:
        return TfidfResult(config.output, tfidf_filter(run, prepare_corpus(run), config.tfidf))


def run_index(config: IndexJob) -> IndexResult:
    with _no_collecting():
        from infscan.pipeline import make_index

    make_index(config)
    return IndexResult(config.output)


def run_ask(job: AskJob) -> RunResult:
    with _no_collecting():
        from infscan.pipeline import ask
        from infscan.steps.ask import ask_config, read_indexes

    if job.queries is None and job.prompt is None and job.completion is None:
        raise ConfigError("no question is given; add queries=<JSONL file>, or prompt=... completion=...")
    found = read_indexes(job.indexes)
    config = ask_config(found, job)
    ask(config, found)
    return RunResult(config.output)


@dataclass(frozen=True)
class DuplicatesResult:
    """Pairs of sequences that are alike in gradient space: sequence_id, other_id, cosine."""

    uri: str
    table: pa.Table

    def show(self) -> None:
        print(f"duplicates  {self.uri}: {self.table.num_rows} pairs")


def run_duplicates(job: DuplicatesJob) -> DuplicatesResult:
    from infscan.results.schema import to_parquet
    from infscan.steps.ask import read_index
    from infscan.steps.duplicates import near_duplicates
    from infscan.storage import Store

    job.check()
    job.index, job.output = absolute(job.index), absolute(job.output) if job.output else None
    found = read_index(job.index)
    table = near_duplicates(found, job.similar, job.seed)
    folder, _, name = job.path.rpartition("/")
    Store(folder).write(name, to_parquet(table, {"fingerprint": found.manifest.fingerprint}))
    return DuplicatesResult(job.path, table)


@dataclass(frozen=True)
class ServeResult:
    """A server that has ended."""

    def show(self) -> None:
        """There is nothing to show."""


def run_serve(job: ServeJob) -> ServeResult:
    from infscan.serve.run import serve
    from infscan.telemetry import configure_logs

    configure_logs()
    serve(job)
    return ServeResult()


def open_index(uri: str | PathLike[str]) -> IndexResult:
    """A finished index, to be asked.

    Raises:
        ConfigError: where `uri` is no address.
        RunError: where it is not finished, or is no index.
        DamagedError: where a file is missing, cut off or changed, as far as names and sizes say.
    """
    (address,) = AskJob(index=uri).indexes
    found = IndexResult(absolute(address))
    found.rows  # noqa: B018  (read now, so that what is wrong is said now)
    return found


def run_explain(job: ExplainJob) -> ExplainResult:
    from infscan.steps.explain import explain
    from infscan.steps.finished import reopen

    job.run = absolute(job.run)
    job.check()
    with reopen(job.run, job.cluster, job.query_ids) as run:
        return ExplainResult(job.folder, explain(run, job), {query.id: query for query in run.queries}, job.run)


def run_masks(job: MasksJob) -> MasksResult:
    from infscan.results.masks import write_masks

    job.run = absolute(job.run)
    job.output = absolute(job.output) if job.output else None
    job.check()
    return MasksResult(job.path, write_masks(job))


def run_report(job: ReportJob) -> ReportResult:
    from infscan.report.write import write_report

    page, unfinished = write_report(
        [absolute(run) for run in job.runs],
        absolute(job.output) if job.output else None,
        rows=job.rows,
        megabytes=job.megabytes,
        tokenizer=job.tokenizer,
    )
    return ReportResult(page, tuple(unfinished))


def run_merge(job: MergeJob) -> MergeResult:
    from infscan.model.adapter import merge

    return MergeResult(merge(job.adapter, job.model, job.output))


def run_status(job: StatusJob) -> StatusResult:
    from infscan.results.status import read_status, read_sweep

    if job.top < 0:
        raise ConfigError(f"top={job.top}: rows to show, 0 or more.")
    cells = read_sweep(job.run)
    if cells:
        return StatusResult(job.run, cells, True, job.json)
    return StatusResult(job.run, {job.run: read_status(job.run, rows=job.top)}, False, job.json)


def run_verify(job: VerifyJob) -> VerifyResult:
    from infscan.results.index_file import MANIFEST as INDEX
    from infscan.results.index_file import verify_index
    from infscan.results.manifest import SUCCESS
    from infscan.results.verify import verify
    from infscan.storage import Store

    where = absolute(job.run)
    store = Store(where)
    is_index = store.exists(INDEX)
    codes = verify_index(store) if is_index else 0
    if is_index and not store.exists(SUCCESS):
        return VerifyResult(where, codes, is_run=False, is_index=True)
    files, has_manifest = verify(where)
    return VerifyResult(where, codes + files, has_manifest, is_index=is_index)


def read_run(uri: str) -> RunResult:
    """A run that is finished, to read its tables.

    Raises:
        RunError: where it is not finished, or is no run's folder.
    """
    from infscan.results.manifest import SUCCESS
    from infscan.storage import Store

    where = absolute(uri)
    if not Store(where).exists(SUCCESS):
        raise RunError(f"{where} is no finished run: it has no {SUCCESS}; check the path, or finish the run.")
    return RunResult(where)
