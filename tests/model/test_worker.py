"""Dealing: every batch goes to exactly one rank, and every rank gets equally many, dummies included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from infscan.corpus.sequences import Sequence
from infscan.influence.layers import Layer
from infscan.model.worker import Batch, ModelWorker
from tests.steps.builders import as_rank


def sequences(lengths: list[int]) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [Sequence(n, rng.integers(1, 97, length).astype(np.int64), (), 0, "") for n, length in enumerate(lengths)]


def content(batch: Batch) -> tuple[list[int], list[list[int]], list[list[bool]]]:
    return batch.rows.tolist(), batch.ids_bt.tolist(), batch.mask_bt.tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 20), max_size=12), tokens=st.integers(1, 60), world=st.integers(1, 4))
def test_ranks_share_the_batches_of_a_single_rank(
    rank: ModelWorker, lengths: list[int], tokens: int, world: int
) -> None:
    taken = sequences(lengths)
    alone = [content(batch) for batch in rank.batches(taken, tokens)]
    assert sorted(row for rows, _, _ in alone for row in rows) == list(range(len(lengths)))
    dealt = [list(as_rank(rank, number, world).batches(taken, tokens)) for number in range(world)]
    assert len({len(batches) for batches in dealt}) == 1
    # In turn: the n-th batches of all ranks are the next ones of a single rank.
    in_turn = [batch for at_once in zip(*dealt, strict=True) for batch in at_once]
    assert [content(batch) for batch in in_turn if batch.scored] == alone
    dummies = [batch for batch in in_turn if not batch.scored]
    assert len(dummies) < world
    for dummy in dummies:
        assert len(dummy.rows) == 0
        assert not dummy.mask_bt.any()


def test_a_dummy_runs_and_counts_for_nothing(rank: ModelWorker) -> None:
    last = as_rank(rank, 1, 2)
    [dummy] = last.batches(sequences([5]), 60)
    assert not dummy.scored

    def consume(*_: object) -> None:
        pytest.fail("a dummy was consumed")

    assert last.backward(dummy, rank.layers, dummy.loss(), consume).tolist() == [0.0]


@pytest.mark.parametrize(("lengths", "padded"), [([5, 5], False), ([5], False), ([4, 5], True)])
def test_a_batch_knows_whether_it_is_padded(rank: ModelWorker, lengths: list[int], padded: bool) -> None:
    [batch] = rank.batches(sequences(lengths), 60)
    assert batch.padded == padded == (not batch.mask_bt.all())


def test_padding_is_zero_in_what_is_consumed(rank: ModelWorker) -> None:
    [batch] = rank.batches(sequences([3, 5]), 60)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, _routed: object) -> None:
        seen[layer.name] = (s_bto, a_bti)

    rank.backward(batch, rank.layers, batch.loss(), consume)
    assert set(seen) == {layer.name for layer in rank.layers}
    for layer in rank.layers:
        s_bto, a_bti = seen[layer.name]
        assert (s_bto.shape[-1], a_bti.shape[-1]) == (layer.outputs, layer.inputs)
        assert not s_bto[~batch.mask_bt].any()
        assert not a_bti[~batch.mask_bt].any()
        assert layer.bias
        torch.testing.assert_close(a_bti[..., -1], batch.mask_bt.to(a_bti.dtype), rtol=0, atol=0)


def test_one_object_per_kind_is_kept(rank: ModelWorker) -> None:
    mine = as_rank(rank, 0, 1)
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    assert mine.cached("kind", 1, lambda: make("a")) == mine.cached("kind", 1, lambda: make("b")) == "a"
    assert mine.cached("other", 1, lambda: make("c")) == "c"
    assert mine.cached("kind", 2, lambda: make("d")) == "d"
    assert mine.cached("kind", 1, lambda: make("e")) == "e"
    mine.forget()
    assert mine.cached("other", 1, lambda: make("f")) == "f"
    assert made == ["a", "c", "d", "e", "f"]
