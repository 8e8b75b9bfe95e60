"""What cheaper passes find of a scan's strongest rows, at what cost, and what is certified (docs/reports/sieve.md).

python benchmarks/sieve.py [--folder runs/sieve] [--model infscan://demo/model] [--documents N] [--draws 200] ...

One pass over a corpus keeps every sequence's score of every block and of the output head (rank 32; --rank 0: full
rank), so that all suffixes of blocks come from it, and what other sieves make of the same sequences: whitened hidden
states of middle blocks (cosine, the best sequence token for every measured query token) and TF-IDF. A sieve's
candidates are its best rows by query; the truth is the strongest rows of all blocks together. Costs are CPU seconds of
single passes in turns, over those of a plain forward and activation-gradient backward. Then audits are drawn from the
stored scores and certified, with all queries' candidates together, as in a scan. --bfloat16-sieve N: suffixes in
bfloat16 of the first N sequences, against the float32 truth. Scores stay in the folder. Without --model a GPT-NeoX is
trained first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from compression import Bench, Fitted, options_parser, say
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infscan.config import Dtype, ModelConfig
from infscan.corpus import sequences as corpus
from infscan.corpus.tfidf import document_frequencies
from infscan.influence.certificate import Audit, Evidence, certify, certify_together
from infscan.influence.layers import Layer
from infscan.influence.score import LayerQueries, Scratch, score_layer
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.suffix import ends_at, last_blocks
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.steps.preconditioner import core, full_rank, layer_factors, sources
from infscan.steps.queries import on_device
from infscan.steps.scan import scoring
from infscan.storage import Store

HERE = Path(__file__).parent
AT_ONCE = 1024  # sequences between two looks at the clock
SHARES = ((10, 0.005), (10, 0.01), (10, 0.02), (100, 0.02), (100, 0.05))
Floats = NDArray[np.float32]


class FoundModel(Bench):
    """The bench with a model that is there, in place of one that is trained for it."""

    def _train(self, settings: Any, heldout: list[list[int]]) -> dict[str, Any]:
        target = Store(str(self.folder / "model"))
        for entry in Store(self.options.model).list():
            target.write(entry.name, Store(self.options.model).read(entry.name))
        return {}


class Sieves:
    """Every sequence's scores by block [B, Q, N], and those of the other sieves [Q, N]."""

    def __init__(self, fitted: Fitted, rank: int | None) -> None:
        self.fitted, self.rank = fitted, fitted.rank
        self.layers = tuple(layer for layer in fitted.plan.layers if block_of(layer) is not None)
        self.heads = tuple(layer for layer in fitted.plan.layers if block_of(layer) is None)
        self.queries = on_device(fitted.rank, fitted.query_batch(rank)) if rank else self._full_rank()
        self.blocks = 1 + max(block_of(layer) or 0 for layer in self.layers)
        self.row = self.layers[0].name.partition(".layers.")[0] + ".layers"
        self.sequences = fitted.bench.corpus.read(np.arange(fitted.bench.corpus.sequences))
        # By the block whose MLP reads them: the states that the block before has given out, and its attention's.
        self.hidden = {
            next(layer for layer in self.layers if block_of(layer) == block): f"hidden states of block {block}"
            for block in sorted({self.blocks // 4, self.blocks // 2, 2 * self.blocks // 3})
        }
        self.whiten = {layer: self._whitening(layer) for layer in self.hidden}
        self.states = self.query_states()

    def _full_rank(self) -> dict[str, LayerQueries]:
        """A layer at a time, for these are the bench's largest tensors by far."""
        found, scratch, inverse = {}, Scratch.on("cpu"), self.fitted.inverse
        V = sources(self.rank, self.fitted.bench.queries, self.fitted.plan.layers, inverse)
        for layer in self.fitted.plan.layers:
            known, Q = layer_factors(inverse, layer, "cpu", torch.float32), len(self.fitted.bench.queries)
            P_qoi = torch.empty(Q, layer.outputs, layer.inputs)
            for q, one in enumerate(V[layer.name]):
                P_qoi[q] = full_rank(core(one, layer, known), known)
            found[layer.name] = LayerQueries.dense(P_qoi, scratch, bias=layer.bias)
        return found

    def _whitening(self, layer: Layer) -> Tensor:
        known = layer_factors(self.fitted.inverse, layer, "cpu", torch.float32)
        assert known is not None
        A = known[0].A.dense()[: layer.inputs - layer.bias]
        values, vectors = torch.linalg.eigh(A[:, : len(A)].double())
        return (vectors * values.clamp_min(1e-6 * float(values.mean())).rsqrt()).float()

    def scored(self) -> dict[str, Floats]:
        """By block, by the head, and by hidden states."""
        Q, N = len(self.fitted.bench.queries), len(self.sequences)
        by_block = np.zeros((self.blocks, Q, N), np.float32)
        others = {name: np.zeros((Q, N), np.float32) for name in ("head", *self.hidden.values())}
        began, done = time.process_time(), 0
        while done < N and not self._late():
            some = self.sequences[done : done + AT_ONCE]
            self._score(some, done, by_block, others)
            done += len(some)
            say(f"{done} sequences in {time.process_time() - began:.0f} s of a core")
        self.sequences = self.sequences[:done]
        return {"by block": by_block[..., :done], **{name: found[:, :done] for name, found in others.items()}}

    def _late(self) -> bool:
        until = self.fitted.options.until
        return until is not None and time.strftime("%H:%M") >= until

    def _score(
        self, some: Sequence[corpus.Sequence], first: int, by_block: Floats, others: Mapping[str, Floats]
    ) -> None:
        asked = self.states
        for batch in self.rank.batches(some, self.fitted.options.tokens_per_batch):
            rows = first + batch.rows

            def consume(
                layer: Layer, s: Tensor, a: Tensor, _: object, rows: Any = rows, mask: Any = batch.mask_bt
            ) -> None:
                block, found = block_of(layer), score_layer(s, a, self.queries[layer.name]).T.numpy()
                if block is None:
                    others["head"][:, rows] += found
                else:
                    by_block[block][:, rows] += found
                if layer in self.hidden:
                    states = torch.nn.functional.normalize(a @ self.whiten[layer], dim=-1)
                    for query, h_pi in enumerate(asked[layer]):
                        cosines = (states @ h_pi.T).masked_fill(~mask[..., None], -1)
                        others[self.hidden[layer]][query, rows] = cosines.amax(dim=1).sum(dim=1).numpy()

            self.rank.backward(batch, (*self.layers, *self.heads), batch.loss(), consume, ones=False)

    def in_bfloat16(self, count: int) -> Floats:
        """Scores of the first sequences by block, [B, Q, n], by the model and with products in bfloat16."""
        model = ModelConfig(path=str(self.fitted.bench.folder / "model"), dtype=Dtype.bfloat16)
        place, scratch = RankContext(threads=self.fitted.options.threads), Scratch.on("cpu")
        worker = ModelWorker(WorkerSettings(model, self.layers, sharded=False), place)
        queries = {
            layer.name: LayerQueries.dense(self.queries[layer.name].densify().bfloat16(), scratch, bias=layer.bias)
            for layer in self.layers
        }
        by_block = np.zeros((self.blocks, len(self.fitted.bench.queries), count), np.float32)
        for batch in worker.batches(self.sequences[:count], self.fitted.options.tokens_per_batch):
            rows = batch.rows

            def consume(layer: Layer, s: Tensor, a: Tensor, _: object, rows: Any = rows) -> None:
                by_block[block_of(layer) or 0][:, rows] += score_layer(s, a, queries[layer.name]).T.float().numpy()

            worker.backward(batch, self.layers, batch.loss(), consume, ones=False)
        return by_block

    def query_states(self) -> dict[Layer, list[Tensor]]:
        """Of every query, its whitened states where a measured token is predicted, [P, I]."""
        found: dict[Layer, list[Tensor]] = {layer: [] for layer in self.hidden}
        for query in self.fitted.bench.queries:
            part = query.parts[0]
            one = corpus.Sequence(0, np.asarray(part.token_ids), (), 0, "")
            (batch,) = self.rank.batches([one], 1 << 20)
            at = torch.tensor([position - 1 for position in part.positions])

            def consume(layer: Layer, s: Tensor, a: Tensor, _: object, at: Tensor = at) -> None:
                if layer in self.hidden:
                    states = torch.nn.functional.normalize(a[0][at] @ self.whiten[layer], dim=-1)
                    found[layer].append(states)

            self.rank.backward(batch, self.layers, batch.loss(), consume, ones=False)
        return found

    def tfidf(self) -> Floats:
        """[Q, N]."""
        bench = self.fitted.bench
        idf = document_frequencies((one.token_ids for one in self.sequences), bench.vocab_size).idf()
        scores = np.zeros((len(bench.queries), len(self.sequences)), np.float32)
        weights = [np.bincount(query.parts[0].token_ids, minlength=bench.vocab_size) * idf for query in bench.queries]
        for number, one in enumerate(self.sequences):
            there = np.unique(one.token_ids)
            scores[:, number] = [weight[there].sum() for weight in weights]
        return scores

    def costs(self, repeats: int) -> dict[str, float]:
        """CPU seconds of a pass over some sequences, in plain floors measured in turn; medians."""
        some = self.sequences[: 2 * self.fitted.options.tokens_per_batch // self.fitted.options.length]
        passes: dict[str, Callable[[], None]] = {"every block": lambda: self._pass(some, self.layers, None)}
        for blocks in suffixes(self.blocks):
            layers = last_blocks(self.layers, blocks)
            passes[f"last {blocks}"] = lambda layers=layers: self._pass(some, layers, ends_at(layers))
        last = f"{self.row}.{self.blocks - 1}"
        passes["head"] = lambda: self._pass(some, self.heads, last)
        for layer, name in self.hidden.items():
            passes[name] = lambda layer=layer: self._forward(some, layer)
        ratios: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(repeats):
            for name, run in passes.items():
                floor = seconds(lambda: self._pass(some, (), None))
                ratios[name].append(seconds(run) / floor)
        return {name: median(found) for name, found in ratios.items()}

    def _pass(self, some: Sequence[corpus.Sequence], layers: Sequence[Layer], end: str | None) -> None:
        for batch in self.rank.batches(some, self.fitted.options.tokens_per_batch):
            scores_bq = torch.zeros(len(batch.rows), len(self.fitted.bench.queries))
            self.rank.backward(batch, layers, batch.loss(), scoring(scores_bq, self.queries), ones=False, ends_at=end)

    def _forward(self, some: Sequence[corpus.Sequence], layer: Layer) -> None:
        """Forward to a layer's inputs, and no further."""
        module = self.rank.model.module.get_submodule(layer.name)
        asked = torch.cat(self.states[layer])

        def look(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            states = torch.nn.functional.normalize(inputs[0] @ self.whiten[layer], dim=-1)
            (states @ asked.T).amax(dim=1)
            raise StopIteration

        with module.register_forward_pre_hook(look), torch.no_grad():
            for batch in self.rank.batches(some, self.fitted.options.tokens_per_batch):
                with suppress(StopIteration):
                    self.rank.model.module(batch.ids_bt)


def block_of(layer: Layer) -> int | None:
    """The number of the block that a layer is in; None of the head."""
    parts = layer.name.split(".")
    return int(parts[2]) if len(parts) > 2 else None


def suffixes(blocks: int) -> list[int]:
    """How many last blocks are tried: all numbers of a few, else about every eighth part."""
    return sorted({max(1, round(blocks * part / 8)) for part in range(1, 8)})


def seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def found_by(sieves: Sequence[Floats], candidates: int) -> NDArray[np.bool_]:
    """[Q, N]: what the best rows of each of several sieves, an equal share each, have together."""
    found = np.zeros(sieves[0].shape, np.bool_)
    for scores in sieves:
        best = np.argsort(-scores, axis=1, kind="stable")[:, : candidates // len(sieves)]
        np.put_along_axis(found, best, True, axis=1)
    return found


def recall(exact: Floats, found: NDArray[np.bool_], top: int) -> float:
    best = np.argsort(-exact, axis=1, kind="stable")[:, :top]
    return float(np.take_along_axis(found, best, axis=1).mean())


def certificates(exact: Floats, found: NDArray[np.bool_], audited: int, top: int, draws: int) -> dict[str, Any]:
    """Audits drawn anew: how often a limit is above the truth, and its median; of one query and of all together."""
    Q, N = exact.shape
    ids = np.flatnonzero(found.any(axis=0))
    known = np.isin(np.arange(N), ids)
    found = np.broadcast_to(known, exact.shape)
    audit, truth = Audit(N, audited), [recall(exact[q : q + 1], found[q : q + 1], top) for q in range(Q)]
    alone, together = [], []
    for draw in range(draws):
        rows = np.random.default_rng(draw).choice(N, audited, replace=False)
        evidence = [Evidence(scores[ids], ids, scores[rows], known[rows]) for scores in exact]
        together.append(certify_together(evidence, audit, top).recall)
        alone.append((certify(evidence[draw % Q], audit, top, Q).recall, truth[draw % Q]))
    stated = [one for one in together if one is not None]
    mean = float(np.mean(truth))
    return {
        "audited": audited,
        "truth": mean,
        "together": {
            "stated": len(stated) / draws,
            "median": median(stated) if stated else None,
            "wrong": float(np.mean([one > mean for one in stated])) if stated else 0.0,
        },
        "alone": {
            "stated": float(np.mean([one is not None for one, _ in alone])),
            "wrong": float(np.mean([one is not None and one > true for one, true in alone])),
        },
    }


def certificates_of_sets(
    by_block: Floats, together: int, candidates: Sequence[int], audited: int, draws: int
) -> list[dict[str, Any]]:
    """As a run with fewer queries has it: suffixes by their candidates per query, over sets of so many queries."""
    rows, exact = [], by_block.sum(axis=0)
    sets = [slice(first, first + together) for first in range(0, len(exact) - together + 1, together)]
    for blocks in suffixes(len(by_block))[:2]:
        mine = by_block[-blocks:].sum(axis=0)
        for count in candidates:
            found = [found_by([mine[one]], count) for one in sets]
            made = [certificates(exact[one], at, audited, 100, draws) for one, at in zip(sets, found, strict=True)]
            limits = [one["together"]["median"] for one in made]
            row = {
                "sieve": f"last {blocks}",
                "candidates": count,
                "scanned in full": float(np.mean([at.any(axis=0).sum() for at in found])),
                "truth": float(np.mean([one["truth"] for one in made])),
                "limits": limits,
                "wrong": float(np.mean([one["together"]["wrong"] for one in made])),
            }
            rows.append(row)
            shown = " ".join("-" if limit is None else f"{limit:.3f}" for limit in limits)
            say(f"last {blocks}, {count} candidates a query, {together} queries, {audited} audited: "
                f"truth {row['truth']:.3f}, limits {shown}, above it {row['wrong']:.1%}")  # fmt: skip
    return rows


def certified(found: dict[str, Any]) -> str:
    limit, wrong = found["together"]["median"], found["together"]["wrong"]
    return f"{'-' if limit is None else f'{limit:.3f}'} of {found['truth']:.3f} (above it {wrong:.1%})"


def all_scores(sieves: Sieves, path: Path) -> dict[str, Floats]:
    """Of the folder where they are there, else made and kept."""
    if not path.exists():
        np.savez(path, **sieves.scored(), **{"TF-IDF": sieves.tfidf()})
    return dict(np.load(path))


def in_bfloat16(sieves: Sieves, by_block: Floats, count: int, folder: Path) -> list[dict[str, Any]]:
    """What suffixes in bfloat16 find of the first sequences' strongest rows in float32, and float32's own do."""
    path = folder / f"bfloat16-{count}.npy"
    if not path.exists():
        np.save(path, sieves.in_bfloat16(count))
    exact, rows = by_block[:, :, :count].sum(axis=0), []
    for blocks in sorted({*suffixes(len(by_block)), len(by_block)}):
        for dtype, scores in (("float32", by_block[:, :, :count]), ("bfloat16", np.load(path))):
            mine = scores[-blocks:].sum(axis=0)
            recalls = [recall(exact, found_by([mine], round(share * count)), top) for top, share in SHARES]
            rows.append({"sieve": f"last {blocks}", "dtype": dtype, "recall": recalls})
            shown = "  ".join(f"{value:.3f}" for value in recalls)
            say(f"{count} sequences, last {blocks}, {dtype}: {shown}")
    return rows


def main() -> None:
    parser = options_parser(__doc__)
    parser.set_defaults(folder=HERE.parent / "runs" / "sieve")
    parser.add_argument("--model", help="a model's folder, in place of one that is trained")
    parser.add_argument("--audited", type=float, default=0.1, help="share of the sequences")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--together", type=int, default=10, help="queries of a set that is certified by itself")
    parser.add_argument("--candidates", type=int, nargs="*", default=[], help="per query, of such sets")
    parser.add_argument("--repeats", type=int, default=7, help="of the passes that are timed; 0: none is")
    parser.add_argument("--until", metavar="HH:MM", help="when the pass ends, with the sequences so far")
    parser.add_argument("--rank", type=int, default=32, help="of the queries; 0: full")
    parser.add_argument("--bfloat16-sieve", type=int, default=0, metavar="SEQUENCES", help="0: float32 alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = FoundModel(options) if options.model else Bench(options)
    bench.architecture = describe(str(bench.folder / "model"), "mlp+head")
    sieves = Sieves(Fitted(bench, Dtype.float32, 0), options.rank or None)
    scores = all_scores(sieves, bench.folder / "sieves.npz")
    sieves.sequences = sieves.sequences[: scores["by block"].shape[-1]]
    costs = sieves.costs(options.repeats) if options.repeats else {}
    by_block = scores.pop("by block")
    exact, Q, N = by_block.sum(axis=0), len(bench.queries), len(sieves.sequences)
    audited = round(options.audited * N)
    ends = {f"last {k}": by_block[-k:].sum(axis=0) for k in suffixes(len(by_block))}
    tried: dict[str, list[Floats]] = {name: [mine] for name, mine in (ends | scores).items()}
    halves = [f"last {k}" for k in suffixes(len(by_block)) if 2 * k <= len(by_block)]
    tried |= {f"{end} + {name}": [ends[end], mine] for end in halves for name, mine in scores.items()}
    rows = []
    table = Table(title=f"{N} sequences, {Q} queries, proponents: recall of the top k among a share of the sequences")
    for column in ("sieve", "floors", *(f"{top} in {share:.1%}" for top, share in SHARES), "certified 100 in 2%"):
        table.add_column(column)
    for name, parts in tried.items():
        recalls = [recall(exact, found_by(parts, round(share * N)), top) for top, share in SHARES]
        found = None
        if len(parts) == 1:
            at = found_by(parts, round(0.02 * N))
            found = certificates(exact, at, audited, 100, options.draws)
        rows.append({"sieve": name, "floors": costs.get(name), "recall": recalls, "certificate": found})
        said = "" if found is None else certified(found)
        cost = f"{costs[name]:.2f}" if name in costs else "-"
        table.add_row(name, cost, *(f"{value:.3f}" for value in recalls), said)
    Console(width=170).print(table)
    sets = certificates_of_sets(by_block, options.together, options.candidates, audited, options.draws)
    if costs:
        say(f"all {len(by_block)} blocks: {costs['every block']:.2f} floors")
    narrow = in_bfloat16(sieves, by_block, options.bfloat16_sieve, bench.folder) if options.bfloat16_sieve else []
    (HERE / "results").mkdir(exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items()}
    result = {"settings": settings, "sequences": N, "queries": Q, "costs": costs, "shares": SHARES, "sieves": rows,
              "sets": sets, "bfloat16": narrow}  # fmt: skip
    (HERE / "results" / f"sieve-{options.layers}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
