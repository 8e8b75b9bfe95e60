"""A second driver: refused while the first lives, let in when it is dead, and never after more than one lease."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from infscan.engine.lease import LEASE, Holder, Lease
from infscan.errors import RunError
from infscan.storage import Store
from infscan.storage.host import Host, process_began
from tests.conftest import Bucket

LEASE_S = 1.0


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> Store:
    if request.param == "local":
        return Store(str(tmp_path))
    bucket: Bucket = request.getfixturevalue("moto_s3")
    return Store(bucket.uri())


@pytest.fixture
def lease(store: Store) -> Iterator[Lease]:
    lease = Lease(store, LEASE_S)
    yield lease
    lease.release()


def elsewhere(holder: Holder) -> Holder:
    """The same driver, seen from another machine."""
    return replace(holder, host=Host("node-17", "another-boot", "another-namespace"), token="elsewhere")


def put(store: Store, holder: Holder) -> None:
    store.write(LEASE, holder.to_bytes())


def held_by(store: Store) -> str:
    token: str = json.loads(store.read(LEASE))["token"]
    return token


def test_a_living_driver_is_named_and_not_waited_for(store: Store, lease: Lease) -> None:
    lease.take()
    with pytest.raises(RunError, match=rf"driven by process {os.getpid()} on .+, since 20\d\d-.*output=") as caught:
        Lease(store, 1000.0).take()
    assert lease.mine.host.name in str(caught.value)
    assert held_by(store) == lease.mine.token
    lease.check()


def test_a_lease_that_is_given_back_is_gone(store: Store, lease: Lease) -> None:
    lease.take()
    lease.release()
    assert not store.exists(LEASE)
    second = Lease(store, LEASE_S)
    second.take()
    second.release()
    assert not store.exists(LEASE)


def test_a_dead_process_of_this_machine_is_followed_at_once(store: Store, lease: Lease) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    first = replace(lease.mine, pid=child.pid, began=process_began(child.pid), lease_s=1000.0, token="x")
    put(store, first)
    with pytest.raises(RunError, match=f"driven by process {child.pid}"):
        lease.take()
    child.kill()
    child.wait()
    lease.take()
    assert held_by(store) == lease.mine.token


def test_a_process_number_that_was_given_anew_is_no_driver(store: Store, lease: Lease) -> None:
    parent = os.getppid()
    put(store, replace(lease.mine, pid=parent, began=process_began(parent) - 1, lease_s=1000.0, token="x"))
    lease.take()


def test_what_an_earlier_run_of_this_process_left_is_no_driver(store: Store, lease: Lease) -> None:
    put(store, replace(lease.mine, token="left over", lease_s=1000.0))
    lease.take()


def test_another_machines_driver_is_followed_after_one_lease(store: Store, lease: Lease) -> None:
    put(store, elsewhere(lease.mine))
    lease.take()
    assert held_by(store) == lease.mine.token


def test_another_machines_driver_that_renews_its_lease_is_alive(store: Store, lease: Lease) -> None:
    first = elsewhere(replace(lease.mine, lease_s=60.0))
    put(store, first)
    renewal = threading.Timer(0.5, put, (store, replace(first, beat=1)))
    renewal.start()
    with pytest.raises(RunError, match=r"driven by process \d+ on node-17, since"):
        lease.take()
    renewal.join()


def test_a_lease_is_renewed_while_it_is_held(store: Store, lease: Lease) -> None:
    lease.take()
    deadline = time.monotonic() + 30
    while json.loads(store.read(LEASE))["beat"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert held_by(store) == lease.mine.token


def test_a_driver_that_was_thought_dead_says_who_took_over(store: Store, lease: Lease) -> None:
    lease.take()
    put(store, elsewhere(lease.mine))
    lease._renewals.join(timeout=30)
    with pytest.raises(RunError, match=r"taken over by process \d+ on node-17.*cluster\.lease_s=1 s"):
        lease.check()
    lease.release()
    assert held_by(store) == "elsewhere"


def test_a_file_that_is_no_lease_is_replaced(store: Store, lease: Lease) -> None:
    store.write(LEASE, b"{torn")
    lease.take()
    assert held_by(store) == lease.mine.token


def test_a_lease_that_vanished_stops_its_driver_and_is_not_written_anew(store: Store, lease: Lease) -> None:
    lease.take()
    store.remove(LEASE)
    lease._renewals.join(timeout=30)
    assert not lease._renewals.is_alive()
    with pytest.raises(RunError, match=r"driver\.json is gone.*moved.*not mounted"):
        lease.check()
    lease.release()
    assert not store.exists(LEASE)


def test_a_driver_that_slept_finds_out_before_it_writes(store: Store) -> None:
    """Its renewals slept as well: nothing but the question to storage says it."""
    slept = Lease(store, 1000.0)
    slept.take()
    slept.confirm()
    put(store, elsewhere(slept.mine))
    slept.check()
    with pytest.raises(RunError, match="taken over by"):
        slept.confirm()
    slept.release()
    assert held_by(store) == "elsewhere"


def test_a_file_that_nobody_wrote_takes_no_lease_away(store: Store, lease: Lease) -> None:
    lease.take()
    store.write(LEASE, b"{torn")
    lease.confirm()
