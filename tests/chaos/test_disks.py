"""A full, read-only or broken disk: a sentence with the path and the fix, nothing torn, and the run goes on."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infscan.config import Config
from infscan.errors import StorageError, UnwritableError
from infscan.pipeline import answer
from infscan.storage import Store
from infscan.storage import local as local_module
from tests.chaos.disks import STAND_IN, fillable_disk, heed_ballast, may_mount, small_disk
from tests.chaos.every_call import Tripwire, watched
from tests.chaos.one_process import without_ray
from tests.chaos.test_every_call import Twin, content

ROOMY = 64 << 20


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with without_ray():
        yield


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Twin:
    return Twin.made(tmp_path_factory.mktemp("twin"))


def blocks(folder: Path) -> int:
    """Bytes on disk, in whole pages."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def assert_nothing_torn(twin: Twin, config: Config) -> None:
    """What is visible is whole: the twin's files, or what the twin removed when it was done (sums, its lease)."""
    for name, data in content(config).items():
        if name in twin.files:
            assert data == twin.files[name], name
        else:
            assert name.startswith(("factors/covariance/", "factors/lambda/", "driver.json")), name


def fill_up(twin: Twin, tmp_path: Path, share: float) -> None:
    with small_disk(tmp_path / "disk", int(share * blocks(Path(twin.config.output)))) as disk:
        config = twin.disturbed(disk.path / "run")
        with pytest.raises(StorageError, match="free some space") as caught:
            answer(config)
        assert str(disk.path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert_nothing_torn(twin, config)
        disk.resize(ROOMY)
        answer(config)
        twin.assert_equals(config, share)


def test_a_full_disk_ends_the_run_and_with_space_it_goes_on(twin: Twin, tmp_path: Path) -> None:
    fill_up(twin, tmp_path, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9])
def test_a_disk_full_at_any_stage_ends_the_run_and_with_space_it_goes_on(
    twin: Twin, tmp_path: Path, share: float
) -> None:
    fill_up(twin, tmp_path, share)


def test_a_disk_that_turns_read_only_ends_the_run_and_mended_it_goes_on(twin: Twin, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", ROOMY) as disk:
        config = twin.disturbed(disk.path / "run")
        wire = Tripwire(lambda: disk.set_read_only(True), at=120)
        with watched(wire), pytest.raises(UnwritableError, match=r"mounted read-only; choose another folder") as caught:
            answer(config)
        assert str(disk.path) in str(caught.value)
        assert_nothing_torn(twin, config)
        disk.set_read_only(False)
        answer(config)
        twin.assert_equals(config, "read-only")


@contextmanager
def failing_sync(number: int, fails: Callable[[], bool]) -> Iterator[None]:
    """Syncing a file reports `number` where `fails()`."""
    sync = os.fsync

    def failing(descriptor: int) -> None:
        if fails():
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_module.os, "fsync", failing)
        yield


@pytest.mark.parametrize(
    ("number", "fix", "kind"),
    [
        (errno.EIO, "input/output error; check the disk", StorageError),
        (errno.EDQUOT, "quota is used up; free some space", UnwritableError),
    ],
)
def test_a_disk_in_trouble_ends_the_run_and_mended_it_goes_on(
    twin: Twin, tmp_path: Path, number: int, fix: str, kind: type[StorageError]
) -> None:
    """A quota that is used up is not tried again; an input/output error may be one machine's, and is."""
    config = twin.disturbed(tmp_path / "run")
    covariances = tmp_path / "run" / "factors" / "covariance"
    with failing_sync(number, covariances.exists), pytest.raises(kind, match=fix) as caught:
        answer(config)
    assert config.output in str(caught.value)
    assert_nothing_torn(twin, config)
    answer(config)
    twin.assert_equals(config, number)


def test_a_single_input_output_error_of_a_rank_costs_one_attempt(twin: Twin, tmp_path: Path) -> None:
    config = twin.disturbed(tmp_path / "run")
    left = [errno.EIO]

    def once() -> bool:
        return (tmp_path / "run" / "scores").exists() and bool(left) and bool(left.pop())

    with failing_sync(errno.EIO, once):
        answer(config)
    assert not left
    twin.assert_equals(config, "one error")


@pytest.mark.parametrize("stand_in", [False, True], ids=["mounted where it may be", "stand-in"])
def test_a_disk_is_full_from_when_it_is_filled_until_it_is_freed(
    stand_in: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the long set of faults fills: a real disk and what stands in for it say the same to the storage layer."""
    monkeypatch.setattr(os, "fsync", os.fsync)
    if stand_in or not may_mount(tmp_path / "trial"):
        monkeypatch.setenv(STAND_IN, "1")
        heed_ballast()
    with fillable_disk(tmp_path / "disk") as disk:
        store = Store(str(disk.path / "run"))
        store.write("before", b"there")
        disk.fill()
        with pytest.raises(UnwritableError, match="free some space"):
            store.write("meanwhile", bytes(1 << 20))
        assert [entry.name for entry in store.list()] == ["before"]
        disk.free()
        store.write("after", bytes(1 << 20))
        assert sorted(entry.name for entry in store.list()) == ["after", "before"]
    Store(str(tmp_path / "elsewhere")).write("file", b"there")


def test_a_folder_of_another_user_is_refused_with_its_path() -> None:
    """Really: as root, in the skin of a user who has no rights."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(UnwritableError, match="permission denied; give this user access to it") as caught:
                Store(f"{folder}/run").check_writable()
        finally:
            os.seteuid(user)
        assert str(caught.value).startswith(f"{folder}/run: ")
