"""Running a step's units: in this process, or on the workers of a Ray cluster (`infscan.engine.ray_executor`).

Nothing here knows what a step computes. A unit whose output is in storage is skipped; one that fails is tried again,
and given up in the end. What a step reads and writes is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from infscan.config import Backend, ClusterConfig, ModelConfig
from infscan.corpus.read_ahead import Reads
from infscan.engine.facts import RankFacts
from infscan.engine.metrics import RunMetrics
from infscan.engine.recovery import RecoveryLog
from infscan.storage import storage_faults
from infscan.telemetry import PhaseView, Telemetry

if TYPE_CHECKING:
    from infscan.engine.in_process import InProcessExecutor as InProcessExecutor
    from infscan.model.worker import WorkerSettings

U = TypeVar("U")
OnDone = Callable[[Any, Any], None]
OnGivenUp = Callable[[Any, str], None]


def _nothing(*_: Any) -> tuple[int, int]:
    return 0, 0


@dataclass(frozen=True)
class Step(Generic[U]):
    """Units of work that need the model. A unit is a number, or a tuple of numbers and names."""

    # The phase's name in logs and in summary.json, and what it calls a unit.
    name: str
    unit_name: str
    # In the order in which they are handed out.
    units: Sequence[U]
    # function(worker, task, *shared): run on every rank of a worker group; rank 0's result is the unit's.
    function: Callable[..., Any]
    # Makes a unit's task when it is handed out, since a task may say what was finished by then.
    task: Callable[[U], Any]
    # Whether the unit's output is in storage, made of the same inputs.
    is_done: Callable[[U], bool] = lambda unit: False
    # The sequences and tokens that a finished unit has read, from the unit and its result.
    progress: Callable[[U, Any], tuple[int, int]] = _nothing
    # What a unit's task reads first: a rank reads the next unit's while it computes.
    reads: Callable[[U], Reads | None] = lambda unit: None


@dataclass(frozen=True)
class Load:
    """What an item of a `TaskMap` takes of its machine: cores that it keeps busy, and bytes of host memory at most."""

    cores: int = 1
    bytes: int = 0


def fits(running: Iterable[Load], item: Load, all_of_it: Load) -> bool:
    """Whether an item may start beside those that run. Alone it always may: it is then as well off as it can be."""
    others = list(running)
    cores, used = (sum(getattr(one, name) for one in (*others, item)) for name in ("cores", "bytes"))
    return not others or (cores <= all_of_it.cores and used <= all_of_it.bytes)


@dataclass(frozen=True)
class TaskMap(Generic[U]):
    """Work without a model, one item at a time, each in a process of its own."""

    name: str
    unit_name: str
    items: Sequence[U]
    # function(*arguments(item)); a module's own function, so that its process imports that module alone.
    function: Callable[..., Any]
    arguments: Callable[[U], tuple[Any, ...]]
    is_done: Callable[[U], bool] = lambda item: False
    progress: Callable[[U, Any], tuple[int, int]] = _nothing
    # CPU cores that an item asks for; 0 where ranks, which wait meanwhile, hold all of them.
    cores: int = 1
    load: Callable[[U], Load] = lambda item: Load()


@dataclass
class RunRecords:
    """What the executors of one run, one for each stage, record together."""

    recovery: RecoveryLog = field(default_factory=RecoveryLog)
    metrics: RunMetrics = field(default_factory=lambda: RunMetrics(""))
    # Called between units; what it raises ends the step (a driver that lost its lease).
    check: Callable[[], None] = lambda: None
    # Called with what the driver waits for, for those who watch; with nothing where it works again.
    announce: Callable[[str], None] = lambda state: None
    # Transient faults of storage that this process had met before, by kind.
    faults_before: Mapping[str, int] = field(default_factory=storage_faults)


@dataclass(frozen=True)
class DeviceNeed:
    """Bytes that a step is forecast to hold on a GPU: what stays, and what its micro-batches take."""

    stays: int
    batch: int

    def halvings(self, free: int) -> int:
        """How often micro-batches are halved until it fits; 0 where it never will, so that the GPU says so."""
        if self.stays >= free:
            return 0
        return next(k for k in count() if self.stays + (self.batch >> k) <= free)

    def said(self, step: str, free: int, where: str) -> str:
        """Where it does not fit as it is."""
        gib = [f"{size / 2**30:.1f} GiB" for size in (free, self.stays + self.batch)]
        return (
            f"{where} has {gib[0]} free and {step} was planned with {gib[1]}: its micro-batches there have "
            f"1/{2 ** self.halvings(free)} of their size from the start."
        )


class Pieces(Protocol):
    """What the ranks of one machine read together."""

    def read(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class MadeHere:
    """`Pieces` that are made wherever they are read."""

    function: Callable[..., Iterator[Any]]
    arguments: tuple[Any, ...]

    def read(self) -> Iterator[Any]:
        return self.function(*self.arguments)


class Executor(Protocol):
    """The workers that hold one model, and the processes beside them. Workers start when a step first needs them."""

    @property
    def settings(self) -> WorkerSettings:
        """What its workers are started with."""
        ...

    @property
    def num_workers(self) -> int: ...

    @property
    def oom_retries(self) -> int:
        """How often micro-batches were halved because memory ran out."""
        ...

    @property
    def telemetry(self) -> Telemetry: ...

    def run(
        self,
        step: Step[Any],
        on_done: OnDone | None = None,
        on_given_up: OnGivenUp | None = None,
        shared: Sequence[Any] = (),
    ) -> Mapping[Any, str]:
        """Run the step's units that are not done. Returns those given up, with reasons.

        on_done(unit, result) and on_given_up(unit, reason) are called in this process as units end. shared: what every
        task reads besides, as `share` gave it.

        Raises:
            RunError: where a unit is given up and no `on_given_up` takes it, where one sequence does not fit a rank's
                memory, or where no worker can be started.
            InfscanError: at once, where an error cannot be fixed by another attempt.
        """
        ...

    def map_tasks(self, tasks: TaskMap[Any], on_done: OnDone | None = None) -> None:
        """Run every item that is not done; an error of the function is raised as itself.

        on_done(item, result) is called for every item, with None for those that were done.
        """
        ...

    def share(self, value: Any) -> Any:
        """What every task is to read, kept once; given to `run`, or among a task's arguments, in place of the value."""
        ...

    def share_by_node(self, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], pieces: int) -> Any:
        """What function(*arguments) yields, so many times; given to `run`, every task has `Pieces` of it in its place.

        It is made on each machine that has a rank, once, and never here: what storage has already.
        """
        ...

    def reserve(self, host_bytes: int) -> None:
        """Have workers that start from now on ask a shared cluster for so much host memory with each rank."""
        ...

    def fill(self, rank_bytes: int, share: int = 1) -> None:
        """Have as many workers as this machine has room for, where `cluster.num_workers` is null.

        rank_bytes: host memory that a rank takes at most. share: executors that the machine is divided among.
        """
        ...

    def expect(self, needs: Mapping[str, DeviceNeed]) -> None:
        """Hold what steps need of a GPU, by their names, against what it has free, before the first of their units."""
        ...

    def change_model(self, model: ModelConfig) -> None:
        """End the workers, where there are any; the next step's load `model`."""
        ...

    def forget(self) -> None:
        """Have the workers drop what a finished step cached."""
        ...

    def facts(self) -> list[list[RankFacts]]:
        """By worker and rank, what they report; those that ended for another model first."""
        ...

    def close(self) -> None:
        """End the workers, where there are any."""
        ...


def left_of(step: Step[U]) -> list[U]:
    """The units that are still to be done."""
    return [unit for unit in step.units if not step.is_done(unit)]


def finish_unit(work: Step[U] | TaskMap[U], phase: PhaseView, on_done: OnDone | None, unit: U, result: Any) -> None:
    """Hand a finished unit to whoever waits for it, and count it."""
    if on_done:
        on_done(unit, result)
    sequences, tokens = work.progress(unit, result)
    phase.advance(sequences=sequences, tokens=tokens)


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank on a GPU has: of its device, and of its host's, which it shares with the others there (None
    where the cluster does not say)."""

    device: int
    host: int | None = None


class Machines(Protocol):
    """Makes executors on one cluster."""

    # GPUs of a rank; 0 for a CPU.
    gpus: float
    # On the smallest GPU; None for a CPU, or an unknown one.
    gpu_memory: RankMemory | None

    def executor(self, settings: WorkerSettings, telemetry: Telemetry, records: RunRecords) -> Executor: ...


def connect_backend(cluster: ClusterConfig) -> Machines:
    """Reach what the workers run on: a Ray cluster, or this process (cluster.backend).

    Raises:
        ConfigError: where there is no such cluster, or it cannot hold a worker.
    """
    if cluster.backend is Backend.ray:
        from infscan.engine.ray_executor import RayBackend

        return RayBackend(cluster)
    from infscan.engine.in_process import InProcessBackend

    return InProcessBackend(cluster)
