"""Every value of every JSON file of a run, replaced by something else, under a checksum that fits: whoever reads it
says a sentence, or reads it."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infscan.config import with_checksum, without_checksum
from infscan.corpus.addressable import open_corpus
from infscan.errors import InfscanError
from infscan.report.assemble import Archive
from infscan.report.contents import run_contents
from infscan.results.read import read_summary, read_top
from infscan.results.status import read_status
from infscan.results.verify import verify
from infscan.steps import factor_files
from infscan.steps.finished import finished_config
from infscan.storage import Store
from tests.chaos.matrix import configured, inputs
from tests.steps.runs import answer_here

ODD = [
    None, -1, 0, 10**18, 10**30, 1.5, float("nan"), "", "x", "/etc/passwd", "\x00", [], [None], {}, {"a": 1}, True,
    "\udc80",
]  # fmt: skip
SEED = int(os.environ.get("INFSCAN_CHAOS_SEED") or datetime.now(UTC).date().toordinal())
CASES = 25  # of each file
_REMOVED = object()
Place = tuple[str | int, ...]


@pytest.fixture(scope="module", params=["documents", "arrays"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    inputs(root, request.param, seed=0)
    answer_here(configured(root, request.param))
    return root / "run"


def readers(run: Path) -> dict[str, list[Callable[[], object]]]:
    """Whoever reads each file."""

    def corpus() -> None:
        opened = open_corpus(Store(f"{run}/corpus"), foreign=True)
        opened.read(np.arange(min(4, opened.sequences)))
        list(opened.token_blocks(0, min(4, opened.sequences)))
        assert opened.counts

    def report() -> object:
        return run_contents(str(run), "x", Archive(1 << 24), 5, None, None)

    def status() -> object:
        return read_status(str(run))

    def factors() -> object:
        return factor_files.read_plan(Store(f"{run}/factors"))

    published = [lambda: read_top(str(run)), lambda: verify(str(run)), lambda: finished_config(str(run))]
    return {
        "corpus/manifest.json": [corpus],
        "corpus/addressable.json": [corpus],
        "_SUCCESS": published,
        "summary.json": [lambda: read_summary(str(run)), report, status],
        "plan.json": [status],
        "factors/plan.json": [factors],
        "queries/queries.jsonl": [report],
    }


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Of a value and what is in it; of a list its first two."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*at, key))


def replaced(value: Any, at: Place, odd: Any) -> Any:
    if not at:
        return odd
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if odd is _REMOVED:
        del inner[at[-1]]
    else:
        inner[at[-1]] = odd
    return value


def test_no_value_of_a_runs_files_ends_in_a_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFSCAN_ALLOWED_ADDRESSES", "/")
    troubles, tried = [], 0
    for name, reading in readers(run).items():
        path = run / name
        if not path.exists():
            continue
        whole = path.read_bytes()
        value = json.loads(whole.splitlines()[0] if name.endswith("l") else whole)
        sealed = "seal" in value
        body = without_checksum(value) if sealed else value
        cases = [(at, odd) for at in places(body) for odd in [*ODD, *([_REMOVED] if at else [])]]
        for at, odd in random.Random(SEED).sample(cases, min(CASES, len(cases))):
            changed = replaced(body, at, odd)
            if sealed and isinstance(changed, dict):
                changed = with_checksum(changed)
            path.write_bytes(json.dumps(changed).encode())
            tried += 1
            for read in reading:
                try:
                    read()
                except InfscanError:
                    pass
                except Exception as error:
                    troubles.append(f"{name} {at}={odd!r}: {type(error).__name__}: {error}")
        path.write_bytes(whole)
    assert not troubles, "\n".join([f"{len(troubles)} of {tried}:", *troubles])
    assert tried > 4 * CASES
