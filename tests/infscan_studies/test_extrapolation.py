"""How far an unfiltered scan must go: a known law is extrapolated rightly, and the whole corpus agrees."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.config import Config, FactorsConfig, to_yaml
from infscan.errors import RunError
from infscan.storage import Store
from infscan_studies.config import ExtrapolationConfig
from infscan_studies.extrapolation import needed, share_beyond, study, words
from infscan_studies.report.figures import draw_extrapolation, write_figure
from tests.infscan_studies.builders import top_rows, write_run
from tests.infscan_studies.test_sparsity import pareto


@settings(max_examples=8, deadline=None)
@given(exponent=st.floats(1.8, 3.5), seed=st.integers(0, 999), k=st.sampled_from([1, 10]))
def test_a_pareto_tail_needs_what_its_law_says(exponent: float, seed: int, k: int) -> None:
    """P(score >= s) = s^(1 - exponent) for a law that starts at 1: k / P sequences."""
    wanted = 50.0
    truth = k * wanted ** (exponent - 1)
    found = needed(pareto(exponent, 1, 20_000, seed), wanted, k, 1000, 100, 0)
    # The exponent's error is (exponent - 1) / sqrt(1000), and it is raised to.
    error = np.log(wanted) * (exponent - 1) / np.sqrt(1000)
    assert abs(np.log(found["needed"] / truth)) < 6 * error + 0.1
    assert found["low"] <= found["needed"] <= found["high"]


def test_within_the_sample_its_own_share_counts() -> None:
    scores = np.arange(1, 1001, dtype=float)
    found = needed(scores, 501.0, 1, 10, 500, 0)
    assert found["needed"] == 1000 / 500
    # Half of 1,000 sequences reach it, give or take 32.
    assert 1000 / 540 < found["low"] < 1000 / 520 < 1000 / 480 < found["high"] < 1000 / 460
    assert needed(scores, 501.0, 10, 10, 50, 0)["needed"] == 10 * 1000 / 500


def test_a_sample_says_how_far_the_whole_corpus_must_be_scanned() -> None:
    """Of 200,000 draws the sample has 5,000; the corpus's own 10th strongest is expected after about all of it."""
    ratios, covered = [], 0
    for seed in range(12):
        corpus = pareto(2.5, 1, 200_000, seed)
        wanted = float(np.sort(corpus)[-10])
        np.random.default_rng(seed).shuffle(corpus)
        found = needed(corpus[:5000], wanted, 10, 250, 200, 0)
        ratios.append(found["needed"] / len(corpus))
        covered += found["low"] < len(corpus) < found["high"]
    assert 0.6 < np.median(ratios) < 1.7
    assert covered >= 8


def lognormal(n: int, seed: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).standard_normal(n))


def test_of_a_tail_that_is_no_power_law_the_interval_contains_the_truth() -> None:
    """Lognormal scores, 100,000 of them, asked after the 10th strongest of 5 million: in 19 of 20 samples and more."""
    truth, wanted = 5e6, float(np.exp(NormalDist().inv_cdf(1 - 10 / 5e6)))
    tail = ExtrapolationConfig().least
    assert tail > ExtrapolationConfig().tail * 100_000
    found = [needed(lognormal(100_000, seed), wanted, 10, tail, 200, 0) for seed in range(20)]
    assert sum(each["low"] <= truth <= each["high"] for each in found) >= 18
    # The power law alone says too few, which is why its own interval is not the answer.
    assert np.median([each["needed"] for each in found]) < truth


def test_a_long_tail_that_is_no_power_law_is_found_out() -> None:
    """As that of 2,000 lognormal scores is: the power law's estimate is a tenth of the truth."""
    wanted = float(np.exp(NormalDist().inv_cdf(1 - 10 / 5e6)))
    found = needed(lognormal(100_000, 0), wanted, 10, 2000, 200, 0)
    assert found["needed"] < 5e6 / 8
    assert found["fit"] < 0.1
    assert found["low"] <= 5e6 <= found["high"]
    assert needed(pareto(2.5, 1, 100_000), 1e4, 10, 1000, 200, 0)["fit"] > 0.1


@pytest.mark.parametrize("shape", [-0.25, 1e-9, 0.5])
def test_the_generalised_pareto_law_of_a_tail_is_found(shape: float) -> None:
    """(1 + shape x)^(-1 / shape) of the excess x over the threshold 3, by inverting it."""
    draws = np.random.default_rng(0).random(20_000)
    tail = 3 + (draws**-shape - 1) / shape
    wanted = 3 + (0.01**-shape - 1) / shape
    assert share_beyond(tail, 3.0, wanted) == pytest.approx(0.01, rel=0.15)
    assert share_beyond(3 + draws, 3.0, 4.5) == 0.0


def runs(folder: Path, factors: str = "f") -> tuple[str, str]:
    inputs = {"model": "m", "queries": "q"}
    sample = write_run(folder / "sample", scores={"a": pareto(2.5, 1, 2000)}, inputs=inputs)
    rows = top_rows("a", "proponent", list(range(12)), [float(n) for n in range(40, 28, -1)])
    rows = [row | {"scan_score": row["score"]} for row in rows]
    filtered = write_run(folder / "filtered", top=rows, inputs=inputs)
    for uri, path in ((sample, "f"), (filtered, factors)):
        Path(uri, "config.yaml").write_text(to_yaml(Config(factors=FactorsConfig(path=path))))
    counts = {"counts": {"scanned": {"sequences": 300}}}
    Path(filtered, "summary.json").write_text(json.dumps({"inputs": inputs} | counts))
    return sample, filtered


def test_a_run_is_held_against_the_filters(tmp_path: Path) -> None:
    sample, filtered = runs(tmp_path)
    table = study(sample, ExtrapolationConfig(filtered=filtered), seed=0)
    assert [(row["k"], row["score"], row["kept"]) for row in table.to_pylist()] == [(1, 40.0, 300), (10, 31.0, 300)]
    said = words(table)
    assert said[0].startswith("For a 1. row as strong as the filter's (300 sequences for all queries)")
    assert write_figure(Store(str(tmp_path)), "x", draw_extrapolation, table) == ["x.png", "x.svg"]


def test_scores_of_two_kinds_are_refused(tmp_path: Path) -> None:
    sample, filtered = runs(tmp_path, factors="others")
    with pytest.raises(RunError, match="other factors"):
        study(sample, ExtrapolationConfig(filtered=filtered), seed=0)
    with pytest.raises(RunError, match=r"3 of 4 scores are positive"):
        needed(np.asarray([1.0, 2, 3, -1]), 2.0, 1, 10, 50, 0)
