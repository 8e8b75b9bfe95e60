"""The influence of a sequence's tokens as targets, by forward-mode differentiation: one forward with tangents.

With P = (G + lambda)^-1 grad(-f) and l_t = -log p(x_t | x_<t), token t's influence as what the model learns to predict
is <P, grad l_t> (`infscan.model.token_influence`, which takes two backward passes): the derivative of l_t along P. All
t come at once from a forward that carries the tangent P of the tracked layers, and several P share the values that
their tangents are taken at; nothing is kept for a backward, and a model that is cut over ranks can do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.nn import functional

from infscan.influence.layers import Layer
from infscan.model.attention import document_logits
from infscan.model.attention_blocks import TwiceDifferentiable
from infscan.model.gauss_newton import moved_by, without_backward_marks
from infscan.model.losses import Head, Loss, instead_of_head, rows_at_once
from infscan.model.suffix import not_checkpointed
from infscan.model.worker import Batch, ModelWorker


@torch.no_grad()
def target_influence(
    worker: ModelWorker, batch: Batch, layers: Sequence[Layer], P: Mapping[str, Tensor], loss: Loss
) -> Tensor:
    """<P, grad of each position's loss>, [K, B, T] float32 or wider, by the position that predicts; 0 without a loss.

    P: [K, O, I] by layer, over which they add up: K queries, whose tangents share one pass. All ranks of a group call
    it together, each with its own batch.
    """
    model, module = worker.model, worker.model.module
    whole = model.head_name in {layer.name for layer in layers} or not model.head_is_last
    directions = {layer.name: P[layer.name].to(model.dtype) for layer in layers}
    at_zero = {name: torch.zeros_like(D_koi[0]) for name, D_koi in directions.items()}
    K = len(next(iter(directions.values())))
    rows = rows_at_once(module.config.get_text_config().vocab_size, on_gpu=model.on_gpu)

    def losses(moved: dict[str, Tensor]) -> Tensor:
        with moved_by(module, layers, moved):
            if whole:
                return _losses(model.logits(batch.ids_bt, batch.position_ids_bt), loss, max(1, rows // K), worker.wide)
            with instead_of_head(module, lambda h, head: _along_gradient(h, head, loss, rows, worker.wide)[..., None]):
                return document_logits(module, batch.ids_bt, batch.position_ids_bt).squeeze(-1)

    every = dict(module.named_modules())
    # Attention's fused kernels and checkpointed blocks have no forward-mode derivative.
    with TwiceDifferentiable(), without_backward_marks(module), not_checkpointed(every, ""):
        tangents_kbt: Tensor = vmap(lambda one: jvp(losses, (at_zero,), (one,))[1])(directions)
    return torch.where(loss.weights_bt.bool(), tangents_kbt, 0)


def _losses(logits_btv: Tensor, loss: Loss, rows: int, wide: torch.dtype) -> Tensor:
    """-log p(label) of every position, [B, T], so many rows at once."""
    parts = zip(logits_btv.flatten(0, 1).split(rows), loss.labels_bt.flatten().split(rows), strict=True)
    found = [functional.cross_entropy(logits_cv.to(wide), labels_c, reduction="none") for logits_cv, labels_c in parts]
    return torch.cat(found).view_as(loss.labels_bt)


def _along_gradient(h_btn: Tensor, head: Head, loss: Loss, rows: int, wide: torch.dtype) -> Tensor:
    """<h, g>, [B, T], g the gradient of -log p(label) by h: as a loss, its tangent is that of the losses.

    g is the same for every tangent, so that each takes n multiplications of a position in place of the head's n * V.
    """
    h_mn, labels_m = forward_ad.unpack_dual(h_btn).primal.flatten(0, 1), loss.labels_bt.flatten()
    gradients = []
    for h_cn, labels_c in zip(h_mn.split(rows), labels_m.split(rows), strict=True):
        logits_cv, through_head = vjp(head, h_cn)[:2]
        p_cv = torch.softmax(logits_cv, dim=-1, dtype=wide)
        p_cv = p_cv.scatter_add(1, labels_c[:, None], p_cv.new_full((len(labels_c), 1), -1.0))
        gradients.append(through_head(p_cv.to(logits_cv.dtype))[0])
    return (h_btn.to(wide) * torch.cat(gradients).view_as(h_btn).to(wide)).sum(dim=-1)
