"""What a user can get wrong is said in a sentence with the value and the fix, before a worker or Ray starts."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import infscan.steps.inputs
import infscan.steps.run
from infscan.config import Config
from infscan.engine.in_process import InProcessBackend
from infscan.errors import ConfigError, CorpusError, InfscanError, ModelError, QueryError, RunError, StorageError
from infscan.steps.prepare import prepare_corpus
from infscan.steps.run import open_run
from infscan.storage import Store
from tests.conftest import Bucket
from tests.steps.runs import CONTEXT, VOCAB, compose, in_process, small_run, tiny_model, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching for Ray fails the test."""

    def connect(*_: object) -> None:
        pytest.fail("Ray was reached before the input was refused")

    monkeypatch.setattr(infscan.steps.run, "connect_backend", connect)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model-tok"), tokenizer=True)


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """A folder of its own with a good model; `small_run` adds a good corpus and good queries."""
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


def refusal(config: Config, kind: type[InfscanError]) -> str:
    """What opening the run says; the error is of this kind and one line long."""
    with pytest.raises(kind) as caught, open_run(config):
        pass
    said = str(caught.value)
    assert "\n" not in said
    return said


def assert_says(said: str, *parts: str) -> None:
    for part in parts:
        assert part in said, f"{part!r} is not in: {said}"


# The model


def test_a_missing_model_folder_is_named(folder: Path, no_ray: None) -> None:
    missing = folder / "nowhere"
    assert_says(refusal(small_run(folder, f"model.path={missing}"), ModelError), str(missing), "no such folder")


def test_a_folder_that_is_no_model_is_named(folder: Path, no_ray: None) -> None:
    (folder / "empty").mkdir()
    said = refusal(small_run(folder, f"model.path={folder / 'empty'}"), ModelError)
    assert_says(said, str(folder / "empty"), "config.json")


def test_an_unreadable_config_is_named(folder: Path, no_ray: None) -> None:
    (folder / "model" / "config.json").write_text("{not json")
    assert_says(refusal(small_run(folder), ModelError), str(folder / "model"), "config.json")


def test_a_pickle_checkpoint_is_refused_by_name(folder: Path, no_ray: None) -> None:
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert_says(refusal(small_run(folder), ModelError), "model.safetensors", "pytorch_model.bin", "save_pretrained")


def test_a_model_without_weights_is_refused(folder: Path, no_ray: None) -> None:
    (folder / "model" / "model.safetensors").unlink()
    assert_says(refusal(small_run(folder), ModelError), str(folder / "model"), "no model.safetensors")


def test_a_broken_tokenizer_is_named(folder: Path, no_ray: None) -> None:
    (folder / "model" / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    assert_says(refusal(small_run(folder), ModelError), str(folder / "model"), "tokenizer", "corpus.tokens_field")


def test_a_regex_that_tracks_no_layer_shows_what_there_is(folder: Path, no_ray: None) -> None:
    said = refusal(small_run(folder, "model.tracked=no_such_layer"), ModelError)
    assert_says(said, "model.tracked='no_such_layer'", "gpt_neox.layers.0")


def test_a_sequence_length_beyond_the_context_is_refused(folder: Path, no_ray: None) -> None:
    said = refusal(small_run(folder, f"corpus.sequence_length={CONTEXT + 1}"), ModelError)
    assert_says(said, f"corpus.sequence_length={CONTEXT + 1}", f"at most {CONTEXT}")


# The corpus


def test_a_missing_corpus_file_is_named(folder: Path, no_ray: None) -> None:
    said = refusal(small_run(folder, f"corpus.path={folder / 'gone.jsonl'}"), StorageError)
    assert_says(said, str(folder / "gone.jsonl"), "check the path")


def test_an_empty_corpus_folder_is_named(folder: Path, no_ray: None) -> None:
    (folder / "documents").mkdir()
    said = refusal(small_run(folder, f"corpus.path={folder / 'documents'}"), StorageError)
    assert_says(said, str(folder / "documents"), "no file is in this folder")


def test_a_missing_corpus_of_the_factors_is_named(folder: Path, no_ray: None) -> None:
    said = refusal(small_run(folder, f"factors.corpus.path={folder / 'gone.jsonl'}"), StorageError)
    assert_says(said, str(folder / "gone.jsonl"))


def test_a_corpus_of_unknown_format_is_refused(folder: Path, no_ray: None) -> None:
    (folder / "corpus.rows").write_bytes(b"PK")
    said = refusal(small_run(folder, f"corpus.path={folder / 'corpus.rows'}"), CorpusError)
    assert_says(said, "corpus.rows", "corpus.format")


def test_an_unknown_format_setting_is_refused(folder: Path, no_ray: None) -> None:
    assert_says(refusal(small_run(folder, "corpus.format=csv"), CorpusError), "corpus.format='csv'", "jsonl", "parquet")


BAD_CORPORA: dict[str, tuple[str, tuple[str, ...]]] = {
    "no document": ("", ("corpus.jsonl", "hold no token")),
    "only empty documents": ('{"id": "d0", "tokens": []}\n' * 2, ("2 documents", "hold no token")),
    "malformed JSON": (
        '{"id": "d0", "tokens": [1, 2]}\n{"id": "d1", "tokens": [1, 2}\n',
        ("corpus.jsonl, line 2", "not JSON"),
    ),
    "a token outside the vocabulary": (
        '{"id": "d0", "tokens": [1, 2]}\n{"id": "d1", "tokens": [1, 97]}\n',
        ("corpus.jsonl", "'d1'", "token id 97", "vocabulary of 97"),
    ),
    "text without a tokenizer": ('{"id": "d0", "text": "words"}\n', ("'d0'", "no tokenizer", "corpus.tokens_field")),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_a_corpus_that_cannot_be_prepared_names_the_place(folder: Path, case: str) -> None:
    content, expected = BAD_CORPORA[case]
    (folder / "corpus.jsonl").write_text(content)
    config = small_run(folder)
    with open_run(in_process(config)) as run, pytest.raises(CorpusError) as caught:
        prepare_corpus(run)
    assert_says(str(caught.value), *expected)
    assert not Store(config.output).exists("corpus/manifest.json")


# The queries


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "q0", "input_ids": [1, 2, 3], "prompt_len": 2} | changes


BAD_QUERIES: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "no query": ([], ("holds no query",)),
    "no completion": ([row(prompt_len=3)], ("line 1", "'q0'", "no completion")),
    "prompt_len beyond the tokens": ([row(prompt_len=4)], ("line 1", "prompt_len=4", "3 input_ids")),
    "longer than the context": (
        [row(input_ids=[1] * (CONTEXT + 1))],
        ("line 1", f"{CONTEXT + 1} tokens", f"context of {CONTEXT}"),
    ),
    "a single token": ([row(input_ids=[1], prompt_len=0)], ("line 1", "single token")),
    "an id twice": ([row(), row(id="q1"), row()], ("line 3", "'q0'", "line 1")),
    "an id with a bad character": ([row(id="q#0")], ("line 1", "'q#0'", "letters, digits")),
    "an id that leaves its folder": ([row(id="../../etc/x")], ("line 1", "'../../etc/x'", "letters, digits")),
    "an id that is a path": ([row(id="/etc/x")], ("line 1", "'/etc/x'", "letters, digits")),
    "an id with an escape": ([row(id="\x1b[31m")], ("line 1", "letters, digits")),
    "an id without end": ([row(id="a" * 65)], ("line 1", "letters, digits")),
    "no id": ([{"input_ids": [1, 2], "prompt_len": 1}], ("line 1", "id None")),
    "a token outside the vocabulary": (
        [row(), row(id="q1", input_ids=[1, 2, VOCAB])],
        ("line 2", "'q1'", f"token id {VOCAB}", f"vocabulary of {VOCAB}"),
    ),
    "a negative token": ([row(input_ids=[1, 2, -1])], ("token id -1",)),
    "a token that is no number": ([row(input_ids=[1, 2, "3"])], ("line 1", "whole numbers")),
    "an unknown measure": ([row(measure="median")], ("'median'", "completion, first, tokens")),
    "text without a tokenizer": ([{"id": "q0", "prompt": "a", "completion": " b"}], ("no tokenizer", "input_ids")),
}


@pytest.mark.parametrize("case", BAD_QUERIES)
def test_a_bad_query_is_refused_with_its_line(folder: Path, no_ray: None, case: str) -> None:
    rows, expected = BAD_QUERIES[case]
    path = write_jsonl(folder / "queries.jsonl", rows)
    assert_says(refusal(small_run(folder), QueryError), str(path), *expected)


@pytest.mark.parametrize("changes", [{"completion": ""}, {}, {"completion": 7}], ids=["empty", "none", "a number"])
def test_a_text_query_without_completion_is_refused(
    tmp_path: Path, model_with_tokenizer: Path, no_ray: None, changes: dict[str, Any]
) -> None:
    write_jsonl(tmp_path / "queries.jsonl", [{"id": "q0", "prompt": "the river"} | changes])
    said = refusal(small_run(tmp_path, f"model.path={model_with_tokenizer}"), QueryError)
    assert_says(said, "line 1", "'q0'", "no completion")


def test_a_malformed_query_line_is_named(folder: Path, no_ray: None) -> None:
    (folder / "queries.jsonl").write_text(json.dumps(row()) + "\n{broken\n")
    assert_says(refusal(small_run(folder), QueryError), "queries.jsonl, line 2", "not JSON")


def test_a_query_file_that_is_not_utf8_is_refused(folder: Path, no_ray: None) -> None:
    (folder / "queries.jsonl").write_bytes(b'{"id": "q0", "prompt": "\xff\xfe", "completion": " b"}\n')
    assert_says(refusal(small_run(folder), QueryError), "queries.jsonl, line 1")


def test_a_missing_query_file_is_named(folder: Path, no_ray: None) -> None:
    path = folder / "gone.jsonl"
    assert_says(refusal(small_run(folder, f"queries.path={path}"), StorageError), str(path))


# The output


def claim(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim a run's folder and keep a plan there, without Ray."""
    with monkeypatch.context() as patch:
        patch.setattr(infscan.steps.run, "connect_backend", InProcessBackend)
        with open_run(config) as run:
            run.folder.claim(config)
            run.store.write("plan.json", b"{}")


def test_an_output_of_another_configuration_is_refused_by_field(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
) -> None:
    claim(small_run(folder), monkeypatch)
    said = refusal(small_run(folder, "scan.rank=4", "scan.top_k=7", "factors.damping.relative=0.2"), RunError)
    assert_says(
        said, "scan.rank: 8 -> 4", "scan.top_k: 5 -> 7", "factors.damping.relative: 0.1 -> 0.2", "another output"
    )
    assert said.count("->") == 3


def test_run_time_fields_may_differ_when_a_run_is_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(small_run(folder), monkeypatch)
    claim(
        small_run(folder, "cluster.num_workers=3", "cluster.deadline_s=7", "model.gradient_checkpointing=true"),
        monkeypatch,
    )


def test_an_output_below_a_file_is_refused(folder: Path, no_ray: None) -> None:
    (folder / "file").write_text("")
    said = refusal(small_run(folder, f"output={folder / 'file' / 'run'}"), StorageError)
    assert_says(said, str(folder / "file"))


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions mean nothing to root")
def test_an_output_that_may_not_be_written_is_refused(folder: Path, no_ray: None) -> None:
    (folder / "locked").mkdir(mode=0o500)
    assert_says(refusal(small_run(folder, f"output={folder / 'locked' / 'run'}"), StorageError), "locked")


SECRET_ADDRESSES = [
    *((key, "s3://key:hidden-secret@bucket/run") for key in ("output", "model.path", "corpus.path", "queries.path")),
    *((key, "s3://key:hidden-secret@bucket/run") for key in ("factors.path", "factors.corpus.path")),
    ("output", "https://hidden-secret@host/run"),
    ("output", "https://host/run?token=hidden-secret"),
    ("output", "https://host/run?X-Amz-Signature=hidden-secret"),
    ("output", "abfs://container@account/run?sv=2024&sig=hidden-secret"),
]


@pytest.mark.parametrize(("key", "address"), SECRET_ADDRESSES)
def test_credentials_in_an_address_are_refused_before_anything_is_written(folder: Path, key: str, address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_run(folder, f"{key}='{address}'")
    assert_says(str(caught.value), key, "carries credentials", "AWS_ACCESS_KEY_ID")
    assert "hidden-secret" not in str(caught.value)
    assert not (folder / "run").exists()


def test_wrong_s3_credentials_end_before_the_model_is_looked_at(
    folder: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch, no_ray: None
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    monkeypatch.setattr(infscan.steps.inputs, "describe", lambda *_, **__: pytest.fail("the model was looked at first"))
    said = refusal(small_run(folder, f"output={s3.uri()}"), StorageError)
    assert_says(said, f"s3://{s3.name}", "refused access", "check the credentials")
    assert "not-the-secret-at-all" not in said


# Settings: refused while they are composed


IMPOSSIBLE: dict[str, tuple[str, str]] = {
    "scan.top_k=0": ("scan.top_k=0", "greater than 0"),
    "scan.rank=-1": ("scan.rank=-1", "greater than 0"),
    "scan.candidates=2": ("scan.candidates=2", "scan.top_k=5"),
    "scan.max_nonfinite=2": ("scan.max_nonfinite=2", "between 0 and 1"),
    "scan.allow_quarantined=-1": ("scan.allow_quarantined=-1", "0 or more"),
    "corpus.sequence_length=1": ("corpus.sequence_length=1", "at least 2"),
    "corpus.max_sequences=0": ("corpus.max_sequences=0", "greater than 0"),
    "factors.damping.absolute=0": ("factors.damping.absolute=0", "greater than 0"),
    "factors.damping.relative=nan": ("factors.damping.relative=nan", "finite"),
    "cluster.num_workers=0": ("cluster.num_workers=0", "greater than 0"),
    "cluster.gpus_per_rank=-1": ("cluster.gpus_per_rank=-1", "0 or more"),
    "model.tracked='mlp('": ("model.tracked='mlp('", "regular expression"),
    "factors.solver=identity scan.compression=weighted": ("factors.solver=identity", "scan.compression"),
}


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_an_impossible_value_is_refused_with_its_key(folder: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_run(folder, *override.split())
    assert_says(str(caught.value), *IMPOSSIBLE[override])


def test_a_sharded_group_without_sharding_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero3"):
        small_run(folder, "model.sharding=none", "cluster.ranks_per_worker=2")


def test_every_missing_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose("scan")
    assert_says(str(caught.value), "model.path=...", "corpus.path=...", "queries.path=...")


# The command itself


# What a process of its own ends with; tests/test_hostile_settings.py has many more, in one process.
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no arguments": ([], ("model.path", "corpus.path", "queries.path")),
    "a missing model": (
        ["model.path=/no/such/model", "corpus=demo", "queries=demo"],
        ("model.path=/no/such/model", "there is no such folder"),
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_job_ends_with_a_sentence_and_without_a_traceback(tmp_path: Path, case: str) -> None:
    arguments, expected = COMMANDS[case]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "jobs" / "scan.py"),
            *arguments,
            *([f"output={tmp_path / 'run'}"] if arguments else []),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    # A terminal's width may break the sentence anywhere.
    assert_says(re.sub(r"\s+", " ", done.stderr), *expected)
