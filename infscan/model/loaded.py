"""A model that a rank has loaded, and the rank's place in its worker group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infscan.model.attention import document_logits, refusal
from infscan.model.tracked import head_path

# Tokens of each of the two documents that a model is tried on.
_TRIED = 6
# What a document may differ from itself run alone, as a share of what the other one does to it where it is seen.
_LEAK = 1e-3


@dataclass(frozen=True)
class RankContext:
    """A rank's number in its worker group, its device, and where the group meets."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    threads: int = 1
    # host:port of rank 0's store; only groups of several ranks (or ZeRO-3 on one) have one.
    address: str | None = None
    timeout_s: float = 3600.0


@dataclass
class LoadedModel:
    """A model in eval mode whose parameters ask for no gradient; call `logits`."""

    module: PreTrainedModel
    context: RankContext
    dtype: torch.dtype
    parameters: int
    # The parameters whose storage this rank holds: all of them without ZeRO-3.
    shard_parameters: int
    # Whether nothing is done to the logits after the output embeddings.
    head_is_last: bool = False
    # Whether it runs on a GPU, or on shapes alone as on one.
    on_gpu: bool = False

    def logits(self, ids_bt: Tensor, position_ids_bt: Tensor | None = None) -> Tensor:
        """[B, T, V]. Padding is on the right: under causal attention it changes no token before it.

        position_ids_bt: as `infscan.model.attention.document_logits` takes them.
        """
        return document_logits(self.module, ids_bt, position_ids_bt)

    @cached_property
    def head_name(self) -> str | None:
        """The path of the output embeddings, where the model has them as a module."""
        return head_path(self.module)


@torch.no_grad()
def check_document_mask(model: LoadedModel) -> None:
    """Try two documents in one sequence: the second must come out as it does alone.

    Raises:
        ModelError: for a model that mixes tokens in another way than masked attention (state spaces, convolutions), or
            whose code does not take position ids for boundaries.
    """
    vocabulary = model.module.get_input_embeddings().num_embeddings
    ids_t = torch.arange(1, 2 * _TRIED + 1, device=model.context.device) % vocabulary
    restart_t = torch.arange(2 * _TRIED, device=ids_t.device) % _TRIED
    with _in_float32(model):
        alone, within, across = (
            logits_btv[0, -_TRIED:].to(torch.float64)
            for logits_btv in (
                model.logits(ids_t[None, _TRIED:]),
                model.logits(ids_t[None], restart_t[None]),
                model.logits(ids_t[None]),
            )
        )
        ran_in = next(model.module.parameters()).dtype
    rounding = (16 if ran_in.itemsize >= 4 else 4) * torch.finfo(ran_in).eps * float(alone.abs().max())
    seen = float((within - alone).abs().max())
    if seen > max(rounding, _LEAK * float((across - alone).abs().max())):
        raise refusal(model.module.config.model_type)


@contextmanager
def _in_float32(model: LoadedModel) -> Iterator[None]:
    """A model in bfloat16 or float16 run in float32, in which a leak is told from rounding; exact both ways.

    Not where its parameters are shards, which are gathered in the dtype they were made in, or where a GPU has no room.
    """
    tensors = [*model.module.parameters(), *model.module.buffers()]
    narrow = [(each, each.dtype) for each in tensors if each.is_floating_point() and each.dtype.itemsize < 4]
    if model.shard_parameters < model.parameters or not _has_room(model, sum(each.nbytes for each, _ in narrow)):
        narrow = []
    for each, _ in narrow:
        each.data = each.data.float()
    try:
        yield
    finally:
        for each, dtype in narrow:
            each.data = each.data.to(dtype)


def _has_room(model: LoadedModel, more: int) -> bool:
    return not model.context.device.startswith("cuda") or torch.cuda.mem_get_info(model.context.device)[0] > 2 * more
