"""What the first shards of a scan cost, which are handed out without a threshold, and what a sample's would save.

python benchmarks/first_wave.py [--shard 4096] [--queries 10 1000] [--candidates 400] [--tokens 512]     (`make bench`)

A shard keeps its C best rows for each query and side, and none below the C-th best that are in storage. The rank's and
the driver's own code chooses rows of normal scores, writes the file (to memory) and merges it; CPU seconds. A threshold
of m sampled sequences is the C-th best of m scores: no other bound is valid, since the C-th best of fewer rows than C
is none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infscan.corpus.sequences import Sequence
from infscan.influence.shard_rows import shard_rows
from infscan.influence.topk_tracker import ScoredRows, TopKTracker
from infscan.results.shard_file import ShardCounts, shard_path, write_shard
from infscan.storage import Store

SIDES = ("proponent", "opponent")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", type=int, default=4096, help="sequences of a shard")
    parser.add_argument("--queries", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--candidates", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    n, C, rng = given.shard, given.candidates, np.random.default_rng(0)
    sequences = [Sequence(number, rng.integers(0, 50_000, given.tokens), (), 0, "corpus") for number in range(n)]
    table = Table("queries", "threshold of", "rows", "file, MB", "choose, s", "write, s", "driver merges, s")
    for queries in given.queries:

        def scores(count: int, queries: int = queries) -> Tensor:
            return torch.from_numpy(rng.standard_normal((count, queries)).astype(np.float32))

        def chosen(scores_nq: Tensor, first: int, tracker: TopKTracker) -> ScoredRows:
            return shard_rows(scores_nq, np.arange(first, first + len(scores_nq)), SIDES, C, tracker.thresholds)

        mine, names = scores(n), [f"query-{query}" for query in range(queries)]
        for label, sampled in (("nothing", 0), ("1/4 shard", n // 4), ("1 shard", n), ("4", 4 * n), ("64", 64 * n)):
            tracker = TopKTracker(queries, SIDES, C)
            for first in range(n, n + sampled, n):
                tracker.add(chosen(scores(min(n, n + sampled - first)), first, tracker))
            choosing, hits = timed(lambda tracker=tracker, mine=mine: chosen(mine, 0, tracker))
            store, losses = Store(f"memory://{queries}-{sampled}"), np.zeros(n, np.float32)
            counts = ShardCounts(n, n * given.tokens, 0, n, len(hits))
            writing, _ = timed(
                lambda to=store, rows=hits, ids=names, counts=counts, losses=losses: write_shard(
                    to, "shard", sequences, losses, rows, ids, counts, "scan"
                )
            )
            merging, _ = timed(lambda tracker=tracker, rows=hits: (tracker.add(rows), tracker.thresholds))
            size = len(store.read(shard_path("shard"))) / 1e6
            seconds = [f"{one:.2f}" for one in (choosing, writing, merging)]
            table.add_row(str(queries), label, f"{len(hits):,}", f"{size:.1f}", *seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
