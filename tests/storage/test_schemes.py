"""Every scheme that fsspec knows ends in bytes or a sentence, and results go only where a file is whole or absent."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from infscan.errors import InfscanError, StorageError, UnwritableError
from infscan.storage import Store, expand

# Reached without a network, or by a name that may be somebody's.
_SKIPPED = {"file", "local", "memory"}
SCHEMES = [*sorted(set(fsspec.available_protocols()) - _SKIPPED), "nonsense", "x+y", "a_b"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFSCAN_STORAGE_TIMEOUT_S", "1")
    monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x" * 20)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)


def test_no_scheme_ends_in_a_traceback(tmp_path: Path) -> None:
    troubles = []
    for scheme in SCHEMES:
        for name, call in (("write", _write), ("read", _read)):
            try:
                call(f"{scheme}://127.0.0.1:1/a/b")
            except InfscanError as error:
                if f"{scheme}://" not in str(error):
                    troubles.append(f"{scheme} {name}: {error}")
            except Exception as error:
                troubles.append(f"{scheme} {name}: {type(error).__name__}: {error}")
            else:
                troubles.append(f"{scheme} {name}: nothing was there, and nobody said so")
    assert not troubles, "\n".join(troubles)
    assert not list(tmp_path.iterdir())


def _write(uri: str) -> None:
    Store(uri).write("c", b"1")


def _read(uri: str) -> None:
    expand(uri)


@pytest.mark.parametrize("scheme", ["local", "https", "sftp"])
def test_results_are_refused_where_a_reader_would_see_halves(scheme: str, tmp_path: Path) -> None:
    # A driver that is not installed says so first.
    store = Store(f"{scheme}://{tmp_path}/run" if scheme == "local" else f"{scheme}://127.0.0.1:1/run")
    for write in (lambda: store.write("a", b"1"), lambda: store.create("a", b"1"), store.check_writable):
        with pytest.raises(StorageError, match=r"no results go there|cannot be opened"):
            write()
    assert not (tmp_path / "run").exists()


def test_what_such_a_scheme_has_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    store = Store(f"local://{tmp_path}")
    assert store.read("a") == b"1"
    with pytest.raises(UnwritableError, match=r"local://.*s3://"):
        store.write("a", b"2")
