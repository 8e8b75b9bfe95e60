"""A scan from and to a slow store, with the next shard read and the last one written while this one is computed.

python benchmarks/read_ahead.py [--read-s 1.0] [--compute-s 1.0] [--write-s 1.0] [--shards 16]     (`make bench`)

The rank's and the executor's own code in this process, over a corpus whose every read takes so long, a computation and
a write that take so long: all sleep, so that what else the machine does hardly counts. The bounds are shards x (read +
compute + write); read + shards x (compute + write), where that takes longer than reading; and read + compute + write +
(shards - 1) x the longest of the three.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.read_ahead import ReadAhead, Reads
from infscan.engine.executor import Step
from infscan.engine.in_process import InProcessExecutor
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker
from infscan.storage import Store
from infscan.storage.write_behind import WriteBehind


def seconds(read_s: float, compute_s: float, write_s: float, shards: int) -> float:
    """One scan's."""
    corpus = CorpusAddress(Store("memory://slow"))
    # A rank without a model.
    worker = ModelWorker.__new__(ModelWorker)
    worker.context, worker.ahead, worker.behind, worker._writes_later = RankContext(), ReadAhead(), WriteBehind(), False

    def read(ids: np.ndarray) -> Any:
        time.sleep(read_s)
        return ids

    def reads(shard: int) -> Reads:
        return Reads(corpus, np.array([shard]))

    def scan(worker: ModelWorker, shard: int) -> None:
        worker.ahead.read(reads(shard), SimpleNamespace(read=read))  # type: ignore[arg-type]
        time.sleep(compute_s)
        worker.later(lambda: time.sleep(write_s))

    began = time.perf_counter()
    InProcessExecutor.on(worker).run(Step("scan", "shards", range(shards), scan, lambda shard: shard, reads=reads))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read-s", type=float, default=1.0)
    parser.add_argument("--compute-s", type=float, default=1.0)
    parser.add_argument("--write-s", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=16)
    given = parser.parse_args()
    sizes = read_s, compute_s, write_s, shards = given.read_s, given.compute_s, given.write_s, given.shards
    at_least = (
        shards * sum(sizes[:3]),
        read_s + (shards - 1) * max(read_s, compute_s + write_s) + compute_s + write_s,
        read_s + compute_s + (shards - 1) * max(sizes[:3]) + write_s,
    )
    without = (
        mock.patch.object(ModelWorker, "later", lambda worker, write: write()),
        mock.patch.object(ReadAhead, "begin", return_value=None),
    )
    names = "one after the other", "the next one read meanwhile", "and the last one written meanwhile"
    for name, least, patches in zip(names, at_least, (without, without[:1], ()), strict=True):
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            print(f"{name}: {seconds(*sizes):.1f} s (at least {least:.1f})")


if __name__ == "__main__":
    main()
