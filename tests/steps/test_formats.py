"""Whole runs over corpora in other tools' layouts: scanned where they lie, with the rows of the prepared documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infscan.corpus.addressable import open_corpus
from infscan.errors import RunError
from infscan.steps.prepare import prepare_corpus
from infscan.storage import Store
from tests.corpus import layouts
from tests.corpus.builders import write_rows
from tests.steps.runs import EOS, answer_here, open_here, small_run, write_jsonl

T = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 60 documents as JSONL (without EOS), Megatron, raw npy and MDS."""
    base = tmp_path_factory.mktemp("formats")
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 97, n).tolist() for n in rng.integers(1, 40, 60)]
    write_jsonl(base / "corpus.jsonl", ({"id": f"d{n}", "tokens": row} for n, row in enumerate(documents)))
    ended = [[*row, EOS] for row in documents]
    flat = [token for row in ended for token in row]
    layouts.megatron(Store(str(base / "megatron")), "a", ended)
    layouts.npy(Store(str(base / "npy")), "a.npy", flat)
    samples = [{"tokens": np.array(flat[at : at + T])} for at in range(0, len(flat), T)]
    layouts.mds(Store(str(base / "mds")), samples, {"tokens": "ndarray:int32"}, compress=True)
    return base


def scanned(folder: Path, corpus: str, *overrides: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The published rows without provenance: of top, and of sequences."""
    output = folder / f"run-{corpus}{'-prepared' if overrides else ''}"
    config = small_run(
        folder,
        f"corpus.path={folder / corpus}",
        "corpus.packing=concat",
        f"corpus.sequence_length={T}",
        # One set of factors for all: what is compared is what the corpora give.
        f"factors.corpus.path={folder / 'corpus.jsonl'}",
        "factors.corpus.in_place=true",
        f"factors.path={folder / 'factors'}",
        f"output={output}",
        *overrides,
    )
    answer_here(config)
    top = pq.read_table(output / "top").to_pylist()
    sequences = pq.read_table(output / "sequences").to_pylist()
    return (
        [tuple(row[key] for key in ("query_id", "side", "rank", "sequence_id", "score", "scan_score")) for row in top],
        [(row["sequence_id"], row["token_ids"], row["loss"], *spans(row)) for row in sequences],
    )


def spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    return [(document["start"], document["end"]) for document in row["documents"]]


@pytest.fixture(scope="module")
def prepared(folder: Path) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    return scanned(folder, "corpus.jsonl")


@pytest.mark.parametrize("layout", ["megatron", "npy", "mds"])
def test_a_scan_in_place_publishes_the_rows_of_the_prepared_documents(
    folder: Path, layout: str, prepared: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]
) -> None:
    assert scanned(folder, layout) == prepared
    assert [entry.name for entry in Store(str(folder / f"run-{layout}" / "corpus")).list()] == ["addressable.json"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".ipc"])
def test_the_same_documents_in_every_format_give_the_same_rows(
    folder: Path, suffix: str, prepared: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]
) -> None:
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    write_rows(folder / f"again{suffix}", rows)
    assert scanned(folder, f"again{suffix}") == prepared


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["megatron", "npy"])
def test_an_array_that_is_prepared_gives_the_rows_of_its_documents(
    folder: Path, layout: str, prepared: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]
) -> None:
    assert scanned(folder, layout, "corpus.in_place=false") == prepared


def test_an_array_that_changed_is_refused_when_the_run_goes_on(folder: Path) -> None:
    scanned(folder, "npy")
    path = folder / "npy" / "a.npy"
    whole = path.read_bytes()
    config = small_run(
        folder, f"corpus.path={folder / 'npy'}", "corpus.packing=concat", f"corpus.sequence_length={T}",
        f"output={folder / 'prepared'}",
    )  # fmt: skip
    with open_here(config, needs_queries=False) as run:
        first = prepare_corpus(run)
        assert open_corpus(first.store).fingerprint == first.fingerprint
        path.write_bytes(whole[:-2] + b"\x07\x00")
        with pytest.raises(RunError, match=r"a\.npy changed.*start a new output"):
            prepare_corpus(run)
    path.write_bytes(whole)
