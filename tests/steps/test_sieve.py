"""Laws of a search: a sieve that leaves everything is a full scan; candidates have a full scan's scores; what is
scanned adds up; it goes on after a death; the audit says what was missed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infscan.config import Config
from infscan.corpus.addressable import open_corpus
from infscan.corpus.filtered import describe_filtered
from infscan.corpus.plan import Plan
from infscan.errors import ConfigError, RunError
from infscan.influence.certificate import Evidence
from infscan.influence.topk_tracker import ScoredRows
from infscan.report.assemble import Archive
from infscan.report.contents import run_contents
from infscan.report.terminal import show
from infscan.results.manifest import TABLES
from infscan.results.read import read_scores, read_summary, read_top
from infscan.results.schema import read_parquet
from infscan.results.shard_file import finished_shards, read_hits
from infscan.steps import scan as scanning
from infscan.steps import suffix_choice
from infscan.steps.candidates import listed
from infscan.steps.certificate import traces
from infscan.steps.factors import fit
from infscan.steps.plan import make_plan
from infscan.steps.prepare import prepare_corpora
from infscan.steps.queries import query_batch
from infscan.storage import Store
from tests.steps.runs import answer_here, open_here, small_run, tiny_model, token_corpus

N = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "model", layers=4)
    token_corpus(folder / "corpus.jsonl", N)
    return folder


def settings(inputs: Path, name: str, *overrides: str) -> Config:
    factors = f"factors.path={inputs / 'factors'}"
    return small_run(
        inputs, factors, "scan.check_sequences=0", "scan.shard_sequences=30", *overrides, f"output={inputs / name}"
    )


@pytest.fixture(scope="module")
def full(inputs: Path) -> Config:
    config = settings(inputs, "full", "scan.scores=all")
    answer_here(config)
    return config


@pytest.fixture(scope="module")
def sieved(inputs: Path) -> Config:
    config = settings(inputs, "sieved", "scan.sieve=2", "scan.sieve_candidates=20", "scan.audit_sequences=30")
    answer_here(config)
    return config


def scored_in_full(config: Config) -> pa.Table:
    store = Store(config.output) / "sieve"
    return pa.concat_tables([read_parquet(store, name) for name in sorted(store.names("scores"))])


def rows(config: Config) -> dict[tuple[str, str, int], float]:
    return {
        (row["query_id"], row["side"], row["sequence_id"]): row["score"] for row in read_top(config.output).to_pylist()
    }


def test_what_a_sieve_leaves_has_the_full_scans_scores(full: Config, sieved: Config) -> None:
    everything = read_scores(full.output)
    some = scored_in_full(sieved)
    assert 30 <= len(some) < N
    chosen = np.isin(everything["sequence_id"].to_numpy(), some["sequence_id"].to_numpy())
    order = np.argsort(some["sequence_id"].to_numpy())
    for column in ("score_q0", "score_q1", "score_q2"):
        want = everything[column].to_numpy()[chosen]
        assert some[column].to_numpy()[order] == pytest.approx(want, rel=1e-5, abs=1e-5 * float(np.abs(want).max()))


def test_published_rows_are_the_full_scans_best_among_them(full: Config, sieved: Config) -> None:
    mine, all_rows = rows(sieved), rows(full)
    shared = mine.keys() & all_rows.keys()
    assert len(shared) >= 0.6 * len(all_rows)
    for row in shared:
        assert mine[row] == pytest.approx(all_rows[row], rel=1e-4)


def test_counts_add_up(sieved: Config) -> None:
    counts = read_summary(sieved.output)["counts"]
    assert counts["planned"]["sequences"] == counts["sieve"]["sequences"] == N
    assert counts["candidates"]["audited"] == 30
    assert counts["scanned"]["sequences"] < counts["candidates"]["sequences"] + 31
    assert counts["quarantined"] == {"shards": 0, "sequences": 0}
    assert {"sieve", "scan", "refine"} <= read_summary(sieved.output)["phases"].keys()


def test_the_certificate_is_in_the_summary_and_in_run_parquet(full: Config, sieved: Config) -> None:
    found = read_summary(sieved.output)["certificate"]
    assert found["audited"] == 30
    assert found["queries"].keys() == {"q0", "q1", "q2"}
    assert found["queries"]["q0"].keys() == {"proponent", "opponent"}
    assert found["sentence"].startswith(("At least", "How many of the strongest sequences were missed is not known"))
    assert found["together"]["top"] == 2 * 3 * 5
    # Of each query's and side's five, found by its own twenty candidates or by another's.
    published = [mine["published"] for sides in found["queries"].values() for mine in sides.values()]
    assert all(0 <= trace["last_tenth"] <= 2 and 0 <= trace["elsewhere"] <= 5 for trace in published)
    mine = settings_row(sieved)
    assert mine["certificate"] == found["sentence"]
    assert settings_row(full)["certificate"] is None
    assert "certificate" not in read_summary(full.output)


def test_screen_and_page_say_it_too(sieved: Config, capsys: pytest.CaptureFixture[str]) -> None:
    said = read_summary(sieved.output)["certificate"]["sentence"]
    show(sieved.output)
    shown = capsys.readouterr().out
    assert said in shown
    assert f"in full, 30 of them as an audit, of {N}." in shown
    page = run_contents(sieved.output, "sieved", Archive(1 << 20), 10, None, None)
    assert said in page["agreement"]


def test_an_audit_says_how_far_a_row_stands_out(inputs: Path, full: Config, sieved: Config) -> None:
    everything = settings(inputs, "audited", "scan.sieve=1", "scan.sieve_candidates=20", f"scan.audit_sequences={N}")
    answer_here(everything)
    known, mine, all_audited = (
        pq.read_table(Path(config.output) / "answers").to_pylist() for config in (full, sieved, everything)
    )
    for row, some, every in zip(known, mine, all_audited, strict=True):
        assert (some["sequences"], every["sequences"]) == (30, N)
        # Fewer than 32 are too few; all are what a full scan has.
        assert some["z"] is None
        for column in ("z", "median", "scale", "positive", "negative", "share"):
            assert every[column] == pytest.approx(row[column], rel=1e-4)


def test_published_rows_leave_traces_of_what_a_sieve_misses() -> None:
    ids = np.arange(20, dtype=np.int64)
    best = ScoredRows(np.zeros(20, np.int32), np.zeros(20, np.int8), ids, (20.0 - ids).astype(np.float32))
    # Exact scores put the sieve's first and last, and one that it did not leave, before all others.
    scores = np.where(np.isin(ids, (0, 19)), 50.0, 1.0)
    evidence = Evidence(np.append(scores, 99.0), np.append(ids, 77), np.zeros(0), np.zeros(0, np.bool_))
    assert traces(best, 0, "proponent", evidence, 3) == {"last_tenth": 1, "elsewhere": 1}
    assert traces(best, 1, "proponent", evidence, 3) == {"last_tenth": 0, "elsewhere": 3}


def settings_row(config: Config) -> dict:
    return pq.read_table(Path(config.output) / "run.parquet").to_pylist()[0]


def test_an_audit_of_everything_states_what_is_true(inputs: Path, full: Config) -> None:
    config = settings(inputs, "audited", "scan.sieve=1", "scan.sieve_candidates=20", f"scan.audit_sequences={N}")
    answer_here(config)
    found = read_summary(config.output)["certificate"]
    # Everything was scanned, so that nothing is missing from the table, whatever the sieve missed.
    assert rows(config).keys() == rows(full).keys()
    assert found["together"]["at_least"] is None or found["together"]["at_least"] <= found["together"]["top"]
    truth = sieve_recall(config, full)
    for name, sides in found["queries"].items():
        for side, mine in sides.items():
            assert mine["without_assumption"] <= truth[name, side] + 1e-9


def sieve_recall(config: Config, full: Config) -> dict[tuple[str, str], float]:
    """Of the full scan's five best by scan score, the share that the sieve's candidates have."""
    store = Store(config.output) / "sieve"
    hits = [read_hits(store, name, ["q0", "q1", "q2"])[0] for name in finished_shards(store)]
    scores = read_scores(full.output)
    ids = scores["sequence_id"].to_numpy()
    # The union over queries and sides of the twenty best by sieve score is what was found.
    found: set[int] = set()
    for query in range(3):
        for side in range(2):
            mine = [
                (-abs(score), number) for part in hits for q, s, number, score in part.rows() if (q, s) == (query, side)
            ]
            found |= {number for _, number in sorted(mine)[:20]}
    recall = {}
    for query in ("q0", "q1", "q2"):
        column = scores[f"score_{query}"].to_numpy()
        for side, turned in (("proponent", column), ("opponent", -column)):
            best = ids[np.argsort(-turned)[:5]]
            recall[query, side] = float(np.mean([int(number) in found for number in best]))
    return recall


def test_a_sieve_that_leaves_everything_publishes_the_same_tables(inputs: Path, full: Config) -> None:
    config = settings(inputs, "everything", "scan.sieve=3", f"scan.sieve_candidates={N}", "scan.audit_sequences=0")
    answer_here(config)
    assert rows(config).keys() == rows(full).keys()
    assert read_summary(config.output)["certificate"] is None


def test_a_search_that_died_goes_on(inputs: Path, sieved: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(inputs, "resumed", "scan.sieve=2", "scan.sieve_candidates=20", "scan.audit_sequences=30")
    done: list[str] = []
    task = scanning.scan_task

    def dies(worker, given, batch):  # type: ignore[no-untyped-def]
        done.append(f"{given.run.uri.rpartition('/')[2]}/{given.shard}")
        if len(done) in (3, 7, 9):
            raise KeyboardInterrupt
        return task(worker, given, batch)

    monkeypatch.setattr(scanning, "scan_task", dies)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            answer_here(config)
    answer_here(config)
    # Each unit once, but for those that died.
    assert len(done) == len(set(done)) + 3
    for table in TABLES:
        names = [sorted(path.name for path in (inputs / run / table).iterdir()) for run in ("resumed", "sieved")]
        assert names[0] == names[1]


def test_other_candidates_are_scanned_anew(inputs: Path, sieved: Config) -> None:
    record = Path(sieved.output) / "sieve" / "candidates.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"digest": "of others"}))
    before = rows(sieved)
    answer_here(sieved)
    assert rows(sieved) == before


def test_candidates_may_come_from_a_list_another_run_or_a_filter(inputs: Path, full: Config) -> None:
    (inputs / "ids.txt").write_text(f"3\n17\n4\n17\n{N}\n")
    corpus = open_corpus(Store(full.output) / "corpus")
    describe_filtered(Store(str(inputs / "filtered")), corpus, np.array([5, 9]))
    plan = Plan.from_json(Store(full.output).read_json("plan.json"))
    assert listed(str(inputs / "ids.txt"), plan).tolist() == [3, 4, 17]
    assert listed(str(inputs / "filtered"), plan).tolist() == [5, 9]
    assert listed(full.output, plan).tolist() == sorted({row[2] for row in rows(full)})


def test_a_list_and_a_sieve_are_scanned_together(inputs: Path) -> None:
    (inputs / "some.txt").write_text("3 4 17")
    sieve = ("scan.sieve=2", "scan.sieve_candidates=20", "scan.audit_sequences=0")
    config = settings(inputs, "both", f"scan.candidates_from={inputs / 'some.txt'}", *sieve)
    answer_here(config)
    assert {3, 4, 17} < set(scored_in_full(config)["sequence_id"].to_pylist())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("3\nfour\n", "'four', which is no sequence"),
        ("9000\n", "none of them is planned"),
        (None, "is not there"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(content: str | None, said: str, inputs: Path, full: Config) -> None:
    listed = inputs / "odd.txt"
    listed.unlink(missing_ok=True)
    if content is not None:
        listed.write_text(content)
    with pytest.raises(ConfigError, match=said):
        answer_here(settings(inputs, "odd", f"scan.candidates_from={listed}"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["scan.sieve=4"], "the model has 4 blocks"),
        (["scan.sieve=2", "scan.scores=all"], "scan.scores=all wants every"),
        (["scan.sieve=2", "scan.sieve_candidates=7"], "less than the 20 rows"),
        (["scan.sieve_candidates=100"], "there is no sieve"),
        (["scan.audit_sequences=100"], "nothing to audit"),
        (["scan.sieve=0"], "scan.sieve=0"),
    ],
)
def test_settings_that_make_no_sieve_are_refused(overrides: list[str], said: str, inputs: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        answer_here(settings(inputs, "refused", *overrides))


def test_a_shard_that_the_sieve_gave_up_leaves_the_certificate_unknown(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = scanning.scan_task

    def poisoned(worker, given, batch):  # type: ignore[no-untyped-def]
        if given.run.uri.endswith("/sieve") and given.shard == "shard-000003":
            raise RuntimeError("poison")
        return task(worker, given, batch)

    overrides = ("scan.sieve=2", "scan.sieve_candidates=20", "cluster.max_attempts=1")
    config = settings(inputs, "poisoned", *overrides)
    monkeypatch.setattr(scanning, "scan_task", poisoned)
    with pytest.raises(RunError, match=r"1 shards are quarantined \(shard-000003; see in .*/sieve/quarantine/"):
        answer_here(config)
    summary = Store(config.output).read_json("summary.json")
    assert summary["counts"]["quarantined"] == {"shards": 1, "sequences": 30}
    assert summary["counts"]["sieve"]["sequences"] == N - 30
    assert "given up" in summary["certificate"]["sentence"]
    # Where the cause is mended, the shard is sieved, and candidates that it adds are scanned.
    monkeypatch.undo()
    answer_here(config)
    summary = read_summary(config.output)
    assert summary["counts"]["quarantined"] == {"shards": 0, "sequences": 0}
    assert summary["certificate"]["together"] is not None


def auto(inputs: Path, name: str, *overrides: str) -> Config:
    config = settings(inputs, name, "scan.sieve=auto", *overrides)
    answer_here(config)
    return config


def test_a_suffix_is_chosen_by_what_it_finds_and_kept(
    inputs: Path, full: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suffix_choice, "_SUFFICES", 0.0)
    few = ("scan.top_k=2", "scan.candidates=2", "scan.sieve_candidates=2", "scan.sides=proponents")
    config = auto(inputs, "auto", *few, "scan.audit_sequences=10")
    record = read_record(config)
    # The cheapest of those that suffice, and all do.
    assert record["blocks"] == 1
    assert record["recall"].keys() == record["floors"].keys() == {"1", "2", "3"}
    assert list(record["floors"].values()) == sorted(record["floors"].values())
    assert read_summary(config.output)["counts"]["sieve"]["sequences"] == N
    # What was chosen is kept by whoever goes on.
    monkeypatch.setattr(suffix_choice, "_SUFFICES", 2.0)
    (Path(config.output) / "_SUCCESS").unlink()
    answer_here(config)
    assert read_record(config) == record


def test_where_no_suffix_suffices_everything_is_scanned(inputs: Path, full: Config) -> None:
    # Twenty candidates per query and side of 120 are more than a sieve saves.
    config = auto(inputs, "none", "scan.sieve_candidates=20", "scan.audit_sequences=60")
    assert read_record(config)["blocks"] is None
    assert rows(config) == rows(full)
    summary = read_summary(config.output)
    assert "certificate" not in summary
    assert summary["counts"]["scanned"]["sequences"] == N


def test_suffixes_are_scored_as_a_scan_scores_their_layers(
    inputs: Path, full: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suffix_choice, "measured", lambda planned: planned)
    with open_here(settings(inputs, "curve", "scan.sieve=auto")) as run:
        corpus = prepare_corpora(run)
        plan, factors = make_plan(run, corpus), fit(run)
        scores_snq = suffix_choice._measured(run, plan, corpus, query_batch(run, factors), [1, 3])
    assert scores_snq is not None
    known = read_scores(full.output)
    for query in range(3):
        assert scores_snq[-1, :, query] == pytest.approx(known[f"score_q{query}"].to_numpy(), rel=1e-4, abs=1e-4)
    assert not np.allclose(scores_snq[0], scores_snq[1])


def read_record(config: Config) -> dict:
    return Store(config.output).read_json(suffix_choice.RECORD)
