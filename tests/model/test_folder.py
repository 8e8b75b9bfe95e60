"""Where a model is found: revisions of the hub, whose cache is made by hand here, and no file but the model's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from infscan.cli import main
from infscan.errors import ModelError
from infscan.model.architecture import describe
from infscan.model.folder import WEIGHTS, WEIGHTS_INDEX, commit_of, model_folder
from infscan.results.read import read_summary, read_top
from infscan.storage import Store
from tests.conftest import Bucket
from tests.steps.runs import compose, tiny_model, token_corpus, token_queries

COMMITS = {"main": "a" * 40, "step1000": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub that cannot be reached, with two revisions of `owner/tiny`."""
    cache = tmp_path / "cache"
    repository = cache / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate(COMMITS.items()):
        (repository / "refs" / name).write_text(commit)
        tiny_model(repository / "snapshots" / commit, seed=seed)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def test_a_revision_is_another_model_and_the_commit_is_known(hub: Path) -> None:
    first, other = (describe("owner/tiny", "mlp", revision=revision) for revision in (None, "step1000"))
    assert (first.revision, other.revision) == (COMMITS["main"], COMMITS["step1000"])
    assert first.fingerprint != other.fingerprint
    assert describe("owner/tiny", "mlp", revision=COMMITS["step1000"]).fingerprint == other.fingerprint
    assert describe(str(hub / "snapshots" / COMMITS["main"]), "mlp").fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("path", "revision", "said"),
    [
        ("owner/tiny", "step7", "model.path=owner/tiny: there is no such folder .* of that id at revision step7"),
        ("owner/tiny@step1000", None, "a hub id has no '@'; give model.path=owner/tiny model.revision=step1000"),
        ("{folder}", "main", "model.revision=main: model.path=.* is a folder, which has no revisions"),
        ("memory://x/y", "main", "model.revision=main: .* is a folder"),
    ],
)
def test_a_revision_that_is_none_is_refused(hub: Path, path: str, revision: str | None, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        model_folder(path.format(folder=hub), revision=revision)


def test_a_run_keeps_the_commit_that_it_was_of(hub: Path, tmp_path: Path) -> None:
    corpus, queries = token_corpus(tmp_path / "corpus.jsonl", 12), token_queries(tmp_path / "queries.jsonl", 1)
    words = [
        "model.path=owner/tiny", f"corpus.path={corpus}", "corpus.tokens_field=tokens", "corpus.packing=document",
        f"queries.path={queries}", "factors.slices=1", "scan.rank=4", "cluster.backend=in_process",
    ]  # fmt: skip
    for name, revision in (("one", []), ("two", ["model.revision=step1000"])):
        main("scan", [*words, *revision, f"output={tmp_path / name}"])
        plan = Store(str(tmp_path / name)).read_json("plan.json")
        assert plan["made_by"]["model_revision"] == COMMITS["step1000" if revision else "main"]
    one, two = (Store(str(tmp_path / name)).read_json("plan.json")["inputs"]["model"] for name in ("one", "two"))
    assert one != two
    # The same content is the same run, however it is named.
    main("scan", [*words, f"model.revision={COMMITS['step1000']}", f"output={tmp_path / 'two'}"])
    assert read_summary(str(tmp_path / "two"))["counts"]["scanned"]["sequences"] == 12


def test_a_resume_loads_the_commit_that_it_was_begun_with(hub: Path, tmp_path: Path) -> None:
    corpus, queries = token_corpus(tmp_path / "corpus.jsonl", 12), token_queries(tmp_path / "queries.jsonl", 1)
    words = [
        "model.path=owner/tiny", f"corpus.path={corpus}", "corpus.tokens_field=tokens", "corpus.packing=document",
        f"queries.path={queries}", "factors.slices=1", "scan.rank=4", "cluster.backend=in_process",
        f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    main("scan", words)
    before = read_top(str(tmp_path / "run")).to_pylist()
    # The branch has moved on, and the finished run is made once more of its last half.
    (hub / "refs" / "main").write_text(COMMITS["step1000"])
    for name in ("_SUCCESS", "shards/shard-000000.parquet"):
        (tmp_path / "run" / name).unlink()
    main("scan", words)
    assert read_top(str(tmp_path / "run")).to_pylist() == before
    # Who names another revision is told that it is another.
    with pytest.raises(SystemExit):
        main("scan", [*words, f"model.revision={COMMITS['step1000']}"])


def test_stages_have_revisions_of_their_own(tmp_path: Path) -> None:
    words = ("stages=two", "model.path=owner/tiny", "corpus.path=x", "queries.path=q", "stages.1.alpha=1",
             "stages.1.model=owner/tiny", "stages.1.corpus.path=y", f"output={tmp_path}")  # fmt: skip
    config = compose("scan", *words, "model.revision=step1", "stages.1.revision=step2")
    assert [config.at_stage(number).model.revision for number in (1, 2)] == ["step1", "step2"]
    config = compose("scan", *words, "stages.0.revision=step1")
    assert [config.at_stage(number).model.revision for number in (1, 2)] == ["step1", None]


def sharded_checkpoint(folder: Path) -> Path:
    """A checkpoint of one indexed part, beside which lie other copies of its weights."""
    tiny_model(folder)
    part = "model-00001-of-00001.safetensors"
    shutil.move(folder / WEIGHTS, folder / part)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {"a.weight": part}}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index))
    for other in ("consolidated.safetensors", "model.fp16.safetensors", "onnx/model.safetensors"):
        (folder / other).parent.mkdir(exist_ok=True)
        shutil.copy(folder / part, folder / other)
    return folder


def test_of_a_store_only_the_files_that_the_index_names_are_fetched(
    tmp_path: Path, moto_s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFSCAN_CACHE", str(tmp_path / "cache"))
    away = Store(moto_s3.uri())
    folder = sharded_checkpoint(tmp_path / "model")
    for path in folder.rglob("*.*"):
        away.write(str(path.relative_to(folder)), path.read_bytes())
    found = {
        str(path.relative_to(one)) for one in [model_folder(away.uri)] for path in one.rglob("*") if path.is_file()
    }
    assert {name for name in found if name.endswith(".safetensors")} == {"model-00001-of-00001.safetensors"}
    assert "config.json" in found
    small = model_folder(away.uri, weights=False)
    assert not list(small.rglob("*.safetensors"))


def test_of_the_hub_only_the_files_that_the_index_names_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = sharded_checkpoint(tmp_path / "snapshots" / ("c" * 40))
    asked: list[tuple[str | None, list[str]]] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: str) -> str:
        asked.append((revision, allow_patterns))
        assert (name, ignore_patterns) == ("owner/tiny", "*/*")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert commit_of(model_folder("owner/tiny", revision="step1")) == "c" * 40
    assert asked == [
        ("step1", ["*.json", "*.model", "*.txt"]),
        # By the commit that the first answer was of: a branch may move between the two.
        ("c" * 40, ["model-00001-of-00001.safetensors"]),
    ]
