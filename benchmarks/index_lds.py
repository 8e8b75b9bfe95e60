"""Do an index's own scores predict retraining as the exact ones do? (docs/reports/index.md)

python benchmarks/index_lds.py [--folder runs/index-lds] [--recipes adamw adamw-small sgd-small]
    [--bergson .venv-rivals/bergson/bin/python [--rivals-alone]]

The bank of benchmarks/data/bank.parquet (benchmarks/bank.py): nothing is retrained but the model of the whole corpus.
LDS of exact full-rank scores, and of what codes of several sizes make of them. Beside them two other stores, written
here after their papers and not their programs, in two bytes a number: like LoGra (arXiv 2405.13954), two-sided random
projections of unwhitened gradients, with the second moment of a layer's projected gradients inverted; and like
TrackStar (arXiv 2410.17413), gradients divided by the roots of an outer product near their entries' second moments,
projected, whitened by the root of the projected moment, and brought to length 1. With --bergson, bergson's own
stores (rivals/run_bergson_index.py), and of its own what LoGra and TrackStar do.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bank import DATA, RECIPES, prepare
from compression import say
from numpy.typing import NDArray
from retraining import ROOT, job
from torch import Tensor
from whole_job import said_by

from infscan.influence.codes import CodeSettings, Kind, layer_code, random_frame
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import Layer
from infscan.influence.packed import Bits, QueryCodes, inner_products, store
from infscan.results.schema import read_parquet
from infscan.steps.preconditioner import query_gradients
from infscan.steps.solve import ekfac_factors
from infscan.storage import Store
from infscan_studies.bank_judged import lds_by_query, over_queries
from infscan_studies.bank_scores import RecipeScores, layer_scores
from infscan_studies.config import SweepConfig

RESULTS = ROOT / "benchmarks" / "results" / "index-lds.json"
CODES: tuple[tuple[Kind, int, Bits], ...] = (
    *(("projected", width, 1) for width in (8, 16, 32, 64, 128, 256)),
    *(("sketched", width, 1) for width in (16, 32, 64, 128)),
    *(("projected", width, 8) for width in (16, 32)),
)  # fmt: skip
OTHERS = (8, 16, 22, 32)
SETS = {"mlp": ("mlp",), "mlp+head": ("mlp", "head")}
Scores = NDArray[np.floating]


class Recipe:
    """A recipe's model, what was measured of its trainings, and every sequence's gradients, all of them at once."""

    def __init__(self, folder: Path, name: str, damping: float | None) -> None:
        table = read_parquet(Store(str(folder / "bank")), "bank.parquet")
        rows = [row for row in table.to_pylist() if row["recipe"] == name]
        subsets = sorted({row["subset"] for row in rows if sum(one["subset"] == row["subset"] for one in rows) > 1})
        self.kept = np.array([next(row["kept"] for row in rows if row["subset"] == one) for one in subsets])
        sweep = SweepConfig(tracked=list(SETS))
        counts = self.kept.shape[1], len(table.column_names)
        config = RecipeScores.config_of(
            str(folder / "bank" / name / "model"), str(folder / "prepared" / "corpus"), str(folder / "queries.jsonl"),
            counts, str(folder / "bank" / name), 0, sweep,
        )  # fmt: skip
        found = RecipeScores(Store(str(folder / "bank" / name)), config, sweep)
        self.worker, self.sequences, self.sets = found.worker, found.study.candidates, found.sets()
        self.model, self.queries = folder / "bank" / name / "model", found.study.queries
        self.measured = np.array(
            [
                np.mean(
                    [[row[f"f_{query.id}"] for query in found.study.queries] for row in rows if row["subset"] == one], 0
                )
                for one in subsets
            ]
        )
        self.V = query_gradients(self.worker, found.study.queries, self.worker.layers)
        names = self.sets["mlp+head"]
        self.layers = [layer for layer in self.worker.layers if layer.name in names]
        self.factors = ekfac_factors(self.worker, found.inverse(damping))
        self.C = {layer.name: inverse_core(self.V[layer.name], *self.factors[layer.name]) for layer in self.layers}

    def exact(self) -> dict[str, Scores]:
        """[Q, N] by layer."""
        P = {layer.name: from_core(self.C[layer.name], self.factors[layer.name][0]) for layer in self.layers}
        return layer_scores(self.worker, self.sequences, P)

    def of_sequences(self, map_of: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> dict[str, Tensor]:
        """A linear map of every sequence's gradient, by layer: [N, D]."""
        found: dict[str, list[tuple[Any, Tensor]]] = {layer.name: [] for layer in self.layers}
        for batch in self.worker.batches(self.sequences, 1024):

            def consume(layer: Layer, s: Tensor, a: Tensor, _: object, rows: Any = batch.rows) -> None:
                found[layer.name].append((rows, map_of[layer.name](s, a)))

            self.worker.backward(batch, self.layers, batch.loss(), consume)
        result = {}
        for name, parts in found.items():
            out = torch.zeros(len(self.sequences), parts[0][1].shape[1])
            for rows, values in parts:
                out[torch.from_numpy(rows)] = values
            result[name] = out
        return result

    def lds(self, scores_qn: Scores) -> NDArray[np.float64]:
        return lds_by_query(self.kept, scores_qn.T, self.measured)


def codes(recipe: Recipe, kind: Kind, width: int, bits: Bits) -> tuple[dict[str, Scores], dict[str, int]]:
    """Scores [Q, N] and bytes of a row, by layer."""
    settings = CodeSettings(kind, width, bits)
    maps = {
        layer.name: layer_code(settings, layer, recipe.factors[layer.name], "cpu", torch.float32)
        for layer in recipe.layers
    }
    u = recipe.of_sequences({name: one.of_tokens for name, one in maps.items()})
    scores, sizes = {}, {}
    for layer in recipe.layers:
        kept = store(u[layer.name].numpy(), bits, layer.size)
        asked = QueryCodes.of(maps[layer.name].of_query(recipe.C[layer.name]).float().numpy(), bits)
        scores[layer.name] = inner_products(kept.codes, kept.scales, asked).T
        sizes[layer.name] = settings.code_bytes(layer)
    return scores, sizes


def others(recipe: Recipe, like: str, width: int) -> tuple[dict[Any, Scores], dict[str, int]]:
    """The other stores. Of TrackStar scores are cosines over all layers of a set, so that the squared lengths of what
    is stored come with them, by (layer, "length")."""
    sides = {
        layer.name: [torch.from_numpy(random_frame(n, min(width, n), f"{layer.name}|{side}")).float()
                     for n, side in ((layer.outputs, "outputs"), (layer.inputs, "inputs"))]
        for layer in recipe.layers
    }  # fmt: skip
    roots = {layer.name: None for layer in recipe.layers} if like == "LoGra" else second_moments(recipe)

    def project(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        S, A = sides[name]
        root = roots[name]
        if root is None:
            return lambda s, a: torch.bmm((s @ S).transpose(1, 2), a @ A).flatten(1)
        o, i = root
        return lambda s, a: torch.bmm(((s / o) @ S).transpose(1, 2), (a / i) @ A).flatten(1)

    u = recipe.of_sequences({layer.name: project(layer.name) for layer in recipe.layers})
    scores: dict[Any, Scores] = {}
    sizes = {}
    for layer in recipe.layers:
        (S, A), root = sides[layer.name], roots[layer.name]
        V = recipe.V[layer.name].float()
        if root is not None:
            V = V / root[0][:, None] / root[1]
        v, mine = (S.T @ V @ A).flatten(1), u[layer.name]
        F = (mine.T @ mine / len(mine)).double()
        values, vectors = torch.linalg.eigh(F)
        inverse = (vectors / (values.clamp_min(0) + 0.1 * values.mean()) @ vectors.T).float()
        stored = (mine @ inverse if like == "LoGra" else mine @ power(inverse, 0.5)).half().float()
        asked = v if like == "LoGra" else v @ power(inverse, 0.5)
        scores[layer.name] = (asked @ stored.T).numpy()
        if like != "LoGra":
            scores[layer.name, "length"] = stored.square().sum(dim=1).numpy()
        sizes[layer.name] = 2 * mine.shape[1]
    return scores, sizes


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(0) ** exponent @ vectors.T).float()


def second_moments(recipe: Recipe) -> dict[str, tuple[Tensor, Tensor]]:
    """Roots of the outer product, by rows' and columns' means, nearest to the second moment of a gradient's entries."""
    total = {layer.name: torch.zeros(layer.outputs, layer.inputs) for layer in recipe.layers}
    for batch in recipe.worker.batches(recipe.sequences, 1024):

        def consume(layer: Layer, s: Tensor, a: Tensor, _: object) -> None:
            total[layer.name] += torch.bmm(s.transpose(1, 2), a).square().sum(dim=0)

        recipe.worker.backward(batch, recipe.layers, batch.loss(), consume)
    found = {}
    for name, one in total.items():
        one = one + 1e-6 * one.mean()
        found[name] = (one.mean(dim=1) / one.mean().sqrt()).sqrt(), (one.mean(dim=0) / one.mean().sqrt()).sqrt()
    return found


def summed(recipe: Recipe, scores: dict[Any, Scores], tracked: str) -> Scores:
    names = [name for name in recipe.sets[tracked] if name in scores]
    total = np.sum([scores[name] for name in names], axis=0)
    if (names[0], "length") in scores:
        total = total / np.sqrt(np.sum([scores[name, "length"] for name in names], axis=0))
    return total


def judged(
    recipe: Recipe, tracked: str, scores: dict[Any, Scores], exact: dict[str, Scores], full_q: NDArray[np.float64]
) -> dict[str, Any]:
    """full_q: LDS of the exact scores; difference: to it, with its 95 % interval over queries."""
    mine, own = summed(recipe, scores, tracked), summed(recipe, exact, tracked)
    lds_q = recipe.lds(mine)
    difference = over_queries(lds_q - full_q, 0, 2000)
    return {
        "subsets": len(recipe.kept),
        "tracked": tracked,
        "lds": float(lds_q.mean()),
        "of_exact": float(lds_q.mean() / full_q.mean()),
        "difference": (difference.mean, difference.low, difference.high),
        "pearson": float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(own, mine, strict=True)])),
    }


def bergson(recipe: Recipe, folder: Path, python: Path) -> Iterator[tuple[str, Scores, int]]:
    """Label, scores [Q, N] of the MLP layers and bytes of a row, of every store of bergson's."""
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(recipe.model, folder / "model")
    scanned = [(one.token_ids.tolist(), range(1, len(one.token_ids))) for one in recipe.sequences]
    parts = [part for query in recipe.queries for part in query.parts]
    assert len(parts) == len(recipe.queries), "a query of several parts is none of bergson's"
    for name, rows in (("scanned", scanned), ("queries", [(list(one.token_ids), one.positions) for one in parts])):
        lines = [
            {
                "input_ids": ids,
                "labels": [token if place in measured else -100 for place, token in enumerate(ids)],
                "length": len(ids),
            }
            for ids, measured in rows
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    script, output = ROOT / "benchmarks" / "rivals" / "run_bergson_index.py", folder / "bergson"
    shutil.rmtree(output, ignore_errors=True)
    command = [str(python), str(script), str(folder), f"--output={output}", "--threads=1"]
    said = json.loads(said_by(command, threads=1).splitlines()[-1])
    say(f"bergson: {said['seconds']}")
    for width, size in said["bytes"].items():
        for kind in ("store", "preconditioned", "trackstar"):
            yield f"bergson, {kind}, {width} x {width}", np.load(output / f"{kind}-{width}.npy"), size


def rows_of(recipe: Recipe, name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    exact, rows = recipe.exact(), list[dict[str, Any]]()
    full = {tracked: recipe.lds(summed(recipe, exact, tracked)) for tracked in SETS}

    def add(label: str, scores: dict[Any, Scores], sizes: dict[str, int], sets: Iterable[str] = SETS) -> None:
        for tracked in sets:
            row = judged(recipe, tracked, scores, exact, full[tracked])
            size = sum(sizes.get(layer, 0) for layer in recipe.sets[tracked])
            rows.append(row | {"recipe": name, "store": label, "bytes": size})
            mean, low, high = row["difference"]
            say(f"{name:12s} {tracked:9s} {label:24s} {size:7d} bytes  LDS {row['lds']:.3f} ({row['of_exact']:.0%} of "
                f"exact; {mean:+.3f} [{low:+.3f}, {high:+.3f}])  Pearson {row['pearson']:.2f}")  # fmt: skip

    add("exact", exact, {})
    if options.bergson:
        first = recipe.sets["mlp"][0]
        for label, scores_qn, size in bergson(recipe, folder / f"bergson-{name}", options.bergson):
            add(label, {first: scores_qn}, {first: size}, ("mlp",))
    if options.rivals_alone:
        return rows
    for kind, width, bits in CODES:
        add(f"{kind} {width}, {bits} bit", *codes(recipe, kind, width, bits))
    for like in ("LoGra", "TrackStar"):
        for width in OTHERS:
            add(f"like {like}, {width} x {width}", *others(recipe, like, width))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "index-lds")
    parser.add_argument("--recipes", nargs="+", default=["adamw", "adamw-small", "sgd-small"], choices=list(RECIPES))
    parser.add_argument("--damping", type=float, help="relative; without it, as found by layer")
    parser.add_argument("--bergson", type=Path, help="Python of an environment that has bergson")
    parser.add_argument("--rivals-alone", action="store_true", help="beside the exact scores")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = options.folder.absolute()
    prepare(folder)
    recipes = json.dumps([{"name": name, **RECIPES[name]} for name in options.recipes]).replace('"', "")
    job(
        "bank", f"corpus.path={folder}/prepared/corpus", f"queries.path={folder}/queries.jsonl", f"recipes={recipes}",
        "subsets=100", "seeds=2", "max_hours=24", f"known={DATA}", "trainings=0", f"output={folder}/bank",
    )  # fmt: skip
    rows = [
        row for name in options.recipes for row in rows_of(Recipe(folder, name, options.damping), name, options, folder)
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
