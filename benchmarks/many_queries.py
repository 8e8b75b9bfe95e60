"""A thousand queries at once: what is kept of full rank, and what a scan with them costs (docs/performance.md).

python benchmarks/many_queries.py [--folder runs/compression] [--queries 1000] [--energies 0.9 0.95] ...

On the trained model of `compression.py`. The queries are windows of held-out documents. `scan.rank=auto` lays them out
as a run would; `--judged` of them are scored at full rank too, against 20,000 sequences, and their strongest are looked
for. Then scans with all of them take turns with the floor, forward and activation gradients alone.
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
from compression import RECALLS, RESULTS, Arrays, Bench, Fitted, judged, options_parser, recalls, say
from floor import floor
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from infscan.config import MOST_RANK, Compression, Dtype, ScanConfig
from infscan.corpus.plan import Selection
from infscan.corpus.sequences import Sequence
from infscan.influence.layers import Layer
from infscan.influence.score import LayerQueries, score_layer
from infscan.passes.joint import JointTask, joint_task, room, with_joint, worthwhile
from infscan.passes.queries import QueryTask, query_task
from infscan.passes.query_batch import (
    allotted,
    in_dtype,
    layout,
    multiplied_out,
    on_device,
    query_weights,
    read_query_batch,
)
from infscan.queries import Query
from infscan.storage import Store

_GROUP = 100  # queries prepared, or scored at full rank, at once


def arguments() -> argparse.Namespace:
    asked = options_parser(__doc__)
    asked.add_argument("--queries", type=int, default=1000)
    asked.add_argument("--judged", type=int, default=200, help="queries scored at full rank, to be found again")
    asked.add_argument("--sequences", type=int, default=20_000)
    asked.add_argument("--lengths", type=int, nargs="+", default=[64, 256], help="T of the timed sequences")
    asked.add_argument("--query-dtype", type=Dtype, help="scan.query_dtype")
    asked.add_argument("--query-group-bytes", type=int, default=ScanConfig().query_group_bytes)
    asked.add_argument(
        "--timed-tokens", type=int, help="tokens of a timed micro-batch; --tokens-per-batch, if not given"
    )
    asked.add_argument("--repeats", type=int, default=5)
    asked.set_defaults(energies=[0.9, 0.95])
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
        self.columns = read_query_batch(self.store, [[name] for name in names])
        self.weights = query_weights(self.columns, self.layers)
        say(f"{len(self.queries)} queries prepared in {time.perf_counter() - began:.0f} s")

    def _prepared(self, start: int, rank: int | None) -> str:
        name, queries = f"{rank}-{start:06d}.safetensors", self.queries[start : start + _GROUP]
        how = (self.layers, self.fitted.inverse, rank, Compression.weighted, name)
        query_task(self.rank, QueryTask(self.store, name, queries, *how))
        return name

    def laid_out(self, energy: float, tokens: int) -> Arrays:
        """As the job does it: columns by energy, a basis pair where it is cheaper, or matrices multiplied out."""
        arrays = allotted(self.columns, self.layers, energy)
        names = []
        rooms = room(arrays, self.layers, self.entries)
        for number, layer in enumerate(self.layers):
            if not worthwhile(arrays, layer, tokens):
                continue
            names.append((layer, f"joint-{energy}-{tokens}-{number}.safetensors"))
            task = JointTask(
                store=self.store,
                name=names[-1][1],
                layer=layer,
                inverse=self.fitted.inverse,
                compression=Compression.weighted,
                weights=self.weights,
                kept=energy,
                tokens=tokens,
                entries=rooms[layer.name],
                fingerprint="",
            )
            joint_task(self.rank, task, arrays)
        return multiplied_out(with_joint(arrays, self.store, names), self.layers, tokens, self.entries)

    @property
    def entries(self) -> int:
        dtype = in_dtype(self.options.query_dtype, self.rank.model.dtype)
        return self.options.query_group_bytes // dtype.itemsize

    def full_rank(self, sequences: list[Sequence]) -> np.ndarray:
        """Scores [judged, N] at full rank, a group of queries after the other."""
        found = []
        for start in range(0, self.options.judged, _GROUP):
            arrays = read_query_batch(self.store, [[self._prepared(start, None)]])
            found.append(self.fitted.score(sequences, {"": on_device(self.rank, arrays)})[""])
        return np.concatenate(found)[: self.options.judged]

    def first(self, batch: dict[str, LayerQueries]) -> dict[str, LayerQueries]:
        """The judged queries alone, as all of them are laid out."""
        count, found = self.options.judged, {}
        for name, queries in batch.items():
            if queries.K_qmn is not None:
                K_qm = None if queries.K_qm is None else queries.K_qm[:count]
                found[name] = replace(queries, ranks=queries.ranks[:count], K_qmn=queries.K_qmn[:count], K_qm=K_qm)
            else:
                found[name] = LayerQueries.full(queries.multiplied_out()[:count])
        return found


def timed(many: Many, batch: dict[str, LayerQueries], length: int) -> dict[str, Any]:
    """Seconds of a scan's scoring pass and of the floor right before it, in turns, on random sequences of T tokens."""
    rank, options = many.rank, many.options
    tokens_per_batch = options.timed_tokens or options.tokens_per_batch
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
    return {"length": length, "ratio": median(ratios), "min": min(ratios), "max": max(ratios), "rounds": rounds[1:]}


def shapes(arrays: Arrays, layers: tuple[Layer, ...]) -> dict[str, str]:
    """How each layer is scored: its way, and a basis pair's sizes."""
    found = {}
    for layer in layers:
        way = layout(arrays, layer)
        sizes = arrays[f"{layer.name}|K"].shape[1:] if way == "joint" else ()
        found[layer.name] = " ".join([way, *(["x".join(map(str, sizes))] if sizes else [])])
    return found


def main() -> None:
    began = time.perf_counter()
    options = arguments()
    disable_progress_bar()
    many = Many(Bench(options), options)
    ids = Selection.of(many.fitted.bench.corpus.sequences, options.sequences, options.seed + 2).ids()
    sequences = many.fitted.bench.corpus.read(ids)
    truth = many.full_rank(sequences)
    say(f"full rank: {time.perf_counter() - began:.0f} s")
    rows = []
    for energy in options.energies:
        arrays = many.laid_out(energy, options.length)
        batch = on_device(many.rank, arrays, options.query_dtype)
        found = many.fitted.score(sequences, {"": many.first(batch)})[""]
        row: dict[str, Any] = {
            "energy": energy,
            "layers": shapes(arrays, many.layers),
            "pearson": judged(truth, found, options),
            **recalls(truth, found),
            "timed": [],
        }
        say(json.dumps(row | {"pearson": row["pearson"]["mean"]}))
        # Gigabytes each: the next layout has no room beside them.
        del arrays, batch, found
        for length in options.lengths:
            there = many.laid_out(energy, length)
            row["timed"].append(
                timed(many, on_device(many.rank, there, options.query_dtype), length)
                | {"layers": shapes(there, many.layers)}
            )
            del there
            say(json.dumps(row["timed"][-1]))
        rows.append(row)
    table = Table(title=f"{len(many.queries)} queries, {len(sequences)} sequences, {options.judged} queries judged")
    for column in ("energy", "layers", "Pearson", "worst", *(f"top {top} in {among}" for top, among in RECALLS)):
        table.add_column(column)
    for length in options.lengths:
        table.add_column(f"floors, T={length}")
    for row in rows:
        ways = Counter(way.split()[0] for way in row["layers"].values())
        table.add_row(
            f"{row['energy']}",
            ", ".join(f"{count} {way}" for way, count in ways.items()),
            f"{row['pearson']['mean']:.4f}",
            f"{row['pearson']['min']:.4f}",
            *(
                "-" if share is None else f"{share:.3f}"
                for share in (row[f"recall_{top}_of_{k}"] for top, k in RECALLS)
            ),
            *(f"{one['ratio']:.2f} ({one['min']:.2f} - {one['max']:.2f})" for one in row["timed"]),
        )
    Console(width=130).print(table)
    settings = {name: value for name, value in vars(options).items() if name != "folder"}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "many-queries.json"
    result = {"settings": settings, "versions": versions, "rows": rows, "seconds": time.perf_counter() - began}
    path.write_text(json.dumps(result, indent=2) + "\n")
    say(f"written to {path}")


if __name__ == "__main__":
    main()
