"""One corpus of everything that a stranger may put into one, through the whole job: each record is counted, once."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from infscan.config import Config
from infscan.errors import BadDocumentError
from infscan.report.terminal import show
from infscan.results.read import read_sequences, read_summary
from infscan.storage import Store
from tests.chaos.one_process import without_ray
from tests.corpus.test_hostile import BAD, GOOD, zstd_bomb
from tests.steps.runs import answer_here, compose, text_queries, tiny_model

NAMES = [
    "../../escape",
    "/etc/passwd",
    "a\0b",
    "C:\\x",
    "<script>alert(1)</script>",
    "\x1b]0;owned\x07",
    "\u202egnp.exe",
]
HTML = "<img src=x onerror=alert(1)> [bold]the river[/bold] \x1b[31mruns \x9b2J {{7*7}} ${output} '; DROP TABLE top; --"


def rows(*values: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


# name: content, and how many of its records are documents, bad, blank
FILES: dict[str, tuple[bytes, int, int, int]] = {}
FILES["names.jsonl"] = (rows(*({"id": name, "source": name, "text": "the river runs"} for name in NAMES)), 7, 0, 0)
FILES["html.jsonl"] = (rows(*({"id": f"h{n}", "text": f"{HTML} {n}"} for n in range(5))), 5, 0, 0)
FILES["dirty.jsonl"] = (
    b"".join(GOOD + line.replace(b"\n", b"") + b"\n" for line in BAD.values()), len(BAD), len(BAD), 0
)  # fmt: skip
FILES["odd.jsonl"] = (b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\n \t\r\n" + GOOD.rstrip(b"\n"), 2, 0, 2)
FILES["tokens.jsonl"] = (rows({"tokens": [1, 2, 3]}, {"tokens": [1, 10**6]}, {"tokens": [1, -1]}), 1, 2, 0)
FILES["empty.jsonl"] = (b"", 0, 0, 0)
FILES["bomb.jsonl.zst"] = (zstd_bomb(600), 0, 1, 0)
FILES["wrong.parquet"] = (parquet(pa.table({"text": pa.array([1.5, 2.5])})), 0, 2, 0)
FILES["not-utf-8.parquet"] = (parquet(pa.table({"text": pa.array([b"ok", b"\xff"]).view(pa.string())})), 1, 1, 0)
CUT = {
    "cut.jsonl.gz": gzip.compress(GOOD * 50)[:-12],
    "cut-too.jsonl.zst": zstandard.ZstdCompressor().compress(GOOD * 50)[:-4],
    "cut.parquet": parquet(pa.table({"text": pa.array(["the river"] * 50)}))[:-20],
    "none.parquet": b"<html>404 not found</html>",
}
DOCUMENTS, DOCUMENTS_BAD, BLANK = (sum(file[column] for file in FILES.values()) for column in (1, 2, 3))


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with without_ray():
        yield


def hostile_run(folder: Path, *overrides: str) -> Config:
    tiny_model(folder / "model", tokenizer=True)
    text_queries(folder / "queries.jsonl", 2)
    (folder / "corpus").mkdir()
    for name, content in {**{name: file[0] for name, file in FILES.items()}, **CUT}.items():
        (folder / "corpus" / name).write_bytes(content)
    return compose(
        "scan",
        f"model.path={folder / 'model'}",
        f"corpus.path={folder / 'corpus'}/*",
        "corpus.tokens_field=tokens",
        "corpus.packing=document",
        f"queries.path={folder / 'queries.jsonl'}",
        "scan.rank=4",
        "scan.top_k=50",
        "scan.shard_sequences=8",
        f"output={folder / 'run'}",
        *overrides,
    )


def test_a_hostile_corpus_adds_up_to_the_last_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allowed = (f"corpus.allow_bad_documents={DOCUMENTS_BAD}", f"corpus.allow_bad_files={len(CUT)}")
    config = hostile_run(tmp_path, *allowed)
    answer_here(config)
    counts = read_summary(config.output)["counts"]
    corpus = counts["corpus"]
    by_reason = Store(config.output).read_json("corpus/manifest.json")["left_out"]["by_reason"]
    assert by_reason.pop("file cannot be read") == len(CUT)
    assert corpus["documents_bad"] == sum(by_reason.values()) == DOCUMENTS_BAD
    assert corpus["documents_read"] == DOCUMENTS
    assert corpus["records_blank"] == BLANK
    assert corpus["records_read"] == DOCUMENTS + DOCUMENTS_BAD + BLANK
    assert (corpus["files_read"], corpus["files_bad"]) == (len(FILES), len(CUT))
    assert counts["planned"]["sequences"] == counts["scanned"]["sequences"] == corpus["sequences"] == DOCUMENTS
    assert counts["scanned"]["tokens"] == corpus["tokens"]
    assert counts["scanned"]["nonfinite"] == counts["quarantined"]["shards"] == 0

    # Names and texts are data: they stand in the tables as they were, and nowhere else.
    sequences = read_sequences(config.output).to_pylist()
    assert {row["document_id"] for row in sequences} >= set(NAMES)
    assert any(row["text"].startswith(HTML[:40]) for row in sequences)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "corpus", "queries.jsonl", "run"}
    for path in (tmp_path / "run").rglob("*"):
        assert path.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    capsys.readouterr()
    show(config.output, rows=50)
    said = capsys.readouterr().out
    assert said.replace("\n", "").isprintable()
    assert "<script>" in said


def test_it_is_refused_at_its_first_bad_record_where_none_is_allowed(tmp_path: Path) -> None:
    config = hostile_run(tmp_path)
    with pytest.raises(BadDocumentError, match=r"corpus/[\w-]+\.\w+"):
        answer_here(config)
    assert not Store(config.output).exists("plan.json")
