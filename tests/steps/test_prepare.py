"""Preparing on Ray: large files in parts, duplicates dropped, several corpora as one; and a scan that says which."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from infscan.config import Config, CorpusConfig, Packing
from infscan.corpus.addressable import AddressableCorpus, label_of
from infscan.corpus.documents import document_files, document_splits
from infscan.corpus.packing import PackSettings
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.tokenizer import Tokenizer
from infscan.engine.in_process import InProcessExecutor
from infscan.errors import ConfigError, CorpusError, RunError
from infscan.model.architecture import describe
from infscan.steps.prepare import prepare, prepare_corpus
from infscan.storage import Store
from tests.corpus import layouts
from tests.steps.runs import (
    EOS,
    VOCAB,
    answer_here,
    compose,
    open_here,
    small_run,
    tiny_model,
    token_queries,
    write_jsonl,
)

T = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, queries, 60 documents as JSONL of which 10 come twice, and an array."""
    base = tmp_path_factory.mktemp("prepare")
    tiny_model(base / "model")
    token_queries(base / "queries.jsonl", 2)
    rng = np.random.default_rng(0)
    rows = [{"id": f"d{n}", "tokens": rng.integers(1, 97, 20).tolist()} for n in range(50)]
    write_jsonl(base / "pile/x.jsonl", [*rows, *({**row, "id": f"again-{row['id']}"} for row in rows[:10])])
    layouts.npy(Store(str(base / "array")), "a.npy", [*rng.integers(1, 97, 200).tolist(), EOS])
    return base


def several(folder: Path, output: str, *overrides: str) -> Config:
    return small_run(
        folder,
        "corpus.path=",
        f"+corpus.paths.pile={folder / 'pile'}",
        f"+corpus.paths.array={folder / 'array'}",
        f"corpus.sequence_length={T}",
        "corpus.packing=concat",
        "corpus.part_bytes=1000",
        "corpus.deduplicate=true",
        f"output={folder / output}",
        *overrides,
    )


def prepared(config: Config) -> AddressableCorpus:
    with open_here(config, needs_queries=False) as run:
        return prepare_corpus(run)


def test_several_corpora_are_prepared_or_read_in_place_and_joined_under_their_labels(folder: Path) -> None:
    config = several(folder, "run")
    assert list(config.corpus.paths) == list(config.factors.corpus.paths) == ["array", "pile"]
    corpus = prepared(config)
    counts = corpus.counts["corpora"]
    assert (counts["pile"]["documents_read"], counts["pile"]["documents_duplicate"]) == (50, 10)
    assert counts["array"]["tokens"] == 201
    parts = sorted(entry.name for entry in Store(str(folder / "run/corpus/pile")).list())
    assert len([name for name in parts if name.startswith("part-")]) > 2
    assert not [name for name in parts if name.startswith("duplicates")]
    sequences = corpus.read(np.arange(corpus.sequences))
    ids = {span.id for sequence in sequences for span in sequence.documents}
    assert {f"d{n}" for n in range(50)} < ids
    assert not [name for name in ids if name.startswith("again")]
    labels = [label_of(corpus, number) for number in range(corpus.sequences)]
    assert labels == ["array"] * 13 + ["pile"] * (corpus.sequences - 13)
    assert prepared(several(folder, "run")).fingerprint == corpus.fingerprint
    layouts.npy(Store(str(folder / "more")), "b.npy", [3] * 20)
    with pytest.raises(RunError, match=r"joins other corpora than corpus\.paths"):
        prepared(several(folder, "run", f"+corpus.paths.more={folder / 'more'}"))
    for path in (folder / "array", folder / "array" / "a.npy", folder / "pile"):
        with pytest.raises(CorpusError, match=r"and corpus\.paths\.\w+ both have .*would count twice"):
            prepared(several(folder, "run", f"+corpus.paths.zz={path}"))


def test_labels_that_cannot_be_and_a_missing_corpus_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.paths: 'a\.b' is no label"):
        small_run(folder, "corpus.path=", "+corpus.paths={a.b: x}")
    with pytest.raises(ConfigError, match=r"corpus\.path: no value given"):
        compose("scan", f"model.path={folder / 'model'}", f"queries.path={folder / 'queries.jsonl'}", "output=x")
    with pytest.raises(ConfigError, match=r"corpus\.sample=2\.0: a share"):
        small_run(folder, "corpus.sample=2")
    with pytest.raises(ConfigError, match=r"corpus\.path=.* and corpus\.paths are both given"):
        small_run(folder, "+corpus.paths.a=x", f"corpus.path={folder / 'pile'}")


def test_token_ids_of_another_tokenizer_or_a_larger_vocabulary_are_refused(folder: Path, tmp_path: Path) -> None:
    architecture = describe(str(folder / "model"), "mlp")
    config = CorpusConfig(path=str(folder / "pile"), tokens_field="tokens", packing=Packing.document)
    mine, other = (Tokenizer(SimpleNamespace(eos_token_id=EOS, bos_token_id=None), name) for name in ("mine", "other"))

    def again(vocab_size: int, made_with: Tokenizer) -> AddressableCorpus:
        pack, store = PackSettings(Packing.document, T, vocab_size), Store(str(tmp_path / made_with.digest))
        pieces = document_splits(document_files(config), config)
        parts = [prepare_part(piece, n, config, pack, made_with, store) for n, piece in enumerate(pieces)]
        write_manifest(store, config, pack, made_with.digest, parts)
        there = CorpusConfig(path=store.uri)
        return prepare(there, architecture, mine, Store(str(tmp_path / "out")), InProcessExecutor())

    assert again(VOCAB, mine).tokenizer == "mine"
    with pytest.raises(CorpusError, match=f"a vocabulary of {VOCAB + 1}, and the model has {VOCAB}"):
        again(VOCAB + 1, mine)
    with pytest.raises(CorpusError, match="was made with another tokenizer than the model's"):
        again(VOCAB, other)


@pytest.mark.slow
def test_published_rows_say_of_which_corpus_they_are(folder: Path) -> None:
    config = several(folder, "scan", "corpus.sample=0.9", "factors.num_sequences=20")
    answer_here(config)
    for table in ("top", "sequences"):
        rows = pq.read_table(folder / "scan" / table, columns=["sequence_id", "corpus"]).to_pylist()
        assert {row["corpus"] for row in rows} == {"array", "pile"}
        assert all(row["corpus"] == ("array" if row["sequence_id"] < 13 else "pile") for row in rows)
