"""What became of a group's step: a lost machine outranks the failures that it causes in the other ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from infscan.config import ClusterConfig
from infscan.engine import heartbeat
from infscan.engine import worker_group as module
from infscan.engine.heartbeat import Beat, Heartbeats
from infscan.engine.worker_group import Outcome, State, WorkerGroup, gpu_index
from infscan.errors import CorpusError
from infscan.model.out_of_memory import RankMemoryError


class Answers:
    """Stands for Ray: what each rank of a step answers, or None while it runs; and the clock.

    beats: what each rank answers to a heartbeat: a `Beat`, an error, or None for silence.
    """

    exceptions = ray.exceptions

    def __init__(self, *ranks: Any) -> None:
        self.ranks = dict(enumerate(ranks))
        self.beats: dict[str, Any] = {}
        self.placement = "CREATED"
        self.now = 100.0

    def actor(self, rank: int) -> SimpleNamespace:
        self.beats[f"beat {rank}"] = Beat({}, 0.25)
        return SimpleNamespace(ping=SimpleNamespace(remote=lambda: f"beat {rank}"))

    def wait(self, refs: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        said = self.ranks | self.beats
        return [ref for ref in refs if said[ref] is not None], [ref for ref in refs if said[ref] is None]

    def get(self, refs: Any) -> Any:
        if isinstance(refs, list):
            return [self.get(ref) for ref in refs]
        said = (self.ranks | self.beats)[refs]
        if isinstance(said, BaseException):
            raise said
        return said

    def monotonic(self) -> float:
        return self.now


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("run", "a traceback", cause)


DAMAGED = CorpusError("a damaged part")
LOST = [ActorDiedError(), ActorUnavailableError("unavailable", None), WorkerCrashedError(), OutOfMemoryError("memory")]


def busy(answers: Answers, monkeypatch: pytest.MonkeyPatch, state: State = State.busy) -> WorkerGroup:
    """A group in a step of 1,000 seconds; heartbeats every 10, silent after 60."""
    for place in (module, heartbeat):
        monkeypatch.setattr(place, "ray", answers)
        monkeypatch.setattr(place, "time", answers)
    monkeypatch.setattr(module, "placement_group_table", lambda _: {"state": answers.placement})
    group = WorkerGroup.__new__(WorkerGroup)
    group.refs = list(answers.ranks)
    group.heartbeats = Heartbeats(
        [answers.actor(rank) for rank in answers.ranks], heartbeat_s=10.0, heartbeat_timeout_s=60.0
    )
    group.placement = object()
    group._placed, group._ask_place_at = False, 0.0
    group._began(state, 7, limit_s=1000.0)
    return group


def pass_time(group: WorkerGroup, answers: Answers, seconds: int) -> tuple[Outcome, Any] | None:
    """Poll every second until there is an outcome; None where there is none within `seconds`."""
    for _ in range(seconds):
        answers.now += 1.0
        if (answer := group.poll()) is not None:
            return answer
    return None


def test_done_when_every_rank_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers("result", None)
    group = busy(answers, monkeypatch)
    assert group.poll() is None
    assert group.running == [1]
    answers.ranks[1] = "another"
    assert group.poll() == (Outcome.done, "result")
    assert group.state is State.idle


def writing(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> WorkerGroup:
    """A group that has computed its unit, and is handed the next one while it writes; it has 1,000 s for each."""
    group = busy(answers, monkeypatch)
    answers.ranks[0], answers.beats["written"] = Outcome.computed, None
    group.actors = [SimpleNamespace(written=SimpleNamespace(remote=lambda: "written"))]
    assert group.poll() == (Outcome.computed, None)
    assert (group.state, group.poll_written(), group.pending) == (State.idle, None, ["written"])
    answers.ranks[0] = None
    group._began(State.busy, 8, limit_s=1000.0)
    assert group.pending == [0, "written"]
    return group


@pytest.mark.parametrize(
    ("said", "becomes"),
    [
        (Outcome.computed, (Outcome.computed, None)),
        (failed(DAMAGED), (Outcome.failed, DAMAGED)),
    ],
)
def test_a_unit_is_heard_of_after_the_one_before_is_written(
    said: Any, becomes: tuple[Outcome, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is mixed up with the other: a failure may end the ranks that still write."""
    answers = Answers(None)
    group = writing(answers, monkeypatch)
    answers.ranks[0] = said
    assert pass_time(group, answers, 5) is None
    answers.beats["written"] = "a result"
    assert group.poll_written() == (Outcome.done, "a result")
    assert group.poll_written() is None
    assert group.poll() == becomes


def test_a_write_fails_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, cause = Answers(None), CorpusError("refused")
    group = writing(answers, monkeypatch)
    answers.beats["written"] = failed(cause)
    assert group.poll_written() == (Outcome.failed, cause)
    assert group.poll() is None
    assert group.state is State.busy


@pytest.mark.parametrize("said", [None, failed(CorpusError("a damaged part"))])
def test_a_unit_that_is_written_for_too_long_loses_its_worker(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(None)
    group = writing(answers, monkeypatch)
    answers.ranks[0] = said
    answers.beats["beat 0"] = Beat({}, 0.5)
    group.deadline += 5000.0
    outcome, error = pass_time(group, answers, 1001) or pytest.fail("no outcome")
    assert outcome is Outcome.lost
    assert str(error) == "its output was not written within 1000 s"


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
    assert pass_time(group, answers, 999) is None
    outcome, said = pass_time(group, answers, 3) or pytest.fail("no outcome")
    assert outcome is Outcome.lost
    assert "cluster.deadline_s=1000" in str(said)


def test_a_limit_of_measured_units_is_said_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(None)
    group = busy(answers, monkeypatch)
    group.cluster, group.unit_limit_s = ClusterConfig(), 1000.0
    outcome, said = pass_time(group, answers, 1001) or pytest.fail("no outcome")
    assert outcome is Outcome.lost
    assert "no answer within 1000 s, many times what the step's longest unit took" in str(said)


@pytest.mark.parametrize("state", [State.busy, State.starting, State.idle])
def test_a_rank_that_falls_silent_is_lost_long_before_the_deadline(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(None, None)
    group = busy(answers, monkeypatch, state)
    assert pass_time(group, answers, 100) is None
    answers.beats["beat 1"] = None
    began = answers.now
    outcome, said = pass_time(group, answers, 200) or pytest.fail("no outcome")
    assert outcome is Outcome.lost
    assert "rank 1 has not answered for cluster.heartbeat_timeout_s=60 s" in str(said)
    assert answers.now - began <= 60 + 10 + 2


def test_an_idle_rank_that_died_is_found_before_work_is_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(None)
    group = busy(answers, monkeypatch, State.idle)
    assert pass_time(group, answers, 50) is None
    answers.beats["beat 0"] = died = ActorDiedError()
    assert pass_time(group, answers, 15) == (Outcome.lost, died)


def test_a_driver_that_slept_takes_nobody_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(None)
    group = busy(answers, monkeypatch)
    assert pass_time(group, answers, 5) is None
    answers.now += 900.0
    assert group.poll() is None


def test_a_process_that_still_starts_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(None)
    group = busy(answers, monkeypatch, State.starting)
    answers.beats["beat 0"] = None
    assert pass_time(group, answers, 900) is None
    outcome, said = pass_time(group, answers, 200) or pytest.fail("no outcome")
    assert outcome is Outcome.lost
    assert "cluster.startup_timeout_s=1000" in str(said)


def test_a_start_is_timed_from_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(None)
    answers.placement = "PENDING"
    group = busy(answers, monkeypatch, State.starting)
    answers.beats["beat 0"] = None
    assert pass_time(group, answers, 5000) is None
    answers.placement = "CREATED"
    assert pass_time(group, answers, 990) is None
    assert pass_time(group, answers, 20) is not None


def test_memory_that_ran_out_explains_why_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """It outranks what its neighbours say, and nothing is waited for."""
    full = RankMemoryError("CUDA out of memory", 4, 256)
    group = busy(Answers(None, failed(RuntimeError("connection closed by peer")), failed(full)), monkeypatch)
    assert group.poll() == (Outcome.failed, full)


@pytest.mark.parametrize(
    ("mine", "visible", "index"),
    [
        ([3], "3", 0),
        (["3"], "1, 3", 1),
        # Ray was told to leave all GPUs visible, with the variable set by somebody else, or not at all.
        ([2], "0,1,2,3", 2),
        ([2], None, 2),
        ([2], "", 2),
        (["MIG-7a"], "MIG-11,MIG-7a", 1),
        ([], None, 0),
    ],
)
def test_a_rank_computes_on_the_gpu_that_ray_gave_it(mine: list[Any], visible: str | None, index: int) -> None:
    assert gpu_index(mine, visible) == index
