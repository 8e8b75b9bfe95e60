"""What a rank reads ahead: the next unit's sequences while this one is computed, and nothing else because of it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.read_ahead import ReadAhead, Reads
from infscan.engine.executor import Step
from infscan.engine.in_process import InProcessExecutor
from infscan.errors import CorpusError
from infscan.model.loaded import RankContext
from infscan.storage import Store
from infscan.storage.write_behind import WriteBehind

CORPUS = CorpusAddress(Store("memory://corpus"))
# A test that would wait so long has failed.
LONG_S = 60.0


class Corpus:
    """Unit u is the numbers u and u + 1; what was begun and ended, in order."""

    def __init__(self, fail: Callable[[int, int], bool] = lambda unit, time: False) -> None:
        self.fail, self.events = fail, list[tuple[str, int]]()
        self.begun = [Event() for _ in range(9)]

    def read(self, ids: np.ndarray) -> Any:
        unit = int(ids[0])
        self.events.append(("read", unit))
        self.begun[unit].set()
        if self.fail(unit, self.events.count(("read", unit))):
            raise CorpusError(f"unit {unit} is damaged")
        return [f"sequence {number}" for number in ids]


def reads(unit: int) -> Reads:
    return Reads(CORPUS, np.array([unit, unit + 1], np.int64))


def run(corpus: Corpus, units: int, compute: Callable[[int], None]) -> tuple[list[Any], dict[int, str], ReadAhead]:
    """Units of this process, as a scan's: read, then computed. Their results in order, those given up, the reader."""
    ahead, results = ReadAhead(), list[Any]()

    def function(worker: Any, unit: int) -> Any:
        sequences = ahead.read(reads(unit), corpus)  # type: ignore[arg-type]
        compute(unit)
        return sequences

    def attempt(
        function: Callable[..., Any], oom_retries: int, *arguments: Any, following: Reads | None, behind: bool
    ) -> Any:
        ahead.next = following
        return function(None, *arguments)

    worker: Any = SimpleNamespace(context=RankContext(), device="cpu", attempt=attempt, behind=WriteBehind())
    step = Step("scan", "shards", range(units), function, lambda unit: unit, reads=reads)
    given_up: dict[int, str] = {}
    executor = InProcessExecutor.on(worker)
    executor.run(step, lambda unit, result: results.append((unit, result)), on_given_up=given_up.__setitem__)
    ahead.forget()
    return results, given_up, ahead


def expected(units: int) -> list[tuple[int, list[str]]]:
    return [(unit, [f"sequence {unit}", f"sequence {unit + 1}"]) for unit in range(units)]


def test_the_next_unit_is_being_read_before_this_one_is_computed() -> None:
    """So that many units take the longer of reading and computing: had computing to end first, none would begin."""
    corpus, units = Corpus(), 6

    def compute(unit: int) -> None:
        if unit + 1 < units:
            assert corpus.begun[unit + 1].wait(LONG_S)
        assert not corpus.begun[unit + 2].is_set(), "one unit ahead at most"

    results, given_up, ahead = run(corpus, units, compute)
    assert (results, given_up) == (expected(units), {})
    assert sorted(corpus.events) == [("read", unit) for unit in range(units)], "each is read once"
    assert ahead.found == units - 1


def test_without_it_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadAhead, "begin", lambda ahead, work: None)
    results, given_up, ahead = run(Corpus(), 6, lambda unit: None)
    assert (results, given_up, ahead.found) == (expected(6), {}, 0)


def test_a_unit_that_was_not_read_in_advance_is_read_when_its_turn_comes() -> None:
    corpus = Corpus(fail=lambda unit, time: unit == 2 and time == 1)
    results, given_up, ahead = run(corpus, 4, lambda unit: None)
    assert (results, given_up) == (expected(4), {})
    assert corpus.events.count(("read", 2)) == 2
    assert ahead.found == 2


def test_what_cannot_be_read_is_that_units_failure_and_no_others() -> None:
    results, given_up, _ = run(Corpus(fail=lambda unit, time: unit == 2), 4, lambda unit: None)
    assert [unit for unit, _ in results] == [0, 1, 3]
    assert given_up == {2: "CorpusError: unit 2 is damaged"}


def test_a_wrong_guess_costs_a_read_and_one_of_another_corpus_none() -> None:
    corpus, ahead = Corpus(), ReadAhead()
    ahead.next = reads(5)
    assert ahead.read(reads(0), corpus) == expected(1)[0][1]  # type: ignore[arg-type]
    ahead.next = Reads(CorpusAddress(Store("memory://other")), np.array([6]))
    assert ahead.read(reads(0), corpus) == expected(1)[0][1]  # type: ignore[arg-type]
    assert (ahead.found, corpus.events.count(("read", 5)), corpus.begun[6].is_set()) == (0, 1, False)
    ahead.forget()


def test_what_is_forgotten_is_read_again() -> None:
    corpus, ahead = Corpus(), ReadAhead()
    ahead.next = reads(1)
    ahead.read(reads(0), corpus)  # type: ignore[arg-type]
    ahead.forget()
    assert ahead.read(reads(1), corpus) == expected(2)[1][1]  # type: ignore[arg-type]
    assert (ahead.found, corpus.events.count(("read", 1))) == (0, 2)
