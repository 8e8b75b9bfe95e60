"""What the filter keeps of a scan's top: shares that count rows, from the files that the two jobs leave."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infscan.errors import ConfigError, RunError
from infscan.results.manifest import SUCCESS
from infscan.results.schema import TOP, to_parquet
from infscan.storage import Store
from infscan_studies.comparison import AVERAGE
from infscan_studies.config import ValidateJob
from infscan_studies.coverage import coverage, validate
from infscan_studies.report.validation import show_coverage
from tests.steps.runs import compose


def top_rows(query: str, side: str, numbers: list[int]) -> list[dict[str, object]]:
    return [
        {"query_id": query, "side": side, "rank": rank, "sequence_id": number}
        for rank, number in enumerate(numbers, start=1)
    ]


TOP_ROWS = [
    *top_rows("a", "proponent", [5, 6, 7, 8]),
    *top_rows("a", "opponent", [1]),
    *top_rows("b", "proponent", [2]),
]
KEPT = [("a", 1, 7), ("a", 2, 5), ("a", 3, 9), ("b", 1, 5), ("b", 2, 2)]


def candidates() -> pa.Table:
    columns = [list(column) for column in zip(*KEPT, strict=True)]
    return pa.table(dict(zip(("query_id", "rank", "sequence_id"), columns, strict=True)))


def test_a_share_counts_the_rows_that_the_filter_ranks_well_enough() -> None:
    table = coverage(pa.Table.from_pylist(TOP_ROWS), candidates(), [2, 4], [1, 2, 3]).to_pylist()
    share = {(row["query"], row["side"], row["top"], row["k"]): row["share"] for row in table}
    # Query a's best two are 5 (the filter's second) and 6 (not kept); its best four have 7 (the first) too.
    assert [share["a", "proponent", 2, k] for k in (1, 2, 3)] == [0.0, 0.5, 0.5]
    assert [share["a", "proponent", 4, k] for k in (1, 2, 3)] == [0.25, 0.5, 0.5]
    assert [share["b", "proponent", 4, k] for k in (1, 2, 3)] == [0.0, 1.0, 1.0]
    assert [share[AVERAGE, "proponent", 4, k] for k in (1, 2, 3)] == [0.125, 0.75, 0.75]
    assert share["a", "opponent", 4, 3] == 0.0
    assert {row["rows"] for row in table if row["query"] == AVERAGE and row["top"] == 4} == {1, 5}


def test_beyond_what_the_filter_kept_no_share_is_known() -> None:
    """What ranks 4 to 10 would have added is not known: the share there is no 0.5, but null."""
    table = coverage(pa.Table.from_pylist(TOP_ROWS), candidates(), [2], [3, 10], known=3).to_pylist()
    share = {(row["query"], row["side"], row["k"]): row["share"] for row in table}
    assert (share["a", "proponent", 3], share["a", "proponent", 10]) == (0.5, None)
    assert (share[AVERAGE, "proponent", 3], share[AVERAGE, "proponent", 10]) == (0.75, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a scan and a filter leave, as far as the study reads it."""
    run = Store(str(tmp_path / "run"))
    table = pa.Table.from_pylist([{name: row.get(name) for name in TOP.names} for row in TOP_ROWS], TOP)
    run.write("top/part-00000.parquet", to_parquet(table, {}))
    run.write_json("summary.json", {"inputs": {"corpus": "c", "queries": "q"}})
    run.write(SUCCESS, b"")
    facts = {"corpus": "c", "queries": "q", "sequences": 100, "top_k": 3}
    Store(str(tmp_path / "filter")).write("candidates.parquet", to_parquet(candidates(), facts))
    return tmp_path


def composed(folder: Path, *overrides: str) -> ValidateJob:
    paths = [f"truth.run={folder / 'run'}", f"truth.filter={folder / 'filter'}", f"output={folder / 'out'}"]
    config = compose("validate", "truth=coverage", "truth.ks=[1,2,3]", *paths, *overrides)
    assert isinstance(config, ValidateJob)
    config.truth.check()
    return config


def test_the_job_reads_the_two_folders_and_writes_and_shows_a_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, table, facts = validate(composed(folder), print)
    assert pq.read_table(folder / "out/validate/coverage.parquet").to_pylist() == table.to_pylist()
    show_coverage(table, facts)
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "top 10 proponents 0.12 0.75 0.75" in shown
    assert "any sequence 0.01 0.02 0.03" in shown


def test_a_k_beyond_the_filters_is_shown_as_unknown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, table, facts = validate(composed(folder, "truth.ks=[3,10]"), print)
    show_coverage(table, facts)
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "top 10 proponents 0.75 ?" in shown
    assert "?: the filter kept 3 per query (tfidf.top_k), and ranks beyond are not known" in shown


def test_another_corpus_or_missing_folders_are_refused(folder: Path) -> None:
    run = Store(str(folder / "run"))
    run.write_json("summary.json", {"inputs": {"corpus": "another", "queries": "q"}})
    with pytest.raises(RunError, match="scanned other corpus than"):
        validate(composed(folder), print)
    run.remove(SUCCESS)
    with pytest.raises(RunError, match="has no _SUCCESS"):
        validate(composed(folder), print)
    with pytest.raises(ConfigError, match=r"truth\.run=None"):
        composed(folder, "truth.run=null")
