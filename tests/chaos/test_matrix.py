"""Whatever is done to a file, whenever: the tables are an undisturbed run's, or a sentence names the file. No third."""

from __future__ import annotations

import os
import random
from collections import Counter
from datetime import UTC, datetime

import pytest

from tests.chaos.matrix import DAMAGES, MOMENTS, Case, Matrix

# A day's sample is the same all day; set it to repeat another day's.
SEED = int(os.environ.get("INFSCAN_CHAOS_SEED") or datetime.now(UTC).date().toordinal())
SAMPLE = 40


@pytest.fixture(scope="module", params=["documents", "arrays"])
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp(request.param), request.param)


def outcomes(matrix: Matrix, cases: list[Case]) -> Counter[tuple[str, str, str]]:
    found: Counter[tuple[str, str, str]] = Counter()
    troubles = []
    for case in cases:
        try:
            found[case.moment, case.damage, matrix.outcome(case)] += 1
        except Exception as error:
            troubles.append(f"{case}: {type(error).__name__}: {error}")
    assert not troubles, "\n".join([f"{len(troubles)} of {len(cases)}:", *troubles])
    return found


def test_the_matrix_has_every_moment_every_damage_and_every_column(matrix: Matrix) -> None:
    assert {case.moment for case in matrix.cases} == set(MOMENTS)
    assert {case.damage for case in matrix.cases} == {*DAMAGES, "flipped"}
    shards = {case.at for case in matrix.cases if "shards/shard-000000" in case.name and case.damage == "flipped"}
    assert len(shards) > 10
    assert len(matrix.cases) > 400


def test_a_sample_of_the_matrix(matrix: Matrix) -> None:
    chosen = random.Random(SEED).sample(matrix.cases, SAMPLE)
    assert sum(outcomes(matrix, chosen).values()) == SAMPLE


@pytest.mark.slow
def test_the_whole_matrix(matrix: Matrix) -> None:
    found = outcomes(matrix, matrix.cases)
    assert sum(found.values()) == len(matrix.cases)
    assert min(sum(n for (*_, ended), n in found.items() if ended == kind) for kind in ("equal", "refused")) > 50
