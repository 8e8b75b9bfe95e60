"""Self-influence equals a dense solve, whatever rows it is asked for; rows are ordered by score over its root."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from infscan.corpus.addressable import PreparedCorpus
from infscan.influence.topk_tracker import ScoredRows
from infscan.model.worker import ModelWorker
from infscan.pipeline import answer
from infscan.queries import Part, Query
from infscan.results.read import read_top
from infscan.results.schema import read_parquet
from infscan.results.shard_file import ShardCounts, write_shard
from infscan.results.statements import relatif_ranks
from infscan.steps.preconditioner import Preconditioner, layer_factors, query_gradients
from infscan.steps.self_influence import SelfInfluenceTask, self_influence_task
from infscan.storage import Store
from tests.chaos.one_process import without_ray
from tests.steps.runs import small_run


def test_it_is_the_gradient_times_the_damped_inverse_times_the_gradient(
    rank: ModelWorker, corpus: PreparedCorpus, inverse: Preconditioner, tmp_path: Path
) -> None:
    """Against G + lambda as one dense matrix per layer, in float64; two layer groups add up to the whole."""
    store, ids = Store(str(tmp_path)), np.asarray([2, 3, 9])
    sequences = corpus.read(ids)
    hits = ScoredRows(np.zeros(3, np.int32), np.zeros(3, np.int8), ids, np.ones(3, np.float32))
    write_shard(store, "shard-000000", sequences, np.zeros(3, np.float32), hits, ["a"], ShardCounts(3, 3, 0, 3, 3), "p")
    found = np.zeros(len(ids))
    for half in (rank.layers[::2], rank.layers[1::2]):
        task = SelfInfluenceTask(store, "unit.parquet", (("shard-000000", ids),), half, inverse, "f", 100, "p")
        assert self_influence_task(rank, task) == sum(map(len, sequences))
        table = read_parquet(store, "unit.parquet")
        assert table["sequence_id"].to_pylist() == ids.tolist()
        found += table["self_influence"].to_numpy()
    for sequence, value in zip(sequences, found, strict=True):
        tokens = tuple(sequence.token_ids.tolist())
        g = query_gradients(rank, [Query("z", (Part(tokens, tuple(range(1, len(tokens)))),))], rank.layers)
        expected = 0.0
        for layer in rank.layers:
            known = layer_factors(inverse, layer, "cpu", torch.float64)
            assert known is not None
            Q_S, Q_A = known[0].Q_S.dense(), known[0].Q_A.dense()
            Q = torch.kron(Q_S, Q_A)
            G = Q @ torch.diag((known[0].Lambda + known[1]).flatten()) @ Q.T
            v = g[layer.name][0].double().flatten()
            expected += float(v @ torch.linalg.solve(G, v))
        assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("solver", ["ekfac", "identity"])
def test_the_strongest_rows_have_it_and_are_ranked_by_both(tmp_path: Path, solver: str) -> None:
    config = small_run(tmp_path, "scan.self_influence=2", "scan.top_k=4", f"factors.solver={solver}")
    with without_ray():
        answer(config)
    rows = read_top(config.output).to_pylist()
    assert any(row["rank"] > 2 for row in rows)
    by_sequence: dict[int, set[float]] = {}
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["rank"] <= 2:
            assert row["self_influence"] > 0
        if row["self_influence"] is None:
            assert row["relatif_rank"] is None
        else:
            by_sequence.setdefault(row["sequence_id"], set()).add(row["self_influence"])
            groups.setdefault((row["query_id"], row["side"]), []).append(row)
    assert all(len(values) == 1 for values in by_sequence.values())
    for group in groups.values():
        group.sort(key=lambda row: row["relatif_rank"])
        assert [row["relatif_rank"] for row in group] == list(range(1, len(group) + 1))
        relative = [abs(row["score"]) / row["self_influence"] ** 0.5 for row in group]
        assert relative == sorted(relative, reverse=True)


def test_rows_without_it_take_no_part() -> None:
    nothing, one = np.nan, 1.0
    ranks = relatif_ranks(
        np.asarray([0, 0, 0, 1], np.int32),
        np.asarray([0, 0, 0, 0], np.int8),
        np.asarray([5, 4, 3, 2], np.float32),
        np.asarray([100, nothing, one, 0]),
        np.asarray([7, 8, 9, 7]),
    )
    assert ranks.tolist() == [2, 0, 1, 0]
