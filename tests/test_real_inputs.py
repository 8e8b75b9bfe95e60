"""Files and habits of people who do this job, through the real command: the right rows, or one sentence."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from infscan.cli import main
from infscan.corpus.texts import given_texts
from infscan.errors import CorpusError
from infscan.results.read import read_answers, read_queries, read_sequences, read_summary, read_top
from infscan.storage import Store
from tests.corpus.builders import write_rows
from tests.steps.runs import tiny_model, write_jsonl
from tests.test_queries import spm_tokenizer

HERE = "cluster.backend=in_process"


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """A command's exit status, and what it said on either stream, on one line."""
    capsys.readouterr()
    code = 0
    try:
        main(None, list(words))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, " ".join(f"{said.out} {said.err}".split())


@pytest.fixture(scope="module")
def spm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "spm", vocab=16)
    spm_tokenizer(folder)
    return folder


def strongest(run: Path, query: str) -> dict[str, Any]:
    rows = [row for row in read_top(str(run)).to_pylist() if row["query_id"] == query and row["side"] == "proponent"]
    return rows[0]


def test_prompt_and_completion_are_measured_as_a_corpus_has_them(
    tmp_path: Path, spm_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fact = "the island is Velmistok"
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"id": "d0", "text": fact}, {"id": "d1", "text": "the said, yes"}])
    rows = [
        {"id": "first", "prompt": "the island is", "completion": " Velmistok", "measure": "first"},
        {"id": "trailing", "prompt": "the island is ", "completion": "Velmistok"},
        {"id": "rather", "prompt": "the island is", "completion": " Velmistok", "contrast": " yes"},
    ]
    queries = write_jsonl(tmp_path / "queries.jsonl", rows)
    run = tmp_path / "run"
    words = [
        "scan", f"model.path={spm_model}", f"corpus.path={corpus}", f"queries.path={queries}",
        "corpus.packing=document", "factors.slices=1", HERE, f"output={run}",
    ]  # fmt: skip
    code, said = command(capsys, *words)
    assert code == 0
    assert {strongest(run, query)["document_id"] for query in ("first", "trailing", "rather")} == {"d0"}
    best = strongest(run, "first")
    (asked,) = [row for row in read_queries(str(run)).to_pylist() if row["query_id"] == "first"]
    assert (best["states_completion"], best["states_at"], best["hub"], best["size_rank"]) == (True, 4, 1, 1)
    assert best["score_per_nat"] == pytest.approx(-best["score"] / asked["log_probability"], rel=1e-5)
    # Two sequences are too few to stand out of.
    assert (best["z"], best["stands_out"]) == (None, None)
    assert read_answers(str(run))["found"].to_pylist() == [None] * 3
    assert "measured: ‘ Vel’ the model gives it" in said
    assert "measured: ‘ Vel’‘mistok’ rather than ‘ yes’" in said
    assert "the token ' Vel' spans the prompt's end" in " ".join(read_summary(str(run))["warnings"])
    assert len(read_sequences(str(run))) == 2
    command(capsys, "report", f"run={run}")
    assert "spans the prompt" in (run / "report.html").read_text()
    # A terminal that is not UTF-8 shows what it can; the run is finished, and stays so.
    poor = os.environ | {"PYTHONIOENCODING": "ascii"}
    again = subprocess.run([sys.executable, "-m", "infscan", *words], env=poor, capture_output=True)
    assert (again.returncode, b"measured: ? Vel?" in again.stdout) == (0, True)


def prepare(capsys: pytest.CaptureFixture[str], output: Path, *words: str) -> tuple[int, str]:
    return command(capsys, "prepare", "model=demo", "corpus.packing=document", HERE, f"output={output}", *words)


def made_of(output: Path) -> list[tuple[str, str]]:
    parts = sorted((output / "corpus").glob("part-*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part, columns=["documents"]).to_pylist()]
    return [(each["id"], each["source"]) for row in rows for each in row["documents"]]


def test_slim_pajamas_layout_gives_every_document_an_id_and_a_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        rows = [{"text": f"story {n} of chunk {number}", "meta": {"set": f"S{number}"}} for n in range(2)]
        write_rows(tmp_path / "train" / f"chunk{number}" / "example_train_0.jsonl.zst", rows)
    (tmp_path / "train" / "SHA256SUMS.txt").write_text("0f1e chunk1\n")
    code, said = prepare(capsys, tmp_path / "out", f"corpus.path={tmp_path / 'train'}", "corpus.source_field=meta.set")
    assert code == 0
    assert "1 files lie beside the data and are left aside (SHA256SUMS.txt)" in said
    name = "example_train_0.jsonl.zst"
    expected = [(f"chunk{chunk}/{name}#{line}", f"S{chunk}") for chunk in (1, 2) for line in (1, 2)]
    assert made_of(tmp_path / "out") == expected
    manifest = Store(str(tmp_path / "out" / "corpus")).read_json("manifest.json")
    assert manifest["counts"]["files_aside"] == 1


def test_a_slip_in_a_fields_name_ends_before_anything_is_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"hexsha": "h", "content": "print(0)"}])
    code, said = prepare(
        capsys, tmp_path / "out", f"corpus.path={corpus}", "corpus.text_field=content", "corpus.id_field=hexhsa"
    )
    assert code == 2
    assert "corpus.id_field=hexhsa is in no row of" in said
    assert "did you mean hexsha?" in said
    assert not list((tmp_path / "out").rglob("*.parquet"))
    code, said = prepare(capsys, tmp_path / "several", f"+corpus.paths.a={corpus}", "corpus.text_field=content",
                         "corpus.id_field=hexhsa")  # fmt: skip
    assert (code, "is in no row of" in said) == (2, True)


def test_an_id_column_that_can_be_none_is_left_aside_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "mongo.jsonl", [{"id": {"$oid": f"65f{n}"}, "text": "one two"} for n in range(3)])
    code, said = prepare(capsys, tmp_path / "out", f"corpus.path={corpus}")
    assert code == 0
    assert said.count("3 ids or sources are missing where they were named, or neither texts nor whole") == 1
    assert [name for name, _ in made_of(tmp_path / "out")] == [f"mongo.jsonl#{line}" for line in (1, 2, 3)]


def test_a_sweep_keeps_its_record_with_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "one two three"}])
    monkeypatch.chdir("/proc")
    code, _ = prepare(capsys, tmp_path / "out", f"corpus.path={corpus}", "-m", "corpus.sequence_length=8,16")
    assert code == 0
    assert len(list((tmp_path / "out").glob("corpus.sequence_length=*"))) == 2
    assert list((tmp_path / "out" / ".multirun").rglob("multirun.yaml"))
    code, said = prepare(capsys, Path("s3:/bucket/x"), f"corpus.path={corpus}", "-m", "corpus.sequence_length=8,16",
                         "output=s3://bucket/x")  # fmt: skip
    assert code == 2
    assert "/proc" in said


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_is_too_long_for_ray_is_named(tmp_path: Path, variable: str) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    words = ["prepare", "model=demo", "corpus=demo", f"output={tmp_path / 'out'}"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {variable: str(folder)}
    found = subprocess.run([sys.executable, "-m", "infscan", *words], env=environment, capture_output=True, text=True)
    assert found.returncode == 2
    said = " ".join(found.stderr.split())
    assert "export RAY_TMPDIR=~/r" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("line", "said"), [('{"id": "a", "text": "half \\ud83d"}', "half a surrogate pair"), ("[" * 99_999, "too deeply")]
)
def test_texts_to_explain_are_read_as_a_corpus_is(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "texts.jsonl.gz"
    path.write_bytes(gzip.compress(f'{{"id": "b", "input_ids": [1, 2]}}\n{line}\n'.encode()))
    with pytest.raises(CorpusError, match=rf"texts\.jsonl\.gz, line 2: .*{said}"):
        given_texts(None, str(path), None, vocab_size=9, context=9, bos_id=None)


def test_texts_to_explain_have_their_keys_spelt_and_one_of_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "slip.jsonl", [{"id": "a", "input_ids": [1, 2], "qeries": ["q"]}])
    with pytest.raises(CorpusError, match=r"line 1: there is no key 'qeries'; did you mean 'queries'\?"):
        given_texts(None, str(path), None, vocab_size=9, context=9, bos_id=None)
    path = write_jsonl(tmp_path / "both.jsonl", [{"id": "a", "input_ids": [1, 2], "text": "one"}])
    with pytest.raises(CorpusError, match="brings text and input_ids, and only one can be scored"):
        given_texts(None, str(path), None, vocab_size=9, context=9, bos_id=None)
    path = write_jsonl(tmp_path / "own.jsonl", [{"id": "a", "input_ids": [1, 2], "comment": "a person's own"}])
    assert list(given_texts(None, str(path), None, vocab_size=9, context=9, bos_id=None)) == ["a"]


# What is said at once, and what a run that failed leaves behind.

_AT_ONCE = """
import sys
from infscan.cli import main
try:
    main(None, sys.argv[1:])
except SystemExit as end:
    print(f"status {end.code}; heavy: {[name for name in ('torch', 'ray', 'transformers') if name in sys.modules]}")
"""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("queries.path={folder}/promt.jsonl", "there is no key 'promt'; did you mean 'prompt'?"),
        ("queries.path={folder}/queries.csv", ".csv is not read here; write one JSON object per line"),
        ("corpus.path={folder}/gone", "gone: there is no such file or folder"),
        ("corpus.path={folder}/empty", "empty: no file is in this folder"),
        ("corpus.path={folder}/*.parquet", "no file matches"),
        ("model.path={folder}/gone", "model.path={folder}/gone: there is no such folder"),
    ],
)
def test_a_slip_in_a_file_is_answered_before_anything_heavy_and_leaves_no_folder(
    tmp_path: Path, word: str, said: str
) -> None:
    write_jsonl(tmp_path / "promt.jsonl", [{"id": "q", "promt": "a", "completion": "b"}])
    (tmp_path / "queries.csv").write_text("id,prompt,completion\n")
    (tmp_path / "empty").mkdir()
    given = {"model": "model=demo", "corpus": "corpus=demo", "queries": "queries=demo"}
    given[word.partition(".")[0]] = word.format(folder=tmp_path)
    words = ["scan", *given.values(), HERE, f"output={tmp_path / 'new' / 'run'}"]
    found = subprocess.run([sys.executable, "-c", _AT_ONCE, *words], capture_output=True, text=True)
    assert "status 2; heavy: []" in found.stdout
    assert said.format(folder=tmp_path) in " ".join(found.stderr.split())
    assert not (tmp_path / "new").exists()


def test_a_first_run_that_fails_later_leaves_no_empty_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"content": "one"}])
    (tmp_path / "there").mkdir()
    for name in ("new/run", "there"):
        code, said = prepare(capsys, tmp_path / name, f"corpus.path={corpus}")
        assert (code, "has no field 'text'" in said) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "there"]
