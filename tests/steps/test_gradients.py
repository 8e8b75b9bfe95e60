"""A query's gradient is taken once, and what is kept of it is what was taken, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infscan.model.worker import ModelWorker
from infscan.queries import Part, Query
from infscan.steps import gradients
from infscan.steps.gradients import StoredTokens, Tokens, by_tokens, kept_bytes, query_tokens, read_tokens, tokens_of
from infscan.steps.measure import MeasureTask, measure_task
from infscan.steps.preconditioner import Preconditioner, preconditioned
from infscan.storage import Store
from tests.steps.runs import answer_here, small_run

# One of few tokens, a contrast, and one of so many that narrow layers keep the whole matrix.
QUERIES = (
    Query("few", (Part((5, 9, 33, 4), (2, 3)),)),
    Query("contrast", (Part((5, 9, 33, 4), (3,)), Part((5, 9, 33, 7), (3,), -1.0))),
    Query("many", (Part(tuple(range(1, 41)), (20, 39)),)),
)


def kept(rank: ModelWorker, store: Store) -> StoredTokens:
    measure_task(rank, MeasureTask(store, "kept", QUERIES, "print"))
    return StoredTokens(store, {query.id: "kept" for query in QUERIES}, "float32")


def test_what_is_read_is_what_was_taken(rank: ModelWorker, tmp_path: Path) -> None:
    found = kept(rank, Store(str(tmp_path)))
    some = rank.layers[1:3]
    taken, read = query_tokens(rank, QUERIES, some), read_tokens(rank, QUERIES, some, found)
    assert list(read) == [layer.name for layer in some]
    matrices = 0
    for layer in some:
        for one, other in zip(taken[layer.name], read[layer.name], strict=True):
            if isinstance(other, Tokens):
                assert torch.equal(one.s_to, other.s_to)
                assert torch.equal(one.a_ti, other.a_ti)
            else:
                assert torch.equal(one.matrix(), other)
                matrices += 1
    assert matrices == sum(not by_tokens(39, layer) for layer in some) > 0
    [alone] = read_tokens(rank, QUERIES[1:2], some[:1], found).values()
    assert torch.equal(alone[0].s_to, taken[some[0].name][1].s_to)
    assert (tmp_path / "kept").stat().st_size >= sum(kept_bytes(tokens_of(query), rank.layers, 4) for query in QUERIES)


def test_the_inverse_of_kept_gradients_is_that_of_new_ones(
    rank: ModelWorker, inverse: Preconditioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = preconditioned(rank, QUERIES, rank.layers, inverse)
    found = kept(rank, Store(str(tmp_path)))
    monkeypatch.delattr(gradients, "backward_of_part")
    known = Preconditioner(inverse.factors, inverse.solver, inverse.damping, tokens=found)
    assert known.fingerprint == inverse.fingerprint
    for name, P_qoi in preconditioned(rank, QUERIES, rank.layers, known).items():
        assert torch.equal(P_qoi, new[name])


def test_a_run_takes_every_gradient_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query batch, the check, refining and the repetition after contexts read them; a damaged file is made again,
    and the tables stay as they are."""
    times = 0
    backward = gradients.backward_of_part

    def counted(*given: object) -> object:
        nonlocal times
        times += 1
        return backward(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(gradients, "backward_of_part", counted)
    config = small_run(tmp_path, "scan.stability=1", "scan.check_sequences=8")
    answer_here(config)
    parts, times = times, 0
    output = tmp_path / "run"
    [file] = (output / "queries").glob("gradients-*.safetensors")
    top = {path.name: path.read_bytes() for path in (output / "top").iterdir()}
    answer_here(config)
    assert times == 0
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    answer_here(config)
    assert times == parts
    assert {path.name: path.read_bytes() for path in (output / "top").iterdir()} == top
