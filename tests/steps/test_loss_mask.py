"""Laws of a loss that is not on every token: labels, statistics, curvature and scores are where it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from infscan.config import Labels, Packing
from infscan.corpus.addressable import PreparedCorpus, open_corpus
from infscan.corpus.sequences import Sequence
from infscan.influence.layers import Layer
from infscan.model.gauss_newton import GaussNewton
from infscan.model.losses import Loss
from infscan.model.worker import Batch, ModelWorker
from infscan.results.tensor_files import read_tensors
from infscan.steps.factor_files import read_layer_factors
from infscan.storage import Store
from tests.corpus.builders import VOCAB, prepare, settings, write_rows
from tests.steps.builders import fit, fit_plan
from tests.steps.runs import CONTEXT

LENGTHS = (9, 5, 17, 2, 12, 1, 24, 7)


def corpus_of(folder: Path, masks: list[list[int]] | None) -> PreparedCorpus:
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [{"id": f"d{n}", "tokens": rng.integers(2, VOCAB, length).tolist()} for n, length in enumerate(LENGTHS)]
    fields = {}
    pack = settings(Packing.document, CONTEXT)
    if masks is not None:
        rows = [{**row, "mask": mask} for row, mask in zip(rows, masks, strict=True)]
        fields, pack = {"mask_field": "mask"}, replace(pack, masked=True)
    write_rows(folder / "in.jsonl", rows)
    prepare(folder / "in.jsonl", folder / "out", pack, **fields)
    return open_corpus(Store(str(folder / "out")))


def everything(store: Store) -> dict[str, Tensor]:
    names = [entry.name for entry in store.list(suffix=".safetensors")]
    return {f"{name}|{key}": value for name in names for key, value in read_tensors(store, name).items()}


@pytest.fixture(scope="module")
def masks() -> list[list[int]]:
    """A prompt, a turn in the middle, everything, nothing."""
    rng = np.random.default_rng(3)
    found = [[int(t >= length // 2) for t in range(length)] for length in LENGTHS]
    found[2] = [0] * 5 + [1] * 4 + [0] * 3 + [1] * 5
    found[4] = [1] * 12
    found[5] = [1]
    found[7] = [0] * 7
    found[6] = rng.integers(0, 2, 24).tolist()
    return found


@pytest.mark.parametrize("labels", list(Labels))
def test_a_mask_of_ones_changes_no_bit(rank: ModelWorker, tmp_path: Path, labels: Labels) -> None:
    ones = [[1] * length for length in LENGTHS]
    found = []
    for name, mask in (("plain", None), ("ones", ones)):
        corpus = corpus_of(tmp_path / name, mask)
        store = Store(str(tmp_path / f"factors-{name}"))
        fit(rank, store, corpus, fit_plan(rank, corpus, slices=2, tokens_per_batch=40), labels)
        found.append(everything(store))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def by_hand(rank: ModelWorker, sequence: Sequence, terms: list[tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """(s [T, O], a [T, I]) by layer, of the sum of -log p(label) over terms (position, label); no mask anywhere."""
    ids = torch.from_numpy(sequence.token_ids)[None]
    batch = Batch(np.arange(1), ids, torch.ones_like(ids, dtype=torch.bool))
    found: dict[str, tuple[Tensor, Tensor]] = {}

    loss = Loss(torch.zeros_like(ids), torch.zeros_like(ids))
    for t, label in terms:
        loss.labels_bt[0, t], loss.weights_bt[0, t] = label, 1

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, _routed: object) -> None:
        found[layer.name] = (s_bto[0].clone(), a_bti[0].clone())

    rank.backward(batch, rank.layers, loss, consume)
    return found


@pytest.mark.parametrize("labels", list(Labels))
def test_factors_are_those_of_the_positions_that_predict_a_token_with_a_loss(
    rank: ModelWorker, tmp_path: Path, masks: list[list[int]], labels: Labels
) -> None:
    corpus, store = corpus_of(tmp_path / "corpus", masks), Store(str(tmp_path / "factors"))
    fit(rank, store, corpus, fit_plan(rank, corpus, tokens_per_batch=40), labels)
    sequences = corpus.read(np.arange(corpus.sequences))
    stored = read_tensors(store, "labels/slice-0000.safetensors")["labels"] if labels is Labels.sampled else None
    A = {layer.name: torch.zeros(layer.inputs, layer.inputs) for layer in rank.layers}
    S = {layer.name: torch.zeros(layer.outputs, layer.outputs) for layer in rank.layers}
    energy = {layer.name: torch.zeros(()) for layer in rank.layers}
    counted = 0
    for row, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        last = len(mask) - 1
        where = [t for t in range(len(mask)) if (mask[t + 1] if t < last else mask[t])]
        counted += len(where)
        if stored is None:
            terms = [(t, int(sequence.token_ids[t + 1])) for t in where if t < last]
        else:
            terms = [(t, int(stored[row, t])) for t in where]
        for name, (s_to, a_ti) in by_hand(rank, sequence, terms).items():
            A[name] += a_ti[where].T @ a_ti[where]
            S[name] += s_to[where].T @ s_to[where]
            # The whole gradient: prompt positions too are moved, through attention.
            energy[name] += (s_to.T @ a_ti).square().sum() / len(sequences)
    for layer in rank.layers:
        factors = read_layer_factors(store, layer)
        torch.testing.assert_close(factors.A.dense(), A[layer.input_of] / counted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(factors.S.dense(), S[layer.name] / counted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(factors.Lambda.sum(), energy[layer.name], rtol=1e-4, atol=1e-6)


def test_a_sequences_gradient_is_of_its_loss_alone(rank: ModelWorker, tmp_path: Path, masks: list[list[int]]) -> None:
    corpus = corpus_of(tmp_path / "corpus", masks)
    sequences = corpus.read(np.arange(corpus.sequences))
    found: dict[tuple[int, str], Tensor] = {}
    losses = np.zeros(len(sequences))
    for batch in rank.batches(sequences, 64):

        def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, _routed: object, batch: Batch = batch) -> None:
            for place, row in enumerate(batch.rows.tolist()):
                found[row, layer.name] = s_bto[place].T @ a_bti[place]

        losses[batch.rows] = rank.backward(batch, rank.layers, batch.loss(), consume).numpy()
    for row, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        terms = [(t - 1, int(sequence.token_ids[t])) for t in range(1, len(mask)) if mask[t]]
        for name, (s_to, a_ti) in by_hand(rank, sequence, terms).items():
            torch.testing.assert_close(found[row, name], s_to.T @ a_ti, rtol=1e-4, atol=1e-6)
    assert losses[7] == 0
    assert losses[4] > 0


def test_the_curvature_is_of_the_same_positions(rank: ModelWorker, tmp_path: Path, masks: list[list[int]]) -> None:
    """G of a masked corpus is that of EK-FAC's pseudo-gradients: a sequence without a loss has none."""
    corpus = corpus_of(tmp_path / "corpus", masks)
    sequences = corpus.read(np.arange(corpus.sequences))
    ggn = GaussNewton(rank, sequences, tokens_per_batch=64)
    x_1p = torch.randn(1, ggn.size, generator=torch.Generator().manual_seed(0))
    assert not ggn.product(x_1p, np.array([7])).any()
    whole = GaussNewton(rank, [replace(one, loss=None) for one in sequences], tokens_per_batch=64)
    assert torch.equal(ggn.product(x_1p, np.array([4])), whole.product(x_1p, np.array([4])))
    assert not torch.allclose(ggn.product(x_1p), whole.product(x_1p), rtol=1e-2)
