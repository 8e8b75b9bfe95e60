"""A thousand queries at once: what is kept of full rank, and what a scan with them costs (docs/reports/performance.md).

python benchmarks/many_queries.py [--folder runs/compression] [--queries 1000] [--energies 0.95] ...

On the trained model of `compression.py`. The queries are windows of held-out documents. `scan.rank=auto` lays them out
as a run would, and scans with all of them take turns with the floor, forward and activation gradients alone. Then
`--judged` of them are scored against 20,000 sequences, as laid out and at full rank, whose strongest are looked for.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from compression import RECALLS, RESULTS, Bench, Fitted, judged, options_parser, recalls, say
from floor import floor
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from infscan.config import MOST_RANK, Compression, Dtype, ScanConfig
from infscan.corpus.plan import Selection
from infscan.corpus.sequences import Sequence
from infscan.influence.layers import Layer
from infscan.influence.layout import LayoutPlan, QueryBatch, lay_out, plan_layouts, query_weights
from infscan.influence.score import LayerQueries, score_layer
from infscan.queries import Query
from infscan.steps.inputs import in_dtype
from infscan.steps.queries import (
    QueryTask,
    SharedBasisTask,
    on_device,
    query_task,
    read_query_batch,
    read_shared_bases,
    shared_basis_task,
)
from infscan.storage import Store

_GROUP = 100  # queries prepared, or scored at full rank, at once


def arguments() -> argparse.Namespace:
    asked = options_parser(__doc__)
    asked.add_argument("--queries", type=int, default=1000)
    asked.add_argument("--judged", type=int, default=200, help="queries scored at full rank, to be found again")
    asked.add_argument("--sequences", type=int, default=20_000)
    asked.add_argument("--timed-length", type=int, default=256, help="T of the timed sequences")
    asked.add_argument("--query-dtypes", type=Dtype, nargs="+", default=[Dtype.float32, Dtype.bfloat16])
    asked.add_argument("--query-group-bytes", type=int, default=ScanConfig().query_group_bytes)
    asked.add_argument("--timed-tokens", type=int, nargs="+", default=[4096, 16384], help="of a timed micro-batch")
    asked.add_argument("--repeats", type=int, default=5)
    asked.set_defaults(energies=[0.95])
    return asked.parse_args()


def windows(bench: Bench, count: int) -> tuple[Query, ...]:
    """Of the held-out documents, every window of T tokens, half of one apart; a third of T is the completion."""
    T = bench.options.length
    rows = [
        {"id": f"{number}-{start}", "input_ids": ids[start : start + T].tolist(), "prompt_len": 2 * T // 3}
        for number, ids in enumerate(bench.heldout)
        for start in range(0, len(ids) - T + 1, T // 2)
    ]
    assert len(rows) >= count, f"the held-out documents give {len(rows)} windows"
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return bench.read_queries([rows[number] for number in sorted(chosen)])


class Many:
    """A thousand queries' batch, as `scan.rank=auto` lays it out."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self.options = options
        self.queries = windows(bench, options.queries)
        self.fitted = Fitted(bench, Dtype.float32, options.seed)
        self.layers, self.rank = self.fitted.plan.layers, self.fitted.rank
        self.store = Store("memory://many-queries")
        began = time.perf_counter()
        names = [self._prepared(start, MOST_RANK) for start in range(0, len(self.queries), _GROUP)]
        self.stored = read_query_batch(self.store, [[name] for name in names])
        self.weights = query_weights(self.stored.spectra, self.layers)
        say(f"{len(self.queries)} queries prepared in {time.perf_counter() - began:.0f} s")

    def _prepared(self, start: int, rank: int | None) -> str:
        name, queries = f"{rank}-{start:06d}.safetensors", self.queries[start : start + _GROUP]
        how = (self.layers, self.fitted.inverse, rank, Compression.weighted, name)
        query_task(self.rank, QueryTask(self.store, name, queries, *how))
        return name

    def laid_out(self, energy: float, tokens: int, dtype: Dtype) -> tuple[QueryBatch, LayoutPlan]:
        """As the job does it: columns by energy, shared bases where they are cheaper, or dense matrices."""
        entries = self.options.query_group_bytes // in_dtype(dtype, self.rank.model.dtype).itemsize
        plan = plan_layouts(self.stored.spectra, self.layers, tokens, entries, energy, share=True)
        batch, names = lay_out(self.stored.batch, plan), []
        for number, layer in enumerate(self.layers):
            if layer.name not in plan.candidates:
                continue
            names.append((layer, f"joint-{energy}-{tokens}-{number}.safetensors"))
            task = SharedBasisTask(
                store=self.store,
                name=names[-1][1],
                layer=layer,
                inverse=self.fitted.inverse,
                compression=Compression.weighted,
                weights=self.weights,
                energy=energy,
                tokens=tokens,
                entries=plan.candidates[layer.name],
                fingerprint="",
            )
            shared_basis_task(self.rank, task, batch)
        bases = read_shared_bases(self.store, names)
        for _, name in names:
            # Gigabytes, and this storage is in memory.
            self.store.remove(name)
        plan = plan.with_bases({name: found.basis for name, found in bases.items()})
        return lay_out({**batch, **bases}, plan), plan

    def full_rank(self) -> dict[str, LayerQueries]:
        """The judged queries at full rank."""
        groups = [[self._prepared(start, None)] for start in range(0, self.options.judged, _GROUP)]
        return self.first(on_device(self.rank, read_query_batch(self.store, groups).batch))

    def first(self, batch: dict[str, LayerQueries]) -> dict[str, LayerQueries]:
        """The judged queries alone, as all of them are laid out; a copy, that the others need not be held."""
        count, found = self.options.judged, {}
        for name, queries in batch.items():
            if queries.K_qmn is None:
                found[name] = LayerQueries.dense(queries.densify()[:count].clone())
            else:
                K_qm = None if queries.K_qm is None else queries.K_qm[:count].clone()
                cores = {"K_qmn": queries.K_qmn[:count].clone(), "K_qm": K_qm}
                found[name] = replace(queries, ranks=queries.ranks[:count], **cores)
        return found


def timed(many: Many, batch: dict[str, LayerQueries], tokens_per_batch: int) -> dict[str, Any]:
    """Seconds of a scan's scoring pass and of the floor right before it, in turns, on random sequences of T tokens."""
    rank, options, length = many.rank, many.options, many.options.timed_length
    rng, count = np.random.default_rng(0), max(1, tokens_per_batch // length)
    vocabulary = many.fitted.bench.vocab_size
    sequences = [Sequence(n, rng.integers(1, vocabulary, length), (), 0, "") for n in range(count)]
    scores = torch.zeros(count, len(many.queries), device=rank.device)

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
        scores.add_(score_layer(s_bto, a_bti, batch[layer.name]))

    def scan() -> None:
        for one in rank.batches(sequences, tokens_per_batch):
            rank.backward(one, many.layers, one.loss(), consume, ones=False)

    rounds = []
    for _ in range(options.repeats + 1):
        seconds = []
        for run in (partial(floor, rank, sequences, tokens_per_batch), scan):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        rounds.append(seconds)
    ratios = [scan_s / floor_s for floor_s, scan_s in rounds[1:]]
    found = {"ratio": median(ratios), "min": min(ratios), "max": max(ratios), "rounds": rounds[1:]}
    return {"tokens_per_batch": tokens_per_batch} | found


def shapes(plan: LayoutPlan) -> dict[str, str]:
    """How each layer is scored: its way, and a shared basis's size."""
    sizes = {name: " {}x{}".format(*basis) for name, basis in plan.bases.items()}
    return {name: way + sizes.get(name, "") for name, way in plan.ways.items()}


def main() -> None:
    began = time.perf_counter()
    options = arguments()
    disable_progress_bar()
    many = Many(Bench(options), options)
    rows: dict[str, dict[str, Any]] = {}
    batches = {"full rank": many.full_rank()}
    for dtype in options.query_dtypes:
        for energy in options.energies:
            arrays, plan = many.laid_out(energy, options.timed_length, dtype)
            layers, batch = shapes(plan), on_device(many.rank, arrays, dtype)
            # Gigabytes each: the next layout has no room beside them.
            del arrays
            name = f"energy {energy}, {dtype}"
            times = [timed(many, batch, tokens) for tokens in options.timed_tokens]
            rows[name] = {"energy": energy, "query_dtype": dtype, "layers": layers, "timed": times}
            batches[name] = many.first(batch)
            del batch
            say(json.dumps(rows[name]))
    ids = Selection.of(many.fitted.bench.corpus.sequences, options.sequences, options.seed + 2).ids()
    found = many.fitted.score(many.fitted.bench.corpus.read(ids), batches)
    truth = found.pop("full rank")
    table = Table(title=f"{len(many.queries)} queries, {len(ids)} sequences, {options.judged} queries judged")
    for column in ("", "layers", "Pearson", "worst", *(f"top {top} in {among}" for top, among in RECALLS)):
        table.add_column(column)
    for tokens in options.timed_tokens:
        table.add_column(f"floors, {tokens} tokens")
    for name, row in rows.items():
        row |= {"pearson": judged(truth, found[name], options), **recalls(truth, found[name])}
        ways = Counter(way.split()[0] for way in row["layers"].values())
        table.add_row(
            name,
            ", ".join(f"{count} {way}" for way, count in ways.items()),
            f"{row['pearson']['mean']:.4f}",
            f"{row['pearson']['min']:.4f}",
            *(
                "-" if share is None else f"{share:.3f}"
                for share in (row[f"recall_{top}_of_{k}"] for top, k in RECALLS)
            ),
            *(f"{one['ratio']:.2f} ({one['min']:.2f} - {one['max']:.2f})" for one in row["timed"]),
        )
    Console(width=150).print(table)
    settings = {name: value for name, value in vars(options).items() if name != "folder"}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "many-queries.json"
    result = {
        "settings": settings,
        "versions": versions,
        "rows": list(rows.values()),
        "seconds": time.perf_counter() - began,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    say(f"written to {path}")


if __name__ == "__main__":
    main()
