"""A run that ends at any storage call, and is started again, leaves what an undisturbed one leaves, byte for byte.

A process that ends before its n-th call has changed what one that ends after its call n - 1 has. So `before` every call
and `after` every changing one are all there is, and `amid` a write, which leaves a hidden file behind.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from infscan.config import Config, check
from infscan.pipeline import answer
from infscan.results.manifest import SUCCESS, TABLES, read_manifest
from infscan.results.read import read_summary
from infscan.results.verify import verify
from infscan.storage import Store
from infscan.storage.tempnames import is_abandoned
from tests.chaos.every_call import (
    CHANGING,
    Call,
    Crash,
    Tripwire,
    crash_driver,
    kill_rank,
    tiny_inputs,
    tiny_run,
    watched,
)
from tests.chaos.one_process import without_ray

ROOT = Path(__file__).resolve().parents[2]
# config.yaml holds the output's own path, summary.json seconds, whose counts are compared, _SUCCESS digests of both.
_APART = ("config.yaml", "summary.json", SUCCESS)
# A day's tests are the same all day; set it to repeat another day's.
SEED = int(os.environ.get("INFSCAN_CHAOS_SEED") or datetime.now(UTC).date().toordinal())
Make = Callable[[int, str], Tripwire]
Strike = tuple[int, str]


def content(config: Config) -> dict[str, object]:
    """Every visible file of the run, by name; of safetensors the header's facts, which stand in no order, apart."""
    store = Store(config.output)
    found: dict[str, object] = {}
    for entry in store.list():
        if entry.name in _APART:
            continue
        data = store.read(entry.name)
        start = 8 + int.from_bytes(data[:8], "little")
        found[entry.name] = (json.loads(data[8:start]), data[start:]) if entry.name.endswith(".safetensors") else data
    return found


@dataclass(frozen=True)
class Twin:
    """The undisturbed run: where its inputs lie, what it left, and the storage calls that such a run makes."""

    root: Path
    config: Config
    files: dict[str, object]
    counts: dict[str, Any]
    calls: list[Call]

    @classmethod
    def made(cls, root: Path) -> Twin:
        """Its inputs and its run, below `root`; nobody has counted its calls yet."""
        tiny_inputs(root)
        config = tiny_run(root, root / "run")
        answer(config)
        return cls(root, config, content(config), read_summary(config.output)["counts"], [])

    def strikes(self, ranks_only: bool = False) -> list[Strike]:
        """Every call number with every moment that makes a difference."""
        calls = [call for call in self.calls if call.rank or not ranks_only]
        return [
            (at, moment)
            for at, call in enumerate(calls)
            for moment in ("before", "after", "amid")
            if moment == "before" or (call.operation in CHANGING and (moment == "after" or call.operation != "remove"))
        ]

    def disturbed(self, output: Path) -> Config:
        config = replace(
            self.config, output=str(output), factors=replace(self.config.factors, path=f"{output}/factors")
        )
        check(config)
        return config

    def assert_equals(self, config: Config, why: object) -> None:
        ours = content(config)
        assert sorted(ours) == sorted(self.files), why
        assert [name for name in ours if ours[name] != self.files[name]] == [], why
        assert read_summary(config.output)["counts"] == self.counts, why
        assert verify(config.output)[1], why
        # What this process began is not swept while it lives: here a driver that ended leaves its process behind.
        hidden = [path.name for path in Path(config.output).rglob(".tmp-*")]
        assert [name for name in hidden if is_abandoned(name, age_s=0)] == [], why


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with without_ray():
        yield


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Twin:
    twin = Twin.made(tmp_path_factory.mktemp("twin"))
    again = twin.disturbed(twin.root / "again")
    # The second one loads no model, as all that follow.
    with watched(crash_driver(None)) as wire:
        answer(again)
    twin.assert_equals(again, "undisturbed")
    return replace(twin, calls=wire.calls)


def crash_and_resume(twin: Twin, strikes: list[Strike], folder: Path) -> None:
    for at, moment in strikes:
        config = twin.disturbed(folder / f"{at}-{moment}")
        with watched(crash_driver(at, moment)) as wire, pytest.raises(Crash):
            answer(config)
        assert_a_glob_sees_what_was_committed(config, (SEED, at, moment, wire.struck))
        answer(config)
        twin.assert_equals(config, (SEED, at, moment, wire.struck))


def assert_a_glob_sees_what_was_committed(config: Config, why: object) -> None:
    """Wherever its driver ended, a run with _SUCCESS has the parts that it lists, and no others."""
    store = Store(config.output)
    if store.exists(SUCCESS):
        manifest = read_manifest(store)
        assert manifest is not None
        for folder in TABLES:
            assert [entry.name for entry in store.list(folder)] == manifest.names(folder), why


def kill_a_rank(twin: Twin, strikes: list[Strike], folder: Path) -> None:
    for at, moment in strikes:
        config = twin.disturbed(folder / f"{at}-{moment}")
        with watched(kill_rank(at, moment)) as wire:
            answer(config)
        assert wire.struck is not None
        # A rank's hidden file is swept when the next driver starts.
        answer(config)
        twin.assert_equals(config, (SEED, at, moment, wire.struck))


def some(strikes: list[Strike], count: int) -> list[Strike]:
    """As many strikes, one from each stretch of the run: another one every day."""
    rng = random.Random(SEED)
    bounds = [len(strikes) * part // count for part in range(count + 1)]
    return [rng.choice(strikes[start:stop]) for start, stop in pairwise(bounds)]


def test_the_tiny_run_does_everything_and_again(twin: Twin) -> None:
    folders = {name.partition("/")[0] for name in twin.files}
    assert folders >= {"corpus", "factors", "queries", "shards", "refined", "top", "sequences", "layers", "tokens"}
    assert folders >= {"scores", "plan.json", "approximation.json"}
    assert {call.operation for call in twin.calls} >= {"read", "open", "write", "create", "stat", "find", "remove"}
    assert sum(call.rank for call in twin.calls) > 50
    config = twin.disturbed(twin.root / "again")
    with watched(crash_driver(None)) as wire:
        answer(config)
    twin.assert_equals(config, "run again when finished")
    assert len(wire.calls) < len(twin.calls)


def test_a_run_that_ends_at_some_storage_calls_resumes(twin: Twin, tmp_path: Path) -> None:
    crash_and_resume(twin, some(twin.strikes(), 6), tmp_path)


def test_a_rank_that_ends_at_some_storage_calls_is_replaced(twin: Twin, tmp_path: Path) -> None:
    kill_a_rank(twin, some(twin.strikes(ranks_only=True), 3), tmp_path)


PIECES = 8


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
def test_a_run_that_ends_at_any_storage_call_resumes(twin: Twin, tmp_path: Path, piece: int) -> None:
    crash_and_resume(twin, twin.strikes()[piece::PIECES], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
def test_a_rank_that_ends_at_any_storage_call_is_replaced(twin: Twin, tmp_path: Path, piece: int) -> None:
    kill_a_rank(twin, twin.strikes(ranks_only=True)[piece::PIECES], tmp_path)


def kill_and_resume(twin: Twin, strikes: list[Strike], folder: Path) -> None:
    for at, moment in strikes:
        config = twin.disturbed(folder / f"{at}-{moment}")
        command = [sys.executable, "-m", "tests.chaos.every_call", str(twin.root), config.output, str(at), moment]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == -9, (at, moment, done.stderr.decode()[-2000:])
        answer(config)
        twin.assert_equals(config, (SEED, at, moment))


@pytest.mark.slow
def test_processes_killed_all_over_the_run_resume(twin: Twin, tmp_path: Path) -> None:
    kill_and_resume(twin, some(twin.strikes(), 10), tmp_path)
