"""stages through the whole job: what it equals, what it keeps, and what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from safetensors.numpy import load_file, save_file

from infscan.config import Config
from infscan.corpus.addressable import open_corpus
from infscan.errors import ConfigError, ModelError, RunError
from infscan.results.manifest import SUCCESS
from infscan.results.read import read_summary, read_top
from infscan.storage import Store
from tests.steps.runs import CONTEXT, VOCAB, answer_here, open_here, small_run, tiny_model, write_jsonl


def fine_tuning(folder: Path, count: int = 16) -> Path:
    """Rows of token ids whose first half is a prompt."""
    rng = np.random.default_rng(7)
    rows = [
        {"id": f"ft{n}", "tokens": rng.integers(1, VOCAB, length).tolist(), "prompt": int(length) // 2}
        for n, length in enumerate(rng.integers(4, CONTEXT, count).tolist())
    ]
    return write_jsonl(folder / "finetune.jsonl", rows)


def two(tmp_path: Path, *overrides: str, model: str = "finetuned") -> Config:
    """Two stages over the small run's corpus; the fine-tuned model is another random one."""
    if not (tmp_path / "finetuned").exists():
        tiny_model(tmp_path / "finetuned", seed=1)
        fine_tuning(tmp_path)
    return small_run(
        tmp_path,
        "stages=two",
        f"stages.1.model={tmp_path / model}",
        f"stages.1.corpus.path={tmp_path / 'finetune.jsonl'}",
        "stages.1.corpus.prompt_field=prompt",
        "stages.1.alpha=0.1",
        "scan.check_sequences=20",
        *overrides,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "tracked", [(), ("model.tracked=mlp+head", "factors.span_from=8", "factors.span=16")], ids=["mlp", "head"]
)
def test_a_second_stage_that_changed_nothing_changes_nothing(tmp_path: Path, tracked: tuple[str, ...]) -> None:
    """The same weights, and no curvature: the scan is the single-stage one."""
    answer_here(small_run(tmp_path, "scan.check_sequences=20", f"output={tmp_path / 'single'}", *tracked))
    answer_here(two(tmp_path, "stages.1.factors.solver=identity", *tracked, model="model"))
    single, double = (read_top(str(tmp_path / name)) for name in ("single", "run"))
    names = ["query_id", "side", "rank", "sequence_id"]
    assert single.select(names) == double.select(names)
    np.testing.assert_allclose(single["score"].to_numpy(), double["score"].to_numpy(), rtol=1e-4)


def test_a_run_is_kept_stage_by_stage_and_goes_on(tmp_path: Path) -> None:
    config = two(tmp_path)
    answer_here(config)
    top, store = read_top(config.output), Store(config.output)
    summary = read_summary(config.output)
    # Two stages are fitted, the queries measured at the second and scanned at the first: one scan.
    assert {"stage 2 covariance", "stage 2 queries", "covariance", "scan"} <= set(summary["phases"])
    assert "stages" in summary["inputs"]
    assert summary["counts"]["scanned"]["sequences"] == 40
    # The fine-tuning corpus was prepared with its prompts.
    masks = [one.loss for one in open_corpus(store / "stages/2/corpus").read(np.arange(16))]
    assert all(mask is not None and 0 < mask.sum() < len(mask) for mask in masks)

    vectors = sorted(entry.name for entry in store.list("stages/2/vectors"))
    assert len(vectors) == 3
    before = {name: store.read(name) for name in vectors}
    kept = {entry.name: entry.etag for entry in store.list("stages/2") if entry.name != vectors[0]}
    for name in (vectors[0], SUCCESS):
        store.remove(name)
    for folder in ("queries", "shards"):
        for entry in store.list(folder):
            store.remove(entry.name)
    answer_here(two(tmp_path, "cluster.num_workers=2"))
    assert read_top(config.output) == top
    assert {name: store.read(name) for name in vectors} == before
    assert {entry.name: entry.etag for entry in store.list("stages/2") if entry.name in kept} == kept

    with pytest.raises(RunError, match=r"stages\.1\.alpha: 0\.1 -> 0\.2"):
        answer_here(two(tmp_path, "stages.1.alpha=0.2"))
    changed = load_file(tmp_path / "finetuned" / "model.safetensors")
    name = next(name for name in changed if "dense_h_to_4h.weight" in name)
    save_file(changed | {name: changed[name] + 1}, tmp_path / "finetuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="planned with another factors, stages"):
        answer_here(two(tmp_path))


@pytest.mark.slow
def test_the_scale_is_alphas_and_the_order_follows_the_second_stage(tmp_path: Path) -> None:
    """Scores fall with alpha, and are not the single-stage ones at either model."""
    scores = {}
    for alpha in ("1e-6", "1e6"):
        config = two(tmp_path, f"stages.1.alpha={alpha}", f"output={tmp_path / alpha}")
        answer_here(config)
        scores[alpha] = read_top(config.output)["score"].to_numpy()
    assert np.abs(scores["1e-6"]).max() < 1e-3 * np.abs(scores["1e6"]).max()
    answer_here(two(tmp_path, "stages.1.factors.solver=identity", f"output={tmp_path / 'identity'}"))
    identity = read_top(str(tmp_path / "identity"))
    limit = read_top(str(tmp_path / "1e6"))
    assert limit["sequence_id"] == identity["sequence_id"]
    np.testing.assert_allclose(limit["score"].to_numpy(), identity["score"].to_numpy(), rtol=1e-4)


@pytest.mark.slow
def test_which_fine_tuning_rows_is_the_same_job(tmp_path: Path) -> None:
    """scan.stage=2: the last stage, its rows scanned where their loss is, its own alpha added."""
    config = two(tmp_path, "scan.stage=2")
    answer_here(config)
    top = read_top(config.output)
    assert set(pc.utf8_slice_codeunits(top["document_id"], 0, 2).to_pylist()) == {"ft"}
    assert not Store(config.output).exists("stages")
    direct = small_run(
        tmp_path,
        f"model.path={tmp_path / 'finetuned'}",
        f"corpus.path={tmp_path / 'finetune.jsonl'}",
        "corpus.prompt_field=prompt",
        f"output={tmp_path / 'direct'}",
    )
    answer_here(direct)
    # Without alpha other scores, of the same rows.
    assert not np.array_equal(read_top(direct.output)["score"].to_numpy(), top["score"].to_numpy())


@pytest.mark.slow
def test_three_stages_are_brought_back_one_after_another(tmp_path: Path) -> None:
    last = (
        f"stages.2.model={tmp_path / 'finetuned'}",
        f"stages.2.corpus.path={tmp_path / 'finetune.jsonl'}",
        "stages.2.alpha=0.5",
    )
    for number, kept in ((1, {"2", "3"}), (2, {"3"})):
        config = two(tmp_path, "stages=three", *last, f"scan.stage={number}", f"output={tmp_path / str(number)}")
        answer_here(config)
        assert {entry.name.split("/")[1] for entry in Store(config.output).list("stages")} == kept
        assert read_top(config.output).num_rows > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16}, r"stages\.0 .* stages\.1 .*one of \d+ parameters that differ"),
        ({"layers": 1}, r"missing, one of"),
        ({"family": "gpt2"}, r"gpt_neox and gpt2"),
    ],
)
def test_another_architecture_is_refused_by_its_first_difference(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    tiny_model(tmp_path / "other", **changes)  # type: ignore[arg-type]
    config = two(tmp_path, model="other")
    with pytest.raises(ModelError, match=message), open_here(config):
        pass
    assert not Store(config.output).exists("config.yaml")


def test_another_vocabulary_is_not(tmp_path: Path) -> None:
    tiny_model(tmp_path / "wider", vocab=VOCAB + 3)
    with open_here(two(tmp_path, model="wider")) as run:
        assert [stage.architecture.vocab_size for stage in run.later] == [VOCAB + 3]


def test_an_adapter_is_refused_with_the_way_to_merge_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "adapter" / "adapter_config.json", [{"peft_type": "LORA"}])
    with (
        pytest.raises(ModelError, match=r"LoRA adapter.*infscan merge adapter="),
        open_here(two(tmp_path, model="adapter")),
    ):
        pass


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.1.alpha=0"], r"stages\.1\.alpha=0"),
        (["stages.1.alpha=null"], r"stages\.1\.alpha=None: every stage has one but the first"),
        (["stages.0.alpha=1"], r"stages\.0\.alpha=1"),
        (["scan.stage=3"], r"scan\.stage=3: there are 2 stages"),
        (["scan.stage=0"], r"scan\.stage=0"),
        (["stages.1.factors.blocks=0"], r"stages\.1\.factors\.blocks=0"),
        (["stages.1.factors.damping.absolute=-1"], r"stages\.1\.factors\.damping\.absolute=-1"),
        (["stages.1.corpus.mask_field=mask"], r"stages\.1\.corpus\.mask_field=mask"),
    ],
)
def test_impossible_stages_are_refused_by_key(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        two(tmp_path, *overrides)
