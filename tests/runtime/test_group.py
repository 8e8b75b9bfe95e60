"""What became of a group's step: a lost machine outranks the failures that it causes in the other ranks."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from infscan.errors import CorpusError
from infscan.runtime import group as module
from infscan.runtime.group import Outcome, State, WorkerGroup


class Answers:
    """Stands for Ray: what each rank of a step answers, or None while it runs; and the clock."""

    def __init__(self, *ranks: Any) -> None:
        self.ranks = dict(enumerate(ranks))
        self.now = 100.0

    def wait(self, refs: list[int], **_: object) -> tuple[list[int], list[int]]:
        return [ref for ref in refs if self.ranks[ref] is not None], [ref for ref in refs if self.ranks[ref] is None]

    def get(self, refs: int | list[int]) -> Any:
        if isinstance(refs, list):
            return [self.get(ref) for ref in refs]
        if isinstance(self.ranks[refs], BaseException):
            raise self.ranks[refs]
        return self.ranks[refs]

    def monotonic(self) -> float:
        return self.now


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("run", "a traceback", cause)


LOST = [ActorDiedError(), ActorUnavailableError("unavailable", None), WorkerCrashedError(), OutOfMemoryError("memory")]


def busy(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> WorkerGroup:
    monkeypatch.setattr(module, "ray", answers)
    monkeypatch.setattr(module, "time", answers)
    group = WorkerGroup.__new__(WorkerGroup)
    group.refs = list(answers.ranks)
    group._began(State.busy, 7, limit_s=1000.0)
    return group


def test_done_when_every_rank_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers("result", None)
    group = busy(answers, monkeypatch)
    assert group.poll() is None
    assert group.running == [1]
    answers.ranks[1] = "another"
    assert group.poll() == (Outcome.done, "result")
    assert group.state is State.idle


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_death_outranks_the_failure_it_causes(
    error: Exception, order: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survivor's collective fails at once; the death may show only later."""
    survivor, dead = order
    answers = Answers(None, None)
    group = busy(answers, monkeypatch)
    answers.ranks[survivor] = failed(RuntimeError("connection closed by peer"))
    assert group.poll() is None
    answers.now += 20.0
    assert group.poll() is None
    answers.ranks[dead] = error
    outcome, said = group.poll() or pytest.fail("no outcome")
    assert outcome is Outcome.lost
    assert said is error


def test_a_failure_is_one_when_nobody_turns_out_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank waits in its collective for good."""
    cause = CorpusError("a damaged part")
    answers = Answers(None, failed(cause))
    group = busy(answers, monkeypatch)
    assert group.poll() is None
    answers.now += 100.0
    assert group.poll() == (Outcome.failed, cause)


def test_where_all_ranks_fail_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = CorpusError("first"), CorpusError("second")
    assert busy(Answers(failed(first), failed(second)), monkeypatch).poll() == (Outcome.failed, first)
    assert busy(Answers(failed(first), "done"), monkeypatch).poll() == (Outcome.failed, first)


def test_silence_past_the_deadline_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers("done", None)
    group = busy(answers, monkeypatch)
    answers.now += 999.0
    assert group.poll() is None
    answers.now += 2.0
    outcome, said = group.poll() or pytest.fail("no outcome")
    assert outcome is Outcome.lost
    assert "cluster.deadline_s" in str(said)
