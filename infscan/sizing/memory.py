"""What a rank holds at once, by pass and part, from shapes alone: the bound that is printed before a run.

A pass holds its weights, what stays for all micro-batches (queries, factors, full-rank gradients), and the most that
is alive while one micro-batch of B sequences of T tokens goes forward and back, weighed by a dry run (`sizing.dry`) of
the code that a rank runs. docs/sizing.md has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from infscan.config import Config, Dtype, Solver, fingerprint, plain
from infscan.errors import ModelError
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.covariance import add_second_moment
from infscan.influence.eigenbasis import add_squared_gradients
from infscan.influence.layers import Layer
from infscan.influence.layout import Spectrum, on_device, plan_layouts, stored_dense, without_content
from infscan.influence.score import LayerQueries, Scratch, formed_at_once, score_layer, score_tokens
from infscan.model.architecture import Architecture, first_line, load_config, model_folder
from infscan.model.load import Place, resolve_dtype
from infscan.model.losses import head_is_last
from infscan.passes.factor_store import layer_groups
from infscan.passes.queries import query_groups
from infscan.passes.query_batch import in_dtype
from infscan.passes.rank import Batch, LayerConsumer, Rank, RankSettings
from infscan.sizing.dry import Dry, dry
from infscan.sizing.volume import size

# glibc's heap keeps freed buffers, and they leave holes: so many buffers of the widest layer's width, for every token
# of a micro-batch. Measured (benchmarks/memory.py, docs/sizing.md), not derived. Buffers that are mapped one by one
# instead (MALLOC_MMAP_THRESHOLD_) leave none, and cost 28 % more CPU time.
_KEPT_WIDTHS = 7


@dataclass(frozen=True)
class PassMemory:
    """Bytes that one rank holds at once in one pass.

    weights: its share of the model, and with ZeRO-3 what is gathered at a time. queries: the query batch as it is laid
    out for scoring. factors: sums, eigenbases and Lambda of a layer group. gradients: full-rank query gradients of a
    query group. activations: the most that a micro-batch has alive beside these. allocator: on a CPU, what malloc keeps
    of freed buffers (`_KEPT_WIDTHS`).
    """

    weights: int
    queries: int = 0
    factors: int = 0
    gradients: int = 0
    activations: int = 0
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


class DryRank:
    """A rank without weights, and the micro-batch that it is sized for: B sequences of T tokens.

    B T is scan.tokens_per_batch, or one sequence where that is less.
    """

    def __init__(self, config: Config, architecture: Architecture, T: int, gpus: float) -> None:
        self.config, self.layers = config, architecture.layers
        self.device = "cuda" if gpus else "cpu"
        dtype = run_dtype(config, architecture, gpus)
        # Two bytes are two bytes.
        dtype = torch.bfloat16 if dtype is torch.float16 else dtype
        model = replace(config.model, path=architecture.folder, dtype=Dtype(str(dtype).removeprefix("torch.")))
        self.rank = Rank(RankSettings(model, self.layers, sharded=False), Place(device="meta"))
        self.B, self.T = max(1, config.scan.tokens_per_batch // T), T
        self.world = config.cluster.ranks_per_worker

    @property
    def itemsize(self) -> int:
        return self.rank.model.dtype.itemsize

    @property
    def weights(self) -> int:
        """Bytes of the rank's share of parameters and buffers; with ZeRO-3 also of what is gathered at most."""
        module = self.rank.model.module
        sizes = [parameter.numel() for parameter in module.parameters()]
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
        if not self.config.sharded:
            return sum(sizes) * self.itemsize + buffers
        zero = self.config.model.zero
        gathered = min(sum(sizes), max(zero.max_live_parameters, *sizes) + zero.prefetch_bucket_size)
        return (-(-sum(sizes) // self.world) + gathered) * self.itemsize + buffers

    def backward(
        self, layers: Sequence[Layer], consume: LayerConsumer, *, labels: bool = False, ones: bool = True
    ) -> Dry:
        """One micro-batch through `consume`; with `labels`, as the pass that draws the Fisher's; `ones` as of a rank.

        Raises:
            ModelError: for a family whose code does not run on shapes alone.
        """
        B, T = self.B, self.T
        try:
            with dry():
                self.rank.model.head_is_last = head_is_last(self.rank.model.module, self.rank.device)
            with dry() as seen:
                ids_bt = torch.zeros(B, T, dtype=torch.int64)
                batch = Batch(np.arange(B), ids_bt, torch.ones(B, T, dtype=torch.bool))
                loss = batch.loss()
                if labels:
                    loss = replace(loss, uniforms_bt=torch.zeros(B, T, dtype=torch.float64))
                self.rank.backward(batch, layers, loss, consume, ones=ones)
        except Exception as error:  # a family's own code may do what it likes
            raise ModelError(
                f"what a rank holds cannot be told: the model does not run on shapes alone ({type(error).__name__}: "
                f"{first_line(error)}); measure a small run instead, and look at workers.ranks in its summary.json."
            ) from error
        return seen


def run_dtype(config: Config, architecture: Architecture, gpus: float, *, refining: bool = False) -> torch.dtype:
    """The dtype that ranks run the model in, or score candidates again in, `auto` resolved."""
    declared = load_config(model_folder(architecture.folder, weights=False))
    asked = config.refine_dtype if refining else config.model.dtype
    return resolve_dtype(asked, declared, "cuda" if gpus else "cpu")


def pass_costs(config: Config, architecture: Architecture, queries: int, T: int, gpus: float) -> dict[str, PassCost]:
    """Every pass of a run by name: covariance and lambda (not with solver=identity), check, scan, refine."""
    sized = DryRank(config, architecture, T, gpus)
    costs: dict[str, PassCost] = {}
    if config.factors.solver is not Solver.identity:
        costs |= {"covariance": _covariance(sized), "lambda": _lambda(sized)}
    if queries:
        costs |= {"check": _check(sized, queries), "scan": scan_cost(sized, queries)}
        again = replace(config, model=replace(config.model, dtype=config.refine_dtype))
        if again.model != config.model:
            sized = DryRank(again, architecture, T, gpus)
        costs["refine"] = _refine(sized, queries)
    return costs


def scan_memory(config: Config, architecture: Architecture, queries: int, T: int, gpus: float) -> PassMemory:
    """What a rank of the scan holds at once: the number that a run prints and `jobs/plan.py` has in its table."""
    shape = (config.model, config.scan, config.sharded, config.cluster.ranks_per_worker)
    key = fingerprint([*map(plain, shape), architecture.fingerprint, queries, T, gpus])
    if key not in _KNOWN:
        _KNOWN[key] = scan_cost(DryRank(config, architecture, T, gpus), queries).memory
    return _KNOWN[key]


# One process may run many scans of one shape, as a sweep's cells do.
_KNOWN: dict[str, PassMemory] = {}


def memory_line(memory: PassMemory) -> str:
    """`a rank of the scan holds at most 1.2 GiB: weights 88 MiB + queries 38 MiB + activations 969 MiB`"""
    parts = " + ".join(f"{name} {size(part)}" for name, part in vars(memory).items() if part)
    return f"a rank of the scan holds at most {size(memory.total)}: {parts}"


def scan_cost(sized: DryRank, queries: int) -> PassCost:
    """The scan: the query batch stays, scores are added up layer by layer."""
    laid_out = _laid_out(sized, queries)
    with torch.device("meta"):
        scores_bq = torch.zeros(sized.B, queries)

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
        scores_bq.add_(score_layer(s_bto, a_bti, laid_out[layer.name]))

    seen = sized.backward(sized.layers, consume, ones=False)
    return _cost(sized, seen, queries=_bytes(laid_out.values()))


def _check(sized: DryRank, queries: int) -> PassCost:
    """The sample that the compression is judged on: the query batch and full-rank gradients beside each other."""
    laid_out = _laid_out(sized, queries)
    groups, layer_groups_ = query_groups(queries, sized.layers, sized.config.scan.query_group_bytes)
    layers = max(layer_groups_, key=lambda group: sum(layer.size for layer in group))
    full = _full(sized, layers, len(groups[0]))

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
        score_layer(s_bto, a_bti, laid_out[layer.name])
        score_layer(s_bto, a_bti, full[layer.name])

    seen = sized.backward(layers, consume, ones=False)
    return _cost(sized, seen, queries=_bytes(laid_out.values()), gradients=_bytes(full.values()))


def _refine(sized: DryRank, queries: int) -> PassCost:
    """Candidates again: full-rank gradients of a query group stay. FLOP are those of one query for a sequence."""
    groups, layer_groups_ = query_groups(queries, sized.layers, sized.config.scan.query_group_bytes)
    layers = max(layer_groups_, key=lambda group: sum(layer.size for layer in group))
    P = {layer.name: torch.empty(len(groups[0]), layer.outputs, layer.inputs, device="meta") for layer in layers}

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
        score_tokens(s_bto, a_bti, P[layer.name][0])

    seen = sized.backward(layers, consume, ones=False)
    return _cost(sized, seen, gradients=sum(P_qoi.nbytes for P_qoi in P.values()))


def _covariance(sized: DryRank) -> PassCost:
    """A and S of a layer group are summed; at the end they are serialised, three copies at once."""
    group, blocks = _largest_group(sized), sized.config.factors.blocks
    A = {layer.name: _zeros(sized, layer.inputs, blocks) for layer in group if layer.input_of == layer.name}
    S = {layer.name: _zeros(sized, layer.outputs, blocks) for layer in group}
    ones_bt = torch.empty(sized.B, sized.T, dtype=torch.bool, device="meta")

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
        add_second_moment(S[layer.name], s_bto)
        if layer.name in A:
            add_second_moment(A[layer.name], a_bti, ones_bt if layer.bias else None)

    sampled = sized.config.factors.labels.value == "sampled"
    seen = sized.backward(group, consume, labels=sampled, ones=False)
    sums = sum(block.nbytes for total in (*A.values(), *S.values()) for block in total.blocks)
    return _cost(sized, seen, factors=sums, at_end=2 * sums)


def _lambda(sized: DryRank) -> PassCost:
    """Eigenbases of a layer group stay, and Lambda is summed; at the end it is serialised, as above."""
    group, blocks = _largest_group(sized), sized.config.factors.blocks
    bases = {layer.name: (_zeros(sized, layer.outputs, blocks), _zeros(sized, layer.inputs, blocks)) for layer in group}
    with torch.device("meta"):
        Lambda = {layer.name: torch.zeros(layer.outputs, layer.inputs, dtype=sized.rank.wide) for layer in group}

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
        add_squared_gradients(Lambda[layer.name], s_bto, a_bti, *bases[layer.name])

    seen = sized.backward(group, consume, ones=False)
    sums = sum(total.nbytes for total in Lambda.values())
    held = sum(block.nbytes for pair in bases.values() for basis in pair for block in basis.blocks)
    return _cost(sized, seen, factors=held + sums, at_end=2 * sums)


def _largest_group(sized: DryRank) -> tuple[Layer, ...]:
    factors = sized.config.factors
    groups = layer_groups(sized.layers, factors.max_group_bytes, factors.blocks)
    by_name = {layer.name: layer for layer in sized.layers}
    found = [tuple(by_name[name] for name in names) for names in groups]
    return max(found, key=lambda group: sum(layer.outputs**2 + layer.inputs**2 + layer.size for layer in group))


def _zeros(sized: DryRank, n: int, blocks: int) -> BlockDiagonal:
    return BlockDiagonal.zeros(n, blocks, dtype=sized.rank.wide, device="meta")


def _laid_out(sized: DryRank, queries: int) -> dict[str, LayerQueries]:
    """The query batch as a scan lays it out at the largest ranks.

    With scan.rank=auto it is not known yet which layers will have a shared basis: none, or all, whichever takes more.
    """
    config, rank, layers = sized.config.scan, sized.config.most_rank, sized.layers
    dtype = in_dtype(config.query_dtype, sized.rank.model.dtype)
    spectra = {
        layer.name: Spectrum.largest(queries, rank)
        for layer in layers
        if rank is not None and not stored_dense(layer, rank)
    }
    entries = config.query_group_bytes // dtype.itemsize
    plan = plan_layouts(spectra, layers, sized.T, entries, share=config.rank == "auto")
    found = []
    for one in (plan, plan.with_largest_bases()) if plan.candidates else (plan,):
        batch = without_content(one, queries, dtype)
        found.append(_with_scratch(sized, on_device(batch, layers, "meta", dtype, Scratch.on(sized.device))))
    return max(found, key=lambda batch: _bytes(batch.values()))


def _full(sized: DryRank, layers: Sequence[Layer], queries: int) -> dict[str, LayerQueries]:
    scratch = Scratch.on(sized.device)
    found = {
        layer.name: LayerQueries.dense(
            torch.empty(queries, layer.outputs, layer.inputs, device="meta"), scratch, bias=layer.bias
        )
        for layer in layers
    }
    return _with_scratch(sized, found)


def _with_scratch(sized: DryRank, found: dict[str, LayerQueries]) -> dict[str, LayerQueries]:
    """The same, with their scratch as large as it becomes: it stays for all micro-batches, as they do."""
    like = torch.empty(0, dtype=sized.rank.model.dtype, device="meta")
    for one in found.values():
        if one.scratch is not None and one.K_qmn is not None:
            _, m, n = one.K_qmn.shape
            one.scratch.take(like.to(one.dtype), min(sized.B, formed_at_once(m, n)), m, n)
    return found


def _bytes(queries: Iterable[LayerQueries]) -> int:
    found = list(queries)
    scratches = {one.scratch for one in found if one.scratch is not None}
    return sum(one.nbytes for one in found) + sum(scratch.nbytes for scratch in scratches)


def _cost(
    sized: DryRank, seen: Dry, *, queries: int = 0, factors: int = 0, gradients: int = 0, at_end: int = 0
) -> PassCost:
    """at_end: bytes that a task holds beside what stays when its micro-batches are over."""
    widest = max(max(layer.outputs, layer.inputs) for layer in sized.layers)
    memory = PassMemory(
        weights=sized.weights,
        queries=queries,
        factors=factors,
        gradients=gradients,
        activations=max(seen.peak, at_end),
        allocator=_KEPT_WIDTHS * sized.B * sized.T * widest * sized.itemsize if sized.device == "cpu" else 0,
    )
    return PassCost(memory, seen.flop / (sized.B * sized.T))


def largest(costs: Mapping[str, PassCost]) -> tuple[str, PassMemory]:
    """The pass that holds the most, and what it holds."""
    name = max(costs, key=lambda one: costs[one].memory.total)
    return name, costs[name].memory
