"""What a person sees while a run goes on: a line per interval, rates that are true, sentences instead of tracebacks."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from infscan import telemetry
from infscan.cli import exit_on_user_error
from infscan.errors import ConfigError, InfscanError, RunError
from infscan.telemetry import Phase, Telemetry, configure_logs


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry.time, "monotonic", clock)
    return clock


@pytest.fixture
def logs() -> Iterator[None]:
    """The logger is put back afterwards. Tests that read the lines configure it themselves, on their standard error."""
    root = logging.getLogger("infscan")
    before = root.handlers[:], root.propagate, root.level
    yield
    root.handlers[:], root.propagate, level = before
    root.setLevel(level)


@pytest.mark.parametrize(
    ("done", "sequences", "tokens", "seconds", "line"),
    [
        (0, 0, 0, 5.0, "0/30 shards"),
        (12, 240, 24_000, 2.0, "12/30 shards  120 sequences/s  12,000 tokens/s  ETA 0:00:03"),
        (1, 10, 0, 3600.0, "1/30 shards  0.0028 sequences/s  ETA 29:00:00"),
        (20, 20, 2_000_000, 150.0, "20/30 shards  0.13 sequences/s  13,333 tokens/s  ETA 0:01:15"),
        (30, 3000, 9000, 3.0, "30/30 shards  1,000 sequences/s  3,000 tokens/s"),
    ],
)
def test_a_line_says_how_far_how_fast_and_how_long(
    clock: Clock, done: int, sequences: int, tokens: int, seconds: float, line: str
) -> None:
    phase = Phase("scan", 30, "shards", began=0.0)
    phase.advance(units=done, sequences=sequences, tokens=tokens)
    clock.now = seconds
    assert phase.line() == line


@pytest.mark.parametrize(
    ("done", "at_work", "seconds", "line"),
    [
        (0, 0.05, 10.0, "0.1/8 slices"),
        (0, 0.5, 10.0, "0.5/8 slices  ETA 0:02:30"),
        (2, 1.5, 35.0, "3.5/8 slices  7 sequences/s  ETA 0:00:45"),
        (7, 3.0, 80.0, "8.0/8 slices  7 sequences/s  ETA 0:00:00"),
        (8, 0.0, 80.0, "8/8 slices  7 sequences/s"),
    ],
)
def test_what_is_done_of_the_units_at_work_counts(
    clock: Clock, done: int, at_work: float, seconds: float, line: str
) -> None:
    """Eight slices of 70 sequences and 10 seconds each; the time left is what is left of the work at this pace."""
    phase = Phase("covariance", 8, "slices", units_done=done, at_work=at_work, sequences=70 * done, began=0.0)
    clock.now = seconds
    assert phase.line() == line


def test_a_long_unit_is_heard_of_before_it_ends(clock: Clock, logs: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    with Telemetry().phase("covariance", 2, "slices") as view:
        view.phase.began = 0.0
        for second in range(5, 45, 5):
            clock.now = float(second)
            view.at_work(second / 40)
        for second in range(45, 90, 5):
            clock.now = float(second)
            view.at_work(1.0)
        view.advance(sequences=8)
        view.at_work(0.0)
        view.advance(sequences=8)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["0.2/2", "0.5/2", "0.8/2", "1.0/2", "2/2"]


def test_no_time_at_all_divides_nothing_by_zero(clock: Clock) -> None:
    phase = Phase("scan", 2, "shards", began=0.0)
    phase.advance(sequences=1, tokens=1)
    assert phase.elapsed > 0
    assert phase.line().startswith("1/2 shards")


def test_one_line_per_interval_and_one_at_the_end(clock: Clock, logs: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    run = Telemetry()
    with run.phase("scan", 40, "shards") as view:
        view.phase.began = 0.0
        for second in range(1, 36):
            clock.now = float(second)
            view.advance(sequences=2, tokens=100)
        view.advance(units=5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["10/40", "20/40", "30/40", "40/40"]
    assert "2 sequences/s  100 tokens/s  ETA 0:00:30" in lines[0]
    assert lines[-1].endswith("in 35.0 s")
    assert run.phases == {"scan": {"seconds": 35.0, "sequences": 70, "tokens": 3500}}


def test_a_phase_entered_twice_adds_up(clock: Clock, logs: None) -> None:
    run = Telemetry()
    for seconds in (2.0, 3.0):
        clock.now = 0.0
        with run.phase("refine") as view:
            view.phase.began = 0.0
            clock.now = seconds
            view.advance(sequences=4, tokens=10)
    assert run.phases == {"refine": {"seconds": 5.0, "sequences": 8, "tokens": 20}}


def test_a_phase_that_breaks_off_is_not_counted(logs: None) -> None:
    run = Telemetry()
    with pytest.raises(RunError), run.phase("scan"):
        raise RunError("broken off")
    assert run.phases == {}


def test_a_terminal_gets_a_live_bar_and_the_same_counts(
    logs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(telemetry.sys.stderr, "isatty", lambda: True)
    configure_logs()
    run = Telemetry()
    with run.phase("scan", 2, "shards") as view:
        view.advance(sequences=3, tokens=7)
        view.advance(sequences=3, tokens=7)
    assert (run.phases["scan"]["sequences"], run.phases["scan"]["tokens"]) == (6, 14)
    assert "2/2 shards" in capsys.readouterr().err


def test_warnings_are_shown_and_kept(logs: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    run = Telemetry()
    run.warn("shard-000001 is quarantined: 100 % damaged [bold]")
    assert run.warnings == ["shard-000001 is quarantined: 100 % damaged [bold]"]
    assert "100 % damaged [bold]" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [InfscanError, ConfigError, RunError])
def test_an_error_is_one_sentence_and_status_2(kind: type[InfscanError], capsys: pytest.CaptureFixture[str]) -> None:
    said = f"{'a/long/path/' * 20}[bold]x[/bold]: no such [file]; give another scan.rank=4."
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise kind(said)
    assert ended.value.code == 2
    assert ended.value.__cause__ is None
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"error: {said}\n"


def test_an_error_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    with pytest.raises(SystemExit), exit_on_user_error():
        raise RunError("s3://me:hunter2@host/bucket refused the key wJalrXUtnFEMI; fix it.")
    shown = capsys.readouterr().err
    assert "hunter2" not in shown
    assert "wJalrXUtnFEMI" not in shown
    assert "host/bucket refused the key" in shown


def test_an_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(TypeError), exit_on_user_error():
        raise TypeError("a bug")
    with exit_on_user_error():
        pass


def test_a_second_is_of_one_phase_alone(clock: Clock) -> None:
    told = Telemetry()
    with told.phase("covariance") as outer:
        clock.now = 3.0
        with told.within("stage 2 ").phase("workers"):
            clock.now = 10.0
        clock.now = 12.0
        outer.advance(sequences=10)
        assert outer.phase.elapsed == 5.0
    assert {name: phase["seconds"] for name, phase in told.phases.items()} == {
        "covariance": 5.0,
        "stage 2 workers": 7.0,
    }


def test_a_phase_that_fails_is_over(clock: Clock) -> None:
    told = Telemetry()
    with pytest.raises(ConfigError), told.phase("fit"):
        raise ConfigError("no")
    with told.phase("scan"):
        clock.now = 2.0
    assert told.phases["scan"]["seconds"] == 2.0
