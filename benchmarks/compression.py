"""The accuracy that the low-rank compression and bfloat16 cost, on a trained model (docs/reports/truth.md).

python benchmarks/compression.py [--folder runs/compression] [--ranks 4 8 16 32 64] ...

A GPT-NeoX is trained on the corpus beside this file, EK-FAC is fitted to it, and completions of held-out documents are
the queries. One pass over all sequences scores them at full rank and at every rank, plain and weighted. Then a sample
of the sequences is scored by the same model in bfloat16. The trained model stays in the folder and is found again, and
so are the scores where the query batches come out the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from infscan.config import (
    MOST_RANK,
    Compression,
    CorpusConfig,
    DampingConfig,
    Dtype,
    Labels,
    ModelConfig,
    QueriesConfig,
    Solver,
    fingerprint,
)
from infscan.corpus import sequences as corpus
from infscan.corpus.addressable import AddressableCorpus, is_prepared, open_corpus
from infscan.corpus.packing import pack_settings
from infscan.corpus.plan import Selection
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.splits import InputSplit
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.engine.in_process import InProcessExecutor
from infscan.influence.agreement import MAX_CANDIDATE_SHARE, Kind, agreement, recall
from infscan.influence.layers import Layer
from infscan.influence.layout import (
    Factored,
    QueryBatch,
    SharedBasis,
    StoredQueries,
    lay_out,
    multiply_adds,
    plan_layouts,
    query_weights,
)
from infscan.influence.score import LayerQueries, score_layer
from infscan.influence.shared_basis import shared_basis
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Query, read_queries
from infscan.steps.factor_files import FactorsPlan
from infscan.steps.factors import fit_factors
from infscan.steps.preconditioner import Preconditioner, layer_factors
from infscan.steps.queries import QueryTask, on_device, query_task, read_query_batch
from infscan.storage import Store, expand
from infscan_studies.demo.making import hold_out
from infscan_studies.truth.train import Sizes, TrainingSettings, build_model, train_language_model

HERE = Path(__file__).parent
CORPUS, RESULTS = HERE / "corpus" / "minipile.jsonl.gz", HERE / "results"
TOKENIZER = "infscan://demo/model"
FULL = "full rank"
ALL_LOW, REDRAWN = "all three, at low rank", "nothing, with labels redrawn"
RECALLS = ((10, 40), (100, 400))  # the strongest by full rank, looked for among so many of the approximation's
# The same, where nothing is scored again in float32, and where 400 are.
NARROW_RECALLS = ((100, 100), (100, 400))

Scores = NDArray[np.floating]


def options_parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "compression")
    parser.add_argument("--documents", type=int, help="use only the corpus's first so many")
    parser.add_argument("--heldout", type=int, default=400, help="documents kept from the model and the scan")
    parser.add_argument("--queries-per-source", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="T, tokens per sequence")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="d of the GPT-NeoX model; its MLP is 4 d wide")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-sequences", type=int, default=32, help="of the training")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--training-dtype", choices=["float32", "bfloat16"], default="float32", help="of its products")
    parser.add_argument("--factor-sequences", type=int, default=2000)
    parser.add_argument("--damping", type=float, default=0.1, help="relative, as factors.damping.relative")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--energies", type=float, nargs="*", default=[0.8, 0.9, 0.95, 0.99], help="of scan.rank=auto")
    parser.add_argument("--bfloat16-rank", type=int, default=32, help="one of --ranks, weighted")
    parser.add_argument("--bfloat16-sequences", type=int, default=2000, help="0: leave bfloat16 out")
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def arguments() -> argparse.Namespace:
    asked = options_parser(__doc__)
    options = asked.parse_args()
    if options.bfloat16_rank not in options.ranks:
        asked.error(f"--bfloat16-rank {options.bfloat16_rank} is not one of --ranks {options.ranks}")
    return options


def training_settings(options: argparse.Namespace) -> TrainingSettings:
    return TrainingSettings(
        epochs=options.epochs,
        batch_sequences=options.batch_sequences,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )


def say(text: str) -> None:
    print(text, flush=True)


class Bench:
    """Corpus, trained model and queries, in a folder named after what they are made of."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        settings = training_settings(options)
        shape = ("documents", "heldout", "queries_per_source", "length", "layers", "width", "training_dtype", "threads",
                 "device", "seed")  # fmt: skip
        key = fingerprint([{name: getattr(options, name) for name in shape}, asdict(settings)])
        self.folder: Path = options.folder.absolute() / key[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(str(self.folder))
        tokenizer = load_tokenizer(TOKENIZER)
        assert tokenizer is not None
        self.vocab_size = describe(TOKENIZER, "mlp").vocab_size
        with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream][: options.documents]
        kept, away = hold_out(rows, options.heldout, options.seed)
        self.corpus = self._prepare(kept, tokenizer)
        encoded = tokenizer.encode_batch([row["text"] for row in away])
        self.heldout = encoded
        self.training = self._train(settings, [ids[: options.length].tolist() for ids in encoded])
        self.architecture = describe(str(self.folder / "model"), "mlp")
        self.queries = self._queries([row["source"] for row in away], encoded)

    def _prepare(self, rows: list[dict[str, str]], tokenizer: Tokenizer) -> AddressableCorpus:
        """Documents joined by EOS and cut every T tokens, prepared as a scan reads them."""
        store = self.store / "corpus"
        if not is_prepared(store.uri):
            path = self.folder / "corpus.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            config = CorpusConfig(path=str(path))
            pack = pack_settings(config, self.options.length, self.vocab_size, tokenizer.eos_id, None)
            (file,) = expand(str(path))
            part = prepare_part(InputSplit((file,)), 0, config, pack, tokenizer, store)
            write_manifest(store, config, pack, tokenizer.digest, [part])
        return open_corpus(store)

    def _train(self, settings: TrainingSettings, heldout: list[list[int]]) -> dict[str, Any]:
        """The record of the training, done now or found; it is written last."""
        record_path = self.folder / "training.json"
        if record_path.exists():
            return json.loads(record_path.read_text())
        width = self.options.width
        sizes = Sizes(self.options.layers, width, max(1, width // 64), 4 * width)
        model = build_model(sizes, self.vocab_size, self.options.length, self.options.seed).to(self.options.device)
        everything = self.corpus.read(np.arange(self.corpus.sequences))
        say(f"training on {self.corpus.tokens} tokens, {settings.epochs} epochs, into {self.folder}")
        narrow, device = self.options.training_dtype == "bfloat16", self.options.device.partition(":")[0]
        # Without the cache, which keeps the weights' narrow copies for as long as the context lasts.
        with torch.autocast(device, torch.bfloat16, enabled=narrow, cache_enabled=False):
            training = train_language_model(
                model,
                [one.token_ids.tolist() for one in everything if len(one) > 1],
                settings,
                heldout,
                lambda epoch, now: say(
                    f"epoch {epoch}: {now.train_losses[-1]:.3f} nats per token, held out {now.heldout_losses[-1]:.3f}, "
                    f"{now.seconds:.0f} s"
                ),
            )
        model.save_pretrained(self.folder / "model")
        record = {
            "optimizer": "AdamW",
            **asdict(settings),
            **asdict(training),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "predicted_tokens_heldout": sum(len(ids) - 1 for ids in heldout),
        }
        record_path.write_text(json.dumps(record, indent=2) + "\n")
        return record

    def _queries(self, sources: list[str], encoded: list[np.ndarray]) -> tuple[Query, ...]:
        """Of every source, the first held-out documents of T tokens or more: 2/3 of T are the prompt, the rest f."""
        length, count = self.options.length, self.options.queries_per_source
        rows = []
        for source in sorted(set(sources)):
            long = [ids for name, ids in zip(sources, encoded, strict=True) if name == source and len(ids) >= length]
            rows += [
                {"id": f"{source}-{n}", "input_ids": ids[:length].tolist(), "prompt_len": 2 * length // 3}
                for n, ids in enumerate(long[:count])
            ]
        return self.read_queries(rows)

    def read_queries(self, rows: list[dict[str, Any]]) -> tuple[Query, ...]:
        path = self.folder / "queries.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = QueriesConfig(str(path))
        return tuple(read_queries(config, None, vocab_size=self.vocab_size, context=self.options.length, bos_id=None))


class Fitted:
    """The model loaded in a dtype, with the factors and the query gradients that it gives in this dtype."""

    def __init__(self, bench: Bench, dtype: Dtype, label_seed: int) -> None:
        self.bench, self.options, layers = bench, bench.options, bench.architecture.layers
        model = ModelConfig(path=str(bench.folder / "model"), dtype=dtype)
        place = RankContext(device=self.options.device, threads=self.options.threads)
        self.rank = ModelWorker(WorkerSettings(model, layers, sharded=False), place)
        sample = Selection.of(bench.corpus.sequences, self.options.factor_sequences, self.options.seed)
        self.plan = FactorsPlan(
            fields={
                "model": bench.architecture.fingerprint,
                "dtype": dtype.value,
                "sample": sample.digest(),
                "labels": label_seed,
            },
            layers=layers,
            selection=sample,
            slices=((0, sample.size),),
            groups=(tuple(layer.name for layer in layers),),
            tokens_per_batch=self.options.tokens_per_batch,
        )
        self.run = Store(f"memory://compression-{self.plan.fingerprint[:12]}")
        self.inverse = Preconditioner(self.run / "factors", Solver.ekfac, DampingConfig(relative=self.options.damping))
        self._fit(label_seed)

    def _fit(self, label_seed: int) -> None:
        began, store = time.perf_counter(), self.inverse.factors
        executor = InProcessExecutor.on(self.rank)
        fit_factors(executor, store, self.bench.corpus, self.plan, Labels.sampled, label_seed)
        say(f"factors of {self.plan.selection.size} sequences: {time.perf_counter() - began:.0f} s")

    def stored(
        self, rank: int | None, how: Compression = Compression.weighted, inverse: Preconditioner | None = None
    ) -> StoredQueries:
        """The columns, or P, of every layer, as the library's own task makes them.

        inverse: another model's factors than the own.
        """
        name, queries, layers = f"{rank}-{how.value}.safetensors", self.bench.queries, self.plan.layers
        query_task(self.rank, QueryTask(self.run, name, queries, layers, inverse or self.inverse, rank, how, name))
        return read_query_batch(self.run, [[name]])

    def query_batch(self, rank: int | None, how: Compression = Compression.weighted) -> QueryBatch:
        """What the scan is given."""
        return self.stored(rank, how).batch

    def auto(self, energy: float) -> QueryBatch:
        """scan.rank=auto: ranks allocated to every query and layer."""
        stored, T = self.stored(MOST_RANK), self.options.length
        return lay_out(stored.batch, plan_layouts(stored.spectra, self.plan.layers, T, 0, energy))

    def shared_basis(self, energy: float) -> QueryBatch:
        """scan.rank=auto with one basis pair for all queries in every layer, cheaper or not."""
        weights = torch.from_numpy(query_weights(self.stored(MOST_RANK).spectra, self.plan.layers))
        columns, bases = self.auto(energy), {}
        for layer in self.plan.layers:
            mine = columns[layer.name]
            assert isinstance(mine, Factored)
            U_xo, V_xi = (torch.from_numpy(side) for side in (mine.U_xo, mine.V_xi))
            known = layer_factors(self.inverse, layer, "cpu", torch.float32)
            assert known is not None
            entries = len(mine.ranks) * layer.size
            found = shared_basis(U_xo, V_xi, mine.ranks, known[0], weights, energy, self.options.length, entries)
            assert found is not None
            B_mo, B_ni = (None if basis is None else basis.numpy() for basis in (found.B_mo, found.B_ni))
            bases[layer.name] = SharedBasis(found.K_qmn.numpy(), B_mo, B_ni)
        return bases

    def multiply_adds(self, batch: QueryBatch) -> float:
        """Multiply-adds per token of scoring all queries, as a share of the tracked layers' own, 2 O I each."""
        Q, done = len(self.bench.queries), 0.0
        for layer in self.plan.layers:
            mine = batch[layer.name]
            columns = sum(mine.ranks) if isinstance(mine, Factored) else 0
            basis = mine.basis if isinstance(mine, SharedBasis) else None
            costs = multiply_adds(layer.outputs, layer.inputs, self.options.length, Q, columns, basis)
            done += costs["factored" if columns else "shared_basis" if basis else "dense"]
        return done / (2 * sum(layer.size for layer in self.plan.layers))

    def score(
        self, sequences: Sequence[corpus.Sequence], batches: Mapping[str, Mapping[str, LayerQueries]]
    ) -> dict[str, Scores]:
        """Every batch's scores [Q, N] of the sequences, all of them from one pass."""
        scores = {
            name: torch.zeros(len(sequences), batch[self.plan.layers[0].name].queries, device=self.rank.device)
            for name, batch in batches.items()
        }
        began = time.perf_counter()
        for number, batch in enumerate(self.rank.batches(sequences, self.options.tokens_per_batch)):
            rows = self.rank.to_device(batch.rows)

            def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, _routed: object, rows: Tensor = rows) -> None:
                for name, queries in batches.items():
                    scores[name].index_add_(0, rows, score_layer(s_bto, a_bti, queries[layer.name]))

            self.rank.backward(batch, self.plan.layers, batch.loss(), consume)
            if number % 50 == 49:
                say(f"{number + 1} batches scored in {time.perf_counter() - began:.0f} s")
        return {name: scores_nq.T.cpu().numpy() for name, scores_nq in scores.items()}


def stacked(rank: ModelWorker, batches: Sequence[QueryBatch]) -> dict[str, LayerQueries]:
    """All batches as one of full-rank matrices, U V^T multiplied out.

    The scores are those of U and V but for rounding (which `low_rank_difference` measures), and cost one gradient per
    sequence and layer however many ranks there are.
    """
    laid_out = [on_device(rank, mine) for mine in batches]
    return {
        layer.name: LayerQueries.dense(torch.cat([one[layer.name].densify() for one in laid_out]))
        for layer in rank.layers
    }


def contents(batch: QueryBatch) -> list[np.ndarray]:
    return [array for layout in batch.values() for array in vars(layout).values() if isinstance(array, np.ndarray)]


def numbers(batch: QueryBatch) -> int:
    return sum(array.size for array in contents(batch))


def judged(reference: Scores, scores: Scores, options: argparse.Namespace, kind: Kind = "pearson") -> dict[str, Any]:
    """Mean over queries with its bootstrap interval, and the worst query."""
    found = agreement(reference, scores, seed=options.seed, resamples=options.resamples, kind=kind)
    row = {"mean": found.mean, "low": found.mean_low, "high": found.mean_high, "min": float(found.values.min())}
    return row | {"by_query": found.values.tolist()}


def recalls(reference: Scores, scores: Scores, wanted: Sequence[tuple[int, int]] = RECALLS) -> dict[str, float | None]:
    """Means over queries; None where there are too few sequences for the figure to say anything."""
    return {
        f"recall_{top}_of_{among}": float(recall(reference, scores, top=top, candidates=among).mean())
        if among <= MAX_CANDIDATE_SHARE * reference.shape[1]
        else None
        for top, among in wanted
    }


def all_scores(fitted: Fitted, batches: dict[str, QueryBatch]) -> dict[str, Scores]:
    """Scores [Q, N] of every sequence of the corpus by every batch; kept in the folder, named after the batches."""
    Q, N = len(fitted.bench.queries), fitted.bench.corpus.sequences
    content = sha256()
    for batch in batches.values():
        for array in contents(batch):
            content.update(array.tobytes())
    path = fitted.bench.folder / f"scores-{content.hexdigest()[:12]}.npy"
    if not path.exists():
        queries = stacked(fitted.rank, list(batches.values()))
        np.save(path, fitted.score(fitted.bench.corpus.read(np.arange(N)), {"": queries})[""])
    return dict(zip(batches, np.load(path).reshape(len(batches), Q, N), strict=True))


def low_rank_difference(fitted: Fitted, batch: QueryBatch, scores: Scores, ids: NDArray[np.int64]) -> float:
    """The largest difference between the scan's own U, V layout and `scores`, in standard deviations of a query's."""
    found = fitted.score(fitted.bench.corpus.read(ids), {"": on_device(fitted.rank, batch)})[""]
    return float((abs(found - scores[:, ids]) / scores.std(axis=1, keepdims=True)).max())


def bfloat16_rows(
    fitted: Fitted, wide: dict[str, QueryBatch], scores: dict[str, Scores], low: str
) -> list[dict[str, Any]]:
    """Scores of a sample in bfloat16 against float32's, more and more of them computed in it.

    The logits' rounding draws other labels for the factors; so float32 with another draw is the row to compare with.
    fitted: in float32. wide, scores: its query batches and scores, by variant. low: the variant to compare at low rank.
    """
    bench, options = fitted.bench, fitted.options
    narrow = Fitted(bench, Dtype.bfloat16, options.seed)
    batches = {
        "scan": wide[FULL],
        "scan and query gradients": narrow.stored(None, inverse=fitted.inverse).batch,
        "scan, gradients and factors": narrow.query_batch(None),
        ALL_LOW: narrow.query_batch(options.bfloat16_rank),
    }
    ids = Selection.of(bench.corpus.sequences, options.bfloat16_sequences, options.seed + 1).ids()
    sequences = bench.corpus.read(ids)
    found = narrow.score(sequences, {name: on_device(narrow.rank, mine) for name, mine in batches.items()})
    redrawn = Fitted(bench, Dtype.float32, options.seed + 1)
    again = redrawn.score(sequences, {REDRAWN: on_device(redrawn.rank, redrawn.query_batch(None))})
    compared = [(name, mine, FULL) for name, mine in (found | again).items()]
    compared.append((ALL_LOW, found[ALL_LOW], low))
    return [
        {
            "variant": name,
            "reference": reference,
            "pearson": judged(scores[reference][:, ids], mine, options),
            "spearman": judged(scores[reference][:, ids], mine, options, "spearman"),
            **recalls(scores[reference][:, ids], mine, NARROW_RECALLS),
        }
        for name, mine, reference in compared
    ]


def interval(found: dict[str, Any]) -> tuple[str, str, str]:
    return f"{found['mean']:.4f}", f"{found['low']:.4f} - {found['high']:.4f}", f"{found['min']:.4f}"


def show(bench: Bench, rows: list[dict[str, Any]], bfloat16: list[dict[str, Any]]) -> None:
    options, console = bench.options, Console(width=120)
    model = (
        f"GPT-NeoX {options.layers} layers, d={options.width}, {bench.training['train_losses'][-1]:.2f} nats per token"
    )
    table = Table(title=f"{len(bench.queries)} queries, {bench.corpus.sequences} sequences, {model}: against full rank")
    found = [f"top {top} in {among}" for top, among in RECALLS]
    for column in ("", "numbers", "products", "Pearson", "95 % interval", "worst query", *found):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        shares = [row[f"recall_{top}_of_{among}"] for top, among in RECALLS]
        table.add_row(
            row["variant"],
            f"{row['share_of_numbers']:.1%}",
            f"{row['products']:.2f}",
            *interval(row["pearson"]),
            *("-" if share is None else f"{share:.3f}" for share in shares),
        )
    console.print(table)
    if not bfloat16:
        return
    table = Table(title=f"bfloat16 on {min(options.bfloat16_sequences, bench.corpus.sequences)} of these sequences")
    for column in ("in bfloat16", "against float32's", "", "mean", "95 % interval", "worst query"):
        table.add_column(column, justify="right" if column in ("mean", "95 % interval", "worst query") else "left")
    for row in bfloat16:
        table.add_row(row["variant"], row["reference"], "Pearson", *interval(row["pearson"]))
        table.add_row("", "", "Spearman", *interval(row["spearman"]))
        for top, among in NARROW_RECALLS:
            if (share := row[f"recall_{top}_of_{among}"]) is not None:
                table.add_row("", "", f"top {top} in {among}", f"{share:.4f}", "", "")
    console.print(table)


def main() -> None:
    began = time.perf_counter()
    options = arguments()
    disable_progress_bar()
    bench = Bench(options)
    fitted = Fitted(bench, Dtype.float32, options.seed)
    batches = {FULL: fitted.query_batch(None)}
    for rank in options.ranks:
        for how in (Compression.plain, Compression.weighted):
            batches[f"rank {rank} {how.value}"] = fitted.query_batch(rank, how)
    for energy in options.energies:
        batches[f"auto, {energy} kept"] = fitted.auto(energy)
        batches[f"joint, {energy} kept"] = fitted.shared_basis(energy)
    scores = all_scores(fitted, batches)
    rows = [
        {
            "variant": name,
            "share_of_numbers": numbers(mine) / numbers(batches[FULL]),
            "products": fitted.multiply_adds(mine),
            "pearson": judged(scores[FULL], scores[name], options),
            **recalls(scores[FULL], scores[name]),
        }
        for name, mine in batches.items()
        if name != FULL
    ]
    low = f"rank {options.bfloat16_rank} {Compression.weighted.value}"
    few = Selection.of(bench.corpus.sequences, 128, options.seed).ids()
    difference = low_rank_difference(fitted, batches[low], scores[low], few)
    bfloat16 = bfloat16_rows(fitted, batches, scores, low) if options.bfloat16_sequences else []
    show(bench, rows, bfloat16)
    gpu = options.device.startswith("cuda")
    settings = {name: value for name, value in vars(options).items() if name != "folder"}
    result = {
        "settings": settings | {"dtype": "float32", "labels": Labels.sampled.value, "packing": "concat"},
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "corpus": {"sequences": bench.corpus.sequences, "tokens": bench.corpus.tokens},
        "training": bench.training,
        "queries": [query.id for query in bench.queries],
        "low_rank_difference": difference,
        "seconds": time.perf_counter() - began,
        "compression": rows,
        "bfloat16": bfloat16,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"compression-{options.device.partition(':')[0]}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    say(f"written to {path}")


if __name__ == "__main__":
    main()
