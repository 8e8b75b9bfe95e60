"""Laws of packing: nothing is lost, spans lead back to the very tokens, and the counts add up."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.config import Packing
from infscan.corpus.packing import Counts, Packer, PackSettings, pack_settings
from infscan.corpus.sequences import Sequence, document_starts
from infscan.errors import CorpusError
from tests.corpus.builders import BOS, EOS, VOCAB, corpus_config, documents, settings

corpora = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=30), max_size=12)
lengths = st.integers(1, 17)


def packed(rows: list[list[int]], pack: PackSettings) -> tuple[list[Sequence], Counts]:
    packer = Packer(pack)
    return list(packer.pack(documents(rows))), packer.counts


def own(rows: list[list[int]], packing: Packing, *, bos: int | bool | None) -> list[list[int]]:
    """Documents without the separators that they bring themselves, which packing puts back once."""
    found = [row[:-1] if packing is Packing.concat and row[-1:] == [EOS] else row for row in rows]
    first = BOS if bos is True else bos
    return [row[1:] if first is not None and first is not False and row[:1] == [first] else row for row in found]


@given(corpora, lengths, st.booleans())
def test_concat_joins_back_to_the_documents_and_their_separators(rows: list[list[int]], length: int, bos: bool) -> None:
    sequences, _ = packed(rows, settings(Packing.concat, length, bos=bos))
    stream = [
        token for row in own(rows, Packing.concat, bos=bos) if row for token in [*([BOS] if bos else []), *row, EOS]
    ]
    assert [token for sequence in sequences for token in sequence.token_ids.tolist()] == stream
    assert all(len(sequence) == length for sequence in sequences[:-1])
    assert [sequence.sequence_id for sequence in sequences] == list(range(len(sequences)))


@given(corpora, lengths, st.booleans(), st.sampled_from(Packing))
def test_spans_lead_back_to_the_very_tokens(rows: list[list[int]], length: int, bos: bool, packing: Packing) -> None:
    sequences, _ = packed(rows, settings(packing, length, bos=bos))
    found: dict[str, list[int]] = defaultdict(list)
    for sequence in sequences:
        ends = [0, *(span.end for span in sequence.documents)]
        for span, before in zip(sequence.documents, ends, strict=False):
            assert before <= span.start <= span.end <= len(sequence)
            found[span.id] += sequence.token_ids[span.start : span.end].tolist()
    room = length - bos
    kept = own(rows, packing, bos=bos)
    expected = {f"d{n}": row if packing is Packing.concat else row[:room] for n, row in enumerate(kept) if row}
    assert found == expected


@given(corpora, lengths, st.sampled_from([None, BOS, EOS]), st.sampled_from(Packing))
def test_attention_begins_anew_where_another_document_and_its_separators_begin(
    rows: list[list[int]], length: int, bos: int | None, packing: Packing
) -> None:
    """Documents may hold the separators' ids too; BOS and EOS may be one token."""
    concat = packing is Packing.concat
    eos = EOS if concat else None
    kept = own(rows, packing, bos=bos if bos is not None else False)
    sequences, _ = packed(rows, PackSettings(packing, length, VOCAB, eos, bos))
    sizes = [(bos is not None) + len(row) + concat for row in kept if row]
    if concat:
        owners = np.repeat(np.arange(len(sizes)), sizes)
        owned = np.split(owners, np.arange(length, len(owners), length)) if len(owners) else []
    else:
        owned = [np.zeros(min(size, length)) for size in sizes]
    for sequence, owner in zip(sequences, owned, strict=True):
        starts = document_starts(sequence.token_ids, sequence.documents, (bos, eos))
        assert starts.tolist() == [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist()]


@given(corpora, lengths, st.booleans(), st.sampled_from(Packing))
def test_counts_add_up(rows: list[list[int]], length: int, bos: bool, packing: Packing) -> None:
    sequences, counts = packed(rows, settings(packing, length, bos=bos))
    assert counts.tokens_read + counts.tokens_added - counts.tokens_truncated == counts.tokens
    assert counts.tokens == sum(map(len, sequences))
    assert counts.sequences == len(sequences)
    assert counts.documents_read == len(rows)
    kept = own(rows, packing, bos=bos)
    assert counts.documents_empty == sum(not row for row in kept)
    assert counts.tokens_read == sum(map(len, kept))
    if packing is Packing.document:
        assert counts.sequences == counts.documents_read - counts.documents_empty
        assert counts.documents_truncated == sum(len(row) + bos > length for row in kept if row)
    else:
        assert counts.tokens_truncated == counts.documents_truncated == 0


@given(corpora, lengths, st.sampled_from(Packing))
def test_a_sequence_points_at_its_first_document(rows: list[list[int]], length: int, packing: Packing) -> None:
    for sequence in packed(rows, settings(packing, length))[0]:
        number = int(sequence.document_id.removeprefix("d"))
        assert (sequence.byte_offset, sequence.source, sequence.path) == (10 * number, f"s{number % 3}", "file")


def test_counts_of_parts_merge_by_addition() -> None:
    rows = [[5, 6, 7], [], [8] * 9]
    pack = settings(Packing.document, 4, bos=True)
    whole = packed(rows, pack)[1]
    parts = [packed([row], pack)[1] for row in rows]
    assert sum(parts, Counts()) == whole
    assert (whole.documents_truncated, whole.tokens_truncated, whole.tokens_added) == (1, 6, 2)


def test_a_separator_alone_names_the_document_it_ends() -> None:
    sequences, _ = packed([[5, 6, 7, 8]], settings(Packing.concat, 4))
    last = sequences[1]
    assert last.token_ids.tolist() == [EOS]
    assert (last.document_id, last.documents[0].start, last.documents[0].end) == ("d0", 0, 0)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
def test_a_token_outside_the_vocabulary_is_named_with_its_document(bad: int) -> None:
    with pytest.raises(CorpusError, match=rf"file: document 'd1' \(at 10\) has token id {bad}, .*vocabulary of 50"):
        packed([[3], [4, bad]], settings(Packing.concat, 8))


def test_an_unsigned_token_beyond_int64_keeps_its_value_in_the_error() -> None:
    document = documents([[1]])[0]
    object.__setattr__(document, "token_ids", np.array([2**64 - 1], np.uint64))
    with pytest.raises(CorpusError, match=str(2**64 - 1)):
        list(Packer(settings(Packing.concat, 8)).pack([document]))


@pytest.mark.parametrize(
    ("changes", "eos", "bos", "message"),
    [
        ({}, None, 1, "corpus.packing=concat .*corpus.packing=document"),
        ({"bos": True}, 0, None, "corpus.bos=true.*corpus.bos=false"),
        ({}, VOCAB, None, "eos_token_id 50 is outside"),
    ],
)
def test_a_separator_the_model_lacks_is_refused(
    changes: dict[str, bool], eos: int | None, bos: int | None, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        pack_settings(corpus_config(**changes), 8, VOCAB, eos, bos)


def test_document_packing_needs_no_eos() -> None:
    pack = pack_settings(corpus_config(packing=Packing.document), 8, VOCAB, None, None)
    assert packed([[3, 4]], pack)[0][0].token_ids.tolist() == [3, 4]
