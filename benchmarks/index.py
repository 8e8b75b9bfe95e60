"""What an index's codes find, against their bytes, and how fast an index is searched (docs/reports/index.md).

python benchmarks/index.py codes [--folder runs/index-codes] [--model infscan://demo/model] [--documents N] ...
python benchmarks/index.py search [--folder runs/index-search] [--rows 1000000] [--queries 1 100] [--threads 2]

codes: one pass over a corpus scores every sequence at full rank and keeps the widest codes of both kinds in float32;
narrower ones are parts of them (the leading columns of a frame are a frame; cells of a sketch are folded). Each is
quantised as `infscan index` does, and searched as `infscan ask` does. Without --model a GPT-NeoX is trained on the
corpus beside this file. search: an index of random rows on the local disk, and questions to all of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compression import Bench, Fitted, options_parser, say
from torch import Tensor

from infscan.config import Dtype
from infscan.influence.agreement import pearson
from infscan.influence.codes import CodeSettings, layer_code
from infscan.influence.layers import Layer
from infscan.influence.packed import Bits, QueryCodes, inner_products, store
from infscan.influence.score import LayerQueries, score_layer
from infscan.results.index_file import codes_bytes, codes_path, column_of, row_bytes
from infscan.steps.preconditioner import core, layer_factors, sources
from infscan.steps.search import FileGroup, Search, search_files
from infscan.storage import Store

HERE = Path(__file__).parent
WIDEST = 128
SHARES = ((10, 0.005), (10, 0.01), (50, 0.02), (100, 0.02), (100, 0.05))
Floats = np.ndarray[Any, np.dtype[np.float32]]


class FoundModel(Bench):
    """The bench with a model that is there, in place of one that is trained for it."""

    def _train(self, settings: Any, heldout: list[list[int]]) -> dict[str, Any]:
        target = self.folder / "model"
        target.mkdir(exist_ok=True)
        source = Store(self.options.model)
        for entry in source.list():
            Store(str(target)).write(entry.name, source.read(entry.name))
        return {}


def float_codes(options: argparse.Namespace) -> dict[str, Any]:
    """Exact scores [N, Q] and, by kind and layer, u [N, D] (half precision, as a file has it) and v [Q, D]."""
    torch.set_num_threads(options.threads)
    bench = FoundModel(options) if options.model else Bench(options)
    fitted = Fitted(bench, Dtype.float32, 0)
    rank, layers = fitted.rank, fitted.plan.layers
    N, Q = bench.corpus.sequences, len(bench.queries)
    say(f"{N} sequences, {bench.corpus.tokens} tokens, {Q} queries, {len(layers)} layers")
    known = {layer.name: layer_factors(fitted.inverse, layer, "cpu", torch.float32) for layer in layers}
    V = sources(rank, bench.queries, layers, fitted.inverse)
    C = {layer.name: torch.stack([core(one, layer, known[layer.name]) for one in V[layer.name]]) for layer in layers}
    exact: dict[str, LayerQueries] = {}
    for layer in layers:
        factors = known[layer.name]
        assert factors is not None
        exact[layer.name] = LayerQueries.dense(factors[0].Q_S @ C[layer.name] @ factors[0].Q_A.T, bias=layer.bias)
    kinds = ("projected", "sketched")
    maps = {
        (kind, layer.name): layer_code(CodeSettings(kind, WIDEST), layer, known[layer.name], "cpu", torch.float32)
        for kind in kinds
        for layer in layers
    }
    scores = np.zeros((N, Q), np.float32)
    u = {
        (kind, layer.name): np.zeros((N, CodeSettings(kind, WIDEST).coordinates(layer)), np.float16)
        for kind, layer in ((kind, layer) for kind in kinds for layer in layers)
    }
    spent = dict.fromkeys(("score", *kinds), 0.0)
    began = time.perf_counter()
    sequences = bench.corpus.read(np.arange(N))
    for number, batch in enumerate(rank.batches(sequences, options.tokens_per_batch)):
        rows = batch.rows

        def consume(layer: Layer, s: Tensor, a: Tensor, _: object, rows: Any = rows) -> None:
            now = time.perf_counter()
            scores[rows] += score_layer(s, a, exact[layer.name]).numpy()
            spent["score"] += time.perf_counter() - now
            for kind in kinds:
                now = time.perf_counter()
                found = maps[kind, layer.name].of_tokens(s, a)
                spent[kind] += time.perf_counter() - now
                u[kind, layer.name][rows] = found.numpy()

        rank.backward(batch, layers, batch.loss(), consume, ones=False)
        if number % 20 == 19:
            say(f"{number + 1} batches in {time.perf_counter() - began:.0f} s")
    seconds = time.perf_counter() - began
    return {
        "scores": scores,
        "u": u,
        "v": {key: maps[key].of_query(C[key[1]]).numpy() for key in u},
        "layers": layers,
        "seconds": {"pass": seconds, **spent, "floor": seconds - sum(spent.values())},
    }


def narrowed(kind: str, layer: Layer, values: Floats, width: int) -> Floats:
    """Codes of a narrower width, from the widest ones: [n, D]."""
    if kind == "sketched":
        folds = values.shape[1] // min(width**2, values.shape[1])
        return values.reshape(len(values), folds, -1).sum(axis=1)
    m, n = min(WIDEST, layer.outputs), min(WIDEST, layer.inputs)
    part = values.reshape(len(values), m, n)[:, :width, :width]
    # A frame's columns have the length sqrt(n / m).
    scale = np.sqrt(m / part.shape[1]) * np.sqrt(n / part.shape[2])
    return np.ascontiguousarray((part * np.float32(scale)).reshape(len(values), -1))


def row_of(known: dict[str, Any], kind: str, width: int, bits: Bits, chosen: list[Layer], name: str) -> dict[str, Any]:
    """How the scores of one code agree with exact ones."""
    exact = known["scores"]
    found = np.zeros_like(exact)
    for layer in chosen:
        u = narrowed(kind, layer, known["u"][kind, layer.name].astype(np.float32), width)
        v = narrowed(kind, layer, known["v"][kind, layer.name], width)
        kept = store(u, bits, layer.size)
        found += inner_products(kept.codes, kept.scales, QueryCodes.of(v, bits))
    bytes_of = {layer.name: CodeSettings(kind, width, bits).code_bytes(layer) for layer in chosen}  # type: ignore[arg-type]
    r = pearson(exact.T, found.T)
    return {
        "code": name,
        "bytes": sum(bytes_of.values()),
        "row_bytes": row_bytes(bytes_of),
        "pearson": float(np.mean(r)),
        "pearson_min": float(np.min(r)),
        **{f"top {k} in {share:.1%}": recall(exact, found, k, share) for k, share in SHARES},
    }


def recall(exact: Floats, found: Floats, k: int, share: float) -> float:
    """The share of exact scores' strongest k that are among the strongest `share` of all by the index, over queries."""
    C = max(k, round(share * len(exact)))
    best = np.argsort(-exact, axis=0)[:k]
    chosen = np.argsort(-found, axis=0)[:C]
    return float(np.mean([np.isin(best[:, q], chosen[:, q]).mean() for q in range(exact.shape[1])]))


def codes(options: argparse.Namespace) -> dict[str, Any]:
    known = float_codes(options)
    layers = list(known["layers"])
    thirds = [layer for layer in layers if int(layer.name.split("layers.")[1].split(".")[0]) % 2 == 1]
    rows = []
    for kind in ("projected", "sketched"):
        for width in (16, 32, 45, 64, 91, 128):
            if kind == "sketched" and width in (45, 91):
                continue
            for bits in (1, 8):
                rows.append(row_of(known, kind, width, bits, layers, f"{kind} {width}, {bits} bit"))  # type: ignore[arg-type]
    for width in (32, 64):
        rows.append(row_of(known, "projected", width, 1, thirds, f"projected {width}, 1 bit, every other block"))
    for row in sorted(rows, key=lambda row: row["bytes"]):
        shown = "  ".join(f"{row[key]:.3f}" for key in row if key not in ("code", "bytes", "row_bytes"))
        say(f"{row['code']:44s} {row['bytes']:8d} {shown}")
    return {"rows": rows, "seconds": known["seconds"], "sequences": len(known["scores"]),
            "queries": known["scores"].shape[1]}  # fmt: skip


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Questions to an index of random rows: D coordinates of one bit in each of so many layers."""
    folder, rng = Store(str(options.folder.absolute())), np.random.default_rng(0)
    names = [f"layer-{number}" for number in range(options.layers_of_index)]
    D, shard = options.coordinates, 4096
    files = []
    for first in range(0, options.rows, shard):
        n, name = min(shard, options.rows - first), codes_path(f"shard-{first // shard:06d}")
        columns: dict[str, Any] = {"sequence_id": np.arange(first, first + n)}
        for layer in names:
            columns[column_of("code", layer)] = rng.integers(0, 256, (n, D // 8), np.uint8)
            columns[column_of("scale", layer)] = np.ones(n, np.float32)
        data, seal = codes_bytes(name, columns, "random", {"rows": n, "tokens": 0, "nonfinite": 0})
        if not folder.exists(name):
            folder.write(name, data)
        files.append((name, seal))
    size = options.rows * len(names) * D // 8
    found = []
    for Q in options.queries:
        queries = {layer: QueryCodes.of(rng.standard_normal((Q, D)).astype(np.float32), 1) for layer in names}
        # Digests take as long whatever is asked.
        for verify in (True, False) if options.queries[0] == Q else (False,):
            began, cpu = time.perf_counter(), time.process_time()
            asked = Search(queries, ("proponent", "opponent"), 400, verify)
            best = search_files(FileGroup(folder, tuple(files), options.rows), asked, options.threads)
            seconds, used = time.perf_counter() - began, time.process_time() - cpu
            row = {"queries": Q, "verify": verify, "seconds": seconds, "cpu_seconds": used, "rows": len(best)}
            found.append(row | {"bytes_per_s": size / seconds})
            say(f"{Q} queries, digests {'checked' if verify else 'known'}: {seconds:.1f} s ({used:.1f} s of a core), "
                f"{size / seconds / 1e9:.2f} GB/s")  # fmt: skip
    began = time.perf_counter()
    for name, _ in files:
        view = folder.mapped(name)
        assert view is not None
        np.frombuffer(view, np.uint8).max()
    memory = size / (time.perf_counter() - began)
    say(f"reading it alone, one thread: {memory / 1e9:.2f} GB/s")
    return {"searches": found, "bytes": size, "read_bytes_per_s": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    base = options_parser(None)
    of_codes = parts.add_parser("codes", parents=[base], add_help=False, conflict_handler="resolve")
    of_codes.add_argument("--model", help="a model that is there, in place of training one")
    of_search = parts.add_parser("search")
    of_search.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "index-search")
    of_search.add_argument("--rows", type=int, default=1_000_000)
    of_search.add_argument("--layers-of-index", type=int, default=4)
    of_search.add_argument("--coordinates", type=int, default=4096)
    of_search.add_argument("--queries", type=int, nargs="+", default=[1, 10, 100])
    of_search.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    result = codes(options) if options.part == "codes" else search(options)
    path = HERE / "results" / f"index-{options.part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": platform.processor(), **result}, indent=1) + "\n")
    say(f"written to {path}")


if __name__ == "__main__":
    main()
