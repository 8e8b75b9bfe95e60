"""Whatever is done to a file, whenever: the tables are an undisturbed run's, or a sentence names the file. No third."""

from __future__ import annotations

import os
import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from infscan.storage import Store
from tests.chaos.matrix import DAMAGES, MADE_AGAIN, MOMENTS, Case, InStore, Matrix, OnRay
from tests.conftest import Bucket

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


def test_what_is_found_damaged_while_it_is_used_is_made_again_by_the_same_command(matrix: Matrix) -> None:
    """Whichever column is hit, and whether refining finds it or publishing."""
    moments = ("refine", "publish")
    # A whole file of another run is no damage: who put it there is told.
    struck = [
        case for case in matrix.cases if case.moment in moments and case.damage not in ("replaced", "overwritten")
    ]
    cases = [case for case in struck if case.name.startswith(MADE_AGAIN)]
    shards = [case for case in cases if "shard-000001" in case.name and case.name.startswith("run/shards")]
    # Of the columns some are not read again: what is cut off is found in any case.
    cut_off = [next(one for one in shards if one.moment == moment and one.damage == "truncated") for moment in moments]
    chosen = [*cut_off, *random.Random(SEED).sample(shards, 3), *random.Random(SEED).sample(cases, 3)]
    refused = 0
    for case in chosen:
        if matrix.outcome(case) == "refused":
            refused += 1
            matrix.resumed(case)
    assert refused >= len(cut_off)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_matrix(matrix: Matrix) -> None:
    found = outcomes(matrix, matrix.cases)
    assert sum(found.values()) == len(matrix.cases)
    assert min(sum(n for (*_, ended), n in found.items() if ended == kind) for kind in ("equal", "refused")) > 50


@pytest.mark.slow
def test_a_dozen_cases_in_an_object_store(tmp_path: Path, s3: Bucket) -> None:
    """A real server, whose objects have ETags and no inodes."""
    found = InStore(tmp_path, "documents", Store(s3.uri()))
    cases = [case for case in found.cases if case.name.startswith("run/") and case.moment != "before"]
    assert sum(outcomes(found, random.Random(SEED).sample(cases, 12)).values()) == 12


@pytest.mark.slow
def test_a_dozen_cases_on_ray(tmp_path: Path) -> None:
    """Ranks in processes of their own, which have the paths alone of what the driver looked at."""
    found = OnRay(tmp_path, "arrays")
    cases = [case for case in found.cases if case.moment != "after"]
    assert sum(outcomes(found, random.Random(SEED).sample(cases, 12)).values()) == 12
