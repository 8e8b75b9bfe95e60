"""What a run tells those who metrics it: metrics that a real Ray offers to Prometheus, JSON lines, a trace."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from infscan.config import Config
from infscan.engine.metrics import TRACE, RunMetrics
from infscan.pipeline import answer
from infscan.results.read import read_summary
from infscan.storage import Store
from infscan.telemetry import Phase
from tests.servers import free_ports
from tests.steps.runs import small_run

DASHBOARD = Path(__file__).resolve().parents[2] / "docker" / "grafana" / "infscan.json"
# Of a histogram and a counter.
SUFFIX = re.compile(r"_(bucket|sum|count|total)$")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A run on a real Ray with everything that can be watched turned on."""

    def __init__(self, config: Config, log: str, port: int) -> None:
        self.config, self.log, self.port = config, log, port
        self.summary: dict[str, Any] = read_summary(config.output)

    def samples(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """What Prometheus would scrape now, infscan's alone: by name, labels and value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "infscan" in sample.name:
                    found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    (port,) = free_ports(1)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:
        config = small_run(folder, "cluster.trace=true", "cluster.log_format=json", "scan.check_sequences=0")
        with pytest.MonkeyPatch.context() as patch:
            lines: list[str] = []
            patch.setattr("sys.stderr", _Lines(lines))
            answer(config)
        yield Watched(config, "".join(lines), port)
    finally:
        ray.shutdown()


class _Lines:
    """Standard error that is kept."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def write(self, text: str) -> int:
        self.lines.append(text)
        return len(text)

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return False


@pytest.mark.slow
def test_prometheus_scrapes_what_the_summary_says(watched: Watched) -> None:
    counts = watched.summary["counts"]
    wanted = {("tokens", "scan"): counts["scanned"]["tokens"], ("sequences", "scan"): counts["scanned"]["sequences"]}
    deadline = time.monotonic() + 60
    while True:
        found = watched.samples()
        said = {
            (kind, labels["phase"]): value
            for kind in ("tokens", "sequences")
            for name, samples in found.items()
            if name in (f"ray_infscan_{kind}", f"ray_infscan_{kind}_total")
            for labels, value in samples
            if labels.get("run") == watched.config.output
        }
        if all(said.get(key) == value for key, value in wanted.items()) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert {key: said.get(key) for key in wanted} == wanted
    shards = {labels["state"]: value for labels, value in found["ray_infscan_shards"]}
    assert shards == {"waiting": 0, "running": 0, "done": counts["planned"]["shards"], "given_up": 0}
    assert {labels["phase"] for labels, _ in found["ray_infscan_phase_seconds"]} >= {"covariance", "lambda", "scan"}
    taken = {labels["phase"]: value for labels, value in found["ray_infscan_unit_seconds_count"]}
    assert taken["scan"] == counts["planned"]["shards"]
    assert "ray_infscan_queue_wait_seconds_count" in found
    assert "ray_infscan_workers" in found


@pytest.mark.slow
def test_the_dashboard_asks_for_metrics_that_there_are(watched: Watched) -> None:
    there = {SUFFIX.sub("", name) for name in watched.samples()}
    # These have no value until something goes wrong.
    there |= {"ray_infscan_retries", "ray_infscan_storage_faults"}
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        SUFFIX.sub("", name)
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"ray_infscan_\w+", target["expr"])
    }
    assert asked == there


@pytest.mark.slow
def test_every_log_line_is_an_object_that_names_run_shard_and_attempt(watched: Watched) -> None:
    lines = [json.loads(line) for line in watched.log.splitlines()]
    assert {line["run"] for line in lines} == {watched.config.output}
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    done = [line for line in lines if line.get("outcome") == "done" and line["phase"] == "scan"]
    planned = watched.summary["counts"]["planned"]["shards"]
    assert {line["shard"] for line in done} == {f"shard-{number:06d}" for number in range(planned)}
    assert {line["attempt"] for line in done} == {1}
    # Workers start within the first phase that asks for them; its units are its own all the same.
    over = [line["phase"] for line in lines if "outcome" in line]
    assert set(over) >= {"covariance", "lambda", "scan"}
    assert "workers" not in over


@pytest.mark.slow
def test_the_trace_holds_every_unit_and_what_its_rank_did_within_it(watched: Watched) -> None:
    value = json.loads((Path(watched.config.output) / TRACE).read_text())
    spans = [event for event in value["traceEvents"] if event["ph"] == "X"]
    shards = [event for event in spans if event["pid"] == 1 and event["name"] == "scan"]
    assert len(shards) == watched.summary["counts"]["planned"]["shards"]
    assert {"read", "forward", "backward"} <= {event["name"] for event in spans if event["pid"] == 2}
    assert {event["name"] for event in spans if event["pid"] == 3} == {"write"}
    for event in spans:
        if event["name"] in ("read", "write"):
            (unit,) = [unit for unit in shards if unit["args"]["shard"] == event["args"]["shard"]]
            assert unit["ts"] <= event["ts"]
            # It is written while the worker computes another.
            assert event["name"] == "write" or event["ts"] + event["dur"] <= unit["ts"] + unit["dur"]


def test_a_phase_within_another_gives_it_back() -> None:
    metrics, outer, inner = RunMetrics("runs/one"), Phase("covariance", 8, "slices"), Phase("workers", 2, "workers")
    metrics.began(outer)
    metrics.began(inner)
    assert metrics.phase == "workers"
    metrics.ended(inner)
    assert metrics.phase == "covariance"
    metrics.ended(outer)
    assert metrics.phase == ""


def test_an_ended_unit_is_told_once_with_its_attempt_and_outcome(tmp_path: Path) -> None:
    clock = Clock()
    metrics = RunMetrics("runs/one", traced=True, clock=clock)
    metrics.began(Phase("scan", 2, "shards"))
    metrics.unit_started(0, 7, 1)
    clock.now += 2
    metrics.unit_finished(0, 7, "lost")
    metrics.unit_finished(0, 7, "lost")
    metrics.unit_started(1, 7, 2)
    clock.now += 3
    # Its worker is free from here on: the span of the unit ends, and the unit once it is written.
    metrics.unit_computed(1, 7)
    clock.now += 9
    metrics.unit_finished(1, 7, "done")
    facts = {"run": "runs/one", "phase": "scan", "unit": 7, "shard": "shard-000007"}
    assert metrics.spans == [
        (0, ("scan", 100.0, 102.0, facts | {"worker": 0, "attempt": 1, "outcome": "lost"})),
        (1, ("scan", 102.0, 105.0, facts | {"worker": 1, "attempt": 2, "outcome": "done"})),
    ]
    metrics.write_trace(Store(str(tmp_path)), [[("read", 100.5, 101.0, {})]])
    events = json.loads((tmp_path / TRACE).read_text())["traceEvents"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        ("scan", 0, 100_000_000, 2_000_000),
        ("scan", 1, 102_000_000, 3_000_000),
        ("read", 0, 100_500_000, 500_000),
    ]
    # The ranks of workers that started anew come beside those before them.
    metrics.write_trace(Store(str(tmp_path)), [[("read", 105.0, 105.5, {})], [("read", 105.0, 106.0, {})]])
    events = json.loads((tmp_path / TRACE).read_text())["traceEvents"]
    reads = [(event["tid"], event["ts"]) for event in events if event["name"] == "read"]
    assert reads == [(0, 100_500_000), (0, 105_000_000), (1, 105_000_000)]
    RunMetrics("runs/two").write_trace(Store(str(tmp_path / "empty")), [])
    assert not (tmp_path / "empty").exists()
