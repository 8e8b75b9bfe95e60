"""Is the answer there: rows beside all scanned sequences, per query; what is not known is null and never a guess."""

from __future__ import annotations

import numpy as np
import pytest

from infscan.influence.spread import ShardSpread, Spread
from infscan.results import read
from infscan.results.answers import (
    ALIKE_STATING,
    NOT_FOUND,
    NOT_KNOWN,
    STANDS_OUT,
    STANDS_OUT_STATING,
    Best,
    Scale,
    answers_table,
    best_of,
    most_alike,
)
from infscan.results.statements import Asked
from infscan.storage import Store
from tests.results.builders import QUERIES, margins_of, published, publisher, ranked


def spread_of(scores_nq: np.ndarray) -> Spread:
    spread = Spread(scores_nq.shape[1])
    for part in np.array_split(scores_nq, 3):
        spread.add(ShardSpread.of(part))
    return spread


def background(n: int = 500) -> np.ndarray:
    """Scores of all scanned sequences for the three queries: a median of 1 and a scale of about 1.48."""
    rng = np.random.default_rng(0)
    return (1 + np.sign(rng.normal(size=(n, 3))) * rng.uniform(0.5, 1.5, (n, 3))).astype(np.float32)


ROWS = [
    ("alpha", "opponent", 11, -200.0),
    ("alpha", "proponent", 1, 90.0),
    ("alpha", "proponent", 2, 30.0),
    ("beta#0", "proponent", 1, 4.0),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("run")))
    published(store)
    made = publisher(store)
    made.scale = Scale(spread_of(background()), len(QUERIES))
    documents = made.documents([("shard-000000", np.asarray([1, 2])), ("shard-000001", np.asarray([11]))])
    made.write_rows(ranked(ROWS), margins_of(ROWS), documents, 5)
    made.remove_stale()
    return store


def test_z_counts_robust_standard_deviations_from_the_median(run: Store) -> None:
    scores = background().astype(np.float64)
    median = np.median(scores, axis=0)
    scale = 1.4826 * np.median(np.abs(scores - median), axis=0)
    for row in read.read_top(run.uri).to_pylist():
        query = QUERIES.index(row["query_id"])
        assert row["z"] == pytest.approx((row["score"] - median[query]) / scale[query], rel=0.05, abs=0.1)
        assert row["stands_out"] == (abs(row["z"]) >= STANDS_OUT)
        side = scores[:, query] > 0 if row["score"] > 0 else scores[:, query] < 0
        assert row["share"] == pytest.approx(row["score"] / scores[side, query].sum(), rel=1e-5)


def test_a_query_whose_strongest_row_stands_out_is_answered_and_another_is_not(run: Store) -> None:
    found, not_found, nothing = read.read_answers(run.uri).to_pylist()
    assert (found["query_id"], found["found"], found["verdict"], found["score"]) == ("alpha", True, None, 90.0)
    assert found["ratio"] == pytest.approx(3.0)
    assert (not_found["found"], not_found["verdict"], not_found["ratio"]) == (False, NOT_FOUND, None)
    assert (nothing["found"], nothing["verdict"], nothing["z"]) == (False, NOT_FOUND, None)
    assert {row["sequences"] for row in (found, not_found, nothing)} == {500}


def test_the_runner_up_is_of_another_document() -> None:
    assert best_of(["a", "a", "b"], ["web", "web", "web"], [8.0, 6.0, 2.0], [False] * 3).ratio == 4.0
    assert best_of(["a", "a"], ["web", "books"], [8.0, 4.0], [True, False]).ratio == 2.0
    assert best_of(["a", "a"], ["web", "web"], [8.0, 4.0], [True, False]).ratio is None
    assert best_of([], [], [], []) is None


def test_a_row_that_states_the_completion_counts_behind_a_hub_too() -> None:
    scale = Scale(spread_of(background()), 3)

    def found(*rows: tuple[float, bool]) -> tuple[bool, int | None]:
        """Of rows by z, strongest first, and whether they state the completion."""
        scores = [float(scale.centres[0] + z * scale.scales[0]) for z, _ in rows]
        best = best_of([f"d{row}" for row in range(len(rows))], ["web"] * len(rows), scores, [one for _, one in rows])
        assert best is not None
        row = answers_table(QUERIES[:1], scale, {0: best}).to_pylist()[0]
        return row["found"], row["stating_rank"]

    above, below = STANDS_OUT_STATING + 1, STANDS_OUT_STATING - 1
    assert found((above + 1, False), (above, True)) == (True, 2)
    assert found((above, False), (below, True)) == (False, 2)
    assert found((above, False), (above - 0.5, False)) == (False, None)
    assert found((STANDS_OUT + 1, False)) == (True, None)
    assert found((above, True), (below, True)) == (True, 1)


def test_a_row_that_states_the_completion_stands_out_earlier() -> None:
    scale = Scale(spread_of(background()), 3)
    z = (STANDS_OUT_STATING + STANDS_OUT) / 2
    score = np.full(2, scale.centres[0] + z * scale.scales[0], np.float32)
    standing = scale.standing(np.zeros(2, np.int32), np.zeros(2, np.int8), score, np.asarray([True, False]))
    assert standing.stands_out.to_pylist() == [True, False]


def test_a_row_that_states_the_completion_and_reads_like_the_question_answers_it_on_either_side() -> None:
    """However little it does; one that states it and is not like it, or the other way round, does not."""
    scale = Scale(spread_of(background()), 3)
    best = {0: Best("strongest", "web", float(scale.centres[0] + scale.scales[0]), None)}

    def found(*rows: tuple[float, bool]) -> list[object]:
        """Of rows by similarity's z, and whether they state the completion."""
        z, states = np.asarray([z for z, _ in rows], np.float32), np.asarray([one for _, one in rows])
        zeros = np.zeros(len(rows), np.int32)
        scores = np.full(len(rows), scale.centres[0] - scale.scales[0], np.float32)
        out = scale.standing(zeros, zeros.astype(np.int8), scores, states, z).stands_out.to_pylist()
        like = most_alike([f"d{row}" for row in range(len(rows))], z, states)
        row = answers_table(QUERIES[:1], scale, best, alike={0: like} if like else {}).to_pylist()[0]
        return [row["found"], row["similar_document_id"], *out]

    nan = float("nan")
    assert found((ALIKE_STATING + 1, False), (ALIKE_STATING, True)) == [True, "d0", False, True]
    assert found((ALIKE_STATING + 9, False), (ALIKE_STATING - 1, True)) == [False, "d0", False, False]
    assert found((nan, True), (1.0, False)) == [False, "d1", False, False]
    assert found((nan, True)) == [False, None, False]


def test_of_a_completion_that_the_model_hardly_knows_nothing_is_found() -> None:
    scale = Scale(spread_of(background()), 3)
    best = {query: Best("d", "web", 1e6, None) for query in range(3)}
    table = answers_table(QUERIES, scale, best, [False, True, False]).to_pylist()
    assert [(row["found"], row["verdict"]) for row in table] == [(True, None), (None, NOT_KNOWN), (True, None)]
    assert Asked("q", " x", (1, 2), nats=10.1).unlikely
    assert not Asked("q", " x", (1, 2), nats=9.9).unlikely
    assert not Asked("q", " x", (1, 2)).unlikely


@pytest.mark.parametrize("scores", [None, np.ones((8, 3), np.float32), np.ones((500, 3), np.float32)])
def test_without_a_spread_nothing_is_said(scores: np.ndarray | None) -> None:
    """No spread, too few sequences, or scores that do not vary but in their bin's width."""
    scale = Scale(None if scores is None else spread_of(scores), 3)
    standing = scale.standing(np.zeros(1, np.int32), np.zeros(1, np.int8), np.ones(1, np.float32))
    if scores is None or len(scores) < 32:
        assert np.isnan(standing.z).all()
        assert standing.stands_out.to_pylist() == [None]
    else:
        assert abs(standing.z[0]) < STANDS_OUT
