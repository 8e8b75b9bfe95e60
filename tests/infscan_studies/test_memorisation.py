"""Word for word: a row holds a completion where its words stand in it in a run, whatever case and signs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.errors import RunError
from infscan.queries import Part, Query
from infscan.storage import Store
from infscan_studies.config import MemorisationConfig
from infscan_studies.memorisation import longest_run, study, words
from infscan_studies.report.figures import draw_memorisation, write_figure
from tests.infscan_studies.builders import top_rows, write_run

_WORDS = st.lists(st.sampled_from("abc"), max_size=8)


@given(a=_WORDS, b=_WORDS)
def test_the_longest_run_is_the_longest_slice_in_both(a: list[str], b: list[str]) -> None:
    slices = [
        [tuple(x[start:stop]) for start in range(len(x)) for stop in range(start + 1, len(x) + 1)] for x in (a, b)
    ]
    assert longest_run(a, b) == max((len(each) for each in set(slices[0]) & set(slices[1])), default=0)


def test_rows_are_judged_by_the_words_in_them(tmp_path: Path) -> None:
    quote = Query("quote", (Part((1, 2), (1,)),), "To be, or not", " to be: that is the question")
    ids = Query("ids", (Part((1, 2), (1,)),))
    texts = {
        0: "He said: TO BE OR NOT TO BE, THAT IS THE QUESTION; and left.",
        1: "to be that is the question",
        2: "the question that is to be",
    }
    top = [*top_rows("quote", "proponent", [1, 0, 2]), *top_rows("ids", "proponent", [2])]
    run = write_run(tmp_path / "run", top=top, texts=texts, queries=[quote, ids])
    table = study(run, MemorisationConfig(), 0)
    found = {
        row["sequence_id"]: (row["rank"], row["completion"], row["whole"], row["longest"]) for row in table.to_pylist()
    }
    assert found == {1: (1, True, False, 6), 0: (2, True, True, 10), 2: (3, False, False, 2)}
    assert set(table["query"].to_pylist()) == {"quote"}
    said = "\n".join(words(table))
    assert "The completion, word for word: in the strongest row of 1 of 1 queries" in said
    assert (
        "Prompt and completion, word for word: in the strongest row of 0 of 1 queries, in one of the 3 strongest of 1"
        in said
    )
    assert write_figure(Store(str(tmp_path)), "m", draw_memorisation, table) == ["m.png", "m.svg"]


def test_a_run_of_token_ids_has_no_words(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", queries=[Query("ids", (Part((1, 2), (1,)),))])
    with pytest.raises(RunError, match="has no text"):
        study(run, MemorisationConfig(), 0)
