"""What the model gives each completion is measured beforehand, and misleading questions are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import infscan
from infscan.results.read import read_queries, read_summary
from tests.steps.runs import answer_here, small_run, write_jsonl

ROWS = [
    {"id": "plain", "input_ids": [5, 6, 7, 8, 9], "prompt_len": 3},
    {"id": "contrast", "input_ids": [5, 6, 7, 8, 9], "prompt_len": 3, "contrast": [11]},
    {"id": "first", "input_ids": [5, 6, 7, 8, 9], "prompt_len": 3, "measure": "first"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    write_jsonl(folder / "queries.jsonl", ROWS)
    answer_here(small_run(folder))
    return folder


def log_p(folder: Path, ids: list[int], positions: list[int]) -> tuple[float, float]:
    """By plain autograd: log p of some tokens, and the norm of its gradient over the MLPs."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    log_p_tv = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = sum(log_p_tv[t - 1, ids[t]] for t in positions)
    total.backward()
    mlps = [p for name, p in model.named_parameters() if ".mlp." in name]
    return float(total), float(sum((p.grad**2).sum() for p in mlps)) ** 0.5


@pytest.mark.parametrize(
    ("row", "prefix", "ids", "positions"),
    [
        (1, "", [5, 6, 7, 8, 9], [3, 4]),
        (0, "", [5, 6, 7, 8, 9], [3, 4]),
        (0, "contrast_", [5, 6, 7, 11], [3]),
    ],
)
def test_log_probabilities_and_gradients_are_autograds(
    run: Path, row: int, prefix: str, ids: list[int], positions: list[int]
) -> None:
    table = {one["query_id"]: one for one in read_queries(str(run / "run")).to_pylist()}
    found = table[["contrast", "plain"][row]]
    expected = log_p(run, ids, positions)
    assert found[f"{prefix}measured"] == positions
    assert found[f"{prefix}log_probability"] == pytest.approx(expected[0], rel=1e-5)
    assert found[f"{prefix}gradient_norm"] == pytest.approx(expected[1], rel=1e-4)
    assert table["first"]["measured"] == [3]
    assert table["plain"]["contrast_log_probability"] is None


def test_a_completion_that_the_model_does_not_know_is_named(run: Path, tmp_path: Path) -> None:
    warnings = read_summary(str(run / "run"))["warnings"]
    unlikely = [one for one in warnings if "nats a token" in one]
    table = read_queries(str(run / "run")).to_pylist()
    expected = [one["query_id"] for one in table if one["log_probability"] / len(one["measured"]) < -5.0]
    assert [one.split("'")[1] for one in unlikely if "completion" in one] == expected


def test_a_contrast_whose_gradient_dwarfs_the_other_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infscan.steps.measure.DWARFED", 1.0)
    write_jsonl(tmp_path / "queries.jsonl", ROWS)
    config = small_run(tmp_path)
    answer_here(config)
    [row] = [one for one in read_queries(config.output).to_pylist() if one["query_id"] == "contrast"]
    norms = {"completion": row["gradient_norm"], "contrast": row["contrast_gradient_norm"]}
    larger, smaller = sorted(norms, key=lambda part: -norms[part])
    warned = [one for one in read_summary(config.output)["warnings"] if "the gradient of its" in one]
    assert len(warned) == 1
    assert warned[0].startswith(f"query 'contrast': the gradient of its {larger} is ")
    assert warned[0].endswith(f"times that of its {smaller}, so rows speak of the {larger} alone")


def test_a_resumed_run_does_not_measure_again_and_keeps_its_table(run: Path) -> None:
    before = (run / "run" / "queries" / "queries.parquet").read_bytes()
    answer_here(small_run(run))
    assert (run / "run" / "queries" / "queries.parquet").read_bytes() == before
    assert "measure" not in read_summary(str(run / "run"))["phases"]


def test_a_failed_first_run_binds_nothing(tmp_path: Path) -> None:
    """After a wrong field the corrected command is taken; once there is a plan, other settings are refused."""
    wrong = small_run(tmp_path, "corpus.tokens_field=content")
    with pytest.raises(infscan.InfscanError, match="has no field"):
        answer_here(wrong)
    answer_here(small_run(tmp_path))
    with pytest.raises(infscan.InfscanError, match=r"belongs to other settings \(scan.top_k: 5 -> 6\)"):
        answer_here(small_run(tmp_path, "scan.top_k=6"))


def test_other_queries_are_refused_with_the_way_to_ask_them(run: Path) -> None:
    write_jsonl(run / "others.jsonl", ROWS[:1])
    with pytest.raises(infscan.InfscanError, match=r"add corpus\.path=\S+/corpus factors\.path=\S+/factors"):
        answer_here(small_run(run, f"queries.path={run / 'others.jsonl'}"))


def test_an_output_that_holds_other_things_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    answer_here(small_run(tmp_path))
    assert any("thesis.tex" in one for one in read_summary(str(tmp_path / "run"))["warnings"])
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["shards"] == 5
