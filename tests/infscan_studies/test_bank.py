"""Laws of the bank: stopped and continued it is the same bytes, what is known is not trained, its judge is fair."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from infscan.config import Packing
from infscan.corpus.addressable import PreparedCorpus
from infscan.errors import ConfigError, RunError
from infscan.results.schema import to_parquet
from infscan.storage import Store
from infscan_studies.api import run_bank
from infscan_studies.bank import TABLE, Bank, open_bank
from infscan_studies.bank_judged import ceilings, lds_by_query, over_queries
from infscan_studies.config import (
    BankJob,
    BankMethod,
    BankRecipe,
    LdsCorpus,
    LdsQueries,
    Sizes,
    SweepConfig,
    TrainingOptimizer,
    TrainingSettings,
)
from infscan_studies.truth.lds import half_subsets, rank_correlation
from tests.corpus.builders import prepare, settings, write_rows

SIZES = Sizes(layers=1, width=8, heads=2, mlp_width=8)
RECIPES = [
    BankRecipe("adamw", SIZES, TrainingSettings(epochs=1, batch_sequences=8)),
    BankRecipe(
        "sgd", SIZES, TrainingSettings(optimizer=TrainingOptimizer.sgd, epochs=1, batch_sequences=8, learning_rate=0.1)
    ),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedCorpus, str]:
    """20 sequences, and queries of two kinds."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"id": f"d{n}", "tokens": [(n + step) % 40 + 2 for step in range(6)]} for n in range(20)]
    write_rows(folder / "in.jsonl", rows)
    corpus = prepare(folder / "in.jsonl", folder / "out", settings(Packing.document, 8))[1]
    queries = [
        {"id": f"{kind}-{n}", "input_ids": [n + 5, n + 6, n + 7], "prompt_len": 1} for kind in "ab" for n in (0, 1)
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    return corpus, str(folder / "queries.jsonl")


def job(inputs: tuple[PreparedCorpus, str], folder: Path, **changed: object) -> BankJob:
    corpus, queries = inputs
    asked = BankJob(
        corpus=LdsCorpus(str(corpus.store)),
        tokenizer=None,
        queries=LdsQueries(queries),
        recipes=RECIPES,
        subsets=3,
        seeds=2,
        output=str(folder),
    )
    return replace(asked, **changed)  # type: ignore[arg-type]


def trained(bank: Bank) -> int:
    return sum(len(cell.study.store.list("lds/retrained")) for cell in bank.cells)


def test_a_bank_that_was_stopped_goes_on_to_the_same_bytes(inputs: tuple[PreparedCorpus, str], tmp_path: Path) -> None:
    whole = run_bank(job(inputs, tmp_path / "whole")).table
    assert whole.num_rows == 2 * 3 * 2

    part = run_bank(job(inputs, tmp_path / "stopped", trainings=4)).table
    assert part.to_pylist() == whole.to_pylist()[:4]
    run_bank(job(inputs, tmp_path / "stopped"))
    assert (tmp_path / "stopped" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()
    first = whole.to_pylist()[0]
    assert first["kept"] == half_subsets(20, 3, 0)[0].tolist()
    assert (first["recipe"], first["optimizer"], first["subset"], first["seed"]) == ("adamw", "adamw", 0, 0)


def test_what_an_earlier_bank_has_is_taken(
    inputs: tuple[PreparedCorpus, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_bank(job(inputs, tmp_path / "first", recipes=RECIPES[:1]))
    known = str(tmp_path / "first" / TABLE)
    more = open_bank(job(inputs, tmp_path / "more", known=known, subsets=4))
    more.prepare()
    assert trained(more) == 3 * 2
    same = open_bank(job(inputs, tmp_path / "same", recipes=RECIPES[:1], known=known))
    same.prepare()
    monkeypatch.setattr(same.cells[0].study.trainer, "train", pytest.fail)
    same.train(lambda _: None)
    same.write()
    assert (tmp_path / "same" / TABLE).read_bytes() == (tmp_path / "first" / TABLE).read_bytes()
    Store(str(tmp_path)).write("other.parquet", to_parquet(pq.read_table(known), {"of": "other.parquet"}))
    refused = open_bank(job(inputs, tmp_path / "refused", known=str(tmp_path / "other.parquet")))
    with pytest.raises(RunError, match="no table of a bank"):
        refused.prepare()


def test_every_method_is_judged_and_the_table_is_found_again(
    inputs: tuple[PreparedCorpus, str], tmp_path: Path
) -> None:
    sweep = SweepConfig(
        methods=list(BankMethod),
        damping=[0.1, 1.0],
        tracked=["mlp", "mlp+head"],
        steps=[1, 2],
        astra_steps=2,
        iterated_auto=True,
        iterated_sequences=[0, 10],
        models=2,
        epochs=[1],
        removal=["ekfac mlp 0.1", "random"],
        removed_queries=1,
        share=0.1,
        random_draws=1,
        resamples=50,
    )
    recipe = replace(RECIPES[0], training=replace(RECIPES[0].training, epochs=2))
    asked = job(inputs, tmp_path / "judged", recipes=[recipe], sweep=sweep)
    table = run_bank(asked).judged
    assert table is not None
    rows = table.to_pylist()
    assert {row["kind"] for row in rows} == {"all", "a", "b"}
    labels = set(table["label"].to_pylist())
    assert {"identity mlp", "kfac mlp+head 1", "ekfac mlp auto", "cg-2 mlp 0.1", "astra-2 mlp 0.1"} <= labels
    assert {"bm25", "cosine", "random"} <= labels
    assert {"cg-2 mlp auto of 10", "astra-2 mlp auto", "ekfac mlp auto x2", "cosine x2"} <= labels
    assert "bm25 x2" not in labels
    assert {"identity mlp at 1", "cg-2 mlp 0.1 at 1+2", "cosine at 1+2"} <= labels
    lds = {(row["label"], row["kind"]): row["lds"] for row in rows}
    assert {row["method"] for row in rows if row["lead"] is not None} == {"ekfac", "kfac", "cg-1", "cg-2", "astra-2"}
    for row in rows:
        if row["label"].startswith("cg-2 mlp 0.1"):
            assert row["lead"] == pytest.approx(row["lds"] - lds["ekfac mlp 0.1", row["kind"]])
    assert all(-1 <= row["low"] <= row["lds"] <= row["high"] <= 1 for row in rows)
    removed = [row for row in rows if row["removal"] is not None]
    assert {row["label"] for row in removed} == {"ekfac mlp 0.1", "random"}
    before = (tmp_path / "judged" / "judged.parquet").read_bytes()
    run_bank(asked)
    assert (tmp_path / "judged" / "judged.parquet").read_bytes() == before
    with pytest.raises(ConfigError, match="is no row of the sweep"):
        run_bank(replace(asked, sweep=replace(sweep, removal=["ekfac mlp 3"])))
    with pytest.raises(ConfigError, match="0 subsets are trained with every seed"):
        run_bank(job(inputs, tmp_path / "few", recipes=RECIPES[:1], sweep=sweep, trainings=1))


def test_the_ceiling_is_the_correlation_with_what_no_seed_adds_to() -> None:
    """Measurements are an effect and each seed's noise: predicting the effect itself reaches the ceiling, no more."""
    rng = np.random.default_rng(0)
    effect_mq = rng.standard_normal((400, 6))
    actual_msq = effect_mq[:, None] + 0.7 * rng.standard_normal((400, 2, 6))
    reached = np.mean([rank_correlation(effect_mq[:, q], actual_msq.mean(axis=1)[:, q]) for q in range(6)])
    assert ceilings(actual_msq).mean() == pytest.approx(reached, abs=0.02)
    assert ceilings(np.repeat(effect_mq[:, None], 3, axis=1)) == pytest.approx(1)
    assert ceilings(rng.standard_normal((400, 2, 6))).mean() < 0.4


def test_scores_that_add_up_to_the_measurements_are_right_for_every_query() -> None:
    scores_nq: NDArray[np.float64] = np.random.default_rng(1).standard_normal((20, 3))
    kept_mn = half_subsets(20, 12, 0)
    assert lds_by_query(kept_mn, scores_nq, kept_mn @ scores_nq) == pytest.approx(1)
    assert lds_by_query(kept_mn, -scores_nq, kept_mn @ scores_nq) == pytest.approx(-1)
    alike = over_queries(np.full(5, 0.3), 0, 50)
    assert (alike.mean, alike.low, alike.high, alike.queries) == pytest.approx((0.3, 0.3, 0.3, 5))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recipes": [RECIPES[0], RECIPES[0]]}, "the names adamw, adamw have to be"),
        ({"subsets": 0}, "subsets=0"),
        ({"max_hours": 1e-9}, "more than max_hours"),
        ({"sweep": SweepConfig(tracked=["mpl"])}, "mpl is unknown"),
        ({"sweep": SweepConfig(damping=[0.0])}, "has to be above 0"),
    ],
)
def test_what_cannot_work_is_refused_before_it_trains(
    inputs: tuple[PreparedCorpus, str], tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run_bank(job(inputs, tmp_path / "refused", **changed))
    assert not Store(str(tmp_path / "refused")).list("adamw/lds/retrained")
