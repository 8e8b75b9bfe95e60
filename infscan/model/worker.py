"""What one rank does: its share of a model, and the micro-batches it is dealt. A test makes one without a cluster."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from infscan.config import Attention, ModelConfig
from infscan.corpus import sequences as corpus
from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.batches import micro_batches, pad, pad_losses, pad_positions
from infscan.corpus.read_ahead import ReadAhead, Reads
from infscan.errors import ModelError
from infscan.influence.covariance import with_ones
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.architecture import fingerprint_of
from infscan.model.capture import backward, capturing
from infscan.model.load import load
from infscan.model.loaded import LoadedModel, RankContext, check_document_mask
from infscan.model.losses import Loss, sequence_losses
from infscan.model.measure import next_tokens, predicting
from infscan.model.out_of_memory import RankMemoryError, foreign_bytes, is_out_of_memory
from infscan.model.probe import check_tracked
from infscan.storage import Identity, Store
from infscan.storage.write_behind import WriteBehind

T = TypeVar("T")
# What a rank did: a name, when it began and ended (seconds since 1970), and what is known of it.
Span = tuple[str, float, float, dict[str, Any]]
_MOST_SPANS = 100_000
# consume(layer, s_bto, a_bti, None): a with padding zeroed, and the bias's 1 appended unless it is left out; of an
# expert consume(layer, s_mo, a_mi, routed), over the tokens that go to it. Neither is to be changed in place.
LayerConsumer = Callable[[Layer, Tensor, Tensor, Routed | None], None]


@dataclass(frozen=True)
class WorkerSettings:
    """What a rank is started with; it travels to the actor."""

    model: ModelConfig
    layers: tuple[Layer, ...]
    sharded: bool
    # The run's folder, which every rank must see.
    output: Store | None = field(default=None, repr=False)
    # Host memory that a rank asks a shared cluster for; None asks for none.
    host_bytes: int | None = None
    # What the model is; None where whatever is at its path is to be loaded.
    identity: Identity | None = None


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch on the device."""

    # Its positions among the task's sequences.
    rows: np.ndarray
    ids_bt: Tensor
    # True on tokens.
    mask_bt: Tensor
    # False for a dummy that keeps the ranks of a sharded group in step; nothing of it counts.
    scored: bool = True
    # True on tokens whose prediction has a loss; None where all have one.
    loss_bt: Tensor | None = None
    # int64, from 0 in each document, where documents do not see each other; None where they do.
    position_ids_bt: Tensor | None = None
    # False where its sequences are of one length.
    padded: bool = True

    def loss(self) -> Loss:
        """The training loss: the summed -log p of a sequence's own next tokens, of those that have a loss."""
        return Loss(*next_tokens(self.ids_bt, self.mask_bt if self.loss_bt is None else self.loss_bt))

    def positions(self) -> Tensor:
        """Where the Fisher's labels are, bool [B, T]: every position before a token that has a loss, and the last one
        where its own token has; with a loss on every token, every one that is not padding."""
        return self.mask_bt if self.loss_bt is None else predicting(self.loss_bt, self.mask_bt)


@dataclass(frozen=True)
class Unwritten:
    """A unit that is computed, and whose output is being written. result: the unit's, once its files are in storage."""

    result: Future[Any]


class ModelWorker:
    """One rank's model and what every step does with it: dealing, capturing, reducing, one cached object per kind."""

    def __init__(self, settings: WorkerSettings, context: RankContext) -> None:
        self.layers = settings.layers
        self.context = context
        self.model: LoadedModel = load(settings.model, context, sharded=settings.sharded)
        # After loading, so that what was replaced before or meanwhile is found.
        if settings.identity is not None:
            settings.identity.check(fingerprint_of(settings.model.path, settings.model.revision), ModelError)
        if context.device != "meta":
            check_tracked(self.model.module, self.layers, context.device)
        self._cache: dict[str, tuple[Any, Any]] = {}
        self._lasting: dict[str, tuple[Any, Any]] = {}
        self.ahead = ReadAhead()
        self.behind = WriteBehind()
        # Whether this unit's output may be written while the next one is computed; and what then writes it.
        self._writes_later = False
        self._write: Callable[[], Any] | None = None
        self._keeps_documents_apart = False
        # How often this unit's micro-batches are halved because memory ran out in its earlier attempts.
        self.oom_retries = 0
        # Kept where a trace was asked for (`cluster.trace`). On a GPU the times are those of handing work to it.
        self.spans: list[Span] | None = None
        # The micro-batch at work: sequences and padded tokens; None outside of one.
        self._at: tuple[int, int] | None = None
        # Of the micro-batches that a unit goes over, how many are done; and who is told as one begins.
        self.share = 0.0
        self.tell: Callable[[float], None] = lambda share: None

    @property
    def device(self) -> str:
        return self.context.device

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums and factors: float32, or float64 for a float64 model."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def leads(self) -> bool:
        """Rank 0 writes what its group computed."""
        return self.context.rank == 0

    def batches(self, sequences: Sequence[corpus.Sequence], tokens_per_batch: int) -> Iterator[Batch]:
        """This rank's micro-batches: cut from the sequences alone, dealt in turn, as many for every rank.

        After k oom_retries they are cut for tokens_per_batch / 2^k, on every rank of the group alike.
        """
        cut = micro_batches([len(sequence) for sequence in sequences], max(1, tokens_per_batch >> self.oom_retries))
        for start in range(0, len(cut), self.context.world):
            mine, self.share = start + self.context.rank, start / len(cut)
            self.tell(self.share)
            if mine < len(cut):
                chosen = [sequences[row] for row in cut[mine]]
                ids, mask = pad([sequence.token_ids for sequence in chosen])
                self._at = ids.shape
                losses = [sequence.loss for sequence in chosen]
                # Without a mask nothing is added to what is computed.
                masked = any(loss is not None for loss in losses)
                loss_bt = self.to_device(pad_losses(losses, mask)) if masked else None
                positions = pad_positions([sequence.starts for sequence in chosen], ids.shape[1])
                positions_bt = None if positions is None else self.to_device(positions)
                yield Batch(
                    cut[mine],
                    self.to_device(ids),
                    self.to_device(mask),
                    loss_bt=loss_bt,
                    position_ids_bt=positions_bt,
                    padded=not mask.all(),
                )
            else:
                ids, mask = np.zeros((1, 2), np.int64), np.zeros((1, 2), np.bool_)
                self._at = ids.shape
                yield Batch(np.empty(0, np.int64), self.to_device(ids), self.to_device(mask), scored=False)
        self._at = None

    def attempt(
        self,
        function: Callable[..., T],
        oom_retries: int,
        *arguments: Any,
        following: Reads | None = None,
        behind: bool = False,
    ) -> T | Unwritten:
        """function(self, *arguments) with micro-batches halved `oom_retries` times.

        following: what the unit after this one reads, if it is known; read while this one is computed. behind: whether
        what the function hands to `later` may be written after it; if not, nothing is written beside it either.

        Raises:
            RankMemoryError: where memory runs out, once the batch is let go; anything else passes as it is.
        """
        self.oom_retries, self._at, self.share, self.ahead.next = oom_retries, None, 0.0, following
        self._writes_later, self._write = behind, None
        if not behind:
            self.behind.wait()
        try:
            result = function(self, *arguments)
            write, self._write = self._write, None
            return result if write is None else Unwritten(self.behind.begin(write))
        except Exception as error:
            if not is_out_of_memory(error, self.device):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rows, longest = self._at or (None, 0)
            found = RankMemoryError(reason, rows, (rows or 0) * longest, foreign_bytes(self.device))
        finally:
            self._writes_later = False
        # Out of the handler: the traceback, whose frames held the batch, is gone.
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        raise found

    def later(self, write: Callable[[], T]) -> T | None:
        """Write a unit's output, as the last that its task does: now, or while the next unit is computed.

        write: returns the unit's result, and holds nothing on the device: bytes and arrays of the host. What it raises
        is this unit's error.
        """
        if not self._writes_later:
            return write()
        self._write = write
        return None

    @contextmanager
    def span(self, name: str, **facts: Any) -> Iterator[None]:
        """Note how long what is within takes, where a trace was asked for."""
        began = time.time()
        yield
        if self.spans is not None and len(self.spans) < _MOST_SPANS:
            self.spans.append((name, began, time.time(), facts))

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copy to the device; from pinned memory and without waiting where the device is a GPU."""
        tensor = torch.from_numpy(array)
        if self.device.startswith("cuda"):
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def backward(
        self,
        batch: Batch,
        layers: Sequence[Layer],
        loss: Loss,
        consume: LayerConsumer,
        *,
        ones: bool = True,
        ends_at: str | None = None,
    ) -> Tensor:
        """Forward, the losses' sum, and the activation-gradient backward through `layers`; returns the losses, [B].

        Not `ones`: a bias's 1 is not appended to inputs, which then need not be copied. ends_at: the path of the block
        above which the backward ends; None is the embedding. Through the head alone nothing goes back: its output's
        gradient is the loss's own, and no activation of the blocks is kept.

        Raises:
            ModelError: where a layer is not reached by a backward that ends there.
        """
        reached = set()

        def consume_masked(layer: Layer, a: Tensor, s: Tensor, routed: Routed | None) -> None:
            reached.add(layer.name)
            if batch.scored:
                mask = batch.mask_bt if routed is None else routed.of(batch.mask_bt)
                consume(layer, s, with_ones(a, mask, bias=layer.bias and ones, padded=batch.padded), routed)

        names = {layer.name for layer in layers}
        whole = self.model.head_name in names
        if names == {self.model.head_name}:
            ends_at = self.model.head_name
        with capturing(self.model.module, layers, consume_masked, ends_at=ends_at):
            with self.span("forward", tokens=batch.ids_bt.numel()):
                losses_b = sequence_losses(self.model, batch.ids_bt, batch.position_ids_bt, loss, whole=whole)
            with self.span("backward", tokens=batch.ids_bt.numel()):
                backward(losses_b.sum())
        missed = [layer.name for layer in layers if not layer.stack and layer.name not in reached]
        if missed:
            raise ModelError(
                f"{missed[0]} is not reached by a backward that ends at {ends_at or 'the embeddings'}: this family's "
                "blocks do not follow one another; leave out scan.sieve or index.layers."
            )
        return losses_b.detach()

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the group's ranks, on rank 0 (other ranks get something unspecified)."""
        if self.context.world > 1:
            tensor = tensor.contiguous()
            dist.reduce(tensor, dst=0)
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the group's ranks, of the same bits on every rank: what is decided by it is decided alike."""
        if self.context.world > 1:
            tensor = self.reduce(tensor)
            dist.broadcast(tensor, src=0)
        return tensor

    def read(self, address: CorpusAddress, ids: np.ndarray) -> list[corpus.Sequence]:
        """Sequences of an addressable corpus by number, as training's attention saw them.

        All ranks of a group read the same, so that they try the model together where documents are to be kept apart.

        Raises:
            ModelError: where they are, and the model lets them see each other all the same.
        """
        if address.reading.attention is Attention.within and not self._keeps_documents_apart:
            check_document_mask(self.model)
            self._keeps_documents_apart = True
        return self.ahead.read(Reads(address, ids), self.cached("corpus", address, address.open))

    def cached(self, kind: str, key: Any, make: Callable[[], T], *, lasting: bool = False) -> T:
        """The last object of a kind, made anew when its key changes; the old one is dropped first.

        lasting: `forget` leaves it: something small that follows from model and corpus alone.
        """
        cache = self._lasting if lasting else self._cache
        held = cache.get(kind)
        if held is None or held[0] != key:
            cache.pop(kind, None)
            del held
            cache[kind] = (key, make())
        found: T = cache[kind][1]
        return found

    def forget(self) -> None:
        """Drop every cached object that is not lasting: a phase's factors and queries are not the next one's."""
        self.ahead.forget()
        self._cache.clear()
