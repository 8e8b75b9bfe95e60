"""An index, and an answer from it, that end at any storage call and are begun again: the bytes of undisturbed ones.

As of `tests.chaos.test_every_call`, which kills scans; here what an index adds is killed, on a disk and on a real S3
server, and an index meets a full disk.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from infscan import pipeline
from infscan.api import run_ask
from infscan.config import Backend, ClusterConfig, QueriesConfig
from infscan.config.jobs import AskJob, IndexConfig, IndexJob
from infscan.errors import StorageError
from infscan.results.index_file import FOLDER, MANIFEST, verify_index
from infscan.results.manifest import TABLES
from infscan.sizing import reserve
from infscan.sizing.memory import pass_costs
from infscan.storage import Store
from tests.chaos.disks import small_disk
from tests.chaos.every_call import CHANGING, Call, Crash, crash_driver, tiny_inputs, tiny_run, watched
from tests.chaos.one_process import in_turn
from tests.chaos.test_every_call import SEED
from tests.conftest import Bucket

ROOMY = 64 << 20
HERE = ClusterConfig(backend=Backend.in_process, lease_s=3600)
Make = Callable[[str], None]
_WRITING = ("write", "create")


@dataclass(frozen=True)
class Made:
    """What makes an output, and what it leaves where nothing disturbs it. kept: of its files, beginnings of names."""

    make: Make
    kept: tuple[str, ...]
    files: dict[str, bytes]
    calls: list[Call]

    @classmethod
    def undisturbed(cls, make: Make, output: str, kept: tuple[str, ...]) -> Made:
        with in_turn(), watched(crash_driver(None)) as wire:
            make(output)
        return cls(make, kept, content(output, kept), wire.calls)

    def strikes(self, *, amid: bool) -> list[tuple[int, str]]:
        """Every call with every moment that makes a difference; `amid` a write where that leaves a hidden file."""
        found = [(at, "before") for at in range(len(self.calls))]
        found += [(at, "after") for at, call in enumerate(self.calls) if call.operation in CHANGING]
        return found + [(at, "amid") for at, call in enumerate(self.calls) if amid and call.operation in _WRITING]

    def crash_and_resume(self, strikes: list[tuple[int, str]], output: Callable[[str], str]) -> None:
        for at, moment in strikes:
            place = output(f"{at}-{moment}")
            with in_turn():
                with watched(crash_driver(at, moment)) as wire, pytest.raises(Crash):
                    self.make(place)
                self.make(place)
            assert content(place, self.kept) == self.files, (SEED, at, moment, wire.struck)


def content(output: str, kept: tuple[str, ...]) -> dict[str, bytes]:
    store = Store(output)
    return {entry.name: store.read(entry.name) for entry in store.list() if entry.name.startswith(kept)}


def some(strikes: list[tuple[int, str]], count: int) -> list[tuple[int, str]]:
    """Others every day."""
    return random.Random(SEED).sample(strikes, count)


def index_of(root: Path, **changed: Any) -> Make:
    """Makes an index of the tiny corpus, beside a scan unless there are no queries."""
    # Composed once: that takes as long as all else.
    config = replace(tiny_run(root, root / "output"), cluster=HERE, **changed)
    config = replace(config, factors=replace(config.factors, path=str(root / "factors")))

    def make(output: str) -> None:
        pipeline.make_index(IndexJob(**vars(replace(config, output=output)), index=IndexConfig(width=8)))

    return make


UNASKED: dict[str, Any] = {"queries": QueriesConfig(path="")}


@pytest.fixture(scope="module", autouse=True)
def sized_once() -> Iterator[None]:
    """A tiny run spends a third of its time on what its ranks will hold, which makes no storage call."""
    known: dict[Any, Any] = {}

    def sized(config: Any, architecture: Any, queries: int, *rest: Any, **more: Any) -> Any:
        if queries not in known:
            known[queries] = pass_costs(config, architecture, queries, *rest, **more)
        return known[queries]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reserve, "pass_costs", sized)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    tiny_inputs(root)
    # Factors are there: what is killed here is what an index adds.
    index_of(root, **UNASKED)(str(root / "first"))
    return root


@pytest.fixture(scope="module")
def index(root: Path) -> Made:
    return Made.undisturbed(index_of(root, **UNASKED), str(root / "index"), (FOLDER, MANIFEST))


@pytest.fixture(scope="module")
def both(root: Path) -> Made:
    return Made.undisturbed(index_of(root), str(root / "both"), (FOLDER, MANIFEST, *TABLES))


@pytest.fixture(scope="module")
def answer(root: Path, index: Made) -> Made:
    def make(output: str) -> None:
        queries = str(root / "queries.jsonl")
        run_ask(
            AskJob(index=str(root / "index"), queries=queries, top_k=2, audit_sequences=6, output=output, cluster=HERE)
        )

    return Made.undisturbed(make, str(root / "answer"), ("candidates.parquet", *TABLES))


@pytest.mark.parametrize("name", ["both", "answer"])
def test_what_ends_at_a_storage_call_goes_on(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(name)
    made.crash_and_resume(some(made.strikes(amid=True), 2), lambda place: str(tmp_path / place))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", "both", "answer"])
def test_what_ends_at_any_storage_call_goes_on(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(name)
    made.crash_and_resume(made.strikes(amid=True), lambda place: str(tmp_path / place))


@pytest.fixture(scope="module")
def on_s3(root: Path, s3: Bucket) -> Made:
    return Made.undisturbed(index_of(root, **UNASKED), s3.uri(), (FOLDER, MANIFEST))


@pytest.mark.slow
def test_an_index_on_s3_that_ends_at_a_storage_call_goes_on(on_s3: Made, index: Made, s3: Bucket) -> None:
    assert on_s3.files == index.files
    on_s3.crash_and_resume(some(on_s3.strikes(amid=False), 12), lambda place: s3.uri())


@pytest.mark.slow
def test_an_index_on_s3_is_asked_as_one_on_a_disk(root: Path, on_s3: Made, answer: Made, s3: Bucket) -> None:
    """Codes are read by byte range; the answer's run is on S3 too."""
    place, output = s3.uri(), s3.uri()
    on_s3.make(place)
    assert verify_index(Store(place)) == 4
    run_ask(
        AskJob(
            index=place, queries=str(root / "queries.jsonl"), top_k=2, audit_sequences=6, output=output, cluster=HERE
        )
    )
    rows = ("layers", "tokens")
    wanted = {name: data for name, data in answer.files.items() if name.startswith(rows)}
    assert content(output, rows) == wanted


def test_a_disk_that_fills_up_ends_an_index_and_with_space_it_goes_on(index: Made, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 60 << 10) as disk:
        output = str(disk.path / "index")
        with pytest.raises(StorageError, match="free some space") as caught:
            index.make(output)
        assert str(disk.path) in str(caught.value)
        there = content(output, (FOLDER, MANIFEST))
        assert all(there[name] == index.files[name] for name in there)
        assert MANIFEST not in there
        disk.resize(ROOMY)
        index.make(output)
        assert content(output, (FOLDER, MANIFEST)) == index.files
