"""Refined units give back their margins, and parts computed by layer group join into one row."""

from pathlib import Path

import numpy as np
import pytest

from infscan.results.refined import Margins, join_layer_groups, read_unit, unit_path, write_unit
from infscan.storage import Store

PAIRS = [("alpha", 5), ("alpha", 2), ("beta", 5)]


def test_round_trip(tmp_path: Path) -> None:
    store, rng = Store(str(tmp_path)), np.random.default_rng(0)
    by_layer = rng.normal(size=(3, 2)).astype(np.float32)
    by_token = [rng.normal(size=length).astype(np.float32) for length in (4, 1, 4)]
    path = unit_path("d" * 64, 3)
    write_unit(store, path, PAIRS, by_layer, by_token, ["up", "down"])
    layers, found = read_unit(store, path)
    assert layers == ["up", "down"]
    assert list(found) == PAIRS
    for index, pair in enumerate(PAIRS):
        np.testing.assert_array_equal(found[pair].layer_scores, by_layer[index])
        np.testing.assert_array_equal(found[pair].token_scores, by_token[index])
        assert found[pair].score == pytest.approx(by_layer[index].sum(), rel=1e-6)


def test_units_of_other_candidates_lie_elsewhere() -> None:
    paths = {unit_path(digest, unit) for digest in ("a" * 64, "b" * 64) for unit in (0, 1)}
    assert len(paths) == 4


def test_layer_groups_join_in_the_models_order() -> None:
    first = (["c", "a"], Margins(np.asarray([3, 1], np.float32), np.asarray([1, 2, 1], np.float32)))
    second = (["b"], Margins(np.asarray([2], np.float32), np.asarray([0, 0.5, 1.5], np.float32)))
    joined = join_layer_groups([first, second], ["a", "b", "c"])
    assert joined.layer_scores.tolist() == [1, 2, 3]
    assert joined.token_scores.tolist() == [1, 2.5, 2.5]
    assert joined.layer_scores.dtype == joined.token_scores.dtype == np.float32
    assert joined.score == joined.token_scores.sum()
    with pytest.raises(KeyError):
        join_layer_groups([first], ["a", "b", "c"])
