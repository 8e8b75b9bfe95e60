"""Several corpora as one: numbered through, every sequence under the label of the corpus it lies in."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infscan.config import Attention, Packing
from infscan.corpus.addressable import AddressableCorpus, label_of, open_corpus
from infscan.corpus.filtered import describe_filtered
from infscan.corpus.in_place import DESCRIPTION
from infscan.corpus.joined import describe_joined
from infscan.corpus.reading import Reading
from infscan.errors import CorpusError
from infscan.storage import Store
from tests.corpus import layouts
from tests.corpus.builders import EOS, corpus_config, plain, prepare, settings, token_rows, write_rows

PACK = settings(Packing.concat, 8)


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, AddressableCorpus]:
    """A prepared one below the joined corpus's folder, and an array that lies elsewhere."""
    _, first = prepare(write_rows(tmp_path / "x.jsonl", token_rows(20)), tmp_path / "joined/a", PACK)
    array = Store(str(tmp_path / "array"))
    layouts.npy(array, "t.npy", [token for row in token_rows(15, seed=2) for token in [*row["tokens"], EOS]])
    there = layouts.described(array, corpus_config(array.uri), PACK, Store(str(tmp_path / "joined/b")))
    return {"a": first, "b": there}


def joined(tmp_path: Path, parts: dict[str, AddressableCorpus]) -> AddressableCorpus:
    store = Store(str(tmp_path / "joined"))
    store.write_json(DESCRIPTION, describe_joined(store, parts))
    return open_corpus(store)


def test_numbers_run_through_and_any_of_them_come_back(tmp_path: Path, parts: dict[str, AddressableCorpus]) -> None:
    corpus = joined(tmp_path, parts)
    n = parts["a"].sequences
    assert corpus.sequences == n + parts["b"].sequences
    assert corpus.tokens == sum(part.tokens for part in parts.values())
    expected = [
        plain(replace(sequence, sequence_id=first + sequence.sequence_id))
        for first, part in ((0, parts["a"]), (n, parts["b"]))
        for sequence in part.read(np.arange(part.sequences))
    ]
    ids = np.random.default_rng(0).integers(0, corpus.sequences, 50)
    for each in (corpus, pickle.loads(pickle.dumps(corpus))):
        assert [plain(sequence) for sequence in each.read(ids)] == [expected[number] for number in ids]
    apart = [
        one.starts.tolist()
        for part in parts.values()
        for one in open_corpus(part.store, Reading(Attention.within)).read(np.arange(part.sequences))
        if one.starts is not None
    ]
    within = open_corpus(corpus.store, Reading(Attention.within)).read(np.arange(corpus.sequences))
    assert [one.starts.tolist() for one in within if one.starts is not None] == apart
    assert len(apart) == corpus.sequences
    blocks = [block.tokens[block.offsets[row] : block.offsets[row + 1]].tolist()
              for block in corpus.token_blocks(n - 2, n + 3) for row in range(len(block))]  # fmt: skip
    assert blocks == [one["token_ids"] for one in expected[n - 2 : n + 3]]
    assert [label_of(corpus, number) for number in (0, n - 1, n, corpus.sequences - 1)] == ["a", "a", "b", "b"]
    assert label_of(parts["a"], 0) is None
    assert corpus.counts["corpora"]["a"] == parts["a"].counts


def test_the_folder_can_move_and_a_part_that_changed_is_refused(
    tmp_path: Path, parts: dict[str, AddressableCorpus]
) -> None:
    before = joined(tmp_path, parts).fingerprint
    (tmp_path / "joined").rename(tmp_path / "moved")
    assert open_corpus(Store(str(tmp_path / "moved"))).fingerprint == before
    prepare(write_rows(tmp_path / "y.jsonl", token_rows(9)), tmp_path / "moved/a", PACK)
    with pytest.raises(CorpusError, match=r"is not the corpus that .* joined as a"):
        open_corpus(Store(str(tmp_path / "moved")))


def test_a_damaged_description_is_refused(tmp_path: Path, parts: dict[str, AddressableCorpus]) -> None:
    store = joined(tmp_path, parts).store
    store.write(DESCRIPTION, store.read(DESCRIPTION).replace(b'"label": "a"', b'"label": "z"'))
    with pytest.raises(CorpusError, match=r"addressable\.json was changed or damaged"):
        open_corpus(store)


def test_labels_are_part_of_the_fingerprint(tmp_path: Path, parts: dict[str, AddressableCorpus]) -> None:
    store = Store(str(tmp_path / "joined"))
    one = describe_joined(store, parts)
    other = describe_joined(store, {"c": parts["a"], "b": parts["b"]})
    assert one["fingerprint"] != other["fingerprint"]
    assert json.loads(json.dumps(one)) == one


def test_corpora_of_different_tokenizers_and_filtered_ones_are_not_joined(
    tmp_path: Path, parts: dict[str, AddressableCorpus]
) -> None:
    store = Store(str(tmp_path / "joined"))
    few = store / "few"
    describe_filtered(few, parts["a"], np.array([1, 2]))
    with pytest.raises(CorpusError, match="few is a filtered corpus"):
        describe_joined(store, {**parts, "few": open_corpus(few)})
    first = parts["a"]
    first.manifest = replace(first.manifest, tokenizer="x")  # type: ignore[attr-defined]
    _, second = prepare(write_rows(tmp_path / "y.jsonl", token_rows(9)), tmp_path / "joined/c", PACK)
    second.manifest = replace(second.manifest, tokenizer="y")
    with pytest.raises(CorpusError, match="a, c were made with different tokenizers"):
        describe_joined(store, {"a": first, "c": second})
