"""The adversary's matrix: every file that a run reads or writes, times a moment, times a way of damaging it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infscan import pipeline
from infscan.config import Config
from infscan.errors import InfscanError
from infscan.results import read
from infscan.results.verify import verify
from infscan.steps import publish as publishing
from infscan.steps import refine as refining
from infscan.steps import scan as scanning
from infscan.storage import Store
from tests.steps.runs import answer_here, small_run, tiny_model, token_corpus, token_queries

MOMENTS = ("before", "between", "scan", "refine", "publish", "after")
# What a run reuses that was there before it: an earlier run's corpus and factors, and the model that they are of.
REUSED = ("model/", "corpus/", "run/corpus/", "run/factors/")
# What a run makes itself, and makes again where a later command finds it damaged.
MADE_AGAIN = ("run/shards/", "run/scores/", "run/refined/", "run/queries/")
DAMAGES = ("replaced", "overwritten", "truncated", "removed", "swapped")
_READERS = ("top", "sequences", "layers", "tokens", "queries", "scores", "summary")
# What nobody computes with: told apart by name, lest a file be left out by accident.
UNREAD = ("shards.parquet", "report.html")


class Stop(BaseException):
    """The driver is gone: no code may take it for an error."""


def inputs(root: Path, kind: str, seed: int) -> None:
    """A model, a corpus (documents to prepare, or a token array) and queries; other seeds, other contents."""
    tiny_model(root / "model", layers=1, width=16, seed=seed)
    token_queries(root / "queries.jsonl", 2, seed=seed + 1)
    if kind == "documents":
        token_corpus(root / "corpus" / "0.jsonl", 16, T=16, seed=seed)
    else:
        (root / "corpus").mkdir(parents=True)
        tokens = np.random.default_rng(seed).integers(1, 97, (2, 8 * 16)).astype(np.uint16)
        for number, some in enumerate(tokens):
            np.save(root / "corpus" / f"{number}.npy", some)


def configured(root: Path, kind: str) -> Config:
    """The smallest run that does everything, over two query groups and two slices."""
    arrays = ("corpus.tokens_field=null", "corpus.packing=concat", "corpus.sequence_length=16")
    return small_run(
        root,
        f"corpus.path={root / 'corpus'}",
        *(arrays if kind == "arrays" else ()),
        "scan.scores=all",
        "scan.top_k=2",
        "scan.shard_sequences=4",
        "scan.rank=4",
        "scan.check_sequences=4",
        "scan.query_group_bytes=4096",
        "cluster.lease_s=3600",
        "cluster.max_attempts=1",
        f"output={root / 'run'}",
    )


def results(config: Config) -> dict[str, object]:
    """What every reader gives: a table, counts, or its sentence."""
    return {name: _result(name, config.output) for name in _READERS}


def _result(name: str, uri: str) -> object:
    try:
        found = getattr(read, f"read_{name}")(uri)
    except InfscanError as error:
        return error
    if name != "summary":
        return found
    # How many rows a shard keeps depends on those that were finished when it was handed out.
    scanned = {key: count for key, count in found["counts"]["scanned"].items() if not key.endswith("_kept")}
    return found["counts"] | {"scanned": scanned}


@dataclass(frozen=True)
class Case:
    """One file, by its place below the root, damaged at one moment. at: of a flipped bit, its share of the file."""

    kind: str
    name: str
    moment: str
    damage: str
    at: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.name} {self.damage} {self.moment}{f' at {self.at}' if self.at else ''}"


class Matrix:
    """One run at its stages, kept aside, and another of other inputs, whose files take the place of its own."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind, self.root, self.aside, self.other = kind, folder / "root", folder / "aside", folder / "other"
        inputs(self.other, kind, seed=10)
        answer_here(configured(self.other, kind))
        inputs(self.root, kind, seed=0)
        self.config = configured(self.root, kind)
        with pytest.MonkeyPatch.context() as patch:
            _at_shard(patch, 2, _stop)
            with pytest.raises(Stop):
                answer_here(self.config)
        self._keep("between")
        answer_here(self.config)
        self._keep("after")
        self.expected = results(self.config)

    def _keep(self, stage: str) -> None:
        shutil.copytree(self.root, self.aside / stage)

    def answer(self, config: Config) -> None:
        answer_here(config)

    def put_back(self, moment: str) -> None:
        """The root as it was when the driver had stopped, or when the run was finished."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.aside / ("after" if moment in ("before", "after") else "between"), self.root)

    @cached_property
    def cases(self) -> list[Case]:
        return [case for moment in MOMENTS for case in self._cases(moment)]

    def _cases(self, moment: str) -> Iterator[Case]:
        for name in self._files(moment):
            path = self.aside / "after" / name
            for damage in DAMAGES:
                if damage in ("replaced", "overwritten") and not self._twin_of(name).exists():
                    continue
                if damage == "swapped" and self._sibling(path) is None:
                    continue
                yield Case(self.kind, name, moment, damage)
            for at in _places(path):
                yield Case(self.kind, name, moment, "flipped", at)

    def _files(self, moment: str) -> list[str]:
        there = self.aside / ("after" if moment in ("before", "publish", "after") else "between")
        names = [path.relative_to(there).as_posix() for path in sorted(there.rglob("*")) if path.is_file()]
        names = [name for name in names if not name.endswith(UNREAD)]
        if moment == "before":
            # Of documents that were prepared already nothing is read again.
            reused = REUSED if self.kind == "arrays" else tuple(set(REUSED) - {"corpus/"})
            names = [name for name in names if name.startswith(reused)]
        return names

    def _twin_of(self, name: str) -> Path:
        """The file of the other run in the same place; of a table, the one of the same number."""
        path = self.other / name
        if not path.exists() and path.parent.exists():
            alike = sorted(path.parent.glob(f"{path.name[:10]}*"))
            return alike[0] if alike else path
        return path

    def _sibling(self, path: Path) -> Path | None:
        if not path.parent.exists():
            return None
        alike = [one for one in sorted(path.parent.iterdir()) if one.suffix == path.suffix and one.is_file()]
        return alike[(alike.index(path) + 1) % len(alike)] if len(alike) > 1 else None

    def strike(self, case: Case) -> None:
        """Damage the file where it lies now, if it does."""
        path = self.root / case.name
        if not path.exists():
            return
        data = path.read_bytes()
        if case.damage == "removed":
            path.unlink()
        elif case.damage == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif case.damage == "flipped":
            path.write_bytes(_flipped(data, min(case.at, len(data) - 1)))
        elif case.damage == "swapped":
            sibling = self._sibling(path)
            if sibling is not None:
                other = sibling.read_bytes()
                sibling.write_bytes(data)
                path.write_bytes(other)
        else:
            _replace(path, self._twin_of(case.name).read_bytes(), in_place=case.damage == "overwritten")

    def outcome(self, case: Case) -> str:
        """`equal` or `refused`; anything else is a fault.

        Raises:
            AssertionError: where the run ends well and what is read is something else, or an error names no file.
            Exception: whatever is no sentence for a user.
        """
        self.put_back(case.moment)
        config = self._second() if case.moment == "before" else self.config
        with self._striking(case):
            try:
                if case.moment != "after":
                    self.answer(config)
            except InfscanError as error:
                self._assert_names(case, str(error))
                return "refused"
        found = results(config)
        if case.moment == "before":
            # It has prepared nothing itself.
            del found["summary"]
        for name, result in found.items():
            if isinstance(result, InfscanError):
                self._assert_names(case, str(result))
            else:
                same = result == self.expected[name]
                assert same, f"{case}: {name} is another, and nobody said so"
        if any(isinstance(one, InfscanError) for one in found.values()):
            with pytest.raises(InfscanError):
                verify(self.config.output)
            return "refused"
        return "equal"

    def _second(self) -> Config:
        """A run of its own that reads the first one's corpus and factors."""
        config = deepcopy(self.config)
        config.corpus.path = config.factors.corpus.path = f"{self.root / 'run'}/corpus"
        config.corpus.tokens_field = config.factors.corpus.tokens_field = None
        config.output, config.factors.path = f"{self.root / 'second'}", f"{self.root / 'run'}/factors"
        return config

    def resumed(self, case: Case) -> None:
        """After a case that was refused: the same command once more, which leaves an undisturbed run's tables.

        Raises:
            AssertionError: where it does not.
        """
        self.answer(self.config)
        found = results(self.config)
        differing = [name for name, table in self.expected.items() if found[name] != table]
        assert not differing, f"{case}: {differing} are others after the same command"
        verify(self.config.output)

    @contextmanager
    def _striking(self, case: Case) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if case.moment == "scan":
                _at_shard(patch, 1, lambda: self.strike(case))
            elif case.moment == "refine":
                refine_units = refining.refine_units
                patch.setattr(refining, "refine_units", lambda *given: (self.strike(case), refine_units(*given))[1])
            elif case.moment == "publish":
                asked = publishing.asked
                patch.setattr(publishing, "asked", lambda *given: (asked(*given), self.strike(case))[0])
            else:
                self.strike(case)
            yield

    def _assert_names(self, case: Case, sentence: str) -> None:
        path = Path(case.name)
        names = {path.name, path.parent.name, path.parts[0]}
        sibling = self._sibling(self.aside / "after" / case.name) if case.damage == "swapped" else None
        names |= {sibling.name} if sibling else set()
        # A model's config.json settles how the corpus is read: what disagrees with it may be the one that is named.
        names |= {str(self.root)} if case.name == "model/config.json" else set()
        assert any(name in sentence for name in names), f"{case}: the sentence names no file: {sentence}"


class OnRay(Matrix):
    """The same with ranks in processes of their own, started anew for every case."""

    def answer(self, config: Config) -> None:
        pipeline.answer(config)


class InStore(Matrix):
    """The same with the run folder in an object store; model, corpus and queries stay on this disk."""

    def __init__(self, folder: Path, kind: str, store: Store) -> None:
        super().__init__(folder, kind)
        self.store = store
        self.config = deepcopy(self.config)
        self.config.output, self.config.factors.path = store.uri, f"{store.uri}/factors"

    def put_back(self, moment: str) -> None:
        super().put_back(moment)
        for name in self.store.names():
            self.store.remove(name)
        for path in sorted((self.root / "run").rglob("*")):
            if path.is_file():
                self.store.write(path.relative_to(self.root / "run").as_posix(), path.read_bytes())
        shutil.rmtree(self.root / "run")

    def strike(self, case: Case) -> None:
        name = case.name.removeprefix("run/")
        if name == case.name:
            super().strike(case)
            return
        if not self.store.exists(name):
            return
        data = self.store.read(name)
        if case.damage == "removed":
            self.store.remove(name)
        elif case.damage == "truncated":
            self.store.write(name, data[: len(data) // 2])
        elif case.damage == "flipped":
            self.store.write(name, _flipped(data, min(case.at, len(data) - 1)))
        elif case.damage == "swapped":
            beside = self._sibling(self.aside / "after" / case.name)
            other = beside and f"{name.rpartition('/')[0]}/{beside.name}".removeprefix("/")
            if other and self.store.exists(other):
                self.store.write(name, self.store.read(other))
                self.store.write(other, data)
        else:
            self.store.write(name, self._twin_of(case.name).read_bytes())


def _stop() -> None:
    raise Stop


def _at_shard(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Act once `number` more shards are done."""
    add, done = scanning._Tally.add, []

    def added(tally: scanning._Tally, shard: int, result: scanning.ShardResult) -> None:
        add(tally, shard, result)
        done.append(shard)
        if len(done) == number:
            act()

    patch.setattr(scanning._Tally, "add", added)


def _replace(path: Path, data: bytes, *, in_place: bool) -> None:
    """Another file under the name; in place: in the same inode, with the times of the old one."""
    times = os.stat(path)
    if not in_place:
        path.unlink()
    path.write_bytes(data)
    if in_place:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :] if data else data


def _places(path: Path) -> list[int]:
    """Where a bit is flipped: amid every column of a table, and at two places of any other file."""
    size = path.stat().st_size
    if path.suffix != ".parquet":
        return [size // 2, size - 3] if size > 8 else []
    group = pq.read_metadata(path)
    if not group.num_row_groups:
        return [size // 2]
    columns = [group.row_group(0).column(number) for number in range(group.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    return [start + column.total_compressed_size * 2 // 3 for start, column in zip(starts, columns, strict=True)]
