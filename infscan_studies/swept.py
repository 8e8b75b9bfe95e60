"""Scores under many dampings from one pass over the sequences, in the factors' eigenbases, where each is a division.

    <P, g> = sum over o, i of C_oi G_oi / (Lambda_oi + lambda),   C = Q_S^T V Q_A,   G = Q_S^T g Q_A

V and g are a query's and a sequence's gradients of a layer. Only the divisor knows of the damping (and of K-FAC, whose
Lambda is the product of the factors' eigenvalues); without it the sum is the gradient dot product. Of a layer with a
span (`infscan.influence.span`) the divisor is the same for all output directions beyond it: of those the sum over o of
C G is all that is formed, from the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.corpus import sequences as corpus_sequences
from infscan.influence.inverse import damping, tokens_to_core
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.worker import ModelWorker
from infscan.queries import Query
from infscan.steps.factor_files import found_damping
from infscan.steps.gradients import Tokens, query_tokens
from infscan.steps.preconditioner import Preconditioner, core, layer_factors
from infscan_studies.config import BankMethod

# Of the queries' matrices, of all layers whose scores are made in one pass.
_MOST_BYTES = 3 << 30


@dataclass(frozen=True)
class Way:
    """ekfac, kfac or identity. damping: a multiple of the mean of Lambda; None: none (identity), or found by layer."""

    method: BankMethod
    damping: float | None


class SweptLayer:
    """The queries of one layer in its eigenbases. tokens: of a sequence of the fit, on average."""

    def __init__(self, layer: Layer, V: Sequence[Tokens], inverse: Preconditioner, tokens: float) -> None:
        known = layer_factors(inverse, layer, str(V[0].s_to.device), V[0].s_to.dtype)
        assert known is not None
        self.layer, self.factors, self.inverse = layer, known[0], inverse
        self._lam: dict[Way, float] = {}
        self.rows = layer.kept_outputs if is_spanned(layer) else layer.outputs
        self.S_rows = tokens * self.factors.S_eigenvalues.clamp_min(0)
        self.A_rows = self.factors.A_eigenvalues.clamp_min(0)
        if not is_spanned(layer):
            self.C_qx = torch.stack([core(one, layer, known, solved=True).flatten() for one in V])
            return
        insides, outsides, inputs, numbers = [], [], [], []
        for number, one in enumerate(V):
            measured = one.s_to.abs().amax(dim=1) > 0
            s_no, b_ni = one.s_to[measured] @ self.factors.Q_S, one.a_ti[measured] @ self.factors.Q_A
            insides.append((s_no[:, : layer.span].T @ b_ni).flatten())
            outsides.append(s_no[:, layer.span :])
            inputs.append(b_ni)
            numbers.append(torch.full((len(b_ni),), number, device=b_ni.device))
        self.C_qx = torch.stack(insides)
        self.s_no, self.b_ni, self.query_n = torch.cat(outsides), torch.cat(inputs), torch.cat(numbers)

    def divisor(self, way: Way) -> Tensor | None:
        """Lambda + lambda in the rows that are told apart, [rows, I]; None: of the dot product."""
        if way.method is BankMethod.identity:
            return None
        if way not in self._lam:
            # Once, not for every micro-batch: it is a mean over Lambda, and a look into storage where it was found.
            self._lam[way] = self._damping(way)
        if way.method is BankMethod.kfac:
            return torch.outer(self.S_rows[: self.rows], self.A_rows) + self._lam[way]
        return self.factors.Lambda[: self.rows] + self._lam[way]

    def _damping(self, way: Way) -> float:
        if way.method is BankMethod.kfac:
            assert way.damping is not None
            return way.damping * float(self.S_rows.mean(dtype=torch.float64) * self.A_rows.mean(dtype=torch.float64))
        relative = found_damping(self.inverse.factors, self.layer) if way.damping is None else way.damping
        return damping(self.factors.Lambda, relative, None, self.layer.name, self.factors.stack_mean)

    def gradients(self, s: Tensor, a: Tensor, routed: Routed | None) -> tuple[list[int], Tensor, Tensor | None] | None:
        """The sequences of a batch that have tokens here (None where none has), their G [B, x] inside of the span, and
        beyond it the sum over output directions of C G, [B, Q, I]."""
        rows, inside, outside = [], [], []
        for row, s_to, a_ti in _by_sequence(s.to(self.C_qx.dtype), a.to(self.C_qx.dtype), routed):
            rows.append(row)
            if not is_spanned(self.layer):
                inside.append(tokens_to_core(s_to, a_ti, self.factors).flatten())
                continue
            s_to, b_ti = s_to @ self.factors.Q_S, a_ti @ self.factors.Q_A
            inside.append((s_to[:, : self.layer.span].T @ b_ti).flatten())
            products_ni = (self.s_no @ s_to[:, self.layer.span :].T) @ b_ti * self.b_ni
            zeros_qi = products_ni.new_zeros(len(self.C_qx), products_ni.shape[1])
            outside.append(zeros_qi.index_add_(0, self.query_n, products_ni))
        if not rows:
            return None
        return rows, torch.stack(inside), torch.stack(outside) if outside else None

    def products(self, way: Way, g_bx: Tensor, outside_bqi: Tensor | None) -> Tensor:
        """What `gradients` found against every query: [B, Q]."""
        C_qx, divisor_oi = self.C_qx, self.divisor(way)
        if divisor_oi is not None:
            inside_x = divisor_oi[: self.layer.span].flatten() if is_spanned(self.layer) else divisor_oi.flatten()
            # Whichever of the two is less to divide.
            C_qx, g_bx = (C_qx / inside_x, g_bx) if len(C_qx) < len(g_bx) else (C_qx, g_bx / inside_x)
        found_bq = (C_qx @ g_bx.T).T
        if outside_bqi is None:
            return found_bq
        return found_bq + (outside_bqi if divisor_oi is None else outside_bqi / divisor_oi[-1]).sum(dim=-1)


def is_spanned(layer: Layer) -> bool:
    """Whether there are output directions beyond the span."""
    return 0 < layer.span < layer.outputs


def _by_sequence(s: Tensor, a: Tensor, routed: Routed | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    if routed is None:
        yield from ((row, *pair) for row, pair in enumerate(zip(s, a, strict=True)))
    else:
        yield from ((row, s[mine], a[mine]) for row, mine in routed.segments())


@dataclass(frozen=True)
class Swept:
    """by_layer [Q, N] each; seconds of the processor: what every way needs, and its own beside it."""

    by_layer: dict[str, NDArray[np.floating]]
    seconds: float


def sweep(
    worker: ModelWorker,
    queries: Sequence[Query],
    sequences: Sequence[corpus_sequences.Sequence],
    inverse: Preconditioner,
    tokens: float,
    ways: Sequence[Way],
    tokens_per_batch: int,
) -> dict[Way, Swept]:
    """Every way's scores of every tracked layer apart. inverse: with the factors; its damping is not looked at.

    tokens: of a sequence that the factors were fitted on, on average.
    """
    started, Q = time.process_time(), len(queries)
    inverse = replace(inverse, damping=replace(inverse.damping, relative=1.0, auto=False))
    spent = dict.fromkeys(ways, 0.0)
    found = {way: {layer.name: np.zeros((Q, len(sequences)), np.float32) for layer in worker.layers} for way in ways}
    for group in groups_of(worker.layers, Q):
        V = query_tokens(worker, queries, group)
        held = {layer.name: SweptLayer(layer, V.pop(layer.name), inverse, tokens) for layer in group}
        for batch in worker.batches(sequences, tokens_per_batch):

            def consume(
                layer: Layer,
                s: Tensor,
                a: Tensor,
                routed: Routed | None,
                held: dict[str, SweptLayer] = held,
                batch_rows: NDArray[np.int64] = batch.rows,
            ) -> None:
                made = held[layer.name].gradients(s, a, routed)
                if made is None:
                    return
                rows, g_bx, outside_bqi = made
                for way in ways:
                    before = time.process_time()
                    found_bq = held[layer.name].products(way, g_bx, outside_bqi)
                    found[way][layer.name][:, batch_rows[rows]] = found_bq.T.cpu().numpy()
                    spent[way] += time.process_time() - before

            worker.backward(batch, group, batch.loss(), consume)
    common = time.process_time() - started - sum(spent.values())
    return {way: Swept(found[way], common + spent[way]) for way in ways}


def groups_of(layers: Sequence[Layer], queries: int) -> list[tuple[Layer, ...]]:
    """Runs of the layers whose queries' matrices fit into `_MOST_BYTES` together."""
    groups: list[list[Layer]] = [[]]
    used = 0
    for layer in layers:
        size = 4 * queries * (layer.span if is_spanned(layer) else layer.outputs) * layer.inputs
        if groups[-1] and used + size > _MOST_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size
    return [tuple(group) for group in groups]
