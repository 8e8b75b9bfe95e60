"""Exact Gauss-Newton-vector products over the tracked layers: the curvature that EK-FAC approximates.

G = (1/N) sum over sequences, sum over positions t of J_t^T H_t J_t     (docs/method.md#influence)

J_t: the Jacobian of position t's logits with respect to the tracked [W, b]. H_t = diag(p) - p p^T: the Hessian of the
cross-entropy with respect to the logits, which is the Fisher of labels drawn from the model. Positions are those of
EK-FAC's pseudo-gradients (`Batch.positions`): every one that is not padding, the last included, unless a loss mask says
less. G is a mean over sequences of summed losses, as Lambda is. A layer counts as the linear map it is: a weight tied
to an embedding moves in the layer alone.

Vectors are [K, P]: K of them, each with every tracked layer's [O, I(+1)] matrix, row by row, one layer after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.nn import functional
from transformers import PreTrainedModel

from infscan.corpus import sequences as corpus
from infscan.influence.layers import Layer
from infscan.model.attention_blocks import TwiceDifferentiable
from infscan.model.capture import by_stack
from infscan.model.experts import Stacked, listening
from infscan.model.worker import Batch, ModelWorker

# hook(layer, inputs [..., I], outputs [..., O]) -> outputs
LayerHook = Callable[[Layer, Tensor, Tensor], Tensor]


def join(layers: Sequence[Layer], matrices: Mapping[str, Tensor], none_k0: Tensor | None = None) -> Tensor:
    """[K, P] from one [K, O, I] per layer. none_k0: what it is on a rank that has no layers, [K, 0]."""
    if not layers and none_k0 is not None:
        return none_k0
    return torch.cat([matrices[layer.name].flatten(1) for layer in layers], dim=1)


def split(layers: Sequence[Layer], x_kp: Tensor) -> dict[str, Tensor]:
    """One [K, O, I] per layer from [K, P]; views where the layout allows."""
    parts = x_kp.split([layer.size for layer in layers], dim=1) if layers else ()
    return {
        layer.name: part.reshape(-1, layer.outputs, layer.inputs) for layer, part in zip(layers, parts, strict=True)
    }


def damping_vector(layers: Sequence[Layer], lambdas: Mapping[str, float], like: Tensor) -> Tensor:
    """lambda_l repeated over its layer's entries: [P], in the dtype and on the device of `like`."""
    sizes = torch.tensor([layer.size for layer in layers], dtype=torch.int64)
    values = torch.tensor([lambdas[layer.name] for layer in layers], dtype=torch.float64)
    return values.repeat_interleave(sizes).to(like)


def owners(layers: Sequence[Layer], world: int) -> dict[str, int]:
    """Which of a group's ranks has each layer's part of a vector: the largest layers first, to whoever has least."""
    held = [0] * world
    found = {}
    for layer in sorted(layers, key=lambda layer: -layer.size):
        rank = held.index(min(held))
        held[rank] += layer.size
        found[layer.name] = rank
    return found


def mine(worker: ModelWorker) -> tuple[Layer, ...]:
    """The layers whose part of every vector this rank has: all of them where it is alone."""
    held = owners(worker.layers, worker.context.world)
    return tuple(layer for layer in worker.layers if held[layer.name] == worker.context.rank)


class GaussNewton:
    """G of some sequences, at a worker's model, over its tracked layers.

    A group's ranks multiply together, with the model whole on each or cut over them: micro-batches are dealt to them,
    and each has a part of every vector, that of the layers `mine`. All call `product` together, with as many vectors.

    tokens_per_batch: padded tokens per forward; memory grows with it times the vectors multiplied at once.
    """

    def __init__(self, worker: ModelWorker, sequences: Sequence[corpus.Sequence], tokens_per_batch: int) -> None:
        self.worker = worker
        self.layers = worker.layers
        self.sequences = sequences
        self.tokens_per_batch = tokens_per_batch
        self.owners = owners(worker.layers, worker.context.world)
        self.mine = mine(worker)
        self.size = sum(layer.size for layer in self.mine)

    def product(self, x_kp: Tensor, rows: NDArray[np.int64] | None = None) -> Tensor:
        """G x for K vectors at once: [K, P] -> [K, P], float32 or wider. rows: G of these sequences alone."""
        chosen = self.sequences if rows is None else [self.sequences[row] for row in rows.tolist()]
        matrices = self._everywhere(x_kp)
        total = {
            layer.name: torch.zeros(
                len(x_kp), layer.outputs, layer.inputs, dtype=self.worker.wide, device=self.worker.device
            )
            for layer in self.layers
        }
        # Attention's fused kernels have no forward-mode derivative.
        with TwiceDifferentiable():
            for batch in self.worker.batches(chosen, self.tokens_per_batch):
                for name, part in self._batch_product(batch, matrices).items():
                    total[name] += part
        return join(self.mine, self._to_owners(total), x_kp) / len(chosen)

    def _everywhere(self, x_kp: Tensor) -> dict[str, Tensor]:
        """Every layer's matrices [K, O, I] in the model's dtype, from the ranks that have them."""
        parts = {name: part.to(self.worker.model.dtype) for name, part in split(self.mine, x_kp).items()}
        if self.worker.context.world == 1:
            return parts
        for layer in self.layers:
            if layer.name not in parts:
                shape = len(x_kp), layer.outputs, layer.inputs
                parts[layer.name] = torch.empty(shape, dtype=self.worker.model.dtype, device=self.worker.device)
            parts[layer.name] = parts[layer.name].contiguous()
            dist.broadcast(parts[layer.name], src=self.owners[layer.name])
        return parts

    def gather(self, x_kp: Tensor) -> dict[str, Tensor]:
        """Every layer's matrices [K, O, I] in the vectors' dtype on rank 0's host; of no use on the others."""
        parts = split(self.mine, x_kp)
        found = {}
        for layer in self.layers:
            part = parts.get(layer.name, x_kp.new_zeros(0))
            if self.worker.context.world > 1:
                shape = len(x_kp), layer.outputs, layer.inputs
                part = self.worker.reduce(part.clone() if layer.name in parts else x_kp.new_zeros(shape))
            if self.worker.leads:
                found[layer.name] = part.cpu()
        return found

    def _to_owners(self, total: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over ranks, each on the rank that has its layer."""
        if self.worker.context.world > 1:
            for layer in self.layers:
                dist.reduce(total[layer.name], dst=self.owners[layer.name])
        return total

    def _batch_product(self, batch: Batch, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """sum over the batch's positions of J^T H J, by layer: [K, O, I]; not of an expert that no token goes to."""
        directions_kbtv = self._logit_directions(batch, matrices)
        logits_btv, inputs, outputs = self._recorded_forward(batch)
        p_btv = torch.softmax(logits_btv.detach().to(self.worker.wide), dim=-1)
        weighted_kbtv = p_btv * directions_kbtv
        # H d = p * d - p (p . d), zero on padding.
        weighted_kbtv = weighted_kbtv - p_btv * weighted_kbtv.sum(dim=-1, keepdim=True)
        weighted_kbtv = weighted_kbtv * batch.positions()[..., None]
        # An expert that no token goes to has no part.
        seen = [layer for layer in self.layers if layer.name in outputs]
        gradients = torch.autograd.grad(
            logits_btv,
            [outputs[layer.name] for layer in seen],
            weighted_kbtv.to(logits_btv.dtype),
            is_grads_batched=True,
        )
        products: dict[str, Tensor] = {}
        for layer, s_kbto in zip(seen, gradients, strict=True):
            s_kmo = s_kbto.reshape(s_kbto.shape[0], -1, layer.outputs).to(self.worker.wide)
            a_mi = inputs[layer.name].flatten(0, -2).to(self.worker.wide)
            if layer.bias:
                a_mi = torch.cat([a_mi, a_mi.new_ones(len(a_mi), 1)], dim=1)
            products[layer.name] = s_kmo.transpose(1, 2) @ a_mi
        return products

    @torch.no_grad()
    def _logit_directions(self, batch: Batch, matrices: Mapping[str, Tensor]) -> Tensor:
        """J x: how the logits move with the tracked layers, [K, B, T, V], by forward-mode differentiation.

        The K tangents share one pass of the values that they are taken at.
        """
        at_zero = {name: torch.zeros_like(matrix[0]) for name, matrix in matrices.items()}

        def logits(moved: dict[str, Tensor]) -> Tensor:
            with moved_by(self.worker.model.module, self.layers, moved):
                return self.worker.model.logits(batch.ids_bt, batch.position_ids_bt)

        with without_backward_marks(self.worker.model.module):
            return vmap(lambda direction: jvp(logits, (at_zero,), (direction,))[1])(dict(matrices)).to(self.worker.wide)

    def _recorded_forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Logits [B, T, V] with their graph, and each tracked layer's inputs (detached) and outputs (in the graph)."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        module = self.worker.model.module

        def keep(layer: Layer, a: Tensor, y: Tensor) -> Tensor:
            inputs[layer.name], outputs[layer.name] = a.detach(), y
            return y

        def on_embedding(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            # As in a scan: parameters ask for no gradient, so the graph starts at the embedding's output.
            out.requires_grad_(True)

        handle = module.get_input_embeddings().register_forward_hook(on_embedding)
        try:
            with _hooked(module, self.layers, keep):
                return self.worker.model.logits(batch.ids_bt, batch.position_ids_bt), inputs, outputs
        finally:
            handle.remove()


@contextmanager
def moved_by(module: PreTrainedModel, layers: Sequence[Layer], moved: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, every layer's output carries the tangent of its `moved` [O, I], which is zero itself, in
    `torch.func.jvp`."""

    def add(layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        # The input's value without its tangent: y already carries W's product with that, and `moved` is zero.
        D_oi = moved[layer.name]
        value = forward_ad.unpack_dual(a).primal
        return y + (
            functional.linear(value, D_oi[:, :-1], D_oi[:, -1]) if layer.bias else functional.linear(value, D_oi)
        )

    with _hooked(module, layers, add):
        yield


class _Unmarked:
    """Takes the place of a function that only marks where backward passes."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        return x


@contextmanager
def without_backward_marks(module: PreTrainedModel) -> Iterator[None]:
    """DeepSpeed marks what enters and leaves a module, so that a backward gathers its parameters, and has a linear map
    of its own for that backward. Neither has a forward-mode derivative, and a pass without a backward needs neither."""
    held = [
        (child, name, child.__dict__[name])
        for child in module.modules()
        for name in ("pre_bwd_fn", "post_bwd_fn")
        if name in child.__dict__
    ]
    for child, name, _ in held:
        setattr(child, name, _Unmarked)
    its_linear, functional.linear = functional.linear, torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = its_linear
        for child, name, mark in held:
            setattr(child, name, mark)


@contextmanager
def _hooked(module: PreTrainedModel, layers: Sequence[Layer], hook: LayerHook) -> Iterator[None]:
    children = dict(module.named_modules())
    experts = by_stack(layers)

    def on(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _module, args, out: hook(layer, args[0], out)

    def on_stack(stack: str, seen: Stacked) -> Tensor | None:
        if stack not in experts:
            return None
        parts = list(seen.out_so.tensor_split(seen.bounds[1:-1]))
        for expert, layer in experts[stack].items():
            a_mi = seen.a_si[slice(*seen.bounds[expert : expert + 2])]
            if len(a_mi):
                parts[expert] = hook(layer, a_mi, parts[expert])
        return torch.cat(parts)

    handles = [children[layer.name].register_forward_hook(on(layer)) for layer in layers if not layer.stack]
    try:
        with listening(module, on_stack):
            yield
    finally:
        for handle in handles:
            handle.remove()
