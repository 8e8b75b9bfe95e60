"""What infscan's passes cost, as multiples of the floor that no scan can go below: forward + activation gradients.

python benchmarks/floor.py [--queries 1 10 32] [--rank 32] [--dtype bfloat16] ...      (`make bench`)

One process, one model, one set of sequences and of settings; the cases take turns, each right after a floor of its own,
so that a busy machine slows both alike. The passes are the very tasks that a rank runs, with storage in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GptOssConfig, set_seed
from transformers.utils.logging import disable_progress_bar

from infscan.config import (
    ON_A_CPU,
    Compression,
    CorpusConfig,
    DampingConfig,
    Dtype,
    Labels,
    ModelConfig,
    Packing,
    Solver,
)
from infscan.corpus.addressable import CorpusAddress, open_corpus
from infscan.corpus.packing import pack_settings
from infscan.corpus.plan import Selection
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.sequences import Sequence
from infscan.corpus.splits import InputSplit
from infscan.engine.in_process import InProcessExecutor
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.codes import CodeSettings, Kind
from infscan.influence.covariance import add_second_moment
from infscan.influence.eigenbasis import add_squared_gradients
from infscan.influence.layers import Layer
from infscan.influence.layout import Array, Layout, from_arrays, lay_out, plan_layouts
from infscan.influence.topk_tracker import Thresholds
from infscan.model.architecture import describe
from infscan.model.capture import capturing
from infscan.model.load import load
from infscan.model.loaded import RankContext
from infscan.model.measure import next_tokens, summed_losses
from infscan.model.suffix import ends_at, last_blocks
from infscan.model.worker import Batch, ModelWorker, WorkerSettings
from infscan.queries import Part, Query
from infscan.results.index_file import codes_path
from infscan.results.shard_file import shard_path
from infscan.results.tensor_files import read_tensors
from infscan.steps.eigenbases import decompose_layer
from infscan.steps.factor_files import FactorsPlan, partial_path
from infscan.steps.factors import covariance_task, fit_factors, lambda_task
from infscan.steps.index import CodesTask, IndexTask, index_task, layer_codes
from infscan.steps.labels import FitTask
from infscan.steps.preconditioner import Preconditioner
from infscan.steps.queries import QueryTask, on_device, query_task
from infscan.steps.refine import RefineTask, refine_task
from infscan.steps.scan import ScanTask, scan_task
from infscan.storage import Store, expand

RESULTS = Path(__file__).parent / "results"
FLOOR = "floor: forward + activation gradients"
SHARD = "shard-000000"
_GROUP_BYTES = ON_A_CPU["scan.query_group_bytes"]


@dataclass(frozen=True)
class Case:
    """Something to be timed; `ready` is called before, outside the clock."""

    name: str
    run: Callable[[], object]
    ready: Callable[[], object] = lambda: None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="d of the GPT-NeoX model; its MLP is 4 d wide")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="T, tokens per sequence")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per case")
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 10, 32], help="query batches to scan with")
    parser.add_argument("--rank", type=int, default=32, help="rank of the compressed query gradients")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32")
    parser.add_argument("--floor-dtype", choices=dtypes, help="of the floor; --dtype, if not given")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of CPU, for one thread on a machine that others use"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="cases to time beside the floor; all, if not given")
    parser.add_argument("--experts", type=int, default=0, help="of each block's mixture, two to a token; 0: no mixture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.floor_dtype = options.floor_dtype or options.dtype
    if options.cpu_time and (options.threads != 1 or options.device != "cpu"):
        parser.error("--cpu-time is of one thread on a CPU; add --threads 1")
    return options


def save_model(options: argparse.Namespace, folder: Path) -> Path:
    set_seed(options.seed)
    config = mixture(options) if options.experts else dense(options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    return folder / "model"


def mixture(options: argparse.Namespace) -> GptOssConfig:
    """gpt-oss's shape: experts as wide as the model."""
    return GptOssConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        num_key_value_heads=1,
        head_dim=64,
        num_local_experts=options.experts,
        num_experts_per_tok=2,
        max_position_embeddings=options.length,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def dense(options: argparse.Namespace) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        max_position_embeddings=options.length,
        bos_token_id=0,
        eos_token_id=0,
    )


def write_corpus(options: argparse.Namespace, folder: Path) -> Path:
    """Random documents of T tokens."""
    rng = np.random.default_rng(options.seed)
    rows = rng.integers(1, options.vocab, (options.sequences, options.length)).tolist()
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    return path


def prepare_corpus(options: argparse.Namespace, folder: Path, store: Store) -> None:
    """Random documents, one sequence each, prepared as a scan reads them."""
    path = write_corpus(options, folder)
    config = CorpusConfig(path=str(path), tokens_field="tokens", packing=Packing.document)
    pack = pack_settings(config, options.length, options.vocab, 0, 0)
    (file,) = expand(str(path))
    write_manifest(store, config, pack, None, [prepare_part(InputSplit((file,)), 0, config, pack, None, store)])


def make_queries(options: argparse.Namespace) -> tuple[Query, ...]:
    """Random prompts of 16 tokens with completions of 4."""
    rng = np.random.default_rng(options.seed + 1)
    rows = rng.integers(1, options.vocab, (max(options.queries), 20)).tolist()
    return tuple(Query(f"q{n}", (Part(tuple(row), tuple(range(16, 20))),)) for n, row in enumerate(rows))


class Bench:
    """A rank made by hand, fitted factors and compressed queries: what the timed tasks need."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        model = save_model(options, folder)
        self.model = ModelConfig(path=str(model), dtype=Dtype(options.dtype))
        architecture = describe(str(model), "mlp")
        self.context = RankContext(device=options.device, threads=options.threads)
        self.rank = ModelWorker(WorkerSettings(self.model, architecture.layers, sharded=False), self.context)
        self.floor_rank = self.rank
        if options.floor_dtype != options.dtype:
            model_of_floor = replace(self.model, dtype=Dtype(options.floor_dtype))
            self.floor_rank = ModelWorker(WorkerSettings(model_of_floor, (), sharded=False), self.context)
        stores = [Store(f"memory://bench-{folder.name}/{name}") for name in ("corpus", "factors", "run")]
        self.corpus, self.factors, self.run = stores
        prepare_corpus(options, folder, self.corpus)
        self.ids = np.arange(options.sequences)
        self.sequences: list[Sequence] = self.rank.read(CorpusAddress(self.corpus), self.ids)
        self.queries = make_queries(options)
        self.plan = FactorsPlan(
            fields={"model": architecture.fingerprint},
            layers=architecture.layers,
            selection=Selection.of(options.sequences),
            slices=((0, options.sequences),),
            groups=(tuple(layer.name for layer in architecture.layers),),
            tokens_per_batch=options.tokens_per_batch,
        )
        self.fit = FitTask(self.factors, CorpusAddress(self.corpus), self.plan, 0, 0, Labels.sampled, options.seed)
        self.inverse = Preconditioner(self.factors, Solver.ekfac, DampingConfig())
        self._compressed: dict[tuple[int, int | None], dict[str, np.ndarray]] = {}

    def covariance(self) -> None:
        covariance_task(self.rank, FitTask(**vars(self.fit) | {"draw_labels": True}))

    def finish_factors(self) -> None:
        corpus = open_corpus(self.corpus)
        fit_factors(InProcessExecutor.on(self.rank), self.factors, corpus, self.plan, Labels.sampled, self.options.seed)

    def compressed(self, count: int, rank: int | None) -> dict[str, np.ndarray]:
        """What the query batch's file holds of the first `count` queries, made once; None: full rank."""
        if (count, rank) in self._compressed:
            return self._compressed[count, rank]
        name, queries = f"queries/{rank}.safetensors", self.queries[:count]
        how = (rank, Compression.weighted, str(rank))
        query_task(self.rank, QueryTask(self.run, name, queries, self.plan.layers, self.inverse, *how))
        found = {key: tensor.numpy() for key, tensor in read_tensors(self.run, name).items()}
        return self._compressed.setdefault((count, rank), found)

    def codes(self, kind: Kind) -> tuple[CodesTask, Callable[[], None]]:
        """A shard's codes as `infscan index` makes them by default, or sketched; and what is ready before: maps, which
        a rank makes once for all its shards, and no file."""
        code = CodeSettings(kind)
        task = CodesTask(self.run / kind, SHARD, self.plan.layers, self.inverse, code, False, kind)

        def ready() -> None:
            self.rank.cached("codes", kind, lambda: layer_codes(self.rank, code, self.plan.layers, self.inverse))
            task.run.remove(codes_path(SHARD))

        return task, ready

    def index(self, kind: Kind) -> Case:
        """A whole shard of an index that has a pass of its own, its file included."""
        codes, ready = self.codes(kind)
        task = IndexTask(CorpusAddress(self.corpus), self.ids, self.options.tokens_per_batch, codes)
        return Case(
            f"index, {kind} {codes.code.width}, {codes.code.bits} bit", lambda: index_task(self.rank, task), ready
        )

    def scan(
        self, count: int, prepared: int, rank: int | None, beside: Kind | None = None, blocks: int | None = None
    ) -> Case:
        """A whole shard against the first `count` of `prepared` queries, its file included; an index beside, or, as a
        sieve, the last `blocks` alone."""
        mine: dict[str, Layout[Array]] = {}
        key = f"{rank}/{count}" + (f"/{beside}" if beside else "") + (f"/last-{blocks}" if blocks else "")
        layers = last_blocks(self.plan.layers, blocks) if blocks else self.plan.layers
        codes, codes_ready = self.codes(beside) if beside else (None, lambda: None)
        task = ScanTask(
            run=self.run / key,
            corpus=CorpusAddress(self.corpus),
            shard=SHARD,
            sequence_ids=self.ids,
            query_ids=tuple(query.id for query in self.queries[:count]),
            query_batch=key,
            sides=("proponent", "opponent"),
            candidates=self.options.sequences,
            thresholds=Thresholds.none(count),
            tokens_per_batch=self.options.tokens_per_batch,
            dense=False,
            fingerprint=key,
            layers=layers,
            ends_at=ends_at(layers) if blocks else None,
            codes=codes,
        )

        def ready() -> None:
            codes_ready()
            if not mine:
                found = from_arrays([{key: array[:count] for key, array in self.compressed(prepared, rank).items()}])
                # As the job lays them out.
                plan = plan_layouts(found.spectra, self.plan.layers, self.options.length, _GROUP_BYTES // 4)
                laid_out = lay_out(found.batch, plan)
                mine.update({layer.name: laid_out[layer.name] for layer in layers})
            # A rank lays its queries out once for all its shards; a shard's file that is there already would stay.
            self.rank.cached("queries", key, lambda: on_device(self.rank, mine))
            task.run.remove(shard_path(SHARD))

        return Case(
            f"scan, {count} quer{'y' if count == 1 else 'ies'}, {f'rank {rank}' if rank else 'full rank'}"
            + (f", an index beside ({beside})" if beside else "")
            + (f", last {blocks} of {self.options.layers} blocks" if blocks else ""),
            lambda: scan_task(self.rank, task, mine),
            ready,
        )

    def decompose(self) -> Case:
        """The eigenbases of every layer, from the covariance sums in storage."""

        def ready() -> None:
            if not self.factors.exists(partial_path("covariance", 0, 0)):
                self.covariance()
            for layer in self.plan.layers:
                for kind in ("A", "S"):
                    self.factors.remove(f"{kind}/{layer.name}.safetensors")

        def run() -> None:
            for layer in self.plan.layers:
                decompose_layer(self.factors, self.plan, layer)

        return Case("eigendecompositions of all layers, once", run, ready)

    def prepare(self, count: int) -> Case:
        """Gradient, inverse and compression of `count` queries, their file included."""
        queries = self.queries[:count]
        how = (self.inverse, self.options.rank, Compression.weighted, "prepared")
        task = QueryTask(self.run, "queries/prepared.safetensors", queries, self.plan.layers, *how)
        return Case(f"preparing {count} quer{'y' if count == 1 else 'ies'}", lambda: query_task(self.rank, task))

    def refine(self, count: int, per_row: int) -> Case:
        """Every sequence again, at full rank and by token, for `per_row` of `count` queries each."""
        wanted = {n: tuple(sorted((n + q) % count for q in range(per_row))) for n in self.ids.tolist()}
        task = RefineTask(
            run=self.run / f"{self.options.rank}/{count}",
            path=f"refined/{per_row}.parquet",
            group=f"{count}",
            queries=self.queries[:count],
            layers=self.plan.layers,
            inverse=self.inverse,
            shards=((SHARD, self.ids),),
            wanted=wanted,
            tokens_per_batch=self.options.tokens_per_batch,
        )
        name = f"refine, {per_row} of {count} queries per sequence"
        return Case(name, lambda: refine_task(self.rank, task))

    def batches(self) -> Iterator[tuple[Batch, tuple[Tensor, Tensor]]]:
        return with_targets(self.rank, self.sequences, self.options.tokens_per_batch)

    @torch.no_grad()
    def forward(self) -> None:
        for batch, targets in self.batches():
            summed_losses(self.rank.model.logits(batch.ids_bt), *targets).sum()

    def floor(self) -> None:
        floor(self.floor_rank, self.sequences, self.options.tokens_per_batch)

    def training(self) -> Callable[[], None]:
        """Forward and backward of a training step, weight gradients included, without the optimizer's update."""
        module = load(self.model, self.context, sharded=False).module.requires_grad_(True)

        def step() -> None:
            for batch, targets in self.batches():
                summed_losses(module(input_ids=batch.ids_bt, use_cache=False).logits, *targets).sum().backward()
            module.zero_grad(set_to_none=True)

        return step

    def arithmetic(self, name: str, product: Callable[[Layer, Tensor, Tensor], None]) -> Case:
        """A pass's matrix products alone, on captured tensors' shapes: what it costs beside forward and backward."""
        sizes, per_batch = self.options, max(1, self.options.tokens_per_batch // self.options.length)
        made: dict[int, Tensor] = {}

        def ready() -> None:
            for n in {n for layer in self.plan.layers for n in (layer.outputs, layer.inputs - layer.bias)}:
                if n not in made:
                    made[n] = torch.randn(per_batch, sizes.length, n, device=self.rank.device).to(self.rank.model.dtype)

        def run() -> None:
            for start in range(0, sizes.sequences, per_batch):
                rows = min(per_batch, sizes.sequences - start)
                for layer in self.plan.layers:
                    product(layer, made[layer.outputs][:rows], made[layer.inputs - layer.bias][:rows])

        return Case(name, run, ready)

    def products(self) -> list[Case]:
        device, wide, layers = self.rank.device, self.rank.wide, self.plan.layers

        def square(n: int) -> BlockDiagonal:
            return BlockDiagonal.zeros(n, 1, dtype=wide, device=device)

        A = {layer.name: square(layer.inputs) for layer in layers}
        S = {layer.name: square(layer.outputs) for layer in layers}
        Lambda = {layer.name: torch.zeros(layer.outputs, layer.inputs, dtype=wide, device=device) for layer in layers}

        def moments(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
            add_second_moment(S[layer.name], s_bto)
            if layer.input_of == layer.name:
                ones_bt = a_bti.new_ones(a_bti.shape[:2], dtype=torch.bool)
                add_second_moment(A[layer.name], a_bti, ones_bt if layer.bias else None)

        def squares(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
            add_squared_gradients(Lambda[layer.name], s_bto, a_bti, S[layer.name], A[layer.name])

        return [
            self.arithmetic("covariance: its products alone", moments),
            self.arithmetic("Lambda: its products alone", squares),
        ]

    def suffixes(self) -> list[int]:
        """How many last blocks sieves score: one, a third, half."""
        return sorted({max(1, self.options.layers // part) for part in (self.options.layers, 3, 2)})

    def cases(self) -> list[Case]:
        self.finish_factors()
        counts = sorted(set(self.options.queries))
        middle = counts[len(counts) // 2]
        cases = [
            Case("forward", self.forward),
            Case("training step (with weight gradients)", self.training()),
            Case("covariance pass (labels drawn)", self.covariance),
            self.decompose(),
            Case("Lambda pass", lambda: lambda_task(self.rank, self.fit)),
            *([] if self.options.experts else self.products()),
            self.prepare(1),
            *([self.prepare(middle)] if middle > 1 else []),
            *(self.scan(count, counts[-1], self.options.rank) for count in counts),
            self.scan(middle, middle, None),
            *(self.index(kind) for kind in ("projected", "sketched")),
            self.scan(middle, counts[-1], self.options.rank, "projected"),
            *(self.scan(count, counts[-1], self.options.rank, blocks=k) for k in self.suffixes() for count in counts),
            self.refine(middle, 1),
            *([self.refine(middle, middle)] if middle > 1 else []),
        ]
        wanted = re.compile(self.options.only)
        return [Case(FLOOR, self.floor), *(case for case in cases if wanted.search(case.name))]


def with_targets(
    rank: ModelWorker, sequences: list[Sequence], tokens_per_batch: int
) -> Iterator[tuple[Batch, tuple[Tensor, Tensor]]]:
    for batch in rank.batches(sequences, tokens_per_batch):
        yield batch, next_tokens(batch.ids_bt, batch.mask_bt)


def floor(rank: ModelWorker, sequences: list[Sequence], tokens_per_batch: int) -> None:
    """Forward and activation gradients of plain summed losses, and no layer tracked."""
    for batch, targets in with_targets(rank, sequences, tokens_per_batch):
        with capturing(rank.model.module, (), _nothing):
            summed_losses(rank.model.logits(batch.ids_bt), *targets).sum().backward()


def _nothing(*_: object) -> None:
    raise AssertionError("no layer is tracked")


def clock(case: Case, options: argparse.Namespace) -> float:
    cuda = options.device.startswith("cuda")
    wait = partial(torch.cuda.synchronize, options.device) if cuda else lambda: None
    now = time.process_time if options.cpu_time else time.perf_counter
    case.ready()
    wait()
    began = now()
    case.run()
    wait()
    return now() - began


def measure(cases: list[Case], options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(seconds, seconds of the floor just before) of every case in every round; the first round warms up."""
    floor = next(case for case in cases if case.name == FLOOR)
    rounds = []
    for _ in range(options.repeats + 1):
        pairs = {}
        for case in cases:
            base = clock(floor, options)
            pairs[case.name] = clock(case, options), base
        rounds.append(pairs)
    return {case.name: [pairs[case.name] for pairs in rounds[1:]] for case in cases}


def report(measured: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> dict[str, object]:
    """Print the table and return it as JSON: medians, and ratios to the floor just before with their spread.

    The floor's own row is one floor over another: the machine's noise.
    """
    tokens = options.sequences * options.length
    dtypes = options.dtype if options.dtype == options.floor_dtype else f"{options.dtype}, floor {options.floor_dtype}"
    family = f"gpt-oss with {options.experts} experts," if options.experts else "GPT-NeoX"
    table = Table(title=f"{tokens} tokens, {family} {options.layers} layers, d={options.width}, {dtypes}")
    for column in ("case", "ms (median)", "tokens/s", "floors", "min - max"):
        table.add_column(column, justify="left" if column == "case" else "right")
    rows = []
    for name, pairs in measured.items():
        values = [seconds for seconds, _ in pairs]
        ratios = [seconds / floor for seconds, floor in pairs]
        row = {
            "case": name,
            "seconds": median(values),
            "tokens_per_second": tokens / median(values),
            "ratio": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "rounds": [{"seconds": seconds, "floor_seconds": floor} for seconds, floor in pairs],
        }
        rows.append(row)
        table.add_row(
            name,
            f"{1e3 * median(values):.0f}",
            f"{tokens / median(values):,.0f}",
            f"{median(ratios):.2f}",
            f"{min(ratios):.2f} - {max(ratios):.2f}",
        )
    Console(width=110).print(table)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"settings": vars(options), "device": device, "versions": versions, "rows": rows}


def main() -> None:
    options = arguments()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Bench(options, Path(folder)).cases(), options)
    RESULTS.mkdir(exist_ok=True)
    kind = "-".join(dict.fromkeys((options.dtype, options.floor_dtype)))
    path = RESULTS / f"floor-{options.device.partition(':')[0]}-{kind}.json"
    path.write_text(json.dumps(report(measured, options), indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
