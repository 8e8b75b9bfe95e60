"""What an index's codes find, against their bytes, and how fast an index is searched (docs/reports/index.md).

python benchmarks/index.py codes [--folder runs/index-codes] [--model infscan://demo/model] [--documents N] ...
python benchmarks/index.py search [--folder runs/index-search] [--rows 1000000] [--queries 1 100] [--threads 2]

codes: one pass over a corpus scores every sequence at full rank and makes the widest codes of both kinds in float32;
narrower ones are parts of them (the leading columns of a frame are a frame; cells of a sketch are folded, 45^2 to
2,048). Each is quantised as `infscan index` does, and searched as `infscan ask` does. --components: principal
components of the sketches too, as a code, as many in every layer or those of the largest variance over all layers.
Without --model a GPT-NeoX is trained on the corpus beside this file.
search: an index of random rows on the local disk, and questions to all of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compression import Bench, Fitted, options_parser, say
from torch import Tensor

from infscan.config import Dtype
from infscan.influence.agreement import pearson
from infscan.influence.codes import CodeSettings, Kind, layer_code
from infscan.influence.layers import Layer
from infscan.influence.packed import Bits, QueryCodes, inner_products, store
from infscan.influence.score import LayerQueries, score_layer
from infscan.results.index_file import codes_bytes, codes_path, column_of
from infscan.steps.preconditioner import core, layer_factors, sources
from infscan.steps.search import FileGroup, Search, search_files
from infscan.storage import Store

HERE = Path(__file__).parent
WIDEST = 128
KINDS: tuple[Kind, ...] = ("projected", "sketched")
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


class Fits:
    """The model, its factors, and both sides of the widest codes of both kinds."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.bench = FoundModel(options) if options.model else Bench(options)
        fitted = Fitted(self.bench, Dtype.float32, 0)
        self.rank, self.layers = fitted.rank, list(fitted.plan.layers)
        self.known = {layer.name: layer_factors(fitted.inverse, layer, "cpu", torch.float32) for layer in self.layers}
        V = sources(self.rank, self.bench.queries, self.layers, fitted.inverse)
        self.exact: dict[str, LayerQueries] = {}
        self.maps = {
            (kind, layer.name): layer_code(
                CodeSettings(kind, WIDEST), layer, self.known[layer.name], "cpu", torch.float32
            )
            for kind in KINDS
            for layer in self.layers
        }
        self.v: dict[tuple[str, str], Floats] = {}
        for layer in self.layers:
            factors = self.known[layer.name]
            assert factors is not None
            C = torch.stack([core(one, layer, factors) for one in V[layer.name]])
            self.exact[layer.name] = LayerQueries.dense(factors[0].Q_S @ C @ factors[0].Q_A.T, bias=layer.bias)
            for kind in KINDS:
                self.v[kind, layer.name] = self.maps[kind, layer.name].of_query(C).numpy()

    def sketches(self, ids: np.ndarray[Any, Any], tokens_per_batch: int) -> dict[str, Floats]:
        """The widest sketches of some sequences, by layer: [n, D]."""
        found = {
            layer.name: np.zeros((len(ids), CodeSettings("sketched", WIDEST).coordinates(layer)), np.float32)
            for layer in self.layers
        }
        for batch in self.rank.batches(self.bench.corpus.read(ids), tokens_per_batch):

            def consume(layer: Layer, s: Tensor, a: Tensor, _: object, rows: Any = batch.rows) -> None:
                found[layer.name][rows] = self.maps["sketched", layer.name].of_tokens(s, a).numpy()

            self.rank.backward(batch, self.layers, batch.loss(), consume, ones=False)
        return found


@dataclass
class Code:
    """A code under test, and its scores so far, [N, Q]. layers: that it keeps."""

    name: str
    kind: str
    layers: list[Layer]
    bits: Bits
    width: int
    scores: Floats
    bytes: int

    def of(self, layer: Layer, values: Floats) -> Floats:
        return narrowed(self.kind, layer, values, self.width)

    def queries(self, fits: Fits) -> dict[str, QueryCodes]:
        return {
            layer.name: QueryCodes.of(self.of(layer, fits.v[self.kind, layer.name]), self.bits) for layer in self.layers
        }


@dataclass
class Components(Code):
    """The leading principal components of sketches, so many of each layer; with one bit, each sign stands for its
    standard deviation."""

    axes: dict[str, Floats] = field(default_factory=dict)
    deviations: dict[str, Floats] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def of(self, layer: Layer, values: Floats) -> Floats:
        """In units of each component's deviation, where signs are kept."""
        count = self.counts[layer.name]
        found = values @ self.axes[layer.name][:, :count]
        return found / self.deviations[layer.name][:count] if self.bits == 1 else found

    def queries(self, fits: Fits) -> dict[str, QueryCodes]:
        found = {}
        for layer in self.layers:
            count = self.counts[layer.name]
            v = fits.v["sketched", layer.name] @ self.axes[layer.name][:, :count]
            weights = self.deviations[layer.name][:count] if self.bits == 1 else 1
            found[layer.name] = QueryCodes.of((v * weights).astype(np.float32), self.bits)
        return found


def principal(sketches_nd: Floats, count: int) -> tuple[Floats, Floats]:
    """Leading axes, [D, count], and the root mean squares along them, [count]."""
    squares, U = np.linalg.eigh(sketches_nd @ sketches_nd.T)
    squares, U = squares[::-1][:count], U[:, ::-1][:, :count]
    roots = np.sqrt(np.maximum(squares, 1e-12))
    return (sketches_nd.T @ (U / roots)).astype(np.float32), (roots / np.sqrt(len(sketches_nd))).astype(np.float32)


def narrowed(kind: str, layer: Layer, values: Floats, width: int) -> Floats:
    """Codes of a narrower width, from the widest ones: [n, D]. A sketch is folded to the next power of two."""
    if kind == "sketched":
        cells = 1 << (min(width**2, values.shape[1]) - 1).bit_length()
        return values.reshape(len(values), values.shape[1] // cells, cells).sum(axis=1)
    m, n = min(WIDEST, layer.outputs), min(WIDEST, layer.inputs)
    part = values.reshape(len(values), m, n)[:, :width, :width]
    # A frame's columns have the length sqrt(n / m).
    scale = np.sqrt(m / part.shape[1]) * np.sqrt(n / part.shape[2])
    return np.ascontiguousarray((part * np.float32(scale)).reshape(len(values), -1))


def codes_under_test(fits: Fits, options: argparse.Namespace) -> list[Code]:
    """Both kinds at several widths, one and eight bits, with all blocks and with some; and principal components."""
    N, Q = fits.bench.corpus.sequences, len(fits.bench.queries)

    def block(layer: Layer) -> int:
        return int(layer.name.split("layers.")[1].split(".")[0])

    parts = {"": fits.layers, ", every other block": [layer for layer in fits.layers if block(layer) % 2 == 1]}
    found: list[Code] = []

    def add(kind: str, width: int, bits: Bits, part: str = "") -> None:
        layers = parts[part]
        cells = {layer.name: narrowed(kind, layer, np.zeros_like(fits.v[kind, layer.name][:1]), width).shape[1]
                 for layer in layers}  # fmt: skip
        size = sum(-(-D * bits // 8) for D in cells.values())
        found.append(Code(f"{kind} {width}, {bits} bit{part}", kind, layers, bits, width, scores(), size))

    def scores() -> Floats:
        return np.zeros((N, Q), np.float32)

    for kind in KINDS:
        for width in (16, 32, 45, 64, 91, 128):
            if width != 91 if kind == "sketched" else width > 32 or not options.brief:
                add(kind, width, 1)
        for width in () if options.brief else (16, 45, 128):
            add(kind, width, 8)
        for width in (64, 128):
            if kind == "sketched" or not options.brief:
                add(kind, width, 1, ", every other block")
    if options.components:
        ids = np.sort(np.random.default_rng(1).choice(N, min(N, options.component_sequences), replace=False))
        began, sketches = time.perf_counter(), fits.sketches(ids, options.tokens_per_batch)
        axes = {name: principal(some, options.components) for name, some in sketches.items()}
        del sketches
        say(f"principal components of {len(ids)} sequences: {time.perf_counter() - began:.0f} s")
        found += list(components_under_test(fits, axes, options.components))
    return found


def components_under_test(fits: Fits, found: dict[str, tuple[Floats, Floats]], most: int) -> Iterator[Components]:
    """Equal counts of every layer, and counts by variance."""
    N, Q, L = fits.bench.corpus.sequences, len(fits.bench.queries), len(fits.layers)
    axes = {name: one[0] for name, one in found.items()}
    deviations = {name: one[1] for name, one in found.items()}
    strongest = np.sort(np.concatenate(list(deviations.values())))[::-1]
    for count, bits in ((128, 1), (256, 1), (512, 1), (1024, 1), (256, 8)):
        if count > most:
            continue
        allotted = {name: int((one >= strongest[L * count - 1]).sum()) for name, one in deviations.items()}
        for how, counts in (("each", dict.fromkeys(axes, count)), ("by variance", allotted)):
            if how == "by variance" and count == most:
                continue
            name = f"{L * count} components, {how}, {bits} bit"
            layers = [layer for layer in fits.layers if counts[layer.name]]
            scores = np.zeros((N, Q), np.float32)
            size = L * count * bits // 8
            yield Components(
                name, "sketched", layers, 1 if bits == 1 else 8, count, scores, size, axes, deviations, counts
            )


def row_of(code: Code, exact: Floats, n: int) -> dict[str, Any]:
    """How the scores of a code agree with exact ones, over the first n sequences."""
    r = pearson(exact[:n].T, code.scores[:n].T)
    return {
        "code": code.name,
        "bytes": code.bytes,
        "pearson": float(np.mean(r)),
        "pearson_min": float(np.min(r)),
        **{f"top {k} in {share:.1%}": recall(exact[:n], code.scores[:n], k, share) for k, share in SHARES},
    }


def cascades(tested: list[Code], exact: Floats, n: int) -> list[dict[str, Any]]:
    """Half of the blocks' codes of every row, then the others' of the best 2, 5 and 10 % alone. bytes: of a row read,
    on average."""
    by_name, found = {code.name: code for code in tested}, []
    for name, first in by_name.items():
        whole = by_name.get(name.removesuffix(", every other block"))
        if whole is None or whole is first:
            continue
        for share in (0.02, 0.05, 0.1):
            kept = np.zeros((n, exact.shape[1]), bool)
            for q, column in enumerate(first.scores[:n].T):
                kept[np.argsort(-column)[: round(share * n)], q] = True
            scores = np.where(kept, whole.scores[:n], -np.inf)
            found.append(
                {
                    "code": f"{whole.name}: half of the blocks, the rest of {share:.0%}",
                    "bytes": round(first.bytes + share * (whole.bytes - first.bytes)),
                    **{f"top {k} in {one:.1%}": recall(exact[:n], scores, k, one) for k, one in SHARES},
                }
            )
    return found


def recall(exact: Floats, found: Floats, k: int, share: float) -> float:
    """The share of exact scores' strongest k that are among the strongest `share` of all by the index, over queries."""
    C = max(k, round(share * len(exact)))
    best = np.argsort(-exact, axis=0)[:k]
    chosen = np.argsort(-found, axis=0)[:C]
    return float(np.mean([np.isin(best[:, q], chosen[:, q]).mean() for q in range(exact.shape[1])]))


def codes(options: argparse.Namespace) -> dict[str, Any]:
    fits = Fits(options)
    bench, N = fits.bench, fits.bench.corpus.sequences
    say(f"{N} sequences, {bench.corpus.tokens} tokens, {len(bench.queries)} queries, {len(fits.layers)} layers")
    exact = np.zeros((N, len(bench.queries)), np.float32)
    tested = codes_under_test(fits, options)
    queries = {code.name: code.queries(fits) for code in tested}
    spent = dict.fromkeys(("score", *KINDS, "quantise and multiply"), 0.0)
    result: dict[str, Any] = {}
    began = time.process_time()
    for first in range(0, N, options.at_once):
        sequences = bench.corpus.read(np.arange(first, min(N, first + options.at_once)))
        for batch in fits.rank.batches(sequences, options.tokens_per_batch):
            rows = first + batch.rows

            def consume(layer: Layer, s: Tensor, a: Tensor, _: object, rows: Any = rows) -> None:
                with clocked(spent, "score"):
                    exact[rows] += score_layer(s, a, fits.exact[layer.name]).numpy()
                u: dict[str, Floats] = {}
                for kind in KINDS:
                    with clocked(spent, kind):
                        u[kind] = fits.maps[kind, layer.name].of_tokens(s, a).numpy()
                with clocked(spent, "quantise and multiply"):
                    for code in tested:
                        if layer.name in queries[code.name]:
                            kept = store(code.of(layer, u[code.kind]), code.bits, layer.size)
                            code.scores[rows] += inner_products(kept.codes, kept.scales, queries[code.name][layer.name])

            fits.rank.backward(batch, fits.layers, batch.loss(), consume, ones=False)
        done = first + len(sequences)
        seconds = time.process_time() - began
        say(f"{done} sequences in {seconds:.0f} s of a core")
        rows_now = sorted((row_of(code, exact, done) for code in tested), key=lambda row: row["bytes"])
        rows_now += cascades(tested, exact, done)
        result = {"rows": rows_now, "sequences": done, "queries": exact.shape[1],
                  "seconds": {"pass": seconds, **spent, "floor": seconds - sum(spent.values())}}  # fmt: skip
        written("codes", result)
    for row in result["rows"]:
        shown = "  ".join(f"{row[key]:.3f}" for key in row if key not in ("code", "bytes"))
        say(f"{row['code']:44s} {row['bytes']:8d} {shown}")
    return result


@contextmanager
def clocked(spent: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of a core that its body takes."""
    began = time.process_time()
    yield
    spent[name] += time.process_time() - began


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
            asked, seconds, used = Search(queries, ("proponent", "opponent"), 400, verify), [], []
            for _ in range(options.repeats if Q == 1 else 1):
                began, cpu = time.perf_counter(), time.process_time()
                best = search_files(FileGroup(folder, tuple(files), options.rows), asked, options.threads)
                seconds.append(time.perf_counter() - began)
                used.append(time.process_time() - cpu)
            row = {"queries": Q, "verify": verify, "seconds": min(seconds), "cpu_seconds": min(used), "rows": len(best)}
            found.append(row | {"bytes_per_core_s": size / min(used)})
            say(f"{Q} queries, digests {'checked' if verify else 'known'}: {min(seconds):.2f} s ({min(used):.2f} to "
                f"{max(used):.2f} s of a core), {size / min(used) / 1e9:.2f} GB/s of a core")  # fmt: skip
    # In the same minute, and of the same files, so that what else the machine does falls on both.
    memory = 0.0
    for _ in range(options.repeats):
        began = time.process_time()
        for name, _ in files:
            view = folder.mapped(name)
            assert view is not None
            words = np.frombuffer(view, np.uint8)
            words[: len(words) // 8 * 8].view(np.uint64).sum()
        memory = max(memory, size / (time.process_time() - began))
    say(f"adding up their words, one thread: {memory / 1e9:.2f} GB/s of a core")
    for row in found:
        row["share"] = row["bytes_per_core_s"] / memory
        say(f"{row['queries']} queries, digests {'checked' if row['verify'] else 'known'}: {row['share']:.3f} of it")
    return {"searches": found, "bytes": size, "memory_bytes_per_core_s": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    base = options_parser(None)
    of_codes = parts.add_parser("codes", parents=[base], add_help=False, conflict_handler="resolve")
    of_codes.add_argument("--model", help="a model that is there, in place of training one")
    of_codes.add_argument("--components", type=int, default=1024, help="principal components of each layer; 0: none")
    of_codes.add_argument("--component-sequences", type=int, default=2048, help="that they are found on")
    of_codes.add_argument("--brief", action="store_true", help="leave out what lost to others at equal bytes before")
    of_codes.add_argument("--at-once", type=int, default=2048, help="sequences between two reports")
    of_search = parts.add_parser("search")
    of_search.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "index-search")
    of_search.add_argument("--rows", type=int, default=1_000_000)
    of_search.add_argument("--layers-of-index", type=int, default=4)
    of_search.add_argument("--coordinates", type=int, default=4096)
    of_search.add_argument("--queries", type=int, nargs="+", default=[1, 10, 100])
    of_search.add_argument("--threads", type=int, default=2)
    of_search.add_argument("--repeats", type=int, default=5, help="of one question; the least is given")
    options = parser.parse_args()
    written(options.part, codes(options) if options.part == "codes" else search(options))


def written(part: str, result: dict[str, Any]) -> None:
    path = HERE / "results" / f"index-{part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": platform.processor(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
