"""A run folder that somebody else made: nothing outside it is opened, and nobody is asked, unless the user says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from infscan.config import from_yaml
from infscan.errors import InfscanError, RunError, StorageError
from infscan.report.write import write_report
from infscan.results.manifest import Part, commit, read_manifest
from infscan.steps.finished import finished_config
from infscan.storage import Store, remember_written
from tests.steps.runs import answer_here, small_run, text_corpus, text_queries, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished run of a model and a corpus that lie outside its folder."""
    root = tmp_path_factory.mktemp("mine")
    tiny_model(root / "model", layers=1, width=16, tokenizer=True)
    corpus, queries = text_corpus(root / "corpus.jsonl", 12), text_queries(root / "queries.jsonl", 1)
    paths = (f"corpus.path={corpus}", f"queries.path={queries}", f"output={root / 'run'}")
    answer_here(small_run(root, *paths, "corpus.tokens_field=null", "scan.rank=4"))
    return Store(str(root / "run"))


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which this user's infscan has written nothing."""
    monkeypatch.setenv("INFSCAN_CACHE", str(tmp_path / "cache"))


def test_what_this_user_ran_is_opened_again_without_a_word(run: Store) -> None:
    assert finished_config(run.uri).model.path == run.uri.replace("/run", "/model")
    assert write_report([run.uri])[0] == f"{run.uri}/report.html"


def test_a_strangers_run_opens_nothing_outside_its_folder(
    run: Store, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = run.uri.replace("/run", "/model")
    for open_it in (finished_config, lambda uri: write_report([uri])):
        with pytest.raises(StorageError, match=rf"config\.yaml names {model}.*INFSCAN_ALLOWED_ADDRESSES={model}"):
            open_it(run.uri)
    # Who names the tokenizer has said what is opened.
    write_report([run.uri], tokenizer=model)
    monkeypatch.setenv("INFSCAN_ALLOWED_ADDRESSES", f"s3://elsewhere,{model}")
    write_report([run.uri])
    assert finished_config(run.uri).corpus.path == f"{run.uri}/corpus"


def test_a_report_asks_no_hub_for_a_model_that_the_run_names(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Store(str(tmp_path / "theirs"))
    for entry in run.list():
        theirs.write(entry.name, run.read(entry.name))
    data = run.read("config.yaml").replace(run.uri.replace("/run", "/model").encode(), b"somebody/model")
    _recommit(theirs, "config.yaml", data)
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **named: asked.append(given) or [])
    with pytest.raises(RunError, match=r"somebody/model.*tokenizer=\.\.\."):
        write_report([theirs.uri])
    assert not asked
    with pytest.raises(InfscanError):
        write_report([theirs.uri], tokenizer="somebody/model")
    assert asked


def _recommit(store: Store, name: str, data: bytes) -> None:
    manifest = read_manifest(store)
    assert manifest is not None
    store.write(name, data)
    store.remove("_SUCCESS")
    parts = {**manifest.parts, name: Part.of(data)}
    commit(store, type(manifest)(**{**manifest.__dict__, "parts": parts}), lambda: None)


def test_settings_without_a_model_end_in_a_sentence(tmp_path: Path, run: Store) -> None:
    theirs = Store(str(tmp_path / "theirs"))
    for entry in run.list():
        theirs.write(entry.name, run.read(entry.name))
    for text in (b"model: 3\n", b"model: {path: [1]}\nstages: []\n", b"stages: {a: 1}\nmodel: {path: x}\n"):
        _recommit(theirs, "config.yaml", text)
        remember_written(text)
        assert from_yaml(text.decode())
        with pytest.raises(RunError, match=r"config\.yaml"):
            write_report([theirs.uri])
