"""What a rank holds at once, by step and part, from shapes alone: the bound that is printed before a run.

A step holds its weights, what stays for all micro-batches (queries, factors, full-rank gradients), and the most that
is alive while one micro-batch of B sequences of T tokens goes forward and back, weighed by a dry run (`sizing.dry`) of
the step's own code. docs/sizing.md has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from infscan.config import Config, Dtype, Labels, Solver, fingerprint, plain
from infscan.config.jobs import IndexConfig
from infscan.errors import ModelError
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.codes import CodeSettings, LayerCode, layer_code
from infscan.influence.eigenbasis import BYTES_PER_ENTRY
from infscan.influence.layers import Layer, LayerFactors
from infscan.influence.layout import (
    Spectrum,
    on_device,
    plan_layouts,
    prices_on,
    stored_dense,
    without_content,
)
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries, Scratch, formed_at_once
from infscan.influence.span import Rotation, SpannedBasis
from infscan.model.architecture import Architecture, load_config
from infscan.model.family import first_line
from infscan.model.folder import model_folder
from infscan.model.gathered import GatherLimits
from infscan.model.load import resolve_dtype
from infscan.model.loaded import RankContext
from infscan.model.losses import head_is_last
from infscan.model.suffix import ends_at, last_blocks, suffixes
from infscan.model.worker import Batch, LayerConsumer, ModelWorker, WorkerSettings
from infscan.results.index_file import row_bytes
from infscan.sizing.dry import Dry, Results, dry
from infscan.steps.check import scoring_twice
from infscan.steps.factor_files import layer_groups, products, widest_block
from infscan.steps.factors import CovarianceSums, lambda_consumer, lambda_sums
from infscan.steps.index import code_settings, indexed_layers, squared_norms
from infscan.steps.inputs import in_dtype
from infscan.steps.preconditioner import query_groups
from infscan.steps.refine import pair_scoring
from infscan.steps.scan import both, scoring

# glibc's heap keeps freed buffers, and they leave holes: so many buffers of the widest layer's width, for every token
# of a micro-batch. Measured (benchmarks/memory.py, docs/sizing.md), not derived. Buffers that are mapped one by one
# instead (MALLOC_MMAP_THRESHOLD_) leave none, and cost 28 % more CPU time.
_KEPT_WIDTHS = 7


@dataclass(frozen=True)
class PassMemory:
    """Bytes that one rank holds at once in one step."""

    # Its share of the model, and with ZeRO-3 what is gathered at a time.
    weights: int
    # The query batch as it is laid out for scoring.
    queries: int = 0
    # Sums, eigenbases and Lambda of a layer group; an index's maps, which are made of them, and a shard's codes.
    factors: int = 0
    # Full-rank query gradients of a query group.
    gradients: int = 0
    # The most that a micro-batch has alive beside these.
    activations: int = 0
    # On a CPU, what malloc keeps of freed buffers (`_KEPT_WIDTHS`).
    allocator: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def above_model(self) -> int:
        return self.total - self.weights


@dataclass(frozen=True)
class PassCost:
    """One pass: what a rank holds, and the floating-point operations of a token (a multiply-add is two)."""

    memory: PassMemory
    flop_per_token: float
    # Of them, what the pass does beside the model's forward and backward.
    own_flop_per_token: float = 0.0


class DryWorker:
    """A worker without weights, and the micro-batch that it is sized for: B sequences of T tokens.

    B T is scan.tokens_per_batch, or one sequence where that is less.
    """

    def __init__(self, config: Config, architecture: Architecture, T: int, gpus: float) -> None:
        self.config, self.layers, self.block = config, architecture.layers, architecture.block
        self.device = "cuda" if gpus else "cpu"
        dtype = run_dtype(config, architecture, gpus)
        # Two bytes are two bytes.
        dtype = torch.bfloat16 if dtype is torch.float16 else dtype
        dtype_name = Dtype(str(dtype).removeprefix("torch."))
        model = replace(config.model, path=architecture.folder, revision=None, dtype=dtype_name)
        self.worker = ModelWorker(WorkerSettings(model, self.layers, sharded=False), RankContext(device="meta"))
        self.worker.model.on_gpu = self.device != "cpu"
        self.B, self.T = max(1, config.tokens_per_batch // T), T
        self.world = config.cluster.ranks_per_worker
        self._head_is_last: bool | None = None
        self._results: Results = {}

    @property
    def itemsize(self) -> int:
        return self.worker.model.dtype.itemsize

    @property
    def weights(self) -> int:
        """Bytes of the rank's share of parameters and buffers; with ZeRO-3 also of what is gathered at most."""
        module = self.worker.model.module
        sizes = [parameter.numel() for parameter in module.parameters()]
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
        if not self.config.sharded:
            return sum(sizes) * self.itemsize + buffers
        limits = GatherLimits.of(self.config.model.zero, self.block)
        gathered = min(sum(sizes), limits.most(max(sizes)))
        return (-(-sum(sizes) // self.world) + gathered) * self.itemsize + buffers

    def batch(self, *, masked: bool = False) -> Batch:
        """The micro-batch, on the device `meta`; with a loss mask, if `masked`."""
        ids_bt = torch.zeros(self.B, self.T, dtype=torch.int64, device="meta")
        ones_bt = torch.ones(self.B, self.T, dtype=torch.bool, device="meta")
        return Batch(np.arange(self.B), ids_bt, ones_bt, loss_bt=torch.ones_like(ones_bt) if masked else None)

    def rows(self) -> Tensor:
        return torch.arange(self.B, device="meta")

    def backward(
        self,
        layers: Sequence[Layer],
        consumer: Callable[[Batch], LayerConsumer],
        batch: Batch,
        *,
        labels: bool = False,
        end: str | None = None,
    ) -> Dry:
        """One micro-batch through its consumer; with `labels`, as the step that draws the Fisher's.

        end: the block above which the backward ends.

        Raises:
            ModelError: for a family whose code does not run on shapes alone.
        """
        model = self.worker.model
        try:
            if self._head_is_last is None:
                with dry(self._results):
                    self._head_is_last = head_is_last(model.module, self.worker.device)
            model.head_is_last = self._head_is_last
            with dry(self._results) as seen:
                loss = batch.loss()
                if labels:
                    loss = replace(loss, uniforms_bt=torch.zeros(self.B, self.T, dtype=torch.float64))
                self.worker.backward(batch, layers, loss, _owned(seen, consumer(batch)), ones=False, ends_at=end)
        except Exception as error:  # a family's own code may do what it likes
            raise ModelError(
                f"a rank's memory is unknown: the model does not run on shapes alone ({type(error).__name__}: "
                f"{first_line(error)}); measure a small run instead, and look at workers.ranks in its summary.json."
            ) from error
        return seen


def _owned(seen: Dry, consume: LayerConsumer) -> LayerConsumer:
    def counted(layer: Layer, s_bto: Tensor, a_bti: Tensor, routed: Routed | None) -> None:
        with seen.owned():
            consume(layer, s_bto, a_bti, routed)

    return counted


def run_dtype(config: Config, architecture: Architecture, gpus: float, *, refining: bool = False) -> torch.dtype:
    """The dtype that ranks run the model in, or score candidates again in, `auto` resolved."""
    declared = load_config(model_folder(architecture.folder, weights=False))
    asked = config.refine_dtype if refining else config.model.dtype
    return resolve_dtype(asked, declared, "cuda" if gpus else "cpu")


def pass_costs(
    config: Config,
    architecture: Architecture,
    queries: int,
    T: int,
    gpus: float,
    *,
    masked: bool = False,
    codes: Codes | None = None,
) -> dict[str, PassCost]:
    """Every step of a run by name: covariance, on a GPU eigenbasis, and lambda (not with solver=identity), check, scan,
    refine; the sieve where there is one; and the index, where nothing is scanned beside it.

    masked: whether the factors' corpus has a loss mask. codes: of an index.
    """
    sized = DryWorker(config, architecture, T, gpus)
    costs: dict[str, PassCost] = {}
    if config.factors.solver is not Solver.identity:
        masked = masked or config.factors.corpus.masked
        costs["covariance"] = _covariance(sized, masked=masked)
        if gpus:
            costs["eigenbasis"] = _eigenbasis(sized)
        costs["lambda"] = _lambda(sized, masked=masked)
    if codes is not None and not queries:
        costs["index"] = _index(sized, codes)
    if queries:
        costs |= {"check": _check(sized, queries), "scan": _scan(sized, queries, sized.layers, codes=codes)}
        if config.scan.sieve is not None:
            # scan.sieve=auto: the longest that it tries.
            blocks = max(suffixes(sized.layers), default=0) if isinstance(config.scan.sieve, str) else config.scan.sieve
            if blocks:
                costs["sieve"] = _sieve(sized, queries, blocks)
        again = replace(config, model=replace(config.model, dtype=config.refine_dtype))
        if again.model != config.model:
            sized = DryWorker(again, architecture, T, gpus)
        costs["refine"] = _refine(sized, queries)
    return costs


def scan_memory(config: Config, architecture: Architecture, queries: int, T: int, gpus: float) -> PassMemory:
    """What a rank of the scan holds at once: the number that a run prints and `infscan plan` has in its table."""
    shape = (config.model, config.scan, config.sharded, config.cluster.ranks_per_worker)
    key = fingerprint([*map(plain, shape), architecture.fingerprint, queries, T, gpus])
    if key not in _KNOWN:
        _KNOWN[key] = scan_cost(DryWorker(config, architecture, T, gpus), queries).memory
    return _KNOWN[key]


def other_passes(
    config: Config, architecture: Architecture, queries: int, scan: PassMemory, gpus: float, *, fitting: bool = True
) -> dict[str, int]:
    """Bytes of the passes beside a scan, by name: about as `pass_costs` finds them, without trying a backward for each.
    Their activations are taken for the scan's.

    fitting: whether factors are still to be fitted.
    """

    def gradients(most: int) -> int:
        groups, layer_groups = query_groups(queries, architecture.layers, most)
        sizes = (sum(layer.size for layer in group) for group in layer_groups)
        return 4 * len(groups[0]) * max(sizes) if queries else 0

    found = {"refine": scan.total - scan.queries + gradients(config.refine_group_bytes)}
    if config.scan.rank is not None and config.scan.check_sequences >= _FEWEST_CHECKED:
        found["check"] = scan.total + gradients(config.query_group_bytes)
    if fitting and config.factors.solver is not Solver.identity:
        for name, (stays, sums) in _fitting_bytes(config, architecture.layers).items():
            waiting, at_end = (0, 0) if gpus else (sums, 2 * sums)
            found[name] = scan.weights + scan.allocator + stays + max(scan.activations + waiting, at_end)
    return found


def serialised_bytes(config: Config, layers: Sequence[Layer]) -> int:
    """Host memory that a layer group's sums of a GPU take while they are written."""
    return 3 * _fitting_bytes(config, layers)["covariance"][1]


def _fitting_bytes(config: Config, layers: Sequence[Layer]) -> dict[str, tuple[int, int]]:
    """What a factors' pass holds of its largest layer group, and its sums among that, float32, by name."""
    group, blocks = _largest_group(config, layers), config.factors.blocks
    A_and_S = CovarianceSums(group, blocks, torch.float32, "meta").nbytes
    Lambda = sum(total.nbytes for total in lambda_sums(group, torch.float32, "meta").values())
    bases = sum(basis.nbytes for pair in _bases(group, blocks, torch.float32).values() for basis in pair)
    return {"covariance": (A_and_S, A_and_S), "lambda": (bases + Lambda, Lambda)}


# Fewer sequences are not compared (`infscan.steps.check`).
_FEWEST_CHECKED = 3
# One process may run many scans of one shape, as a sweep's cells do.
_KNOWN: dict[str, PassMemory] = {}


def scan_cost(sized: DryWorker, queries: int) -> PassCost:
    """The scan: the query batch stays, scores are added up layer by layer."""
    return _scan(sized, queries, sized.layers)


def _scan(
    sized: DryWorker, queries: int, layers: Sequence[Layer], end: str | None = None, codes: Codes | None = None
) -> PassCost:
    columns = queries + sized.config.scan.background_queries
    laid_out = _laid_out(sized, columns)
    scores_bq = torch.zeros(sized.B, columns, device="meta")
    consume, maps = scoring(scores_bq, laid_out), None
    if codes is not None:
        maps = _maps(sized, codes)
        consume = both(consume, encoding(maps, codes))
    seen = sized.backward(layers, lambda _: consume, sized.batch(), end=end)
    cost = _cost(sized, seen, queries=_bytes(laid_out.values()))
    return cost if codes is None or maps is None else _with_codes(sized, cost, codes, maps)


@dataclass(frozen=True)
class Codes:
    """What an index keeps, as far as a rank's memory goes: the layers, and how many sequences a shard has."""

    code: CodeSettings
    layers: tuple[Layer, ...]
    gradient_norm: bool
    shard_sequences: int

    @staticmethod
    def of(settings: IndexConfig, layers: Sequence[Layer], shard_sequences: int) -> Codes:
        """Of some tracked layers, those that are indexed."""
        some = indexed_layers(layers, settings.layers)
        return Codes(code_settings(settings), some, settings.gradient_norm, shard_sequences)

    @property
    def row_bytes(self) -> int:
        by_layer = {layer.name: self.code.code_bytes(layer) for layer in self.layers}
        return row_bytes(by_layer, gradient_norm=self.gradient_norm)


def _index(sized: DryWorker, codes: Codes) -> PassCost:
    """The maps of all indexed layers stay, and the codes of a shard; each layer is encoded as it comes."""
    maps = _maps(sized, codes)
    seen = sized.backward(codes.layers, lambda _: encoding(maps, codes), sized.batch(), end=ends_at(codes.layers))
    return _with_codes(sized, _cost(sized, seen), codes, maps)


def _maps(sized: DryWorker, codes: Codes) -> dict[str, LayerCode]:
    wide, blocks = sized.worker.wide, sized.config.factors.blocks

    def one(layer: Layer) -> LayerCode:
        A, Q_S = _zeros(layer.inputs, blocks, wide), _of_outputs(layer, blocks, wide)
        S = None if isinstance(Q_S, SpannedBasis) else Q_S
        a, s = (torch.empty(n, device="meta", dtype=wide) for n in (layer.inputs, layer.outputs))
        Lambda = torch.empty(layer.outputs, layer.inputs, device="meta", dtype=wide)
        whitened = sized.config.factors.solver is not Solver.identity
        known = (LayerFactors(A, S, A, Q_S, a, s, Lambda), 1.0) if whitened else None
        return layer_code(codes.code, layer, known, "meta", wide)

    return {layer.name: one(layer) for layer in codes.layers}


def encoding(maps: Mapping[str, LayerCode], codes: Codes) -> LayerConsumer:
    """What an index does with a layer of a micro-batch, on shapes alone."""

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        if layer.name in maps:
            u_bd = maps[layer.name].of_tokens(s, a, routed).float()
            # Quantised on the host from two copies.
            torch.stack([u_bd, u_bd])
            if codes.gradient_norm:
                squared_norms(layer, s, a, routed)

    return consume


def _with_codes(sized: DryWorker, cost: PassCost, codes: Codes, maps: Mapping[str, LayerCode]) -> PassCost:
    """With maps and a shard's codes; on a CPU the file is made beside them, of two copies."""
    shard = codes.shard_sequences * codes.row_bytes
    held = sum(one.nbytes for one in maps.values()) + shard * (1 if sized.device == "cuda" else 3)
    return replace(cost, memory=replace(cost.memory, factors=cost.memory.factors + held))


def _sieve(sized: DryWorker, queries: int, blocks: int) -> PassCost:
    """The scan of the last blocks alone: the whole query batch stays, which the scan of the candidates takes."""
    layers = last_blocks(sized.layers, blocks)
    return _scan(sized, queries, layers, ends_at(layers))


def _check(sized: DryWorker, queries: int) -> PassCost:
    """The sample that the compression is judged on: the query batch and full-rank gradients beside each other."""
    laid_out = _laid_out(sized, queries + sized.config.scan.background_queries)
    groups, layers = _largest_query_group(sized, queries, sized.config.query_group_bytes)
    full = _full(sized, layers, len(groups[0]))
    approximate_nq = torch.zeros(sized.B, len(groups[0]), dtype=torch.float64, device="meta")
    columns = torch.arange(len(groups[0]), device="meta")
    consume = scoring_twice((approximate_nq, laid_out, columns), (torch.zeros_like(approximate_nq), full), sized.rows())
    seen = sized.backward(layers, lambda _: consume, sized.batch())
    return _cost(sized, seen, queries=_bytes(laid_out.values()), gradients=_bytes(full.values()))


def _refine(sized: DryWorker, queries: int) -> PassCost:
    """Candidates again: full-rank gradients of a query group stay. FLOP are those of one query for a sequence."""
    groups, layers = _largest_query_group(sized, queries, sized.config.refine_group_bytes)
    P = {layer.name: torch.empty(len(groups[0]), layer.outputs, layer.inputs, device="meta") for layer in layers}
    index = {0: torch.stack([sized.rows(), sized.rows()])}
    consume = pair_scoring(index, P, lambda layer, pairs_n, scores_nt: None)
    seen = sized.backward(layers, lambda _: consume, sized.batch())
    return _cost(sized, seen, gradients=sum(P_qoi.nbytes for P_qoi in P.values()))


def _largest_query_group(sized: DryWorker, queries: int, most: int) -> tuple[list[range], tuple[Layer, ...]]:
    """The groups of queries, and the largest of layers. most: bytes of a group."""
    groups, layer_groups = query_groups(queries, sized.layers, most)
    return groups, max(layer_groups, key=lambda group: sum(layer.size for layer in group))


def _covariance(sized: DryWorker, *, masked: bool) -> PassCost:
    """A and S of a layer group are summed; at the end they are serialised, three copies at once, on a GPU in the host's
    memory. The slice before may still wait to be written, once."""
    group, blocks = _largest_group(sized.config, sized.layers), sized.config.factors.blocks
    sums = CovarianceSums(group, blocks, sized.worker.wide, "meta")
    sampled = sized.config.factors.labels is Labels.sampled
    seen = sized.backward(group, sums.consumer, sized.batch(masked=masked), labels=sampled)
    return _cost(sized, seen, factors=sums.nbytes, waiting=sums.nbytes, at_end=2 * sums.nbytes)


def _eigenbasis(sized: DryWorker) -> PassCost:
    """The widest block is decomposed beside the model, on a GPU; on a CPU that has a process of its own."""
    blocks = sized.config.factors.blocks
    widest = max(widest_block(layer, blocks) for layer in sized.layers)
    return PassCost(PassMemory(weights=sized.weights, factors=BYTES_PER_ENTRY * widest**2), 0.0)


def _lambda(sized: DryWorker, *, masked: bool) -> PassCost:
    """Eigenbases of a layer group stay, and Lambda is summed; at the end it is serialised, as above."""
    group, blocks = _largest_group(sized.config, sized.layers), sized.config.factors.blocks
    bases = _bases(group, blocks, sized.worker.wide)
    Lambda = lambda_sums(group, sized.worker.wide, "meta")
    consume = lambda_consumer(Lambda, bases)
    seen = sized.backward(group, lambda _: consume, sized.batch(masked=masked))
    sums = sum(total.nbytes for total in Lambda.values())
    held = sum(basis.nbytes for pair in bases.values() for basis in pair)
    return _cost(sized, seen, factors=held + sums, waiting=sums, at_end=2 * sums)


def _largest_group(config: Config, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    groups = layer_groups(tuple(layers), config.group_bytes, config.factors.blocks)
    by_name = {layer.name: layer for layer in layers}
    found = [tuple(by_name[name] for name in names) for names in groups]
    return max(found, key=lambda group: sum(map(products, group)))


def _bases(group: Sequence[Layer], blocks: int, dtype: torch.dtype) -> dict[str, tuple[Rotation, BlockDiagonal]]:
    """Q_S and Q_A of every layer, without content."""
    return {layer.name: (_of_outputs(layer, blocks, dtype), _zeros(layer.inputs, blocks, dtype)) for layer in group}


def _of_outputs(layer: Layer, blocks: int, dtype: torch.dtype) -> Rotation:
    if not layer.span:
        return _zeros(layer.outputs, blocks, dtype)
    like = torch.empty(layer.outputs, layer.span, dtype=dtype, device="meta")
    return SpannedBasis(like, like.new_empty(layer.span, layer.span))


def _zeros(n: int, blocks: int, dtype: torch.dtype) -> BlockDiagonal:
    return BlockDiagonal.zeros(n, blocks, dtype=dtype, device="meta")


def _laid_out(sized: DryWorker, queries: int) -> dict[str, LayerQueries]:
    """The query batch as a scan lays it out at the largest ranks.

    With scan.rank=auto it is not known yet which layers will have a shared basis: none, or all, whichever takes more.
    """
    config, rank, layers = sized.config.scan, sized.config.most_rank, sized.layers
    dtype = in_dtype(config.query_dtype, sized.worker.model.dtype)
    spectra = {
        layer.name: Spectrum.largest(queries, rank)
        for layer in layers
        if rank is not None and not stored_dense(layer, rank)
    }
    entries = sized.config.query_group_bytes // dtype.itemsize
    prices = prices_on(sized.device, sized.B)
    plan = plan_layouts(spectra, layers, sized.T, entries, share=config.rank == "auto", prices=prices)
    found = []
    for one in (plan, plan.with_largest_bases()) if plan.candidates else (plan,):
        batch = without_content(one, queries, dtype)
        found.append(_with_scratch(sized, on_device(batch, layers, "meta", dtype, Scratch.on(sized.device))))
    return max(found, key=lambda batch: _bytes(batch.values()))


def _full(sized: DryWorker, layers: Sequence[Layer], queries: int) -> dict[str, LayerQueries]:
    scratch = Scratch.on(sized.device)
    found = {
        layer.name: LayerQueries.dense(
            torch.empty(queries, layer.outputs, layer.inputs, device="meta"), scratch, bias=layer.bias
        )
        for layer in layers
    }
    return _with_scratch(sized, found)


def _with_scratch(sized: DryWorker, found: dict[str, LayerQueries]) -> dict[str, LayerQueries]:
    """The same, with their scratch as large as it becomes: it stays for all micro-batches, as they do."""
    like = torch.empty(0, dtype=sized.worker.model.dtype, device="meta")
    for one in found.values():
        if one.scratch is not None and one.K_qmn is not None:
            _, m, n = one.K_qmn.shape
            one.scratch.take(like.to(one.dtype), min(sized.B, formed_at_once(m, n, on_cpu=True)), m, n)
    return found


def _bytes(queries: Iterable[LayerQueries]) -> int:
    found = list(queries)
    scratches = {one.scratch for one in found if one.scratch is not None}
    return sum(one.nbytes for one in found) + sum(scratch.nbytes for scratch in scratches)


def _cost(
    sized: DryWorker,
    seen: Dry,
    *,
    queries: int = 0,
    factors: int = 0,
    gradients: int = 0,
    waiting: int = 0,
    at_end: int = 0,
) -> PassCost:
    """waiting: host memory of the unit before, whose file may wait to be written. at_end: bytes that a task holds
    beside what stays when its micro-batches are over, and nothing waits any more."""
    widest = max(max(layer.outputs, layer.inputs) for layer in sized.layers)
    memory = PassMemory(
        weights=sized.weights,
        queries=queries,
        factors=factors,
        gradients=gradients,
        activations=max(seen.peak + waiting, at_end) if sized.device == "cpu" else seen.peak,
        allocator=_KEPT_WIDTHS * sized.B * sized.T * widest * sized.itemsize if sized.device == "cpu" else 0,
    )
    tokens = sized.B * sized.T
    return PassCost(memory, seen.flop / tokens, seen.own / tokens)


def largest(costs: Mapping[str, PassCost]) -> tuple[str, PassMemory]:
    """The pass that holds the most, and what it holds."""
    name = max(costs, key=lambda one: costs[one].memory.total)
    return name, costs[name].memory
