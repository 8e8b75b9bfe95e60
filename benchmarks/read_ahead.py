"""A scan from a slow store, with the next shard read while this one is computed, and without.

python benchmarks/read_ahead.py [--read-s 1.0] [--compute-s 1.0] [--shards 16]     (`make bench`)

The rank's and the executor's own code in this process, over a corpus whose every read takes so long, and a computation
that takes so long: both sleep, so that what else the machine does hardly counts. The bounds are shards x (read +
compute), and read + (shards - 1) x max(read, compute) + compute.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.read_ahead import ReadAhead, Reads
from infscan.engine.executor import Step
from infscan.engine.in_process import InProcessExecutor
from infscan.model.loaded import RankContext
from infscan.storage import Store


def seconds(read_s: float, compute_s: float, shards: int) -> float:
    """One scan's."""
    ahead, corpus = ReadAhead(), CorpusAddress(Store("memory://slow"))

    def read(ids: np.ndarray) -> Any:
        time.sleep(read_s)
        return ids

    def reads(shard: int) -> Reads:
        return Reads(corpus, np.array([shard]))

    def scan(worker: Any, shard: int) -> None:
        ahead.read(reads(shard), SimpleNamespace(read=read))  # type: ignore[arg-type]
        time.sleep(compute_s)

    def attempt(function: Any, oom_retries: int, *arguments: Any, following: Reads | None) -> Any:
        ahead.next = following
        return function(None, *arguments)

    worker: Any = SimpleNamespace(context=RankContext(), device="cpu", attempt=attempt)
    began = time.perf_counter()
    InProcessExecutor.on(worker).run(Step("scan", "shards", range(shards), scan, lambda shard: shard, reads=reads))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read-s", type=float, default=1.0)
    parser.add_argument("--compute-s", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=16)
    given = parser.parse_args()
    sizes = (given.read_s, given.compute_s, given.shards)
    with mock.patch.object(ReadAhead, "begin", return_value=None):
        without = seconds(*sizes)
    least = given.read_s + (given.shards - 1) * max(given.read_s, given.compute_s) + given.compute_s
    print(f"one after the other: {without:.1f} s (at least {given.shards * (given.read_s + given.compute_s):.1f})")
    print(f"the next one read meanwhile: {seconds(*sizes):.1f} s (at least {least:.1f})")


if __name__ == "__main__":
    main()
