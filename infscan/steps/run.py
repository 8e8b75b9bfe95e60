"""A run: its inputs, its folder, its workers. What is wrong with the first two is found before a worker starts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from infscan.config import Backend, Config, Dtype, LogFormat, ModelConfig
from infscan.engine.executor import Executor, Machines, RunRecords, connect_backend
from infscan.engine.metrics import RunMetrics
from infscan.engine.recovery import RecoveryLog
from infscan.model.architecture import Architecture
from infscan.model.worker import WorkerSettings
from infscan.queries import Query, query_warnings
from infscan.steps.inputs import Inputs, check_stages_agree, later_configs, open_inputs, read_measured_queries
from infscan.steps.run_folder import RunFolder, open_folder
from infscan.steps.sizes import settled
from infscan.storage import Store, storage_faults
from infscan.telemetry import Telemetry, configure_logs


@dataclass(frozen=True)
class Run:
    """One stage at work: what its steps are called with. Made by `open_run`."""

    inputs: Inputs
    folder: RunFolder
    executor: Executor
    telemetry: Telemetry
    records: RunRecords
    # With stages, a run for every stage after this one, in order, with workers of its own.
    later: tuple[Run, ...] = ()

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def store(self) -> Store:
        return self.folder.store

    @property
    def architecture(self) -> Architecture:
        return self.inputs.architecture

    @property
    def queries(self) -> tuple[Query, ...]:
        return self.inputs.queries

    def hold_model_in(self, dtype: Dtype) -> None:
        """Have workers hold the model in `dtype`: those that hold it in another end; the next step starts new ones."""
        held = self.executor.settings.model
        if self.inputs.resolved(dtype) != self.inputs.resolved(held.dtype):
            self.executor.change_model(replace(held, dtype=dtype))


@contextmanager
def open_run(
    config: Config,
    *,
    needs_queries: bool = True,
    queries: Sequence[Query] | None = None,
    telemetry: Telemetry | None = None,
    machines: Machines | None = None,
    inputs: Inputs | None = None,
) -> Iterator[Run]:
    """Check the inputs, claim the output for this configuration, reach the cluster; workers start lazily.

    queries: what is measured, where it need not be read from the query file: a finished run's, opened again.
    machines, inputs: what the workers run on, and the scanned stage's model, tokenizer and corpora, where they are
    there already: whoever asks again and again has them read once.

    Raises:
        InfscanError: for anything wrong with the model, tokenizer, corpus files, queries, output or settings.
        RunError: where another driver works on this output.
    """
    if telemetry is None:
        configure_logs(run=config.output, json_lines=config.cluster.log_format is LogFormat.json)
    with ExitStack() as stack:
        # The folders of a run that fails before it kept anything go with it.
        for place in filter(None, (config.output, config.factors.path)):
            stack.enter_context(Store(place).removed_unless_used())
        yield stack.enter_context(_opened(config, needs_queries, queries, telemetry, machines, inputs))


@contextmanager
def _opened(
    config: Config,
    needs_queries: bool,
    queries: Sequence[Query] | None,
    telemetry: Telemetry | None,
    machines: Machines | None,
    inputs: Inputs | None,
) -> Iterator[Run]:
    metrics = RunMetrics(config.output, traced=config.cluster.trace, exported=config.cluster.backend is Backend.ray)
    opened, faults_before = time.monotonic(), storage_faults()
    folder = open_folder(config)
    config = folder.pinned(config)
    stages = [(folder, open_inputs(config) if inputs is None else replace(inputs, config=config))]
    if needs_queries:
        stages += [(open_folder(later, folder.lease), open_inputs(later)) for later in later_configs(config)]
        stages = _with_queries(stages, queries)
        folder.check_claim(config)
    folder.lease.take()
    try:
        for stage, _ in stages:
            stage.sweep()
        reached = machines or connect_backend(config.cluster)
        followed = str(folder.lease.followed) if folder.lease.followed else None
        recovery = RecoveryLog(followed=followed, opened=opened)
        records = RunRecords(recovery, metrics, folder.lease.check, folder.lease.announce, faults_before)
        run = _runs(stages, reached, telemetry or Telemetry(listener=metrics), records)
        try:
            for warning in [*_warnings(folder, run.queries), *run.architecture.warnings]:
                run.telemetry.warn(warning)
            yield run
        finally:
            for stage_run in (run, *run.later):
                stage_run.executor.close()
    finally:
        folder.lease.release()


def _warnings(folder: RunFolder, queries: Sequence[Query]) -> list[str]:
    """What is allowed, and probably not meant."""
    found = query_warnings(queries)
    if others := folder.others():
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        found.append(f"{folder.store.uri} holds other things too ({shown}); a folder of its own is easier to remove")
    return found


Stage = tuple[RunFolder, Inputs]


def _with_queries(stages: Sequence[Stage], queries: Sequence[Query] | None) -> list[Stage]:
    """Every stage with the queries, which are measured at the last one's model and read with its tokenizer."""
    inputs = [stage for _, stage in stages]
    check_stages_agree(inputs[0], inputs[1:])
    asked = tuple(queries) if queries else read_measured_queries(inputs[-1])
    models = [stage.architecture.fingerprint for stage in inputs]
    first = replace(inputs[0], later_models=tuple(models[1:]))
    return [
        (folder, replace(stage, queries=asked)) for (folder, _), stage in zip(stages, [first, *inputs[1:]], strict=True)
    ]


def _runs(stages: Sequence[Stage], machines: Machines, telemetry: Telemetry, records: RunRecords) -> Run:
    """The scanned stage's run, with those of the later ones; their records are the whole run's."""
    lease = stages[0][0].lease
    first = stages[0][1].config.scan.stage

    def run(number: int, folder: RunFolder, inputs: Inputs, later: tuple[Run, ...] = ()) -> Run:
        inputs = replace(inputs, device="cuda" if machines.gpus else "cpu", memory=machines.gpu_memory)
        known = (inputs.config, inputs.architecture, inputs.itemsize, len(inputs.queries))
        inputs = replace(inputs, config=settled(*known, machines.gpu_memory, folder.kept()))
        config = inputs.config
        settings = WorkerSettings(
            _as_it_is_used(inputs.model, config),
            inputs.layers,
            config.sharded,
            lease.store,
            identity=inputs.model_identity,
        )
        mine = telemetry.within(f"stage {number} ") if number > first else telemetry
        return Run(inputs, folder, machines.executor(settings, mine, records), mine, records, later)

    later = tuple(run(number, *stage) for number, stage in enumerate(stages[1:], start=first + 1))
    return run(first, *stages[0], later)


def _as_it_is_used(model: ModelConfig, config: Config) -> ModelConfig:
    """An iterated inverse has no parameter gathered ahead of its use: DeepSpeed foresees one order of modules, and a
    product runs through them three times where a query's gradient does twice."""
    if not config.factors.solver.iterated:
        return model
    return replace(model, zero=replace(model.zero, prefetch_bucket_size=0))
