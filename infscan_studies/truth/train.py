"""A small, seeded trainer of causal language models on sequences of token ids.

The ground truths that retrain a model (LDS) and the embedded demo share it. A run is fixed by the model's weights, the
sequences in their order, the settings and the number of CPU threads: the same four give the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from infscan.errors import ConfigError, CorpusError, ModelError
from infscan.model.measure import next_tokens, summed_losses
from infscan_studies.config import Sizes, TrainingOptimizer, TrainingSettings

# Which of a sequence's tokens have a loss; None: all.
Mask = Sequence[bool] | None
Example = tuple[Sequence[int], Mask]
POOL_BATCHES = 16  # sequences are sorted by length within this many batches: little padding, still a random order


def build_model(sizes: Sizes, vocab_size: int, context: int, seed: int) -> GPTNeoXForCausalLM:
    """The untrained model of a seed."""
    if sizes.width % sizes.heads:
        raise ConfigError(f"width={sizes.width} is not a multiple of heads={sizes.heads}; give one that is.")
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp_width,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)


@dataclass
class TrainingRecord:
    """What a run did. Losses are nats per predicted token; ``train_losses`` averages over each epoch as it went."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    heldout_losses: list[float] = field(default_factory=list)


def train_language_model(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    settings: TrainingSettings,
    heldout: Sequence[Sequence[int]] = (),
    on_epoch: Callable[[int, TrainingRecord], None] | None = None,
    *,
    losses: Sequence[Mask] | None = None,
    alpha: float = 0.0,
    until: int | None = None,
) -> TrainingRecord:
    """Train ``model`` (a transformers causal LM, on its own device) in place and leave it in eval mode.

    ``sequences`` are token ids, no longer than the model's context; each predicts its tokens t >= 1, or those of them
    that ``losses`` says (a mask of each sequence's tokens, None for all). ``heldout`` is scored after each epoch;
    ``on_epoch(epoch, record)`` is called after that. ``alpha`` adds alpha/2 |theta - theta_0|^2, theta_0 being the
    weights at the start, to the loss of a batch (docs/method.md#multi-stage; with reduction=sum, on its own scale).
    ``until`` stops after so many epochs, the schedule being that of all.
    Raises ConfigError for impossible settings, CorpusError where a sequence has no token to predict and ModelError
    where the loss stops being finite.
    """
    settings.check()
    masks = losses or [None] * len(sequences)
    examples = list(zip(sequences, masks, strict=True))
    for number, example in enumerate(examples):
        if not _predicted([example]):
            raise CorpusError(
                f"Sequence {number} has {len(example[0])} token(s) and nothing to predict: drop it beforehand."
            )
    if alpha and settings.reduction != "sum":
        raise ConfigError(f"alpha={alpha} is of a mean over sequences of summed losses: give reduction='sum' with it.")
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad] if alpha else []
    if not sequences:
        raise CorpusError("There is no sequence to train on: the list is empty.")
    order = torch.Generator().manual_seed(settings.seed)
    total_steps = settings.epochs * math.ceil(len(sequences) / settings.batch_sequences)
    optimizer = _optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total_steps, settings))
    record = TrainingRecord()
    started, cpu_started = time.perf_counter(), time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # dropout, where the model has any
        for epoch in range(settings.epochs if until is None else until):
            model.train()
            epoch_nats, epoch_tokens = 0.0, 0
            for batch in _batches(examples, settings.batch_sequences, order):
                nats = _summed_loss(model, batch)
                predicted = _predicted(batch)
                (nats / (predicted if settings.reduction == "mean" else len(batch))).backward()
                _pull_back(model, start, alpha)
                nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                epoch_nats += nats.item()
                epoch_tokens += predicted
                record.steps += 1
            if not math.isfinite(epoch_nats):
                raise ModelError(
                    f"The training loss is {epoch_nats} in epoch {epoch}: lower learning_rate={settings.learning_rate}."
                )
            record.tokens += epoch_tokens
            record.train_losses.append(epoch_nats / epoch_tokens)
            if heldout:
                record.heldout_losses.append(mean_loss(model, heldout, settings.batch_sequences))
            record.seconds = time.perf_counter() - started
            record.cpu_seconds = time.process_time() - cpu_started
            if on_epoch is not None:
                on_epoch(epoch, record)
    model.eval()
    return record


@torch.no_grad()
def mean_loss(model: nn.Module, sequences: Sequence[Sequence[int]], batch_sequences: int = 16) -> float:
    """Nats per predicted token over all sequences, in eval mode (in which the model is left)."""
    model.eval()
    by_length: list[Example] = [(ids, None) for ids in sorted(sequences, key=len)]
    nats = sum(
        _summed_loss(model, by_length[start : start + batch_sequences]).item()
        for start in range(0, len(by_length), batch_sequences)
    )
    return nats / sum(len(ids) - 1 for ids in sequences)


def _predicted(batch: Sequence[Example]) -> int:
    """Tokens with a loss; the first of a sequence has none."""
    return sum(len(ids) - 1 if mask is None else int(sum(mask[1:])) for ids, mask in batch)


def _pull_back(model: nn.Module, start: Sequence[Tensor], alpha: float) -> None:
    """Add the gradient of alpha/2 |theta - theta_0|^2."""
    if not alpha:
        return
    trained = (p for p in model.parameters() if p.requires_grad)
    for parameter, theta_0 in zip(trained, start, strict=True):
        change = alpha * (parameter.detach() - theta_0)
        parameter.grad = change if parameter.grad is None else parameter.grad.add_(change)


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Of the settings; it decays matrices only: biases and norms are left alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer is TrainingOptimizer.sgd:
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.beta1)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon)


def _rate(step: int, total_steps: int, settings: TrainingSettings) -> float:
    """The learning rate of a step (from 0) as a fraction of its peak."""
    warmup = max(1, round(settings.warmup_fraction * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return settings.final_fraction + (1 - settings.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def _batches(examples: Sequence[Example], batch_sequences: int, order: torch.Generator) -> Iterator[list[Example]]:
    """One epoch in a random order, cut into batches of similar length; every sequence comes once."""
    shuffled = torch.randperm(len(examples), generator=order).tolist()
    pool = POOL_BATCHES * batch_sequences
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), pool):
        # The batch cut keeps whole batches inside a pool, so only the last pool has a short one.
        near = sorted(shuffled[start : start + pool], key=lambda number: (len(examples[number][0]), number))
        batches += [near[i : i + batch_sequences] for i in range(0, len(near), batch_sequences)]
    for chosen in torch.randperm(len(batches), generator=order).tolist():
        yield [examples[number] for number in batches[chosen]]


def _summed_loss(model: nn.Module, batch: Sequence[Example]) -> Tensor:
    """Sum of -log p(x_t | x_<t) over t >= 1 of every sequence, where its mask allows: a scalar, in nats.

    Sequences are padded on the right: attention is causal, so no real token sees the padding and no mask is needed.
    """
    ids_bt = torch.zeros(len(batch), max(len(ids) for ids, _ in batch), dtype=torch.long)
    mask_bt = torch.zeros_like(ids_bt, dtype=torch.bool)
    for row, (ids, mask) in enumerate(batch):
        ids_bt[row, : len(ids)] = torch.tensor(ids)
        mask_bt[row, : len(ids)] = True if mask is None else torch.tensor(mask, dtype=torch.bool)
    device = next(model.parameters()).device
    ids_bt, mask_bt = ids_bt.to(device), mask_bt.to(device)
    targets_bt, weights_bt = next_tokens(ids_bt, mask_bt)
    logits_btv = model(input_ids=ids_bt, use_cache=False).logits
    return summed_losses(logits_btv, targets_bt, weights_bt).sum()
