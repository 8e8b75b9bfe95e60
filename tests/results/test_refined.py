"""Refined units give back their margins, by layer group or at once, and a run's units give back any of its rows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.influence.topk_tracker import ScoredRows
from infscan.results.refined import RefinedRows, read_unit, unit_path, write_unit
from infscan.storage import Store

PAIRS = [("alpha", 5), ("alpha", 2), ("beta", 5)]


def test_round_trip(tmp_path: Path) -> None:
    store, rng = Store(str(tmp_path)), np.random.default_rng(0)
    by_layer = rng.normal(size=(3, 2)).astype(np.float32)
    by_token = [rng.normal(size=length).astype(np.float32) for length in (4, 1, 4)]
    path = unit_path("d" * 64, 3)
    write_unit(store, path, PAIRS, by_layer, by_token, ["up", "down"])
    unit = read_unit(store, [path], ["down", "up"])
    assert list(zip(unit.query_ids.to_pylist(), unit.sequence_ids.tolist(), strict=True)) == PAIRS
    np.testing.assert_array_equal(unit.layer_scores, by_layer[:, ::-1])
    np.testing.assert_array_equal(unit.token_scores, np.concatenate(by_token))
    assert unit.starts.tolist() == [0, 4, 5, 9]
    assert unit.scores.tolist() == [np.float32(float(row.sum(dtype=np.float64))) for row in by_layer[:, ::-1]]
    scores_alone = read_unit(store, [path], ["down", "up"], tokens=False)
    np.testing.assert_array_equal(scores_alone.scores, unit.scores)
    assert len(scores_alone.token_scores) == 0


def test_units_of_other_candidates_lie_elsewhere() -> None:
    paths = {unit_path(digest, unit) for digest in ("a" * 64, "b" * 64) for unit in (0, 1)}
    assert len(paths) == 4


def test_layer_groups_join_in_the_models_order(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    pair = [("alpha", 7)]
    write_unit(store, "0", pair, np.asarray([[3, 1]], np.float32), [np.asarray([1, 2, 1], np.float32)], ["c", "a"])
    write_unit(store, "1", pair, np.asarray([[2]], np.float32), [np.asarray([0, 0.5, 1.5], np.float32)], ["b"])
    unit = read_unit(store, ["0", "1"], ["a", "b", "c"])
    assert unit.layer_scores.tolist() == [[1, 2, 3]]
    assert unit.token_scores.tolist() == [1, 2.5, 2.5]
    assert unit.layer_scores.dtype == unit.token_scores.dtype == np.float32
    assert unit.scores.tolist() == [unit.token_scores.sum()]
    with pytest.raises(KeyError):
        read_unit(store, ["0"], ["a", "b", "c"])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), queries=st.integers(1, 6), per_group=st.integers(1, 6), per_unit=st.integers(1, 5))
def test_any_rows_of_a_run_are_found_in_its_units(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, queries: int, per_group: int, per_unit: int
) -> None:
    """Whatever the query groups and units, and by layer group: a row's margins are those that were written for it."""
    store = Store(str(tmp_path_factory.mktemp("refined")))
    pairs = st.tuples(st.integers(0, queries - 1), st.integers(0, 1), st.integers(0, 9))
    rows = sorted(data.draw(st.lists(pairs, unique_by=lambda row: (row[0], row[2]), max_size=30)))
    columns = np.asarray(rows, np.int64).reshape(-1, 3).T
    best = ScoredRows(*columns[:2].astype(np.int32), columns[2], np.ones(len(rows), np.float32))
    rng = np.random.default_rng(len(rows))
    by_layer = rng.normal(size=(len(rows), 3)).astype(np.float32)
    by_token = [rng.normal(size=1 + row[2]).astype(np.float32) for row in rows]
    layers, names = ["a", "b", "c"], [f"q{query}" for query in range(queries)]
    groups = [range(start, min(start + per_group, queries)) for start in range(0, queries, per_group)]
    paths: list[list[list[str]]] = []
    for number, group in enumerate(groups):
        mine = sorted((row for row in range(len(rows)) if rows[row][0] in group), key=lambda row: rows[row][2])
        units = [mine[start : start + per_unit] for start in range(0, len(mine), per_unit)]
        paths.append([[f"{number}-{part}-{unit}" for unit in range(len(units))] for part in range(2)])
        for unit, places in enumerate(units):
            ids = [(names[rows[place][0]], rows[place][2]) for place in places]
            for part, (columns_of, half) in enumerate(((slice(0, 2), 0.25), (slice(2, 3), 0.75))):
                scores = [np.float32(half) * by_token[place] for place in places]
                write_unit(store, paths[-1][part][unit], ids, by_layer[places, columns_of], scores, layers[columns_of])
    refined = RefinedRows(store, groups, paths, layers, names, best)
    np.testing.assert_allclose(refined.scores, by_layer.sum(axis=1), rtol=1e-5, atol=1e-6)
    some = np.asarray(data.draw(st.permutations(range(len(rows)))), np.intp)[: data.draw(st.integers(0, len(rows)))]
    found = refined.margins(some)
    np.testing.assert_array_equal(found.layer_scores, by_layer[some])
    for place, tokens in zip(some.tolist(), found.token_scores, strict=True):
        np.testing.assert_allclose(tokens, by_token[place], rtol=1e-6)
