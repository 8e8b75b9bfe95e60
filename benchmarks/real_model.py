"""Sieves and codes on a real model and real documents: SmolLM2-135M and a dictionary's entries (docs/reports/sieve.md,
docs/reports/index.md).

python benchmarks/real_model.py pass --made FOLDER [--folder runs/real-model] [--until 17:00] ...
python benchmarks/real_model.py tables [--folder runs/real-model]

FOLDER is what `infscan real_demo documents=20000` wrote. pass: EK-FAC of all blocks' MLPs is fitted, some entries are
held out and their endings are queries beside the demo's, and one pass over the others, in an order drawn once, keeps by
layer, document and query: the exact full-rank score, and those of one-bit codes of several widths (projected in all
blocks, sketched in every third). All suffixes of blocks, all subsets of layers and all mixtures of widths come from
them. Beside them the output head (outputs not whitened) and whitened hidden states, as sieves. A file every so many
documents; what is there is found again. tables: what has been scored so far.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compression import say
from index import clocked, narrowed
from sieve import block_of, found_by, recall
from torch import Tensor

from infscan.config import CorpusConfig, DampingConfig, Dtype, Labels, ModelConfig, Packing, QueriesConfig, Solver
from infscan.corpus import sequences as corpus
from infscan.corpus.addressable import is_prepared, open_corpus
from infscan.corpus.packing import pack_settings
from infscan.corpus.plan import Selection
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.splits import InputSplit
from infscan.corpus.tfidf import document_frequencies
from infscan.corpus.tokenizer import load_tokenizer
from infscan.engine.in_process import InProcessExecutor
from infscan.influence.agreement import pearson
from infscan.influence.codes import CodeSettings, Kind, layer_code
from infscan.influence.layers import Layer
from infscan.influence.packed import QueryCodes, inner_products, store
from infscan.influence.score import LayerQueries, Scratch, score_layer
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import read_queries
from infscan.steps.factor_files import FactorsPlan
from infscan.steps.factors import fit_factors
from infscan.steps.gradients import part_tokens, query_tokens
from infscan.steps.preconditioner import Preconditioner, core, full_rank, layer_factors
from infscan.storage import Store, expand

HERE = Path(__file__).parent
WIDTHS: dict[Kind, tuple[int, ...]] = {"projected": (16, 24, 32, 45, 64, 91, 128), "sketched": (32, 45, 64, 128)}
WIDEST = 128
SIEVE_SHARES = ((10, 0.005), (10, 0.01), (10, 0.02), (10, 0.05), (100, 0.02), (100, 0.05), (100, 0.1))
CODE_SHARES = ((10, 0.005), (10, 0.01), (10, 0.02), (100, 0.05))
Floats = np.ndarray[Any, np.dtype[np.float32]]


class Material:
    """Model, documents, queries and factors."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store, path = Store(str(self.folder)), str(options.made / "model")
        self.architecture = describe(path, "mlp+head")
        self.head = next(layer for layer in self.architecture.layers if ".layers." not in layer.name)
        self.layers = tuple(layer for layer in self.architecture.layers if layer is not self.head)
        tokenizer = load_tokenizer(path)
        assert tokenizer is not None
        rows = [json.loads(line) for line in (options.made / "corpus.jsonl").read_text("utf-8").splitlines()]
        asked = [json.loads(line) for line in (options.made / "queries.jsonl").read_text("utf-8").splitlines()]
        away = set(np.random.default_rng(options.seed).choice(len(rows), options.heldout, replace=False).tolist())
        T, separator = options.length, tokenizer.eos_id
        config = CorpusConfig(path=str(self.folder / "corpus.jsonl"), packing=Packing.document, bos=True)
        prepared = self.store / "corpus"
        if not is_prepared(prepared.uri):
            kept = [json.dumps(row, ensure_ascii=False) for n, row in enumerate(rows) if n not in away]
            Path(config.path).write_text("\n".join(kept) + "\n", "utf-8")
            pack = pack_settings(config, T, self.architecture.vocab_size, separator, separator)
            (file,) = expand(config.path)
            part = prepare_part(InputSplit((file,)), 0, config, pack, tokenizer, prepared)
            write_manifest(prepared, config, pack, tokenizer.digest, [part])
        self.corpus = open_corpus(prepared)
        for n in sorted(away):
            ids = [separator, *tokenizer.encode_batch([rows[n]["text"]])[0].tolist()][:T]
            asked.append({"id": f"heldout-{n}", "input_ids": ids, "prompt_len": 2 * len(ids) // 3})
        path_of_queries = self.folder / "queries.jsonl"
        path_of_queries.write_text("".join(json.dumps(row) + "\n" for row in asked), "utf-8")
        self.queries = read_queries(
            QueriesConfig(str(path_of_queries)),
            tokenizer,
            vocab_size=self.architecture.vocab_size,
            context=2048,
            bos_id=separator,
        )
        layers = (*self.layers, self.head)
        model = ModelConfig(path=path, dtype=options.dtype)
        self.rank = ModelWorker(WorkerSettings(model, layers, sharded=False), RankContext(device="cpu", threads=1))
        self.sample = Selection.of(self.corpus.sequences, options.factor_sequences, options.seed)
        plan = FactorsPlan(
            fields={
                "model": self.architecture.fingerprint,
                "dtype": options.dtype.value,
                "sample": self.sample.digest(),
            },
            layers=self.layers,
            selection=self.sample,
            slices=((0, self.sample.size),),
            groups=(tuple(layer.name for layer in self.layers),),
            tokens_per_batch=options.tokens_per_batch,
        )
        factors = self.store / "factors"
        self.inverse = Preconditioner(factors, Solver.ekfac, DampingConfig(relative=options.damping))
        began = time.process_time()
        fit_factors(InProcessExecutor.on(self.rank), factors, self.corpus, plan, Labels.sampled, options.seed)
        say(f"factors of {self.sample.size} sequences: {time.process_time() - began:.0f} s of a core")


class Head:
    """Scores of the output head, its inputs whitened and its outputs not: two Gram matrices, and no gradient."""

    def __init__(self, made: Material) -> None:
        head, rank = made.head, made.rank
        A, tokens = torch.zeros(head.inputs, head.inputs), 0
        for batch in rank.batches(made.corpus.read(made.sample.ids()), made.options.tokens_per_batch):

            def consume(layer: Layer, s: Tensor, a: Tensor, _: object) -> None:
                A.add_(a.float().flatten(0, 1).T @ a.float().flatten(0, 1))

            rank.backward(batch, (head,), batch.loss(), consume, ones=False)
            tokens += int(batch.mask_bt.sum())
        A /= tokens
        A.diagonal().add_(made.options.damping * float(A.diagonal().mean()))
        self.s, self.a, self.counts = [], [], []
        for query in made.queries:
            mine = part_tokens(rank, query.parts[0], (head,))[1][head.name]
            measured = mine.s_to.abs().amax(dim=1) > 0
            self.s.append(mine.s_to[measured])
            self.a.append(torch.linalg.solve(A, mine.a_ti[measured].T).T)
            self.counts.append(int(measured.sum()))
        self.s_po, self.a_pi = (torch.cat(one).to(rank.model.dtype) for one in (self.s, self.a))

    def scores(self, s: Tensor, a: Tensor) -> Floats:
        found = (s @ self.s_po.T).float() * (a @ self.a_pi.T).float()
        return torch.stack([part.sum(dim=(1, 2)) for part in found.split(self.counts, dim=2)], dim=1).numpy()


class Hidden:
    """Whitened cosines of what some blocks' MLPs read: the best token for every measured one of a query."""

    def __init__(self, made: Material) -> None:
        first = {block_of(layer): layer for layer in reversed(made.layers)}
        self.layers = {first[block]: f"hidden {block}" for block in made.options.hidden}
        self.whiten: dict[Layer, Tensor] = {}
        for layer in self.layers:
            known = layer_factors(made.inverse, layer, "cpu", torch.float32)
            assert known is not None
            values, vectors = torch.linalg.eigh(known[0].A.dense().double())
            self.whiten[layer] = (vectors * values.clamp_min(1e-6 * float(values.mean())).rsqrt()).float()
        self.asked: dict[Layer, list[Tensor]] = {layer: [] for layer in self.layers}
        for query in made.queries:
            part = query.parts[0]
            (batch,) = made.rank.batches([corpus.Sequence(0, np.asarray(part.token_ids), (), 0, "")], 1 << 20)
            at = torch.tensor([position - 1 for position in part.positions])

            def consume(layer: Layer, s: Tensor, a: Tensor, _: object, at: Tensor = at) -> None:
                if layer in self.layers:
                    self.asked[layer].append(
                        torch.nn.functional.normalize(a[0][at].float() @ self.whiten[layer], dim=-1)
                    )

            made.rank.backward(batch, made.layers, batch.loss(), consume, ones=False)

    def scores(self, layer: Layer, a: Tensor, mask: Tensor) -> Floats:
        states = torch.nn.functional.normalize(a.float() @ self.whiten[layer], dim=-1)
        cosines = [(states @ h.T).masked_fill(~mask[..., None], -1).amax(dim=1).sum(dim=1) for h in self.asked[layer]]
        return torch.stack(cosines, dim=1).numpy()


class Pass:
    """What is known of every layer before the documents are read."""

    def __init__(self, made: Material) -> None:
        self.made, options = made, made.options
        self.head, self.hidden = Head(made), Hidden(made)
        began = time.process_time()
        self.kinds: dict[Kind, tuple[Layer, ...]] = {
            "projected": made.layers,
            "sketched": tuple(
                layer for layer in made.layers if block_of(layer) % options.sketched_every == options.sketched_every - 1
            ),
        }
        tokens = dict(query_tokens(made.rank, made.queries, made.layers))
        self.exact: dict[str, LayerQueries] = {}
        self.maps: dict[tuple[Kind, str], Any] = {}
        self.codes: dict[tuple[Kind, int, str], QueryCodes] = {}
        scratch = Scratch()
        for layer in made.layers:
            known = layer_factors(made.inverse, layer, "cpu", torch.float32)
            assert known is not None
            C = torch.stack([core(one, layer, known) for one in tokens.pop(layer.name)])
            P = torch.stack([full_rank(one, known).to(made.rank.model.dtype) for one in C])
            self.exact[layer.name] = LayerQueries.dense(P, scratch)
            for kind, layers in self.kinds.items():
                if layer in layers:
                    # What a map does not need of the factors is not kept.
                    needed = (replace(known[0], A=None, S=None), known[1])
                    mine = layer_code(CodeSettings(kind, WIDEST), layer, needed, "cpu", torch.float32)
                    self.maps[kind, layer.name] = mine
                    v = mine.of_query(C).numpy()
                    for width in WIDTHS[kind]:
                        self.codes[kind, width, layer.name] = QueryCodes.of(narrowed(kind, layer, v, width), 1)
        say(f"queries: {time.process_time() - began:.0f} s of a core")
        self.spent = dict.fromkeys(("head", "hidden", "exact", "projected", "sketched", "quantise and multiply"), 0.0)

    def run(self, ids: np.ndarray[Any, Any], kinds: Sequence[Kind]) -> dict[str, Any]:
        made, Q, n = self.made, len(self.made.queries), len(ids)
        asked_kinds = {kind: self.kinds[kind] for kind in kinds}
        documents = [replace(one, token_ids=one.token_ids[: made.options.scanned]) for one in made.corpus.read(ids)]
        place = {layer.name: number for number, layer in enumerate(made.layers)}
        found: dict[str, Floats] = {"head": np.zeros((n, Q), np.float32)}
        found |= {name: np.zeros((n, Q), np.float32) for name in self.hidden.layers.values()}
        found["exact"] = np.zeros((len(made.layers), n, Q), np.float32)
        for kind, layers in asked_kinds.items():
            found |= {f"{kind} {width}": np.zeros((len(layers), n, Q), np.float32) for width in WIDTHS[kind]}
            found[f"{kind} rms"] = np.zeros((len(layers), n), np.float32)
        place_of = {
            kind: {layer.name: number for number, layer in enumerate(mine)} for kind, mine in self.kinds.items()
        }
        for batch in made.rank.batches(documents, made.options.tokens_per_batch):
            rows = batch.rows

            def consume(
                layer: Layer, s: Tensor, a: Tensor, _: object, rows: Any = rows, mask: Tensor = batch.mask_bt
            ) -> None:
                if layer is made.head or layer.name == made.head.name:
                    with clocked(self.spent, "head"):
                        found["head"][rows] = self.head.scores(s, a)
                    return
                if layer in self.hidden.layers:
                    with clocked(self.spent, "hidden"):
                        found[self.hidden.layers[layer]][rows] = self.hidden.scores(layer, a, mask)
                with clocked(self.spent, "exact"):
                    found["exact"][place[layer.name]][rows] = score_layer(s, a, self.exact[layer.name]).float().numpy()
                for kind, layers in asked_kinds.items():
                    if layer not in layers:
                        continue
                    with clocked(self.spent, kind):
                        u = self.maps[kind, layer.name].of_tokens(s, a).numpy()
                    with clocked(self.spent, "quantise and multiply"):
                        at = place_of[kind][layer.name]
                        for width in WIDTHS[kind]:
                            kept = store(narrowed(kind, layer, u, width), 1, layer.size)
                            asked = self.codes[kind, width, layer.name]
                            found[f"{kind} {width}"][at][rows] = inner_products(kept.codes, kept.scales, asked)
                        found[f"{kind} rms"][at][rows] = kept.rms

            made.rank.backward(batch, made.rank.layers, batch.loss(), consume, ones=False)
        return found


def run_pass(options: argparse.Namespace) -> None:
    made = Material(options)
    (made.folder / "facts.json").write_text(json.dumps(facts(made)))
    N = made.corpus.sequences
    say(f"{N} documents, {made.corpus.tokens} tokens, {len(made.queries)} queries, {len(made.layers)} layers")
    passing, order = Pass(made), np.random.default_rng(options.seed).permutation(N)[: options.documents]
    began, done = time.process_time(), 0
    for number, first in enumerate(range(0, len(order), options.at_once)):
        path, ids = made.folder / f"scores-{number:03d}.npz", order[first : first + options.at_once]
        if path.exists():
            continue
        found = passing.run(
            np.sort(ids), ("projected", "sketched") if number < options.sketched_files else ("projected",)
        )
        done += len(ids)
        used = time.process_time() - began
        spent = passing.spent | {"rest": used - sum(passing.spent.values())}
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, ids=np.sort(ids), **found)
        partial.rename(path)
        each = ", ".join(f"{name} {1000 * value / done:.0f}" for name, value in spent.items())
        now = time.strftime("%H:%M:%S")
        say(f"{now} {first + len(ids)} documents; ms of a core each: {1000 * used / done:.0f} ({each})")
        if options.until and time.strftime("%H:%M") >= options.until:
            break


def facts(made: Material) -> dict[str, Any]:
    """What the tables are to know. multiply_adds: of a token, of a block's layers and of the head."""
    block = sum(p.numel() for p in made.rank.model.module.model.layers[0].parameters() if p.dim() == 2)
    return {
        "layers": [layer.name for layer in made.layers],
        "queries": [query.parts[0].token_ids.tolist() for query in made.queries],
        "scanned": made.options.scanned,
        "vocabulary": made.architecture.vocab_size,
        "multiply_adds": {"block": block, "head": made.head.size},
    }


class Scored:
    """What the pass has left so far: by layer, document and query."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.glob("scores-*.npz") if ".partial" not in path.name)
        self.files = [dict(np.load(path)) for path in paths]
        self.ids = np.concatenate([file["ids"] for file in self.files])
        self.facts = json.loads((folder / "facts.json").read_text())
        self.blocks = np.array([int(name.split(".layers.")[1].split(".")[0]) for name in self.facts["layers"]])
        self.exact = self.of("exact")

    def of(self, name: str) -> Floats:
        """[layers, N, Q], or [N, Q]. Sketches are of the first documents."""
        parts = [file[name] for file in self.files if name in file]
        return np.concatenate(parts, axis=parts[0].ndim - 2)


def sieve_rows(scored: Scored, tfidf: Floats) -> list[dict[str, Any]]:
    """Suffixes of blocks, other sieves and unions."""
    exact, B = scored.exact.sum(axis=0).T, int(scored.blocks.max()) + 1
    ends = {k: scored.exact[scored.blocks >= B - k].sum(axis=0).T for k in (1, 2, 3, 5, 10, 15, 20, 25)}
    costs = scored.facts["multiply_adds"]
    floor = 2 * (B * costs["block"] + costs["head"])
    others = {"output head": (scored.of("head").T, B * costs["block"] + costs["head"]), "TF-IDF": (tfidf, 0)}
    for name in sorted(scored.files[0]):
        if name.startswith("hidden"):
            block = int(name.split()[1])
            others[f"hidden states of block {block}"] = (scored.of(name).T, block * costs["block"])
    tried: dict[str, tuple[list[Floats], float]] = {}
    for k, end in ends.items():
        tried[f"last {k} of {B} blocks"] = ([end], floor / 2 + costs["head"] + k * costs["block"])
    for name, (mine, cost) in others.items():
        tried[name] = ([mine], cost)
    for k in (3, 10, 15):
        suffix = tried[f"last {k} of {B} blocks"]
        for name, (mine, _) in others.items():
            # Hidden states and the head are by-products of the suffix's own forward.
            tried[f"last {k} and {name}"] = ([*suffix[0], mine], suffix[1])
    every = scored.exact[scored.blocks % 3 == 2].sum(axis=0).T
    tried["every third block"] = ([every], floor)
    N = exact.shape[1]
    return [
        {
            "sieve": name,
            "floors": cost / floor,
            "recall": {f"{top} in {share:.1%}": recall(exact, found_by(parts, round(share * N)), top)
                       for top, share in SIEVE_SHARES},
        }
        for name, (parts, cost) in tried.items()
    ]  # fmt: skip


def code_bytes(kind: Kind, width: int, layers: int) -> int:
    return layers * -(-(width**2 if kind == "projected" else 1 << (width**2 - 1).bit_length()) // 8)


def code_rows(scored: Scored) -> list[dict[str, Any]]:
    """Codes of all layers, of some blocks, and of widths that differ by layer, against exact scores of all layers."""
    exact, blocks, B = scored.exact.sum(axis=0), scored.blocks, int(scored.blocks.max()) + 1
    projected = {width: scored.of(f"projected {width}") for width in WIDTHS["projected"]}
    subsets = {
        "all blocks": np.ones(len(blocks), np.bool_),
        "every other block": blocks % 2 == 1,
        "every third block": blocks % 3 == 2,
        "every sixth block": blocks % 6 == 5,
        "last 15 blocks": blocks >= B - 15,
        f"blocks {B // 3} to {B - B // 4 - 1}": (blocks >= B // 3) & (blocks < B - B // 4),
    }
    rows = []
    for subset, chosen in subsets.items():
        of_all = scored.exact[chosen].sum(axis=0)
        rows.append(code_row(f"exact scores of {subset}", 0, exact, of_all))
        for width, mine in projected.items():
            size = code_bytes("projected", width, int(chosen.sum()))
            rows.append(code_row(f"projected {width}, {subset}", size, exact, mine[chosen].sum(axis=0), of_all))
    some = blocks % 6 == 5
    first = scored.of("sketched 64").shape[1]
    for kind, mine in (("projected", some), ("sketched", slice(None))):
        for width in WIDTHS["sketched"]:
            found = scored.of(f"{kind} {width}")[mine][:, :first].sum(axis=0)
            size, wanted = code_bytes(kind, width, int(some.sum())), scored.exact[some][:, :first].sum(axis=0)
            rows.append(code_row(f"first {first} documents, every sixth block: {kind} {width}", size, wanted, found))
    half = len(exact) // 2
    for subset in ("all blocks", "every third block"):
        chosen = subsets[subset]
        for budget in (4096, 8192, 16384, 32768):
            widths = allotted(
                scored.exact[chosen, :half], {w: mine[chosen, :half] for w, mine in projected.items()}, budget
            )
            size = sum(code_bytes("projected", width, 1) for width in widths)
            found = sum(
                projected[width][layer, half:] for layer, width in zip(np.flatnonzero(chosen), widths, strict=True)
            )
            rows.append(code_row(f"second half, {subset}: widths by layer", size, exact[half:], np.asarray(found)))
    return rows


def allotted(exact: Floats, projected: dict[int, Floats], budget: int) -> list[int]:
    """A width for every layer: least squared error within so many bytes (or the least widths), the layers' errors being
    independent, by what is known of some documents."""
    scale = exact.sum(axis=0).std(axis=0)
    squares = np.stack([(((mine - exact) / scale) ** 2).mean(axis=(1, 2)) for mine in projected.values()], axis=1)
    sizes = np.array([code_bytes("projected", width, 1) for width in projected])
    low, high = 0.0, float(squares.max())
    for _ in range(60):
        price = (low + high) / 2
        within = sizes[(squares + price * sizes).argmin(axis=1)].sum() <= budget
        low, high = (low, price) if within else (price, high)
    return [list(projected)[one] for one in (squares + high * sizes).argmin(axis=1)]


def code_row(name: str, size: int, exact: Floats, found: Floats, own: Floats | None = None) -> dict[str, Any]:
    """own: the exact scores of what is coded."""
    r = pearson(exact.T, found.T)
    row = {"code": name, "bytes": size, "pearson": float(r.mean()), "pearson_min": float(r.min())}
    row["pearson_own"] = float(pearson(own.T, found.T).mean()) if own is not None else None
    N = len(exact)
    for top, share in CODE_SHARES:
        kept = found_by([found.T], max(top, round(share * N)))
        row[f"{top} in {share:.1%}"] = recall(exact.T, kept, top)
    return row


def tables(options: argparse.Namespace) -> None:
    scored = Scored(options.folder)
    made = open_corpus(Store(str(options.folder.absolute())) / "corpus").read(scored.ids)
    vocab, Q = scored.facts["vocabulary"], len(scored.facts["queries"])
    documents = [one.token_ids[: scored.facts["scanned"]] for one in made]
    idf = document_frequencies(iter(documents), vocab).idf()
    weights = np.stack([np.bincount(ids, minlength=vocab) * idf for ids in scored.facts["queries"]])
    tfidf = np.stack([weights[:, np.unique(ids)].sum(axis=1) for ids in documents], axis=1).astype(np.float32)
    result = {
        "documents": len(scored.ids),
        "queries": Q,
        "strength": strengths(scored.exact.sum(axis=0)),
        "sieves": sieve_rows(scored, tfidf),
        "codes": code_rows(scored),
    }
    say(f"{len(scored.ids)} documents, {Q} queries; z of rank 1, 10, 100: {result['strength']}")
    for row in result["sieves"]:
        say(f"{row['sieve']:40s} {row['floors']:.2f}  " + "  ".join(f"{value:.3f}" for value in row["recall"].values()))
    for row in result["codes"]:
        shown = [row[key] for key in row if key not in ("code", "bytes")]
        said = "  ".join("  -  " if value is None else f"{value:.3f}" for value in shown)
        say(f"{row['code']:56s} {row['bytes']:7d} {said}")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "real-model.json").write_text(json.dumps(result, indent=1) + "\n")


def strengths(exact: Floats) -> list[float]:
    """How many standard deviations the mean query's rows of rank 1, 10 and 100 stand out."""
    z = (exact - exact.mean(axis=0)) / exact.std(axis=0)
    ranked = -np.sort(-z, axis=0)
    return [round(float(ranked[rank - 1].mean()), 1) for rank in (1, 10, 100)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["pass", "tables"])
    parser.add_argument("--made", type=Path, help="what `infscan real_demo` wrote")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "real-model")
    parser.add_argument("--documents", type=int, help="at most")
    parser.add_argument("--heldout", type=int, default=4, help="entries that are queries")
    parser.add_argument("--length", type=int, default=64, help="T")
    parser.add_argument("--dtype", type=Dtype, default=Dtype.bfloat16)
    parser.add_argument("--factor-sequences", type=int, default=96)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--hidden", type=int, nargs="+", default=[7, 15, 20])
    parser.add_argument("--scanned", type=int, default=48, help="tokens of a document that are scanned, at most")
    parser.add_argument("--sketched-every", type=int, default=6, help="of so many blocks one is sketched, too")
    parser.add_argument("--sketched-files", type=int, default=2, help="sketches are slow: of the first files alone")
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    parser.add_argument("--at-once", type=int, default=128, help="documents of a file")
    parser.add_argument("--until", help="HH:MM, after which no more documents are begun")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run_pass(options) if options.part == "pass" else tables(options)


if __name__ == "__main__":
    main()
