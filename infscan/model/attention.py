"""Documents of one sequence that do not see each other: block-diagonal causal attention, by position ids alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import sdpa_attention

from infscan.errors import ModelError

# Families whose code places tokens by position ids, and does not take boundaries from them.
_WANT_MASK = frozenset({"opt"})


def document_logits(module: PreTrainedModel, ids_bt: Tensor, position_ids_bt: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of token ids int64 [B, T].

    position_ids_bt: int64 [B, T], beginning anew at 0 where a document does; None: every row is one document. With
    neither an attention mask nor a cache, transformers takes ids that do not ascend by one for the boundary of a packed
    sequence, and keeps what is before out of sight, in sliding windows too. Where it does not, a mask is given.
    """
    told = {}
    if position_ids_bt is not None:
        told["position_ids"] = position_ids_bt
        if module.config.model_type in _WANT_MASK:
            told["attention_mask"] = document_mask(position_ids_bt)
    with _packed(position_ids_bt is not None):
        return module(input_ids=ids_bt, use_cache=False, **told).logits


@contextmanager
def _packed(packed: bool) -> Iterator[None]:
    """Within it, transformers is told whether rows hold several documents.

    By itself it looks at the position ids, and for the answer the host waits until a GPU has done all it was given.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = document_numbers if packed else _one_document
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def document_numbers(position_ids: Tensor) -> Tensor:
    """The number of its document in the row, from 0, for every token: int64 [B, T].

    position_ids: int64 [B, T]; one that does not follow on from the one before begins a document.
    """
    begins = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return begins.cumsum(dim=-1)


def repeat_grouped_heads() -> None:
    """From here on, transformers repeats keys and values of grouped heads where a GPU's fused attention does not share
    them: in float32 and wider, where torch would take the way that keeps [T, T] for every head until the backward pass.

    For the whole process: blocks that are checkpointed are run again in the backward pass, out of any context.
    """
    before = sdpa_attention.use_gqa_in_sdpa
    if getattr(before, "narrow_alone", False):
        return

    @wraps(before)
    def use_gqa_in_sdpa(attention_mask: Tensor | None, key: Tensor, *rest: Tensor) -> bool:
        return fused_shares_heads(key) and before(attention_mask, key, *rest)

    use_gqa_in_sdpa.narrow_alone = True  # type: ignore[attr-defined]
    sdpa_attention.use_gqa_in_sdpa = use_gqa_in_sdpa


def fused_shares_heads(key: Tensor) -> bool:
    """Whether a fused kernel of the key's device takes grouped heads in its dtype."""
    return not key.is_cuda or key.dtype.itemsize <= 2


def _one_document(position_ids: Tensor) -> None:
    return None


def document_mask(position_ids_bt: Tensor) -> Tensor:
    """True where a token (row) sees a token (column): not before its document's first. bool [B, 1, T, T].

    position_ids_bt: int64 [B, T], 0 where a document begins.
    """
    document_bt = (position_ids_bt == 0).cumsum(dim=1)
    same_btt = document_bt[:, :, None] == document_bt[:, None, :]
    return same_btt.tril()[:, None]


def refusal(family: str, part: str = "") -> ModelError:
    """What a model of a family that cannot keep documents apart is refused with. part: what carries a state, if any."""
    reason = f"{family}, whose {part} carries a state from token to token," if part else family
    return ModelError(
        f"corpus.attention=within: {reason} does not keep the documents of a sequence apart; use "
        "corpus.packing=document, where each has a sequence of its own, or corpus.attention=across."
    )
