"""What dead writers left is removed; what living ones are at work on is not, and would do no harm if it were."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from infscan.storage import Store
from infscan.storage import s3 as s3_module
from infscan.storage import tempnames as tempnames_module
from infscan.storage.tempnames import ABANDONED_S, is_abandoned, temporary_name
from tests.chaos.proxy import Proxy, first
from tests.conftest import Bucket

DAY = 86_400.0


def name_of(process: subprocess.Popen[bytes]) -> str:
    """A hidden name as that process would give it."""
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


@pytest.fixture
def other() -> subprocess.Popen[bytes]:
    """Another process that has told a hidden name of its own and lives on."""
    code = (
        "from infscan.storage.tempnames import temporary_name\nprint(temporary_name(), flush=True)\n"
        "import time\ntime.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()


def test_a_file_lives_as_long_as_its_writer(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    store, theirs, mine = Store(str(tmp_path)), name_of(other), temporary_name()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in (theirs, mine):
        (tmp_path / "deep" / "er" / name).write_bytes(b"half")
        os.utime(tmp_path / "deep" / "er" / name, (0, 0))  # age says nothing where the writer can be asked
    store.write("kept", b"1")
    assert store.sweep() == 0
    other.kill()
    other.wait()
    assert store.sweep() == 1
    assert os.listdir(tmp_path / "deep" / "er") == [mine]
    assert store.read("kept") == b"1"


def test_a_process_that_took_a_dead_one_s_number_is_not_its_writer() -> None:
    mine = temporary_name()
    parts = mine.split("-")
    parts[3] = str(int(parts[3]) - 1)
    assert is_abandoned("-".join(parts), age_s=0)
    assert not is_abandoned(mine, age_s=100 * DAY)


@pytest.mark.parametrize(("age_s", "gone"), [(ABANDONED_S / 2, False), (ABANDONED_S * 2, True)])
def test_another_machine_s_file_is_judged_by_its_age(tmp_path: Path, age_s: float, gone: bool) -> None:
    (tmp_path / temporary_name().replace(tempnames_module._host(), "00000000")).write_bytes(b"half")
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - age_s,) * 2)
    assert Store(str(tmp_path)).sweep() == gone
    assert len(os.listdir(tmp_path)) == (not gone)


@given(st.from_regex(r"[A-Za-z0-9._-]{1,60}", fullmatch=True))
def test_a_hidden_file_that_infscan_does_not_name_is_never_removed(rest: str) -> None:
    assume(not tempnames_module._NAME.fullmatch(f".tmp-{rest}"))
    assert not is_abandoned(f".tmp-{rest}", age_s=1000 * DAY)


def test_a_users_hidden_files_stay(tmp_path: Path) -> None:
    names = [".tmp-thesis.tex", "deep/er/.tmp-backup.tar", f"deep/{temporary_name()}.bak"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
        os.utime(tmp_path / name, (0, 0))
    assert Store(str(tmp_path)).sweep() == 0
    assert all((tmp_path / name).exists() for name in names)


def test_a_writer_whose_hidden_file_is_swept_away_writes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that takes every hidden file for abandoned, all the time, beside a writer: nothing is lost."""
    monkeypatch.setattr(tempnames_module, "ABANDONED_S", -1.0)
    here = itertools.count()
    monkeypatch.setattr(tempnames_module, "_host", lambda: f"{next(here) % (1 << 32):08x}")
    store, writing = Store(str(tmp_path)), threading.Event()
    writing.set()
    swept = [0]

    def sweep() -> None:
        while writing.is_set() and swept[0] < 2:
            swept[0] += store.sweep()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        deadline = time.monotonic() + 60
        number = 0
        while swept[0] < 2 and time.monotonic() < deadline:
            number += 1
            store.write("x", bytes([number % 251]) * 2_000_000)
            assert store.create(f"new/{number}", b"1" * 2_000_000)
    finally:
        writing.clear()
        sweeper.join()
    assert swept[0] >= 2
    assert store.read("x") == bytes([number % 251]) * 2_000_000
    assert all(entry.size == 2_000_000 for entry in store.list())


def test_unfinished_uploads_are_aborted_once_they_are_old(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the run's own prefix alone; and hidden objects of a preflight that died, too."""
    store, client = Store(s3.uri()), s3.server.client()
    prefix = store.uri.split("/", 3)[3]
    for key in (f"{prefix}/large", f"{prefix}-other/large"):
        client.create_multipart_upload(Bucket=s3.name, Key=key)
    client.put_object(Bucket=s3.name, Key=f"{prefix}/{temporary_name()}", Body=b"mine")
    dead = temporary_name().replace(f"-{os.getpid()}-", f"-{(1 << 22) + 1}-")
    client.put_object(Bucket=s3.name, Key=f"{prefix}/{dead}", Body=b"a dead one's")
    store.write("kept", b"1")
    assert store.sweep() == 1
    monkeypatch.setattr(s3_module, "ABANDONED_S", -1.0)
    assert store.sweep() == 1
    left = client.list_multipart_uploads(Bucket=s3.name)["Uploads"]
    assert [upload["Key"] for upload in left if upload["Key"].startswith(prefix)] == [f"{prefix}-other/large"]
    assert store.read("kept") == b"1"
    assert [entry.name for entry in store.list()] == ["kept"]


def test_a_store_that_tells_nothing_of_uploads_does_not_stop_a_run(
    faulty_s3: tuple[Bucket, Proxy], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = faulty_s3
    monkeypatch.setattr("infscan.storage.remote.log.propagate", True)
    store = Store(bucket.uri())
    store.write("kept", b"1")
    refused = first(1, "403")
    proxy.plan = lambda method, path: refused(method, path) if "uploads" in path else None
    assert store.sweep() == 0
    assert "unfinished uploads of earlier attempts cannot be listed" in caplog.text


def test_an_upload_that_another_process_aborted_is_begun_anew(faulty_s3: tuple[Bucket, Proxy]) -> None:
    bucket, proxy = faulty_s3
    store, client = Store(bucket.uri()), bucket.server.client()
    prefix = store.uri.split("/", 3)[3]
    swept = []

    def sweep(method: str, path: str) -> None:
        if "partNumber=2" in path and not swept:
            for upload in client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]:
                if upload["Key"].startswith(prefix):
                    client.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
                    swept.append(upload["Key"])

    def plan(method: str, path: str) -> str | None:
        if prefix in path and "Uploads" not in path:
            sweep(method, path)
        return None

    proxy.plan = plan
    data = os.urandom(1 << 20) * 101
    store.write("large", data)
    assert swept
    assert store.read("large") == data
