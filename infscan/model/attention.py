"""Documents of one sequence that do not see each other: block-diagonal causal attention, by position ids alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infscan.errors import ModelError

if TYPE_CHECKING:
    from infscan.model.load import LoadedModel

# Tokens of the two documents that a model is tried on.
_TRIED = 6
# Families whose code places tokens by position ids, and does not take boundaries from them.
_WANT_MASK = frozenset({"opt"})


def document_logits(module: PreTrainedModel, ids_bt: Tensor, position_ids_bt: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of token ids int64 [B, T].

    position_ids_bt: int64 [B, T], beginning anew at 0 where a document does; None: every row is one document. With
    neither an attention mask nor a cache, transformers takes ids that do not ascend by one for the boundary of a packed
    sequence, and keeps what lies before out of sight, in sliding windows too. Where it does not, a mask is given.
    """
    told = {}
    if position_ids_bt is not None:
        told["position_ids"] = position_ids_bt
        if module.config.model_type in _WANT_MASK:
            told["attention_mask"] = document_mask(position_ids_bt)
    return module(input_ids=ids_bt, use_cache=False, **told).logits


def document_mask(position_ids_bt: Tensor) -> Tensor:
    """True where a token (row) sees a token (column): not before its document's first. bool [B, 1, T, T].

    position_ids_bt: int64 [B, T], 0 where a document begins.
    """
    document_bt = (position_ids_bt == 0).cumsum(dim=1)
    same_btt = document_bt[:, :, None] == document_bt[:, None, :]
    return same_btt.tril()[:, None]


@torch.no_grad()
def check_keeps_apart(model: LoadedModel) -> None:
    """Try two documents in one sequence: the second must come out as it does alone.

    Raises:
        ModelError: for a model that mixes tokens in another way than masked attention (state spaces, convolutions), or
            whose code does not take position ids for boundaries.
    """
    vocabulary = model.module.get_input_embeddings().num_embeddings
    ids_t = torch.arange(1, 2 * _TRIED + 1, device=model.place.device) % vocabulary
    restart_t = torch.arange(2 * _TRIED, device=ids_t.device) % _TRIED
    alone, within, across = (
        logits_btv[0, -_TRIED:].to(torch.float64)
        for logits_btv in (
            model.logits(ids_t[None, _TRIED:]),
            model.logits(ids_t[None], restart_t[None]),
            model.logits(ids_t[None]),
        )
    )
    rounding = 16 * torch.finfo(model.dtype).eps * float(alone.abs().max())
    seen = float((within - alone).abs().max())
    if seen > max(rounding, 0.1 * float((across - alone).abs().max())):
        raise refusal(model.module.config.model_type)


def refusal(family: str) -> ModelError:
    """What a model of a family that cannot keep documents apart is refused with."""
    return ModelError(
        f"corpus.attention=within: {family} does not keep the documents of a sequence apart; use "
        "corpus.packing=document, where each has a sequence of its own, or corpus.attention=across."
    )
