"""The whole job, from fitting to published rows: infscan beside kronfluence and bergson (docs/reports/performance.md).

python benchmarks/whole_job.py [--kronfluence .venv-kronfluence/bin/python] [--bergson .venv-bergson/bin/python] ...

A GPT-NeoX is trained on the corpus beside this file. Every program then gets the same model, the same sequences to fit
its EK-FAC on, the same to scan and the same queries, in processes of their own and one after the other, in turns. A
program's time is that of its phases (its own clock; imports and loading the model are left out for all, and reported as
the difference to the process's life). `make bench-rivals` installs the rivals in environments of their own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from infscan.config import fingerprint
from infscan.corpus.plan import Selection
from infscan.corpus.tokenizer import load_tokenizer
from infscan.influence.agreement import agreement
from infscan.model.architecture import describe
from infscan.results.dense import FOLDER as SCORES
from infscan.results.dense import score_column
from infscan.results.read import read_scores, read_summary, read_top
from infscan_studies.truth.train import Sizes, TrainingSettings, build_model, train_language_model

HERE = Path(__file__).parent
CORPUS, RESULTS = HERE / "corpus" / "minipile.jsonl.gz", HERE / "results"
TOKENIZER = "infscan://demo/model"
# A rival may refuse batches of more tokens than the model's context; rotary positions cost nothing.
CONTEXT = 4096
# What infscan's phases are in the words of the table.
PHASES = {
    "fit": ("covariance", "eigenbasis", "lambda", "factors"),
    "queries": ("measure", "queries", "joint", "check"),
    "sieve": ("sieve",),
    "scan": ("scan",),
    "refine": ("refine",),
}
OTHERS = "others"
REFERENCE = "infscan, full rank, float32"


@dataclass(frozen=True)
class Outcome:
    """One program's run: seconds by phase and of the process's life, scores [Q, N], published sequences by query."""

    phases: dict[str, float]
    life: float
    scores: NDArray[np.float32] | None = None
    published: dict[str, set[int]] | None = None

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "whole-job")
    parser.add_argument("--kronfluence", type=Path, help="python of an environment that has it")
    parser.add_argument("--bergson", type=Path, help="python of an environment that has it")
    parser.add_argument("--width", type=int, default=512, help="d of the GPT-NeoX model; its MLP is 4 d wide")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="T, tokens per sequence")
    parser.add_argument("--fitted", type=int, default=100, help="sequences the factors are fitted on")
    parser.add_argument("--scanned", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--top", type=int, default=20, help="rows per query that are published and looked for")
    parser.add_argument("--candidates", type=int, help="rows per query that are refined; 2 x --top, if not given")
    parser.add_argument("--check", type=int, help="sequences that the compression is checked on; --scanned / 20")
    parser.add_argument("--energy", type=float, default=0.95, help="of rank auto")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--ranks", nargs="+", default=["32", "auto"])
    parser.add_argument(
        "--sieves", type=int, nargs="*", default=[], help="last blocks of a sieve; each a run of its own"
    )
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--keep", action="store_true", help="read our own finished runs where they lie")
    parser.add_argument("--rounds", type=int, default=1, help="every program runs so many times, in turns")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Job:
    """Model, sequences and queries in a folder, as all programs read them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        made_of = ("width", "layers", "length", "fitted", "scanned", "queries", "epochs", "seed", "threads")
        key = fingerprint({name: getattr(options, name) for name in made_of})
        self.folder: Path = options.folder.absolute() / key[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ids = [f"q{number}" for number in range(options.queries)]
        if not (self.folder / "training.json").exists():
            self._make()

    def _make(self) -> None:
        tokenizer = load_tokenizer(TOKENIZER)
        assert tokenizer is not None
        T, wanted = self.options.length, self.options.scanned + self.options.queries
        with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
            documents = [json.loads(line)["text"] for line in lines]
        order = np.random.default_rng(self.options.seed).permutation(len(documents))
        stream: list[int] = []
        for number in order.tolist():
            stream += [*tokenizer.encode_batch([documents[number]])[0].tolist(), tokenizer.eos_id]
            if len(stream) >= wanted * T:
                break
        rows = [stream[start : start + T] for start in range(0, wanted * T, T)]
        if len(rows[-1]) < T:
            raise SystemExit(f"the corpus has fewer than {wanted} sequences of {T} tokens; lower --scanned")
        scanned, asked = rows[: self.options.scanned], rows[self.options.scanned :]
        fitted = Selection.of(len(scanned), self.options.fitted, self.options.seed).ids()
        self._write("scanned", [(row, 0) for row in scanned])
        self._write("fit", [(scanned[number], 0) for number in fitted.tolist()])
        # A prompt of 48 tokens and a completion of 16 that the model has not seen.
        self._write("queries", [(row[:64], 48) for row in asked])
        # As infscan reads them, which takes no key that it does not know.
        lines = [{"id": f"q{n}", "input_ids": row[:64], "prompt_len": 48} for n, row in enumerate(asked)]
        (self.folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._train(scanned, asked)

    def _write(self, name: str, rows: list[tuple[list[int], int]]) -> None:
        lines = [
            {
                "id": f"q{number}",
                "input_ids": ids,
                "prompt_len": prompt,
                "labels": [-100] * prompt + ids[prompt:],
                "length": len(ids),
            }
            for number, (ids, prompt) in enumerate(rows)
        ]
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _train(self, rows: list[list[int]], heldout: list[list[int]]) -> None:
        width = self.options.width
        torch.set_num_threads(self.options.threads)
        sizes = Sizes(self.options.layers, width, max(1, width // 64), 4 * width)
        model = build_model(sizes, describe(TOKENIZER, "mlp").vocab_size, CONTEXT, self.options.seed)
        settings = TrainingSettings(epochs=self.options.epochs, batch_sequences=16, learning_rate=1e-3)
        print(f"training on {len(rows)} sequences, into {self.folder}", flush=True)
        record = train_language_model(model, rows, settings, heldout)
        model.save_pretrained(self.folder / "model")
        # bergson opens the tokenizer even of rows that are tokenised.
        for path in (HERE.parent / "infscan" / "demo" / "model").glob("*token*.json"):
            shutil.copy(path, self.folder / "model" / path.name)
        (self.folder / "training.json").write_text(json.dumps(record.__dict__) + "\n")

    def infscan(self, name: str, kept: bool = False, **settings: Any) -> Callable[[], Outcome]:
        """jobs/scan.py with scan.scores=all: what is scored is what its rows are drawn from.

        kept: a finished run is read where it lies, and not made again.
        """
        output = self.folder / "infscan" / name.replace(" ", "-").replace(",", "")
        given: dict[str, Any] = {
            "model.path": self.folder / "model",
            "corpus.path": self.folder / "scanned.jsonl",
            "corpus.tokens_field": "input_ids",
            "corpus.packing": "document",
            "queries.path": self.folder / "questions.jsonl",
            "factors.num_sequences": self.options.fitted,
            # Partial sums are for workers that share a fit, and for a fit that is interrupted.
            "factors.slices": 1,
            "cluster.num_workers": 1,
            "cluster.cpus_per_rank": self.options.threads,
            "scan.top_k": self.options.top,
            "scan.candidates": self.options.candidates or 2 * self.options.top,
            "scan.check_sequences": self.options.check or max(1, self.options.scanned // 20),
            "scan.energy": self.options.energy,
            "scan.sides": "proponents",
            "scan.scores": "all",
            "seed": self.options.seed,
            "output": output,
        }

        def run() -> Outcome:
            if kept and (output / "_SUCCESS").exists():
                return self._outcome(output, 0.0)
            shutil.rmtree(output, ignore_errors=True)
            overrides = [f"{key}={'null' if value is None else value}" for key, value in (given | settings).items()]
            life, _ = self._process([sys.executable, str(HERE.parent / "jobs" / "scan.py"), *overrides])
            return self._outcome(output, life)

        return run

    def _outcome(self, output: Path, life: float) -> Outcome:
        seconds = {key: phase["seconds"] for key, phase in read_summary(str(output))["phases"].items()}
        phases = {word: sum(seconds.pop(key, 0.0) for key in keys) for word, keys in PHASES.items()}
        phases[OTHERS] = sum(seconds.values())
        published: dict[str, set[int]] = {query: set() for query in self.ids}
        for row in read_top(str(output)).to_pylist():
            published[row["query_id"]].add(row["sequence_id"])
        if not (output / SCORES).exists():
            return Outcome(phases, life, None, published)
        dense = read_scores(str(output)).sort_by("sequence_id")
        scores = np.stack([dense[score_column(query)].to_numpy() for query in self.ids])
        return Outcome(phases, life, scores, published)

    def rival(self, name: str, python: Path, *settings: str) -> Callable[[], Outcome]:
        output = self.folder / name

        def run() -> Outcome:
            shutil.rmtree(output, ignore_errors=True)
            script = HERE / "rivals" / f"run_{name}.py"
            threads = f"--threads={self.options.threads}"
            command = [str(python), str(script), str(self.folder), f"--output={output}", threads, *settings]
            life, said = self._process(command)
            return Outcome(json.loads(said.splitlines()[-1]), life, np.load(output / "scores.npy"))

        return run

    def _process(self, command: list[str]) -> tuple[float, str]:
        began = time.perf_counter()
        said = said_by(command, self.options.threads)
        return time.perf_counter() - began, said


def said_by(command: list[str], threads: int) -> str:
    """What a program of its own prints; where it fails, this one ends with what it says."""
    quiet = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def judged(name: str, runs: list[Outcome], reference: Outcome, base: list[Outcome], top: int) -> dict[str, Any]:
    """One program's row: its times, and how near its scores are to the reference's.

    Recall: the share of the reference's `top` that is published; for a program that publishes nothing, that is among
    its own `top` highest scores.
    """
    assert reference.scores is not None
    scores, published = runs[0].scores, runs[0].published
    best = np.argsort(-reference.scores, axis=1, kind="stable")[:, :top]
    if published is None:
        assert scores is not None
        found = [set(row) for row in np.argsort(-scores, axis=1, kind="stable")[:, :top].tolist()]
    else:
        found = list(published.values())
    recall = float(np.mean([len(set(mine) & theirs) / top for mine, theirs in zip(best.tolist(), found, strict=True)]))
    # A sieve leaves most sequences without a score.
    pearson = None if scores is None else agreement(reference.scores, scores, seed=0, resamples=200).mean
    times = [run.seconds / ours.seconds for run, ours in zip(runs, base, strict=True)]
    return {
        "program": name,
        "phases": {key: median(run.phases[key] for run in runs) for key in runs[0].phases},
        "seconds": median(run.seconds for run in runs),
        "life": median(run.life for run in runs),
        "times_infscan": median(times),
        "times_min": min(times),
        "times_max": max(times),
        "pearson": pearson,
        "recall": recall,
    }


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    title = (
        f"{options.queries} queries, {options.fitted} sequences fitted, {options.scanned} scanned, T={options.length}, "
        f"GPT-NeoX {options.layers} layers, d={options.width}"
    )
    table = Table(title=title)
    for column in (
        "program",
        "by phase, s",
        "s",
        "whole process",
        "times infscan",
        "Pearson",
        f"recall of {options.top}",
    ):
        table.add_column(column, justify="left" if column in ("program", "by phase, s") else "right")
    for row in rows:
        table.add_row(
            row["program"],
            "  ".join(f"{key} {value:.1f}" for key, value in row["phases"].items()),
            f"{row['seconds']:.1f}",
            f"{row['life']:.1f}",
            f"{row['times_infscan']:.2f} ({row['times_min']:.2f}-{row['times_max']:.2f})",
            "-" if row["pearson"] is None else f"{row['pearson']:.4f}",
            f"{row['recall']:.3f}",
        )
    Console(width=170).print(table)


def main() -> None:
    options = arguments()
    job = Job(options)
    programs: dict[str, Callable[[], Outcome]] = {}
    for dtype in options.dtypes:
        for rank in options.ranks:
            programs[f"infscan, rank {rank}, {dtype}"] = job.infscan(
                f"rank {rank} {dtype}", options.keep, **{"model.dtype": dtype, "scan.rank": rank}
            )
            for blocks in options.sieves:
                programs[f"infscan, rank {rank}, {dtype}, sieve of {blocks}"] = job.infscan(
                    f"rank {rank} {dtype} sieve {blocks}",
                    options.keep,
                    **{"model.dtype": dtype, "scan.rank": rank, "scan.sieve": blocks, "scan.scores": "top"}
                    # What is the default of a larger corpus.
                    | {"scan.audit_sequences": max(1, options.scanned // 10)},
                )
    if options.kronfluence:
        programs["kronfluence, rank 32, float32"] = job.rival("kronfluence", options.kronfluence)
    if options.bergson:
        programs["bergson, full rank, float32"] = job.rival("bergson", options.bergson)
    reference = job.infscan("reference", kept=True, **{"model.dtype": "float32", "scan.rank": None})()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, run in programs.items():
            outcomes[name].append(run())
            print(f"{name}: {outcomes[name][-1].seconds:.1f} s of {outcomes[name][-1].life:.1f} s", flush=True)
    base = next(iter(outcomes.values()))
    rows = [judged(REFERENCE, [reference] * options.rounds, reference, base, options.top)]
    rows += [judged(name, runs, reference, base, options.top) for name, runs in outcomes.items()]
    show(rows, options)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "whole-job.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    path.write_text(json.dumps({"settings": settings, "versions": versions, "rows": rows}, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
