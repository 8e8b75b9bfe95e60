"""A query file: what it may hold, what it is expanded into, and the sentence for everything it may not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.config import Measure, QueriesConfig
from infscan.corpus.cut import encode_cut
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.errors import BadFileError, QueryError, RunError
from infscan.queries import (
    MEASURED,
    Part,
    Query,
    measured_jsonl,
    queries_fingerprint,
    query_warnings,
    read_measured,
    read_queries,
)
from infscan.storage import Store

VOCAB, CONTEXT = 128, 16


class Letters:
    """A tokenizer whose tokens are characters."""

    unk_id: int | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray([ord(letter) for letter in text], np.int64) for text in texts]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = self.encode_batch(texts)
        return [(row, np.arange(len(row))[:, None] + [0, 1]) for row in rows]


def measured_texts(part: Part) -> tuple[str, ...]:
    assert part.texts is not None
    return tuple(part.texts[position] for position in part.positions)


def read(
    folder: Path,
    *rows: dict[str, Any] | str,
    measure: Measure = Measure.completion,
    tokenizer: bool = True,
    bos: int | None = None,
) -> list[Query]:
    path = folder / "queries.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    encoder = Letters() if tokenizer else None
    return read_queries(QueriesConfig(str(path), measure), encoder, vocab_size=VOCAB, context=CONTEXT, bos_id=bos)


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_a_text_query_measures_the_completions_tokens(tmp_path: Path) -> None:
    (query,) = read(tmp_path, {"id": "a", "prompt": "abc", "completion": "de"})
    assert query == Query("a", (Part(ids("abcde"), (3, 4)),), "abc", "de", "completion")


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    (query,) = read(tmp_path, {"id": "a", "input_ids": [5, 6, 7], "prompt_len": 1}, tokenizer=False)
    assert query == Query("a", (Part((5, 6, 7), (1, 2)),))


@pytest.mark.parametrize("prompt", [{}, {"prompt": ""}])
def test_an_empty_prompt_starts_at_the_second_token(tmp_path: Path, prompt: dict[str, str]) -> None:
    (query,) = read(tmp_path, {"id": "a", "completion": "abc"} | prompt)
    assert query.parts == (Part(ids("abc"), (1, 2)),)
    (query,) = read(tmp_path, {"id": "a", "input_ids": [1, 2], "prompt_len": 0})
    assert query.parts == (Part((1, 2), (1,)),)


def test_bos_goes_before_every_prompt_so_that_a_whole_text_is_measured(tmp_path: Path) -> None:
    first, second = read(
        tmp_path, {"id": "a", "completion": "ab"}, {"id": "b", "prompt": "x", "completion": "y"}, bos=0
    )
    assert first.parts == (Part((0, *ids("ab")), (1, 2)),)
    assert second.parts == (Part((0, *ids("xy")), (2,)),)


def test_first_measures_one_token(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "ab", "completion": "cde"}
    (query,) = read(tmp_path, row, measure=Measure.first)
    assert query.parts == (Part(ids("abcde"), (2,)),)
    assert query.measure == "first"


def test_tokens_expand_into_sub_queries_that_add_up(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "ab", "completion": "cde"}
    (whole,) = read(tmp_path, row)
    subs = read(tmp_path, row, measure=Measure.tokens)
    assert [sub.id for sub in subs] == ["a#0", "a#1", "a#2"]
    assert sum((sub.parts[0].positions for sub in subs), ()) == whole.parts[0].positions
    assert {sub.parts[0].token_ids for sub in subs} == {whole.parts[0].token_ids}


def test_a_rows_own_measure_outranks_the_settings(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "ab", "completion": "cd", "measure": "tokens"},
        {"id": "b", "prompt": "ab", "completion": "cd", "measure": None},
    ]
    assert [query.id for query in read(tmp_path, *rows, measure=Measure.first)] == ["a#0", "a#1", "b"]


def test_a_contrast_is_subtracted(tmp_path: Path) -> None:
    (query,) = read(tmp_path, {"id": "a", "prompt": "ab", "completion": "cd", "contrast": "e"})
    assert query.parts == (Part(ids("abcd"), (2, 3), 1.0), Part(ids("abe"), (2,), -1.0))
    row = {"id": "a", "input_ids": [1, 2, 3], "prompt_len": 2, "contrast": [4, 5]}
    (query,) = read(tmp_path, row, measure=Measure.first)
    assert query.parts == (Part((1, 2, 3), (2,), 1.0), Part((1, 2, 4, 5), (2,), -1.0))


def test_blank_lines_are_fine(tmp_path: Path) -> None:
    rows = ["", '{"id": "a", "prompt": "p", "completion": "c"}', "   "]
    assert [query.id for query in read(tmp_path, *rows)] == ["a"]


GOOD = {"id": "a", "prompt": "p", "completion": "c"}
TOKENS = {"id": "a", "input_ids": [1, 2, 3], "prompt_len": 1}
SAME = "its contrast has the tokens of its completion, as far as they are measured"
REFUSED: list[tuple[dict[str, Any] | str, str]] = [
    ("{", "line 2 is not JSON"),
    ("[1]", "line 2 is a list, not an object"),
    ('{"id": "a", "prompt": "\\ud83d", "completion": "c"}', "line 2: half a surrogate pair"),
    ("[" * 100_000, "line 2: nested too deeply"),
    ({"prompt": "p"}, "line 2: id None must be a string of 1 to 64"),
    (GOOD | {"id": "x#0"}, "line 2: id 'x#0' must be a string"),
    (GOOD | {"id": "x" * 65}, "must be a string of 1 to 64"),
    (GOOD | {"id": 7}, "line 2: id 7 must be"),
    (GOOD | {"id": "taken"}, "line 2: the id 'taken' is taken by line 1"),
    (GOOD | {"measure": "all"}, "line 2 (query 'a'): measure 'all' is unknown; give one of completion, first, tokens"),
    (GOOD | {"measure": ["first"]}, "measure ['first'] is unknown"),
    (GOOD | {"prompt": None}, "line 2 (query 'a'): prompt must be a string"),
    (GOOD | {"completion": ""}, "line 2 (query 'a'): no completion"),
    ({"id": "a", "prompt": "p"}, "line 2 (query 'a'): no completion"),
    (GOOD | {"contrast": ""}, "line 2 (query 'a'): no contrast"),
    (GOOD | {"contrast": "d", "measure": "tokens"}, "measure 'tokens' splits one completion"),
    ({"id": "a", "completion": "c"}, "a single token has no log-probability"),
    (GOOD | {"prompt": "p" * CONTEXT}, f"{CONTEXT + 1} tokens are longer than the model's context of {CONTEXT}"),
    (GOOD | {"completion": "\u00e9"}, f"token id 233 is outside the model's vocabulary of {VOCAB}"),
    (TOKENS | {"input_ids": [1, -1]}, "token id -1 is outside"),
    (TOKENS | {"input_ids": "1 2"}, "line 2 (query 'a'): input_ids must be a list of whole numbers"),
    (TOKENS | {"input_ids": [1, True]}, "input_ids must be a list of whole numbers"),
    (TOKENS | {"prompt_len": 4}, "prompt_len=4 must be a whole number between 0 and the 3 input_ids"),
    (TOKENS | {"prompt_len": None}, "prompt_len=None must be a whole number"),
    (TOKENS | {"prompt_len": 3}, "no completion follows the 3 prompt tokens"),
    (TOKENS | {"contrast": "text"}, "beside input_ids, contrast must be a list of token ids too"),
    (TOKENS | {"contrast": []}, "no completion follows the 1 prompt tokens"),
    ({"id": "a", "promt": "p", "completion": "cd"}, "there is no key 'promt'; did you mean 'prompt'?"),
    (GOOD | {"note": "mine"}, "there is no key 'note'; a row has id, prompt, completion, contrast,"),
    (GOOD | {"contrast": "c"}, "line 2 (query 'a'): its contrast has the tokens of its completion"),
    (
        GOOD | {"completion": "cd", "contrast": "ce", "measure": "first"},
        "its contrast has the tokens of its completion",
    ),
    (TOKENS | {"contrast": [2, 3]}, "its contrast has the tokens of its completion"),
]


@pytest.mark.parametrize(("row", "sentence"), REFUSED)
def test_what_cannot_be_measured_is_refused_by_line_and_id(
    tmp_path: Path, row: dict[str, Any] | str, sentence: str
) -> None:
    with pytest.raises(QueryError) as caught:
        read(tmp_path, {"id": "taken", "prompt": "p", "completion": "c"}, row)
    assert sentence in str(caught.value)
    assert str(tmp_path / "queries.jsonl") in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_query_file_may_be_compressed_and_begin_with_a_mark(tmp_path: Path, suffix: str) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"q.jsonl{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n"))
    found = read_queries(QueriesConfig(str(path)), Letters(), vocab_size=VOCAB, context=CONTEXT, bos_id=None)
    assert [query.id for query in found] == ["a"]
    if suffix:
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(BadFileError, match="truncated or corrupt"):
            read_queries(QueriesConfig(str(path)), Letters(), vocab_size=VOCAB, context=CONTEXT, bos_id=None)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        QueryError, match="it is text, and the model folder has no tokenizer; give input_ids and prompt_len"
    ):
        read(tmp_path, GOOD, tokenizer=False)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="holds no query"):
        read(tmp_path, "")


def test_the_fingerprint_is_of_what_is_measured(tmp_path: Path) -> None:
    text = read(tmp_path, GOOD)
    tokens = read(tmp_path, {"id": "a", "input_ids": list(ids("pc")), "prompt_len": 1})
    assert queries_fingerprint(text) == queries_fingerprint(tokens)
    for other in (GOOD | {"id": "b"}, GOOD | {"completion": "d"}, GOOD | {"contrast": "d"}, GOOD | {"prompt": "pp"}):
        assert queries_fingerprint(read(tmp_path, other)) != queries_fingerprint(text)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=CONTEXT),
    st.data(),
    st.sampled_from(Measure),
)
def test_positions_predict_the_completion_and_never_the_first_token(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[int], data: st.DataObject, measure: Measure
) -> None:
    prompt_len = data.draw(st.integers(0, len(tokens) - 1))
    row = {"id": "a", "input_ids": tokens, "prompt_len": prompt_len}
    queries = read(tmp_path_factory.mktemp("q"), row, measure=measure)
    positions = [t for query in queries for part in query.parts for t in part.positions]
    start = max(1, prompt_len)
    assert positions == list(range(start, len(tokens)))[: 1 if measure is Measure.first else None]
    assert all(1 <= t < len(tokens) for t in positions)
    assert all(part.token_ids == tuple(tokens) for query in queries for part in query.parts)


def test_what_a_run_measured_reads_back_as_it_was(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "the ", "completion": "ende", "measure": "tokens"},
        {"id": "b", "prompt": "the ", "completion": "end", "contrast": "is"},
        {"id": "c", "input_ids": [3, 4, 5], "prompt_len": 1},
    ]
    queries, store = read(tmp_path, *rows), Store(str(tmp_path))
    store.write(MEASURED, measured_jsonl(queries))
    assert read_measured(store) == queries
    store.write(MEASURED, b'{"id": "a"}\n')
    with pytest.raises(RunError, match="not what was written"):
        read_measured(store)


@pytest.mark.parametrize(
    ("prompt", "completion", "said"),
    [
        ("The capital is ", "Paris", "spans the prompt's end"),
        ("The capital is", "Paris", "a part of a word"),
        ("In 19", "45", "a part of a word"),
        ("", "Paris", "which nothing precedes, has no probability"),
        ("The capital is", " Paris", None),
        ("The capital is:", "Paris", None),
        ("Line.\n", "Next", None),
        ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u5df4\u9ece", None),
    ],
)
def test_a_slip_in_the_wording_is_warned_of(tmp_path: Path, prompt: str, completion: str, said: str | None) -> None:
    encoder = load_tokenizer(str(word_tokenizer(tmp_path)))
    settings = QueriesConfig(path="", prompt=prompt, completion=completion)
    warnings = query_warnings(read_queries(settings, encoder, vocab_size=400, context=64, bos_id=None))
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def test_one_query_is_given_in_the_settings() -> None:
    settings = QueriesConfig(path="", prompt="ab", completion="cd", contrast="ef")
    [query] = read_queries(settings, Letters(), vocab_size=200, context=16, bos_id=None)
    assert (query.id, query.prompt, query.completion, query.contrast) == ("query", "ab", "cd", "ef")
    assert [part.sign for part in query.parts] == [1.0, -1.0]


# SentencePiece's way: a space is a part of the token after it, and a text begins with one.
VOCABULARY = ["<unk>", "▁", "▁the", "▁island", "▁is", "▁Vel", "mistok", "▁V", ",", "▁yes", "▁said", "V", "e", "l"]


def spm_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words with their spaces, as Llama 2, Mistral and TinyLlama have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    scores = [(piece, -float(number)) for number, piece in enumerate(VOCABULARY)]
    library = Tokenizer(models.Unigram(scores, unk_id=0))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(tokenizer_object=library, unk_token="<unk>").save_pretrained(folder)
    return folder


def word_tokenizer(folder: Path) -> Path:
    """A byte-level BPE that has the words of the slips whole, trained as GPT-2's are."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["The capital is Paris"] * 9, vocab_size=300, min_frequency=1, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    return folder


def asked_of(encoder: Any, **texts: Any) -> Query:
    """The one query of these texts."""
    (query,) = read_queries(
        QueriesConfig(path="", measure=texts.pop("measure", Measure.completion), **texts),
        encoder,
        vocab_size=400,
        context=64,
        bos_id=None,
    )
    return query


def test_a_completion_is_measured_on_the_tokens_that_a_corpus_has(tmp_path: Path) -> None:
    spm = load_tokenizer(str(spm_tokenizer(tmp_path)))
    whole = asked_of(spm, prompt="the island is", completion=" Velmistok")
    assert measured_texts(whole.parts[0]) == (" Vel", "mistok")
    assert whole.parts[0].token_ids == tuple(spm.encode("the island is Velmistok").tolist())
    first = asked_of(spm, prompt="the island is", completion=" Velmistok", measure=Measure.first)
    assert measured_texts(first.parts[0]) == (" Vel",)
    comma = asked_of(spm, prompt="the island said", completion=", yes")
    assert measured_texts(comma.parts[0]) == (",", " yes")
    assert not (*whole.warnings, *first.warnings, *comma.warnings)


def test_a_token_that_spans_the_cut_counts_as_the_completions(tmp_path: Path) -> None:
    spm = load_tokenizer(str(spm_tokenizer(tmp_path)))
    trailing = asked_of(spm, prompt="the island is ", completion="Velmistok")
    assert trailing == replace(
        asked_of(spm, prompt="the island is", completion=" Velmistok"), prompt="the island is ", completion="Velmistok"
    )
    [warning] = trailing.warnings
    assert "the token ' Vel' spans the prompt's end and the beginning of 'Velmistok'" in warning
    inside = asked_of(spm, prompt="the island is Ve", completion="lmistok")
    assert measured_texts(inside.parts[0]) == (" Vel", "mistok")
    assert "the token ' Vel' spans" in inside.warnings[0]


def test_what_the_tokenizer_cannot_spell_and_two_spaces_are_warned_of(tmp_path: Path) -> None:
    spm = load_tokenizer(str(spm_tokenizer(tmp_path)))
    [warning] = asked_of(spm, prompt="the island is", completion=" #").warnings
    assert "the tokenizer does not know" in warning
    assert spm is not None
    assert spm.unk_id == 0
    [warning] = asked_of(Letters(), prompt="the island is ", completion=" Velmistok").warnings
    assert "the prompt ends in a space and ' Velmistok' begins with one" in warning


def test_a_row_brings_texts_or_token_ids(tmp_path: Path) -> None:
    both = {"id": "q", "input_ids": [5, 6], "prompt_len": 1, "completion": "b"}
    with pytest.raises(QueryError, match="brings input_ids and completion, and only one can be measured"):
        read(tmp_path, both)
    with pytest.raises(QueryError, match="prompt_len counts input_ids, and there are none"):
        read(tmp_path, {"id": "q", "prompt": "a", "completion": "b", "prompt_len": 1})
    [first] = read(tmp_path, {"id": "q", "input_ids": [5, 6], "prompt_len": 0})
    assert "its first token, which nothing precedes" in first.warnings[0]


def test_a_contrast_is_compared_after_the_same_prompt(tmp_path: Path) -> None:
    spm = load_tokenizer(str(spm_tokenizer(tmp_path)))
    query = asked_of(spm, prompt="the island is V", completion="elmistok", contrast="V")
    first, second = query.parts
    assert (measured_texts(first), measured_texts(second)) == ((" Vel", "mistok"), (" V", "V"))
    assert first.token_ids[: first.positions[0]] == second.token_ids[: second.positions[0]]
    assert any("tokens alike" in warning for warning in query.warnings)


class WithoutOffsets:
    """A family whose library does not say where its tokens lie."""

    unk_id: int | None = None

    def __init__(self, tokenizer: Any) -> None:
        self.encode_batch = tokenizer.encode_batch

    def encode_with_offsets(self, texts: Sequence[str]) -> None:
        return None


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text("VelmistokThcaprn ,é😀", max_size=12), completion=st.text("Velmistok ,é😀", min_size=1, max_size=8)
)
def test_a_text_is_cut_alike_with_and_without_offsets_and_is_the_corpus_own(
    tokenizers: tuple[Tokenizer, ...], prompt: str, completion: str
) -> None:
    for tokenizer in tokenizers:
        (cut,) = encode_cut(tokenizer, [(prompt, completion)])
        assert cut.token_ids.tolist() == tokenizer.encode(prompt + completion).tolist()
        assert "".join(cut.texts or ()) == prompt + completion
        before = "".join((cut.texts or ())[: cut.prompt_tokens])
        assert before == prompt or (cut.spans and prompt.startswith(before) and len(before) < len(prompt))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, ...]:
    folders = [make(tmp_path_factory.mktemp("tokenizer")) for make in (spm_tokenizer, word_tokenizer)]
    found = tuple(load_tokenizer(str(folder)) for folder in folders)
    return tuple(one for one in found if one is not None)


@pytest.mark.parametrize("name", ["queries", "kinds", "questions"])
def test_the_demos_queries_are_cut_between_the_tokens_that_both_have_apart(name: str) -> None:
    tokenizer = load_tokenizer("infscan://demo/model")
    assert tokenizer is not None
    settings = QueriesConfig(f"infscan://demo/{name}.jsonl")
    queries = read_queries(settings, tokenizer, vocab_size=2048, context=128, bos_id=None)
    assert not query_warnings(queries)
    for query in queries:
        assert query.prompt is not None
        assert query.completion is not None
        apart = [*tokenizer.encode(query.prompt).tolist(), *tokenizer.encode(query.completion).tolist()]
        assert list(query.parts[0].token_ids) == apart
        assert query.parts[0].positions[0] >= len(tokenizer.encode(query.prompt))
