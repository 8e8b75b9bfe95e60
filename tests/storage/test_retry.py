"""The retry's laws, on a clock that a test turns, and at a server that misbehaves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import fsspec
import pytest

from infscan.errors import StorageError, UnwritableError
from infscan.storage import MissingError, Store, storage_faults
from infscan.storage import remote as remote_module
from infscan.storage import retry as retry_module
from infscan.storage import s3 as s3_module
from infscan.storage.retry import FIRST_PAUSE_S, GIVEN_UP, LONGEST_PAUSE_S, RetryPolicy
from tests.chaos.proxy import Proxy, always, first
from tests.conftest import Bucket


class Clock:
    """time.monotonic and time.sleep of the retry; `pauses` is what it slept."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry_module, "time", clock)
    return clock


@pytest.fixture
def counted() -> Callable[[], dict[str, int]]:
    """The faults met since the test began."""
    before = storage_faults()
    return lambda: {
        kind: now - before.get(kind, 0) for kind, now in storage_faults().items() if now != before.get(kind, 0)
    }


def explain(error: Exception, attempts: int) -> StorageError:
    return StorageError(f"{error}, {attempts} times")


class TestTheRetry:
    @pytest.mark.parametrize("seed", range(20))
    def test_pauses_are_drawn_from_all_of_a_doubling_range_and_end_within_the_budget(
        self, clock: Clock, seed: int, counted: Callable[[], dict[str, int]]
    ) -> None:
        random.seed(seed)

        def fail() -> None:
            clock.now += 0.1
            raise OSError("no")

        with pytest.raises(StorageError, match=rf"no, {len(clock.pauses) or ''}\d* times"):
            RetryPolicy(retry_s=60).call_with_retry(fail, lambda error: "busy", explain)
        assert 60 - LONGEST_PAUSE_S <= clock.now <= 60 + 0.1
        bounds = [min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) for attempt in range(len(clock.pauses))]
        assert all(0 <= pause <= bound for pause, bound in zip(clock.pauses, bounds, strict=True))
        assert counted() == {"busy": len(clock.pauses) + 1, GIVEN_UP: 1}

    def test_the_jitter_is_full(self, clock: Clock) -> None:
        """First pauses are uniform over [0, FIRST_PAUSE_S]: their mean and extremes say so."""
        random.seed(1)
        firsts = []
        for _ in range(500):
            answers = iter([OSError("no"), None])

            def request(answers: Iterator[OSError | None] = answers) -> None:
                if (answer := next(answers)) is not None:
                    raise answer

            RetryPolicy().call_with_retry(request, lambda error: "busy", explain)
            firsts.append(clock.pauses[-1])
        assert abs(sum(firsts) / len(firsts) - FIRST_PAUSE_S / 2) < 0.02
        assert min(firsts) < 0.01
        assert max(firsts) > FIRST_PAUSE_S - 0.01

    def test_what_does_not_pass_is_not_asked_again(self, clock: Clock, counted: Callable[[], dict[str, int]]) -> None:
        with pytest.raises(StorageError, match="no, 1 times"):
            RetryPolicy().call_with_retry(lambda: (_ for _ in ()).throw(OSError("no")), lambda error: None, explain)
        assert clock.pauses == []
        assert counted() == {}

    @pytest.mark.parametrize("variable", ["INFSCAN_STORAGE_RETRY_S", "INFSCAN_STORAGE_TIMEOUT_S"])
    @pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
    def test_settings_that_are_no_seconds_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
    ) -> None:
        monkeypatch.setenv(variable, value)
        with pytest.raises(StorageError, match=f"{variable}={value} is no number of seconds"):
            Store("s3://bucket/x").list()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "5")


KINDS = {
    "500": "broken", "502": "broken", "503": "busy", "429": "busy", "reset": "connection", "lost": "connection"
}  # fmt: skip


@pytest.mark.usefixtures("quick")
class TestAtAServer:
    @pytest.mark.parametrize("fault", [*KINDS, "cut"])
    def test_every_operation_outlives_passing_faults_and_counts_them(
        self, faulty_s3: tuple[Bucket, Proxy], fault: str, counted: Callable[[], dict[str, int]]
    ) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        store.write("there", b"some bytes")
        operations: list[tuple[Callable[[], object], object]] = [
            (lambda: store.write("x", b"some bytes"), None),
            (lambda: store.create("new", b"1"), True),
            (lambda: store.read("there"), b"some bytes"),
            (lambda: store.open("there").read(), b"some bytes"),
            (lambda: store.exists("there"), True),
            (lambda: store.exists("nowhere"), False),
            (lambda: [entry.name for entry in store.list()], ["new", "there", "x"]),
            (lambda: store.remove("x"), None),
        ]
        for operation, answer in operations:
            proxy.plan = first(2, fault)
            before = proxy.played
            assert operation() == answer
            assert proxy.played == before + 2
        kinds = counted()
        if fault.isdigit():
            assert kinds == {KINDS[fault]: 2 * len(operations)}
        else:  # The HTTP client itself asks once more where a connection that it had kept breaks.
            assert set(kinds) <= {"connection", "cut_off"}
            assert 2 <= sum(kinds.values()) <= 2 * len(operations)

    @pytest.mark.parametrize("fault", ["lost", "cut"])
    def test_a_create_whose_answer_was_lost_is_its_own(self, faulty_s3: tuple[Bucket, Proxy], fault: str) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        proxy.plan = first(1, fault, "PUT")
        assert store.create("plan.json", b"mine") is True
        assert sum(method == "PUT" for method, _ in proxy.requests) == 2
        assert store.create("plan.json", b"mine") is False

    def test_a_create_that_lost_while_it_was_retried_is_not_its_own(self, faulty_s3: tuple[Bucket, Proxy]) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        key = f"{store.uri.split('/', 3)[3]}/plan.json"
        fault = first(1, "500", "PUT")

        def meanwhile(method: str, path: str) -> str | None:
            met = fault(method, path)
            if met:
                bucket.server.client().put_object(Bucket=bucket.name, Key=key, Body=b"theirs")
            return met

        proxy.plan = meanwhile
        assert store.create("plan.json", b"mine") is False
        assert store.read("plan.json") == b"theirs"

    @pytest.mark.parametrize(("status", "kind"), [("403", UnwritableError), ("401", UnwritableError)])
    def test_a_refusal_is_not_asked_again_and_says_the_mend(
        self, faulty_s3: tuple[Bucket, Proxy], status: str, kind: type[StorageError]
    ) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        proxy.plan = always(status)
        for write in (lambda: store.write("x", b""), lambda: store.remove("x")):
            before = len(proxy.requests)
            with pytest.raises(kind, match="check the credentials in the environment") as caught:
                write()
            assert f"{store.uri}/x" in str(caught.value)
            assert len(proxy.requests) == before + 1
        before = len(proxy.requests)
        with pytest.raises(StorageError, match="refused access") as caught:
            store.read("x")
        assert not isinstance(caught.value, UnwritableError)
        proxy.plan = None
        before = len(proxy.requests)
        with pytest.raises(MissingError):
            store.read("x")
        assert len(proxy.requests) == before + 1

    def test_a_whole_read_is_one_request(self, faulty_s3: tuple[Bucket, Proxy]) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        store.write("x", b"some bytes")
        before = len(proxy.requests)
        assert store.read("x") == b"some bytes"
        assert [method for method, _ in proxy.requests[before:]] == ["GET"]

    def test_a_large_object_is_read_in_parts_of_one_version(
        self, faulty_s3: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch, counted: Callable[[], dict[str, int]]
    ) -> None:
        """Replaced between two parts: never a mixture of both versions (s3fs's own reader returns one)."""
        bucket, proxy = faulty_s3
        monkeypatch.setattr(s3_module, "PART_BYTES", 1 << 16)
        store = Store(bucket.uri())
        key = f"{store.uri.split('/', 3)[3]}/x"
        old, new = b"o" * 300_000, b"n" * 200_000
        store.write("x", old)
        proxy.plan = None
        assert store.read("x") == old
        asked = 0

        def replaced(method: str, path: str) -> None:
            nonlocal asked
            asked += 1
            if asked == 3:
                bucket.server.client().put_object(Bucket=bucket.name, Key=key, Body=new)

        proxy.plan = replaced
        assert store.read("x") == new
        assert counted() == {"changed": 1}
        with store.open("x") as file:
            file.read(10)
        assert asked > 3

    def test_a_slow_answer_is_waited_for_and_a_silent_server_is_not(
        self, faulty_s3: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch, counted: Callable[[], dict[str, int]]
    ) -> None:
        bucket, proxy = faulty_s3
        monkeypatch.setenv("INFSCAN_STORAGE_TIMEOUT_S", "2")
        store = Store(bucket.uri())
        proxy.plan, proxy.slow_s = first(2, "slow"), 0.1
        store.write("x", b"1")
        assert store.read("x") == b"1"
        assert counted() == {}
        proxy.plan = first(2, "hang")
        assert store.read("x") == b"1"
        assert counted() == {"timeout": 2}

    def test_a_create_whose_answer_was_lost_is_recognised_through_further_faults(
        self, faulty_s3: tuple[Bucket, Proxy], counted: Callable[[], dict[str, int]]
    ) -> None:
        """The put took effect, the next loses against it, and the read that tells whose it is breaks off at first."""
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        faults = {"PUT": iter(["lost"]), "GET": iter(["reset", "reset"])}

        def plan(method: str, path: str) -> str | None:
            if method == "GET" and not path.partition("?")[0].endswith("/x"):
                return None
            return next(faults.get(method, iter(())), None)

        proxy.plan = plan
        assert store.create("x", b"1")
        assert not list(faults["GET"])
        # The HTTP client asks once more by itself.
        assert counted()["connection"] >= 1

    def test_a_request_is_judged_by_what_it_met_and_not_by_what_was_handled_before(
        self, faulty_s3: tuple[Bucket, Proxy], counted: Callable[[], dict[str, int]]
    ) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        store.write("x", b"1")
        try:
            store.read("nothing")
        except MissingError:
            proxy.plan = first(2, "reset", "GET")
            assert store.read("x") == b"1"
        assert counted()["connection"] >= 1

    def test_an_answer_that_drips_is_given_up_too(
        self, faulty_s3: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No wait on the socket is long, but the whole is: each of three operations ends at its attempt's limit."""
        bucket, proxy = faulty_s3
        monkeypatch.setenv("INFSCAN_STORAGE_TIMEOUT_S", "0.6")
        monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "0.1")
        monkeypatch.setattr(RetryPolicy, "attempt_s", lambda self, size=0: 0.1)
        store = Store(bucket.uri())
        proxy.slow_s = 0.3
        proxy.plan = always("slow")
        accesses: list[Callable[[], object]] = [
            lambda: store.write("x", b"1"),
            lambda: store.exists("x"),
            lambda: store.read("x"),
        ]
        for access in accesses:
            with pytest.raises(StorageError, match="does not answer"):
                access()

    def test_the_preflight_gives_up_soon(
        self, faulty_s3: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch, clock: Clock
    ) -> None:
        bucket, proxy = faulty_s3
        monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "3600")
        proxy.plan = always("503")
        with pytest.raises(StorageError, match="SlowDown"):
            Store(bucket.uri()).check_writable()
        assert clock.now <= 10


class Stuck(fsspec.AbstractFileSystem):
    """A driver without timeouts of its own."""

    protocol = "stuck"

    def info(self, path: str, **options: object) -> dict[str, object]:
        import time

        time.sleep(5)
        raise AssertionError("nobody waits so long")


def test_a_driver_without_timeouts_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("stuck", Stuck, clobber=True)
    monkeypatch.setenv("INFSCAN_STORAGE_TIMEOUT_S", "0.05")
    monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "0.2")
    with pytest.raises(StorageError, match=r"stuck://host/x: the store cannot be reached or does not answer"):
        Store("stuck://host").exists("x")


class Short(fsspec.AbstractFileSystem):
    """A driver that returns less than it promised, the first time."""

    protocol = "short"
    reads = 0

    def info(self, path: str, **options: object) -> dict[str, object]:
        return {"name": path, "size": 10, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        type(self).reads += 1
        whole = b"0123456789"[start:end]
        return whole if self.reads % 2 == 0 else whole[:-1]


def test_a_driver_that_returns_less_than_promised_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, counted: Callable[[], dict[str, int]]
) -> None:
    fsspec.register_implementation("short", Short, clobber=True)
    monkeypatch.setattr(remote_module, "BUFFER_BYTES", 4)
    store = Store("short://host")
    assert store.read("x") == b"0123456789"
    with store.open("x") as file:
        assert file.read() == b"0123456789"
    assert counted()["cut_off"] >= 2
