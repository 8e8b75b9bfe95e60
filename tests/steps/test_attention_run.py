"""corpus.attention through the whole job, in this process: what reaches the workers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infscan.config import Attention
from infscan.corpus.addressable import open_corpus
from infscan.corpus.reading import Reading
from infscan.errors import CorpusError, FactorsError, RunError
from infscan.pipeline import answer
from infscan.results.read import read_scores
from infscan.storage import Store
from tests.chaos.one_process import without_ray
from tests.corpus import layouts
from tests.steps.runs import small_run, write_jsonl

T = 16
PACKED = ("corpus.packing=concat", f"corpus.sequence_length={T}")
WITHIN = (*PACKED, "corpus.attention=within")
DOT = ("factors.solver=identity", "scan.compression=plain", "scan.rank=null", "scan.scores=all")


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    with without_ray():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("attention")
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 97, length).tolist() for length in rng.integers(1, 12, 30)]
    write_jsonl(base / "corpus.jsonl", ({"id": f"d{n}", "tokens": row} for n, row in enumerate(documents)))
    return base


def scores(output: Path) -> np.ndarray:
    table = read_scores(str(output))
    return np.stack([table[f"score_q{query}"].to_numpy() for query in range(3)], axis=1).astype(np.float64)


def test_a_packed_sequences_scores_are_the_sums_of_its_documents(folder: Path) -> None:
    """Each alone with the token after it to predict; the published scores, refined, say the same as the scan's."""
    answer(small_run(folder, *WITHIN, *DOT, f"output={folder / 'within'}"))
    corpus = open_corpus(Store(str(folder / "within" / "corpus")), Reading(Attention.within))
    alone, rows = [], []
    for row, sequence in enumerate(corpus.read(np.arange(corpus.sequences))):
        assert sequence.starts is not None
        for start, end in zip(sequence.starts, [*sequence.starts[1:], len(sequence)], strict=True):
            rows.append(row)
            alone.append({"id": f"s{len(alone)}", "tokens": sequence.token_ids[start : end + 1].tolist()})
    assert len(alone) > corpus.sequences
    write_jsonl(folder / "alone.jsonl", alone)
    answer(small_run(folder, *DOT, f"corpus.path={folder / 'alone.jsonl'}", f"output={folder / 'alone'}"))
    expected = np.zeros((corpus.sequences, 3))
    np.add.at(expected, np.array(rows), scores(folder / "alone"))
    found = scores(folder / "within")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for row in pq.read_table(folder / "within" / "top").to_pylist():
        assert row["score"] == pytest.approx(row["scan_score"], rel=1e-4, abs=1e-5 * np.abs(expected).max())
    answer(small_run(folder, *PACKED, *DOT, f"output={folder / 'across'}"))
    assert np.abs(scores(folder / "across") - expected).max() > 0.01 * np.abs(expected).max()


def test_factors_and_runs_are_of_one_attention(folder: Path) -> None:
    """Fitted and checked within documents; neither the run nor its factors serve the other kind."""
    output, factors = f"output={folder / 'fitted'}", f"factors.path={folder / 'factors'}"
    answer(small_run(folder, *WITHIN, output, factors))
    assert json.loads((folder / "fitted" / "plan.json").read_text())["attention"] == "within"
    assert json.loads((folder / "factors" / "plan.json").read_text())["fields"]["attention"] == "within"
    with pytest.raises(RunError, match=r"corpus\.attention: 'within' -> 'across'"):
        answer(small_run(folder, *PACKED, output, factors))
    with pytest.raises(FactorsError, match=r"attention: 'within' -> 'across'"):
        answer(small_run(folder, *PACKED, factors, f"output={folder / 'other'}"))
    # Fitted within, and scanned across, where that is what is asked for.
    own = ("factors.corpus.attention=within", f"output={folder / 'mixed'}")
    answer(small_run(folder, *PACKED, f"factors.path={folder / 'mixed' / 'factors'}", *own))
    plans = [json.loads((folder / name / "plan.json").read_text()) for name in ("mixed", "mixed/factors")]
    assert (plans[0]["attention"], plans[1]["fields"]["attention"]) == ("across", "within")


def test_arrays_in_which_nothing_ends_a_document_are_refused_before_a_model_is_loaded(folder: Path) -> None:
    layouts.npy(Store(str(folder / "array")), "a.npy", np.random.default_rng(1).integers(1, 97, 200))
    array = f"corpus.path={folder / 'array'}"
    for name, in_place in (("lies", "true"), ("prepared", "false")):
        output = f"output={folder / name}"
        with pytest.raises(CorpusError, match=r"nothing says where they begin: none of 200 .*Give corpus\.eos_id="):
            answer(small_run(folder, *WITHIN, array, output, f"corpus.in_place={in_place}"))
        assert not (folder / name / "plan.json").exists()
