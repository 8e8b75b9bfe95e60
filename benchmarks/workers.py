"""What a second worker brings: the seconds of the same scan with one worker and with two, of one thread each, in turns.

python benchmarks/workers.py [--width 512] [--layers 6] [--sequences 96] [--repeats 3] ...

Whole runs of `jobs/scan.py`, each on a Ray of its own; the seconds of the scan are compared: workers have started then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from floor import RESULTS, save_model, write_corpus
from transformers.utils.logging import disable_progress_bar

from infscan.results.read import read_summary

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--shard-sequences", type=int, default=4)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def scan_seconds(folder: Path, options: argparse.Namespace, workers: int, turn: int) -> float:
    """Of the gradient dot product at rank 32: the same scan as with factors, and nothing to fit before."""
    output, shard = folder / f"run-{workers}-{turn}", options.shard_sequences
    command = [
        sys.executable, "jobs/scan.py", f"model.path={folder}/model", f"corpus.path={folder}/corpus.jsonl",
        "corpus.tokens_field=tokens", "corpus.packing=document", f"queries.path={folder}/queries.jsonl",
        "factors=identity", "scan.compression=plain", "scan.check_sequences=0", "scan.top_k=1", "scan.candidates=1",
        f"scan.shard_sequences={shard}", f"scan.tokens_per_batch={shard * options.length}",
        f"cluster.num_workers={workers}", "cluster.cpus_per_rank=1", f"output={output}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    subprocess.run(command, check=True, cwd=HERE.parent, env=environment, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = read_summary(str(output))
    return float(summary["phases"]["scan"]["seconds"])


def main() -> None:
    options = arguments()
    disable_progress_bar()
    rng = np.random.default_rng(options.seed + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(options, folder)
        write_corpus(options, folder)
        asked = rng.integers(1, options.vocab, (options.queries, 20)).tolist()
        lines = [json.dumps({"id": f"q{n}", "input_ids": row, "prompt_len": 16}) for n, row in enumerate(asked)]
        (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
        turns = []
        for turn in range(options.repeats):
            one, two = (scan_seconds(folder, options, workers, turn) for workers in (1, 2))
            turns.append((one, two))
            print(f"one worker {one:.1f} s, two {two:.1f} s: {one / two:.2f}", flush=True)
    ratios = [one / two for one, two in turns]
    print(f"two workers are {median(ratios):.2f} times as fast as one ({min(ratios):.2f} to {max(ratios):.2f})")
    RESULTS.mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "processor": platform.processor()}
    result = {"settings": vars(options), "machine": machine, "seconds": turns, "ratios": ratios}
    (RESULTS / "workers.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
