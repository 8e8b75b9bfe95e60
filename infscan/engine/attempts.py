"""What becomes of a unit whose attempt failed: tried again, in smaller micro-batches or as it is, or given up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infscan.engine.schedule import Schedule
from infscan.errors import (
    ChangedCorpusError,
    ConfigError,
    FactorsError,
    InfscanError,
    ModelError,
    QueryError,
    RunError,
    StorageError,
    UnwritableError,
)
from infscan.model.out_of_memory import RankMemoryError

# Errors that another attempt cannot fix: they end the step at once.
FATAL = (ChangedCorpusError, ConfigError, FactorsError, ModelError, QueryError, UnwritableError)
LONGEST_BACK_OFF_S = 60.0

OnGivenUp = Callable[[Any, str], None]


class NotMadeError(Exception):
    """What the ranks of a node read together could not be made there; no unit's fault, and no machine's that scores.

    cause: the error in its making; None where the process that made it died.
    """

    def __init__(self, cause: Exception | None, reason: str) -> None:
        super().__init__(cause, reason)
        self.cause, self.reason = cause, reason

    def __str__(self) -> str:
        return self.reason

    @property
    def transient(self) -> bool:
        return self.cause is not None and is_transient(self.cause)


@dataclass(frozen=True)
class Verdict:
    """Whether a unit is given up, and what its attempt failed of: `error`, `memory`, `storage` or `lost`."""

    given_up: bool
    cause: str


def is_transient(error: BaseException) -> bool:
    """Whether storage was busy, broken or out of reach: nobody's fault, and another attempt may succeed."""
    return isinstance(error, StorageError | NotMadeError) and error.transient


def judge(
    schedule: Schedule,
    unit: Any,
    error: BaseException,
    reason: str,
    *,
    lost: bool = False,
    killed: bool = False,
    worker: int | None = None,
) -> Verdict:
    """Record a failed attempt. lost: its worker failed, which one. killed: for the memory that it took.

    Raises:
        RunError: where one sequence alone does not fit a rank's memory.
        InfscanError: where another attempt cannot fix the error.
    """
    if isinstance(error, FATAL):
        raise error
    # What others hold of its GPU says nothing of the sequence: another worker may have room.
    if isinstance(error, RankMemoryError) and error.rows == 1 and not error.foreign:
        raise RunError(
            f"one sequence alone ({error.tokens} tokens) does not fit a rank's memory ({error.reason}). Cut the "
            "model over more ranks (cluster.ranks_per_worker), set model.gradient_checkpointing=true or "
            "model.dtype=bfloat16, or prepare the corpus with a shorter corpus.sequence_length."
        )
    if isinstance(error, RankMemoryError) and error.rows is not None and error.foreign:
        if error.rows > 1:
            schedule.put_back(unit)
            return Verdict(False, "memory")
        lost = True
    elif killed or (isinstance(error, RankMemoryError) and error.rows is not None):
        return Verdict(schedule.retry_smaller(unit, reason), "memory")
    if lost or is_transient(error) or isinstance(error, NotMadeError):
        return Verdict(
            schedule.lose(unit, reason, worker if lost else None), "storage" if is_transient(error) else "lost"
        )
    return Verdict(schedule.fail(unit, reason), "error")


def shrunk(halvings: int) -> str:
    """What is said where micro-batches are halved for every unit that is still to come."""
    return (
        f"several units did not fit a rank's memory: from now on this phase's micro-batches have 1/{2**halvings} of "
        "their size; a lower scan.tokens_per_batch has the same effect from the start."
    )


def give_up(unit: Any, error: BaseException, reason: str, attempts: int, on_given_up: OnGivenUp | None) -> None:
    """Hand a unit that is given up to `on_given_up`.

    Raises:
        InfscanError: where there is no such function.
    """
    if on_given_up is not None:
        on_given_up(unit, reason)
    elif isinstance(error, InfscanError):
        raise error
    else:
        raise RunError(f"given up after {attempts} attempts: {reason}") from error


def reason_of(error: BaseException) -> str:
    """An error's kind and the last line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}"
