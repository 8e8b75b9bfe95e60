"""Near-duplicates in gradient space: copies are found, whatever the bits; cosines are those of the gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infscan import pipeline
from infscan.api import run_duplicates
from infscan.config.jobs import DuplicatesJob
from infscan.errors import ConfigError
from infscan.steps.ask import read_index
from infscan.steps.duplicates import _candidates, _cosines, _read
from tests.steps.runs import small_run, token_corpus, write_jsonl
from tests.steps.test_index import index_job, unasked

COPIES = {(3, 40), (3, 41), (7, 42), (40, 41)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexes at 1 and at 8 bits of forty documents and copies of two of them."""
    folder = tmp_path_factory.mktemp("duplicates")
    rows = [json.loads(line) for line in token_corpus(folder / "corpus.jsonl", 40).read_text().splitlines()]
    write_jsonl(folder / "corpus.jsonl", [*rows, *(rows[n] | {"id": f"copy {i}"} for i, n in enumerate((3, 3, 7)))])
    config = unasked(small_run(folder, f"factors.path={folder / 'factors'}"))
    for bits in (1, 8):
        pipeline.make_index(index_job(config, folder / f"index-{bits}", bits=bits))
    return folder


@pytest.mark.parametrize("bits", [1, 8])
def test_copies_are_found(folder: Path, bits: int) -> None:
    job = DuplicatesJob(str(folder / f"index-{bits}"), similar=0.98)
    found = run_duplicates(job).table.to_pylist()
    assert {(row["sequence_id"], row["other_id"]) for row in found} == COPIES
    assert all(row["cosine"] == pytest.approx(1, abs=1e-5) for row in found)
    assert Path(job.path).exists()


def test_pairs_are_found_with_the_cosine_of_their_gradients(folder: Path) -> None:
    """Every pair: signs estimate what bytes say; and of those that are alike nearly all are looked at."""
    one, eight = (_read(read_index(str(folder / f"index-{bits}"))) for bits in (1, 8))
    pairs = np.stack(np.triu_indices(43, 1), axis=1)
    wanted = _cosines(eight, pairs)
    assert np.corrcoef(_cosines(one, pairs), wanted)[0, 1] > 0.95
    looked_at = {tuple(pair) for pair in _candidates(one, 0).tolist()}
    alike = [tuple(pair) for pair, cosine in zip(pairs.tolist(), wanted, strict=True) if cosine > 0.9]
    assert len(alike) >= len(COPIES)
    assert np.mean([pair in looked_at for pair in alike]) > 0.9


@pytest.mark.parametrize("settings", [{"similar": 0.2}, {"similar": 1.5}])
def test_a_cosine_that_is_not_found_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="similar="):
        run_duplicates(DuplicatesJob("runs/index", **settings))
