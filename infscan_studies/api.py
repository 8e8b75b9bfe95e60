"""What the commands run: settings in, a small result with `show()` out. Heavy modules are imported when needed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from infscan.config import absolute, plain
from infscan.errors import ConfigError
from infscan.telemetry import configure_logs
from infscan_studies.config import (
    AnswersJob,
    BankJob,
    CoverageConfig,
    CrossLingualConfig,
    ExtrapolationConfig,
    FactsJob,
    FinetuneDemoJob,
    LayersConfig,
    LdsJob,
    MemorisationConfig,
    ModelsConfig,
    PbrfConfig,
    ProveJob,
    RealDemoJob,
    RegressionConfig,
    SideBySideConfig,
    SparsityConfig,
    StepConfig,
    StudyConfig,
    StudyJob,
    TrainDemoJob,
    TruthConfig,
    ValidateJob,
    WordOrderConfig,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from infscan_studies.report.figures import Draw

log = logging.getLogger("infscan")


@dataclass(frozen=True)
class StudyResult:
    """A study's table, what it says, and the files in the folder `uri`."""

    uri: str
    table: pa.Table
    words: tuple[str, ...]
    files: tuple[str, ...]
    job: StudyJob

    def show(self) -> None:
        from infscan_studies.report.word_order import show_planted

        if isinstance(self.job.study, WordOrderConfig) and self.job.study.texts is None:
            show_planted(self.job.run, self.job.study, self.table)
        for line in self.words:
            print(line)
        print(f"\n{self.uri}/: {', '.join(self.files)}")


def _studies() -> dict[type[StudyConfig], tuple[Callable[..., pa.Table], Callable[[pa.Table], list[str]], Draw]]:
    """Settings -> (run, settings, seed) -> table; table -> what it says; figure, table -> drawn."""
    from infscan_studies import (
        cross_lingual,
        extrapolation,
        layers,
        memorisation,
        models,
        side_by_side,
        sparsity,
        word_order,
    )
    from infscan_studies.report import figures

    return {
        SparsityConfig: (sparsity.study, sparsity.words, figures.draw_sparsity),
        LayersConfig: (layers.study, layers.words, figures.draw_layers),
        WordOrderConfig: (word_order.study, word_order.words, figures.draw_word_order),
        MemorisationConfig: (memorisation.study, memorisation.words, figures.draw_memorisation),
        ModelsConfig: (models.study, models.words, figures.draw_models),
        CrossLingualConfig: (cross_lingual.study, cross_lingual.words, figures.draw_cross_lingual),
        SideBySideConfig: (side_by_side.study, side_by_side.words, figures.draw_side_by_side),
        ExtrapolationConfig: (extrapolation.study, extrapolation.words, figures.draw_extrapolation),
    }


def run_study(job: StudyJob) -> StudyResult:
    from infscan.results.schema import to_parquet
    from infscan.storage import Store
    from infscan_studies import side_by_side
    from infscan_studies.report.figures import write_figure

    job.run = absolute(job.run)
    job.study.check()
    study, words, draw = _studies()[type(job.study)]
    table = study(job.run, job.study, job.seed)
    store, name = Store(job.folder), job.study.name
    settings = plain(job)
    settings["study"] = {"name": name} | settings["study"]
    store.write(f"{name}.parquet", to_parquet(table, {"study": settings}))
    written = [f"{name}.parquet", *write_figure(store, name, draw, table)]
    if isinstance(job.study, SideBySideConfig):
        text = side_by_side.page(table.to_pylist(), side_by_side.read_asked(job.run, job.study))
        store.write(f"{name}.md", text.encode())
        written.append(f"{name}.md")
    return StudyResult(store.uri, table, tuple(words(table)), tuple(written), job)


@dataclass(frozen=True)
class ValidateResult:
    """A validation's table, by query and method, and the facts that are in its footer."""

    uri: str
    table: pa.Table
    facts: Mapping[str, Any]
    truth: TruthConfig

    def show(self) -> None:
        from infscan_studies.report.validation import show, show_coverage, show_steps

        shown = {CoverageConfig: show_coverage, StepConfig: show_steps}.get(type(self.truth), show)
        shown(self.table, self.facts)
        print(f"\n{'By kind of query' if isinstance(self.truth, StepConfig) else 'By query'}: {self.uri}")


def of_run(config: ValidateJob) -> ValidateJob:
    """The settings of the finished run that is named, beside the validation's own."""
    if config.run is None:
        return config
    from infscan.steps.finished import finished_config

    run = finished_config(absolute(config.run))
    factors = replace(config.factors, damping=run.factors.damping, labels=run.factors.labels, blocks=run.factors.blocks)
    return replace(config, model=run.model, corpus=run.corpus, queries=run.queries, factors=factors)


def run_validate(config: ValidateJob) -> ValidateResult:
    from infscan.storage import Store
    from infscan_studies import against_cg, against_pbrf, against_step, coverage, regression

    studies: dict[type[TruthConfig], tuple[Callable[..., tuple[Any, pa.Table, dict[str, Any]]], str]] = {
        TruthConfig: (against_cg.validate, "against_cg"),
        PbrfConfig: (against_pbrf.validate, "against_pbrf"),
        RegressionConfig: (regression.validate, "against_pbrf_regression"),
        CoverageConfig: (coverage.validate, coverage.NAME),
        StepConfig: (against_step.validate, against_step.NAME),
    }
    configure_logs()
    config.truth.check()
    config = of_run(config)
    validate, name = studies[type(config.truth)]
    with Store(config.output).removed_unless_used():
        _, table, facts = validate(config, log.info)
    return ValidateResult(f"{config.output}/validate/{name}.parquet", table, facts, config.truth)


@dataclass(frozen=True)
class LdsResult:
    """What to print, and the rows of <output>/lds/lds.parquet; none while the full model waits to be scanned."""

    lines: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...] = ()

    def show(self) -> None:
        print("\n".join(self.lines))


def run_lds(job: LdsJob) -> LdsResult:
    import torch

    from infscan_studies.retraining import MODEL, lines, open_study, read_proponents, save_full_model

    torch.set_num_threads(job.threads)
    study = open_study(job)
    folder = study.store.local_path(MODEL)
    if folder is None:
        raise ConfigError(f"output={job.output}: the trained model is written to a local folder; give one.")
    print(f"trained by {study.trainer.optimiser}")
    study.claim()
    if not folder.exists():
        save_full_model(study, folder, job.tokenizer)
    if not job.scores:
        return LdsResult(
            (
                f"the full model is in {folder}; scan it with scan.scores=all, then add scores.<method>=<run>:",
                f"infscan scan model.path={folder} corpus.path={job.corpus.path} queries.path={job.queries.path} "
                "scan.scores=all output=...",
            )
        )
    methods = {name: study.scores(uri) for name, uri in job.scores.items()}
    rows = study.run(methods, read_proponents(job.proponents) if job.proponents else None)
    return LdsResult((*lines(rows), *study.missed(), f"{study.store}/lds/"), tuple(rows))


@dataclass(frozen=True)
class BankResult:
    """The table of a bank as it was written, and what scores are worth by it."""

    uri: str
    table: pa.Table
    judged: pa.Table | None = None

    def show(self) -> None:
        from infscan_studies.report.validation import show_bank

        if self.judged is not None:
            show_bank(self.judged)
        print(f"{self.uri}: {self.table.num_rows} trainings")


def run_bank(job: BankJob) -> BankResult:
    import torch

    from infscan_studies.bank import TABLE, open_bank

    configure_logs()
    torch.set_num_threads(job.threads)
    bank = open_bank(job)
    bank.prepare()
    bank.train(log.info)
    table = bank.write()
    judged = bank.judge(log.info) if job.sweep.methods else None
    return BankResult(f"{bank.store}/{TABLE}", table, judged)


@dataclass(frozen=True)
class ProveResult:
    """A proof's table by query and row, and the facts in its footer."""

    uri: str
    table: pa.Table
    facts: Mapping[str, Any]
    job: ProveJob

    def show(self) -> None:
        from infscan_studies.report.validation import show_effects

        if self.job.plan:
            print(self.facts["cost"])
            return
        show_effects(self.table, self.facts, self.job)
        print(f"\nRow by row: {self.uri}/prove.parquet. As a page to read: infscan report {self.job.run}")


def run_prove(job: ProveJob) -> ProveResult:
    from infscan.results.schema import to_parquet
    from infscan.steps.finished import reopen
    from infscan.storage import Store
    from infscan_studies.prove import effects_table, prove

    job.run = absolute(job.run)
    job.dot_product = absolute(job.dot_product) if job.dot_product else None
    job.check()
    store = Store(job.folder)
    with store.removed_unless_used():
        store.check_writable()
        with reopen(job.run, job.cluster, job.query_ids) as run:
            table, facts = prove(run, job)
        if not job.plan:
            footer = {"prove": plain(job), **facts}
            store.write("effects.parquet", to_parquet(effects_table(table, job.resamples, job.seed), footer))
            store.write("prove.parquet", to_parquet(table, footer))
    return ProveResult(store.uri, table, facts, job)


@dataclass(frozen=True)
class FilesResult:
    """What was written, a line for each file or folder."""

    lines: tuple[str, ...]

    def show(self) -> None:
        print("\n".join(self.lines))


def run_facts(job: FactsJob) -> FilesResult:
    from infscan.storage import Store
    from infscan_studies.demo.facts import FACTS, queries
    from infscan_studies.partitions import read_facts, texts_of

    facts = read_facts(job.facts) if job.facts else FACTS
    store, written = Store(job.output), []
    for name, rows in (("queries.jsonl", queries(facts)), ("texts.jsonl", texts_of(facts))):
        store.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        written.append(f"{store.uri}/{name}: {len(rows)} rows")
    return FilesResult(tuple(written))


def run_real_demo(job: RealDemoJob) -> FilesResult:
    from infscan_studies.demo.real import make

    return FilesResult(tuple(make(job.wheel, job.dictionary, job.output, job.documents)))


@dataclass(frozen=True)
class AnswersResult:
    """counts: by run and measurement, of each fact."""

    counts: Mapping[tuple[str, str], list[int]]

    def show(self) -> None:
        print("Forward documents among the ten strongest (of 10), by fact\n")
        for (name, measure), counts in self.counts.items():
            print(f"{name:<14} {measure:<13} {sum(counts):>3} of {10 * len(counts)}   {counts}")


def run_answers(job: AnswersJob) -> AnswersResult:
    from infscan_studies.demo.answers import forward_among_ten

    job.check()
    measures = (("whole answer", ""), ("first token", "-first"))
    return AnswersResult(
        {
            (name, measure): forward_among_ten(run, suffix)
            for name, run in job.runs.items()
            for measure, suffix in measures
        }
    )


def run_train_demo(job: TrainDemoJob) -> FilesResult:
    from infscan_studies.demo.train import train_demo

    configure_logs()
    return FilesResult((str(train_demo(job)),))


def run_finetune_demo(job: FinetuneDemoJob) -> FilesResult:
    from infscan_studies.demo.finetune import finetune_demo

    configure_logs()
    return FilesResult((str(finetune_demo(job)),))
