"""Losses of every position and their gradient, without the logits of all positions ever existing at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infscan.model.attention import document_logits
from infscan.model.loaded import LoadedModel
from infscan.model.measure import sample_labels

# Positions whose logits exist at once: as many as fit a cache at 4 bytes each, and no fewer than a product needs to run
# at full speed, however large the vocabulary.
_CHUNK_BYTES, _CHUNK_ROWS = 8 << 20, 512
# On a GPU, which wants few and large kernels, and has the memory.
_GPU_CHUNK_BYTES = 512 << 20
# Tokens that a model is tried on.
_TRIED = 4


@dataclass(frozen=True)
class Loss:
    """Each sequence's sum over its positions of weight * -log p(label), nats (docs/method.md#losses).

    labels_bt: int64 [B, T], by the position that predicts them. weights_bt: [B, T] bool or signed float.
    uniforms_bt: float64 [B, T] in [0, 1): where given, the labels are drawn from the model by these numbers, and are
    found in labels_bt afterwards.
    """

    labels_bt: Tensor
    weights_bt: Tensor
    uniforms_bt: Tensor | None = None


Head = Callable[[Tensor], Tensor]


class _PositionLosses(torch.autograd.Function):
    """h [B, T, n] -> weight * -log p(label) of every position, [B, T], logits = head(h).

    A position's loss depends on its own row of h alone, so its gradient is made along with it, `rows` rows at a time:
    d loss / d logits = weight * (p - onehot(label)), and then through the head. Nothing of the logits is kept.
    """

    @staticmethod
    def forward(ctx: Any, h_btn: Tensor, head: Head, loss: Loss, rows: int) -> Tensor:
        h_mn = h_btn.detach().flatten(0, 1)
        labels_m, weights_m = loss.labels_bt.view(-1), loss.weights_bt.flatten()
        uniforms_m = None if loss.uniforms_bt is None else loss.uniforms_bt.flatten()
        wide = torch.promote_types(h_mn.dtype, torch.float32)
        losses_m = torch.empty(len(h_mn), dtype=wide, device=h_mn.device)
        gradient_mn = torch.empty_like(h_mn)
        for start in range(0, len(h_mn), rows):
            part = slice(start, start + rows)
            h_cn = h_mn[part].requires_grad_()
            with torch.enable_grad():
                logits_cv = head(h_cn)
            log_p_cv = torch.log_softmax(logits_cv.detach(), dim=-1, dtype=wide)
            if uniforms_m is not None:
                labels_m[part] = sample_labels(log_p_cv.exp(), uniforms_m[part])
            labels_c1, weights_c = labels_m[part, None], weights_m[part].to(wide)
            losses_m[part] = log_p_cv.gather(1, labels_c1).squeeze(1).neg_() * weights_c
            p_cv = log_p_cv.exp_()
            p_cv.scatter_add_(1, labels_c1, p_cv.new_full(labels_c1.shape, -1.0)).mul_(weights_c[:, None])
            (gradient_mn[part],) = torch.autograd.grad(logits_cv, h_cn, p_cv.to(logits_cv.dtype))
        ctx.save_for_backward(gradient_mn.view_as(h_btn))
        return losses_m.view_as(loss.labels_bt)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_btn,) = ctx.saved_tensors
        return gradient_btn * gradients[0][..., None].to(gradient_btn.dtype), None, None, None


def sequence_losses(
    model: LoadedModel, ids_bt: Tensor, position_ids_bt: Tensor | None, loss: Loss, *, whole: bool = False
) -> Tensor:
    """Every sequence's loss, [B] float32 or wider; its gradient reaches whatever the forward asks one for.

    ids_bt, position_ids_bt: as `infscan.model.attention.document_logits` takes them. The head is run inside the
    module's forward, where a partitioned weight is gathered once; a family that does more to its logits gives them
    whole. whole: the logits themselves are wanted, of a head that is tracked.
    """
    module = model.module
    rows = rows_at_once(module.config.get_text_config().vocab_size, on_gpu=model.on_gpu)
    if whole or not model.head_is_last:
        logits_btv = document_logits(module, ids_bt, position_ids_bt)
        return _PositionLosses.apply(logits_btv, _itself, loss, rows).sum(dim=1)
    with instead_of_head(module, lambda h_btn, head: _PositionLosses.apply(h_btn, head, loss, rows)[..., None]):
        return document_logits(module, ids_bt, position_ids_bt).squeeze(-1).sum(dim=1)


def rows_at_once(vocabulary: int, *, on_gpu: bool) -> int:
    """Positions whose logits exist at once."""
    return max(_CHUNK_ROWS, (_GPU_CHUNK_BYTES if on_gpu else _CHUNK_BYTES) // (4 * vocabulary))


def _itself(logits_cv: Tensor) -> Tensor:
    return logits_cv * 1


@contextmanager
def instead_of_head(module: PreTrainedModel, instead: Callable[[Tensor, Head], Tensor]) -> Iterator[None]:
    """While open, the output embeddings return instead(h, their own forward)."""
    head: Any = module.get_output_embeddings()
    before = head.__dict__.get("forward")
    own: Head = head.forward
    head.forward = lambda h_btn: instead(h_btn, own)
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


@torch.no_grad()
def head_is_last(module: PreTrainedModel, device: str) -> bool:
    """Whether the logits are what the output embeddings give, and nothing is done to them afterwards (a soft cap, a
    scale): tried on a few tokens. All ranks of a group must ask together.
    """
    if module.get_output_embeddings() is None:
        return False
    given: list[tuple[Tensor, Tensor]] = []

    def keep(h_btn: Tensor, head: Head) -> Tensor:
        out_btv = head(h_btn)
        # A copy: what is done afterwards may be done in place.
        given.append((out_btv, out_btv.clone()))
        return out_btv

    ids_bt = torch.arange(1, _TRIED + 1, device=device)[None] % module.get_input_embeddings().num_embeddings
    with instead_of_head(module, keep):
        logits_btv = document_logits(module, ids_bt)
    if len(given) != 1:
        return False
    ((out_btv, copy_btv),) = given
    # Shapes alone have no values to compare.
    return out_btv is logits_btv if device == "meta" else torch.equal(copy_btv.to(logits_btv.dtype), logits_btv)
