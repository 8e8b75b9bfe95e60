"""Nobody ever sees a torn file: readers that look while writers write, on a local disk and at an S3 server."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infscan.errors import StorageError
from infscan.storage import MissingError, Store
from infscan.storage import local as local_module
from tests.chaos.proxy import Plan, fault_proxy
from tests.conftest import Bucket

SIZES = (0, 1, 70_000, 1_000_000)


def whole(number: int) -> bytes:
    """Bytes that say of themselves whether they are all there: a digest, then what it is of."""
    body = number.to_bytes(8, "little") + bytes([number % 251]) * SIZES[number % len(SIZES)]
    return hashlib.sha256(body).digest() + body


def is_whole(data: bytes) -> bool:
    return hashlib.sha256(data[32:]).digest() == data[:32]


def watch(store: Store, writing: threading.Event, torn: list[str]) -> int:
    """Read whatever is there until nobody writes any more; how many files were read."""
    read = 0
    while writing.is_set():
        for entry in store.list():
            try:
                data = store.read(entry.name)
                with store.open(entry.name) as stream:
                    streamed = stream.read()
            except MissingError:
                continue
            except StorageError as error:
                # A stream over an object that was replaced says so; it is never a mixture.
                if "changed while it was read" not in str(error):
                    raise
                continue
            read += 1
            torn += [entry.name for seen in (data, streamed) if not is_whole(seen)]
            if ".tmp-" in entry.name:
                torn.append(entry.name)
    return read


def write_while_watched(store: Store, rounds: int) -> None:
    """Four writers replace, create and remove the same names under the eyes of two readers."""
    writing, torn = threading.Event(), list[str]()
    writing.set()

    def write(writer: int) -> None:
        for step in range(rounds):
            number = step * 4 + writer
            store.write(f"replaced/{step % 3}", whole(number))
            store.create(f"created/{number % 7}", whole(number))
            if step % 3 == 2:
                store.remove(f"created/{number % 7}")

    with ThreadPoolExecutor(6) as pool:
        watchers = [pool.submit(watch, store, writing, torn) for _ in range(2)]
        try:
            for writer in [pool.submit(write, writer) for writer in range(4)]:
                writer.result()
        finally:
            writing.clear()
        assert sum(watcher.result() for watcher in watchers) > 0
    assert torn == []
    assert all(is_whole(store.read(entry.name)) for entry in store.list())


def test_no_reader_of_a_local_folder_sees_a_torn_file(tmp_path: Path) -> None:
    write_while_watched(Store(str(tmp_path)), rounds=40)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_no_reader_of_an_s3_server_sees_a_torn_object(s3: Bucket) -> None:
    write_while_watched(Store(s3.uri()), rounds=6)


def test_no_reader_sees_a_torn_object_through_faults(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut-off bodies, lost answers and resets on the way of readers and writers alike."""
    with fault_proxy(s3.server, Plan(seed=5, rate=0.25, faults=("503", "cut", "lost", "reset"))) as proxy:
        for name, value in proxy.server.env.items():
            monkeypatch.setenv(name, value)
        write_while_watched(Store(s3.uri()), rounds=3)
        assert proxy.played > 10


class TestSteps:
    """What a power cut may not undo is synced before the next step (POSIX: a name is durable once its folder is)."""

    @pytest.fixture
    def steps(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The system calls of a write, in order: of a sync, what it is of."""
        steps: list[str] = []

        def recorded(name: str) -> None:
            original = getattr(os, name)

            def call(*arguments: object) -> object:
                what = arguments[0] if name != "fsync" else os.readlink(f"/proc/self/fd/{arguments[0]}")
                steps.append(f"{name} {'hidden' if '.tmp-' in str(what) else os.path.basename(str(what))}")
                return original(*arguments)

            monkeypatch.setattr(local_module.os, name, call)

        for name in ("fsync", "replace", "link", "mkdir", "remove"):
            recorded(name)
        return steps

    def test_bytes_are_synced_before_the_name_and_the_name_with_its_folder(
        self, tmp_path: Path, steps: list[str]
    ) -> None:
        store = Store(str(tmp_path / "run"))
        store.write("a/x", b"1")
        new_folders = ["mkdir run", f"fsync {tmp_path.name}", "mkdir a", "fsync run"]
        assert steps == [*new_folders, "fsync hidden", "replace hidden", "fsync a", "remove hidden"]
        del steps[:]
        assert store.create("a/y", b"1")
        assert steps == ["fsync hidden", "link hidden", "fsync a", "remove hidden"]

    def test_a_create_whose_answer_a_network_disk_lost_is_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NFS may do a link, lose the answer, ask again and report that the name exists."""
        link = os.link

        def lossy(source: str, target: str) -> None:
            link(source, target)
            raise FileExistsError(17, "File exists")

        monkeypatch.setattr(local_module.os, "link", lossy)
        store = Store(str(tmp_path))
        assert store.create("x", b"1") is True
        monkeypatch.undo()
        assert store.create("x", b"1") is False
        assert store.read("x") == b"1"
