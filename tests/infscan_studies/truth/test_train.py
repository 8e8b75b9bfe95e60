"""Laws of the trainer: it learns, it repeats itself bit for bit, and padding takes no part."""

import math

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from infscan.errors import ConfigError, CorpusError, ModelError
from infscan_studies.config import TrainingOptimizer
from infscan_studies.truth.train import TrainingRecord, TrainingSettings, mean_loss, train_language_model

SETTINGS = TrainingSettings(epochs=6, batch_sequences=4, learning_rate=5e-3, seed=3)


def tiny_model(seed: int = 0) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=23,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


@pytest.fixture
def sequences() -> list[list[int]]:
    """Counting sequences modulo 23, of lengths 2 to 16: learnable, and unequal enough to need padding."""
    return [[(start + step) % 23 for step in range(2 + start % 15)] for start in range(30)]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_loss_falls_on_seen_and_held_out_sequences(sequences: list[list[int]]) -> None:
    model, heldout = tiny_model(), sequences[::5]
    seen = [ids for ids in sequences if ids not in heldout]
    before = mean_loss(model, heldout)
    record = train_language_model(model, seen, SETTINGS, heldout)
    assert before == pytest.approx(math.log(23), abs=0.2)
    assert record.train_losses[-1] < record.train_losses[0] - 1
    assert record.heldout_losses[-1] < before - 1
    assert record.steps == SETTINGS.epochs * 6
    assert record.tokens == SETTINGS.epochs * sum(len(ids) - 1 for ids in seen)
    assert not model.training


def test_sgd_steps_along_its_gradient_and_decays_matrices_alone(sequences: list[list[int]]) -> None:
    one = TrainingSettings(
        optimizer=TrainingOptimizer.sgd,
        epochs=1,
        batch_sequences=30,
        learning_rate=0.1,
        warmup_fraction=0.0,
        weight_decay=0.5,
        gradient_clip=1e9,
    )
    model, before = tiny_model(), tiny_model()
    train_language_model(model, sequences, one)
    predicted = sum(len(ids) - 1 for ids in sequences)
    for ids in sequences:
        row = torch.tensor(ids)
        (before(input_ids=row[None, :], labels=row[None, :]).loss * ((len(ids) - 1) / predicted)).backward()
    for after, start in zip(model.parameters(), before.parameters(), strict=True):
        assert start.grad is not None
        decay = 0.5 * start if start.ndim >= 2 else 0.0
        torch.testing.assert_close(after, start - 0.1 * (start.grad + decay), rtol=1e-4, atol=1e-6)


def test_one_seed_gives_the_same_bits_and_another_seed_others(sequences: list[list[int]]) -> None:
    runs = []
    for seed in (3, 3, 4):
        model = tiny_model()
        torch.manual_seed(1000 + len(runs))  # the caller's own random state must not matter
        train_language_model(model, sequences, TrainingSettings(epochs=2, batch_sequences=4, seed=seed))
        runs.append(weights(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_training_leaves_the_callers_random_state_alone(sequences: list[list[int]]) -> None:
    before = torch.get_rng_state()
    model = tiny_model()
    torch.set_rng_state(before)
    train_language_model(model, sequences, TrainingSettings(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_scoring_does_not_change_the_training(sequences: list[list[int]]) -> None:
    with_it, without = tiny_model(), tiny_model()
    train_language_model(with_it, sequences, SETTINGS, sequences[:3])
    train_language_model(without, sequences, SETTINGS)
    assert torch.equal(weights(with_it), weights(without))


def test_loss_does_not_depend_on_padding_or_batches(sequences: list[list[int]]) -> None:
    model = tiny_model().eval()
    alone = mean_loss(model, sequences, batch_sequences=1)
    assert mean_loss(model, sequences, batch_sequences=7) == pytest.approx(alone, rel=1e-5)
    assert mean_loss(model, sequences[::-1], batch_sequences=30) == pytest.approx(alone, rel=1e-5)


def test_sum_reduction_is_the_mean_over_sequences_of_their_summed_losses() -> None:
    # With all sequences of n predicted tokens the two losses differ by the factor n, which clipping to one norm undoes.
    equal = [[(start + step) % 23 for step in range(9)] for start in range(8)]
    models = [tiny_model(), tiny_model()]
    for model, reduction in zip(models, ("sum", "mean"), strict=True):
        settings = TrainingSettings(epochs=1, batch_sequences=8, gradient_clip=1e-3, reduction=reduction)
        train_language_model(model, equal, settings)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-3, atol=1e-5)


def test_every_epoch_is_reported(sequences: list[list[int]]) -> None:
    seen: list[tuple[int, int]] = []

    def on_epoch(epoch: int, record: TrainingRecord) -> None:
        seen.append((epoch, record.steps))

    train_language_model(tiny_model(), sequences, TrainingSettings(epochs=3, batch_sequences=10), on_epoch=on_epoch)
    assert seen == [(0, 3), (1, 6), (2, 9)]


def test_sequences_without_a_target_are_refused() -> None:
    with pytest.raises(CorpusError, match="Sequence 1 has 1 token"):
        train_language_model(tiny_model(), [[1, 2], [3]], SETTINGS)
    with pytest.raises(CorpusError, match="no sequence"):
        train_language_model(tiny_model(), [], SETTINGS)


def test_a_diverged_loss_is_refused(sequences: list[list[int]]) -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ModelError, match="learning_rate"):
        train_language_model(model, sequences, SETTINGS)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_sequences": -1}, {"warmup_fraction": 2.0}, {"reduction": "average"}]
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        train_language_model(tiny_model(), [[1, 2]], TrainingSettings(**wrong))  # type: ignore[arg-type]


def test_a_mask_leaves_the_gradient_of_the_rest(sequences: list[list[int]]) -> None:
    """Tokens without a loss teach nothing: masked prompts are predicted as before, completions better."""
    masks = [[position >= len(ids) // 2 for position in range(len(ids))] for ids in sequences]
    few = TrainingSettings(epochs=1, batch_sequences=4, seed=3)
    whole, masked, none = tiny_model(), tiny_model(), tiny_model()
    train_language_model(whole, sequences, few, losses=[[True] * len(ids) for ids in sequences])
    record = train_language_model(masked, sequences, few, losses=masks)
    train_language_model(none, sequences, few)
    assert torch.equal(weights(whole), weights(none))
    assert not torch.equal(weights(masked), weights(none))
    assert record.tokens == sum(sum(mask[1:]) for mask in masks)
    with pytest.raises(CorpusError, match="Sequence 0 has 3 token\\(s\\) and nothing to predict"):
        train_language_model(tiny_model(), [[1, 2, 3]], few, losses=[[True, False, False]])


def test_the_proximal_term_holds_a_model_where_it_started(sequences: list[list[int]]) -> None:
    settings = TrainingSettings(epochs=4, batch_sequences=4, weight_decay=0.0, reduction="sum", seed=3)
    moved = []
    for alpha in (0.0, 10.0, 1000.0):
        model = tiny_model()
        start = weights(model)
        train_language_model(model, sequences, settings, alpha=alpha)
        moved.append(float((weights(model) - start).norm()))
    assert moved[0] > 2 * moved[1] > 2 * moved[2]
    with pytest.raises(ConfigError, match="reduction='sum'"):
        train_language_model(tiny_model(), sequences, SETTINGS, alpha=1.0)
