"""Readers refuse what is not finished, not infscan's, or newer than they are."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infscan.errors import RunError
from infscan.results import read, schema
from infscan.results.manifest import SUCCESS
from infscan.results.schema import to_parquet
from infscan.storage import Store
from tests.results.builders import published

READERS = [read.read_top, read.read_sequences, read.read_layers, read.read_tokens, read.read_scores, read.read_summary]


@pytest.fixture
def run(tmp_path: Path) -> Store:
    store = Store(str(tmp_path))
    published(store)
    return store


@pytest.mark.parametrize("reader", READERS)
def test_a_run_without_its_marker_is_refused(run: Store, reader: object) -> None:
    run.remove(SUCCESS)
    with pytest.raises(RunError, match="has no _SUCCESS: the run is not finished"):
        reader(run.uri)  # type: ignore[operator]


def test_an_unfinished_run_can_be_read_on_demand(run: Store) -> None:
    run.remove(SUCCESS)
    assert read.read_top(run.uri, unfinished=True).num_rows == 6
    assert read.read_summary(run.uri, unfinished=True) == {"counts": {}}


def test_tables_that_are_not_there_are_named(run: Store) -> None:
    with pytest.raises(RunError, match=r"scores holds no Parquet; scores/ is there only with scan\.scores=all"):
        read.read_scores(run.uri)


def test_a_newer_schema_is_refused(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    published(run)
    monkeypatch.undo()
    with pytest.raises(
        RunError, match=r"top/part-00000-\w+\.parquet has schema version 2, newer than this infscan's 1; upgrade"
    ):
        read.read_top(run.uri)


def test_a_file_of_somebody_else_is_refused(run: Store) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), sink)
    run.write("top/part-00009.parquet", sink.getvalue())
    with pytest.raises(RunError, match="was not written by infscan"):
        read.read_top(run.uri)


def test_footers_hold_what_was_given_and_the_version() -> None:
    table = pq.read_table(pa.BufferReader(to_parquet(pa.table({"x": [1]}), {"fingerprint": "f"})))
    assert schema.footer_of(table.schema, "x") == {"schema_version": schema.SCHEMA_VERSION, "fingerprint": "f"}
