"""Finished runs over documents that mean harm to a page, for the tests of report.html."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from infscan.config import Config
from infscan.pipeline import answer
from tests.chaos.one_process import without_ray
from tests.steps.runs import small_run, text_corpus, tiny_model, write_jsonl

CONTEXT = 128
HOSTILE = {
    "script": "</script><script>window.harmed = 1</script>",
    "comment": "<!-- <script> --> ]]> </textarea></style><img src=x onerror='window.harmed = 2'>",
    "attribute": '" onmouseover="window.harmed = 3" x=\'',
    "template": "{{script}} {{index}} ${window.harmed = 4} `",
    "bidi": "abc \u202egnp.exe\u202c \u2066isolated\u2069 \u200bzero width",
    "controls": "a\x01b\x07c\x7f\u2028d\u2029e\ttab\r\nline",
    "arabic": "النهر يجري في الخليج والبلشون يقف في الماء",
    "hebrew": "הנהר זורם אל המפרץ",
    "chinese": "河流入海，苍鹭立于浅水之中。",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 é é e\u0301",
    "long": "w" * 40,
    "copy one": "the very same words stand here twice over and over again",
    "copy two": "the very same words stand here twice over and over again",
}


def write_hostile(folder: Path, texts: Iterable[tuple[str, str]] = HOSTILE.items()) -> Path:
    """A corpus of these texts among harmless ones; their ids and sources are hostile too."""
    rows = [{"id": f"<b>{name}</b>", "source": '"><script>', "text": text} for name, text in texts]
    plain = text_corpus(folder / "plain.jsonl", 20)
    path = write_jsonl(folder / "corpus.jsonl", rows)
    path.write_text(path.read_text() + plain.read_text())
    return path


def finish(folder: Path, *overrides: str) -> Config:
    """A run with two queries, of which every document is published, in this process."""
    model = folder / "model"
    if not model.exists():
        tiny_model(model, tokenizer=True, context=CONTEXT)
    queries = write_jsonl(
        folder / "queries.jsonl",
        [
            {"id": "one", "prompt": "The river </script> runs", "completion": " into <b>Xarrel</b> Bay"},
            {"id": "two", "prompt": "The wine", "completion": " of Tharble"},
        ],
    )
    config = small_run(
        folder,
        f"corpus.path={folder / 'corpus.jsonl'}",
        "corpus.tokens_field=null",
        f"corpus.sequence_length={CONTEXT}",
        f"queries.path={queries}",
        "scan.scores=all",
        "scan.top_k=50",
        *overrides,
    )
    with without_ray():
        answer(config)
    return config
