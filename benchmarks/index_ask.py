"""From a question to its answer, part by part: seconds on the clock and of a core (docs/reports/index.md)

python benchmarks/index_ask.py INDEX [--questions 3] [--top-k 5] [--candidates 10] [--audit 16] [--queries FILE]

Asks an index what `infscan serve` would, one question after the other, in this process: the first finds the model on
the disk, the others find it loaded. A step's seconds are its own, without those of a step inside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from infscan import pipeline
from infscan.config.jobs import ServeJob
from infscan.engine import in_process
from infscan.serve.desk import Desk
from infscan.steps import ask as asking
from infscan.steps.ask import ask_config, read_indexes

# What a person would call the parts: (part, module, function).
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("model loaded", in_process, "ModelWorker"),
    ("corpus and plan", pipeline, "prepare_corpora"),
    ("corpus and plan", pipeline, "make_plan"),
    ("measured, its gradient", pipeline, "measure"),
    ("factors and index checked", pipeline, "fit"),
    ("factors and index checked", pipeline, "indexed"),
    ("its codes", asking, "query_codes"),
    ("search", asking, "search"),
    ("search", asking, "self_influences"),
    ("preconditioned, low rank", pipeline, "query_batch"),
    ("candidates and audit, full pass", pipeline, "scan"),
    ("refined", pipeline, "refine"),
    ("similarity", pipeline, "similarity"),
    ("tables", pipeline, "rank"),
    ("tables", pipeline, "certificate"),
    ("tables", pipeline, "publish"),
)
REST = "all else"


class Clock:
    """Seconds by part of what runs now; a part inside another one is not the outer one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._open: list[tuple[str, float, float]] = []

    def _add(self, part: str, wall: float, cpu: float) -> None:
        before = self.seconds.get(part, (0.0, 0.0))
        self.seconds[part] = before[0] + wall, before[1] + cpu

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        self._open.append((name, 0.0, 0.0))
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            _, inner_wall, inner_cpu = self._open.pop()
            self._add(name, wall - inner_wall, cpu - inner_cpu)
            if self._open:
                outer, other_wall, other_cpu = self._open[-1]
                self._open[-1] = outer, other_wall + wall, other_cpu + cpu

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function, updated=())
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--audit", type=int, default=16)
    parser.add_argument("--queries", type=Path, help="JSONL; without it, one and the same question")
    options = parser.parse_args()
    print(f"imported: {time.process_time():.1f} s of a core", flush=True)
    rows = [{"prompt": "The Turing machine was invented by", "completion": " Alan Turing"}]
    if options.queries:
        rows = [json.loads(line) for line in options.queries.read_text().split("\n") if line]
    questions = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    seconds = []
    with TemporaryDirectory() as folder:
        job = ServeJob(
            index=options.index, output=folder, top_k=options.top_k, candidates=options.candidates,
            audit_sequences=options.audit,
        )  # fmt: skip
        clock = Clock()
        with clock.part("opened"):
            found = read_indexes(job.asking().indexes)
            desk = Desk(found, ask_config(found, job.asking()), job)
        print("opened: {:.1f} s, {:.1f} of a core".format(*clock.seconds["opened"]), flush=True)
        for part, module, name in PARTS:
            setattr(module, name, clock.timed(part, getattr(module, name)))
        for number in range(options.questions):
            clock.seconds = {}
            with clock.part(REST):
                question = desk.submit(questions[number % len(questions)])
                desk._ask(desk._next())
            assert question.state == "done", question.error
            print(f"question {number}: first answer after {question.first_s} s, exact after {question.exact_s} s")
            counts = desk.store.read_json(f"{question.run}/summary.json")["counts"]
            print(
                f"  {counts['scanned']['sequences']} sequences scanned, {counts['refined']['rows']} refined", flush=True
            )
            clock.seconds["together"] = tuple(map(sum, zip(*clock.seconds.values(), strict=True)))
            seconds.append(clock.seconds)
            show(seconds)


def show(seconds: list[dict[str, tuple[float, float]]]) -> None:
    names = list(dict.fromkeys([part for part, _, _ in PARTS] + [REST, "together"]))
    print("| part | first question: s, of a core | later ones, median |\n|---|---|---|")
    for name in names:
        by_question = [one.get(name, (0.0, 0.0)) for one in seconds]
        later = by_question[1:] or by_question
        medians = [statistics.median(one[which] for one in later) for which in (0, 1)]
        first = by_question[0]
        print(f"| {name} | {first[0]:.1f}, {first[1]:.1f} | {medians[0]:.1f}, {medians[1]:.1f} |")


if __name__ == "__main__":
    main()
