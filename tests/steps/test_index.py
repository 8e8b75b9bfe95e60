"""An index of a corpus, and the runs that answer from it: exact in what they publish, refused where they do not fit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import infscan
from infscan import pipeline
from infscan.api import open_index, read_run, run_ask, run_explain, run_fit, run_verify
from infscan.config import Backend, ClusterConfig, Config, QueriesConfig, Scores, with_checksum, without_checksum
from infscan.config.jobs import AskJob, ExplainJob, IndexConfig, IndexJob, VerifyJob
from infscan.errors import ConfigError, DamagedError, FactorsError, RunError
from infscan.influence.layers import Layer
from infscan.influence.packed import QueryCodes
from infscan.influence.routed import Routed
from infscan.influence.topk_tracker import TopKTracker
from infscan.results.index_file import MANIFEST, column_of, read_columns, read_header, read_manifest
from infscan.results.manifest import TABLES
from infscan.results.schema import read_parquet
from infscan.steps import scan as scanning
from infscan.steps.ask import ask_config, query_codes, read_index
from infscan.steps.factors import fit
from infscan.steps.index import squared_norms
from infscan.steps.run import open_run
from infscan.steps.search import Search, file_groups, file_scores, search_files
from infscan.storage import Store
from tests.influence.factors import normal
from tests.steps.runs import answer_here, in_process, small_run, tiny_model, token_corpus

HERE = ClusterConfig(backend=Backend.in_process)


def index_job(config: Config, output: Path, **settings: Any) -> IndexJob:
    """A run's settings as an index's, in this process; its queries are answered in the same pass."""
    made = vars(in_process(config)) | {"output": str(output)}
    return IndexJob(**made, index=IndexConfig(**settings))


def make(tmp_path: Path, **settings: Any) -> tuple[Config, Path]:
    """A scan's settings, and an index of its corpus with the scan's factors to be."""
    config = small_run(tmp_path, f"factors.path={tmp_path / 'factors'}")
    pipeline.make_index(index_job(unasked(config), tmp_path / "index", **settings))
    return config, tmp_path / "index"


def unasked(config: Config) -> Config:
    """The same settings without queries."""
    return replace(config, queries=QueriesConfig(path=""))


def ask(tmp_path: Path, where: Path, **settings: Any) -> Path:
    """An answer; without an audit, which of so small an index would be everything."""
    known: dict[str, Any] = {
        "index": str(where),
        "queries": str(tmp_path / "queries.jsonl"),
        "cluster": HERE,
        "top_k": 5,
    }
    known["audit_sequences"] = 0
    run_ask(AskJob(**known | {"output": str(tmp_path / "answer")} | settings))
    return Path(settings.get("output", tmp_path / "answer"))


def rows_of(run: Path) -> dict[tuple[str, str, int], float]:
    table = read_run(str(run)).top()
    names = ("query_id", "side", "sequence_id", "score")
    return {tuple(row[:3]): row[3] for row in zip(*(table[name].to_pylist() for name in names), strict=True)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Path]:
    """A folder with a finished scan in run/, and an index of the same corpus and factors."""
    folder = tmp_path_factory.mktemp("index")
    config, index = make(folder, bits=8, gradient_norm=True)
    answer_here(config)
    return folder, config, index


def test_an_answer_has_the_scan_s_rows_and_scores(made: tuple[Path, Config, Path]) -> None:
    folder, config, index = made
    found, wanted = rows_of(ask(folder, index)), rows_of(Path(config.output))
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[row] for row in wanted], list(wanted.values()), rtol=1e-5)


def test_an_answer_publishes_what_the_index_ranks_highest(made: tuple[Path, Config, Path]) -> None:
    folder, _, index = made
    answer = ask(folder, index, candidates=5, output=str(folder / "few"))
    listed = read_parquet(Store(str(answer)), "candidates.parquet")
    assert listed.column_names == ["query_id", "side", "rank", "sequence_id", "index_score", "relative_score"]
    known = [read_columns(Store(str(index)), name, ["sequence_id", "self_influence"]) for name in
             read_manifest(Store(str(index))).files]  # fmt: skip
    of = {int(i): float(x) for one in known for i, x in zip(one["sequence_id"], one["self_influence"], strict=True)}
    for row in listed.to_pylist():
        assert row["relative_score"] == pytest.approx(row["index_score"] / of[row["sequence_id"]] ** 0.5, rel=1e-5)
    assert {
        tuple(row) for row in zip(*(listed[name].to_pylist() for name in listed.column_names[:2]), strict=True)
    } == {(f"q{query}", side) for query in range(3) for side in ("proponent", "opponent")}
    for query in range(3):
        mine = listed.filter((pc.field("query_id") == f"q{query}") & (pc.field("side") == "opponent"))
        assert mine["rank"].to_pylist() == [1, 2, 3, 4, 5]
        assert mine["index_score"].to_pylist() == sorted(mine["index_score"].to_pylist())
    assert {row[2] for row in rows_of(answer)} <= set(listed["sequence_id"].to_pylist())
    counts = read_run(str(answer)).summary["counts"]
    found = len(set(listed["sequence_id"].to_pylist()))
    assert (counts["planned"]["sequences"], counts["candidates"]) == (40, {"sequences": found, "audited": 0})
    assert counts["scanned"]["sequences"] == found < 40


def test_an_audit_says_what_was_missed_and_how_far_rows_stand_out(made: tuple[Path, Config, Path]) -> None:
    """z by a scan of everything and by an audit of everything is the same; of a part it is near."""
    folder, config, index = made
    whole = ask(folder, index, audit_sequences=40, output=str(folder / "audited"))
    wanted, found = (read_run(run).answers() for run in (config.output, str(whole)))
    names = ["query_id", "found", "verdict", "sequences", "document_id"]
    assert found.select(names).equals(wanted.select(names))
    np.testing.assert_allclose(found["z"].to_numpy(), wanted["z"].to_numpy(), rtol=1e-3)
    np.testing.assert_allclose(found["positive"].to_numpy(), wanted["positive"].to_numpy(), rtol=1e-3)
    part = ask(folder, index, audit_sequences=35, output=str(folder / "partly"))
    # What all positive scores sum to, a sample does not say.
    sampled = read_run(str(part)).answers()
    assert (sampled["share"].null_count, sampled["positive"].null_count) == (3, 3)
    np.testing.assert_allclose(read_run(str(part)).answers()["scale"], wanted["scale"], rtol=0.5)
    for run in (whole, part):
        said = read_run(str(run)).summary["certificate"]
        assert said["queries"].keys() == {"q0", "q1", "q2"}
        assert said["sentence"] == pq.read_table(run / "run.parquet")["certificate"].to_pylist()[0]
    # Everything was scored, so that nothing is missing from the table.
    assert rows_of(whole).keys() == rows_of(Path(config.output)).keys()


def own_scores(folder: Path, index: Path, *layers: str) -> tuple[list[int], np.ndarray]:
    """Sequence ids in order, and what the index's codes make of their scores, [N, Q]; of some of its layers."""
    found = read_index(str(index))
    run_config = ask_config([found], AskJob(index=str(index), queries=str(folder / "queries.jsonl"), cluster=HERE))
    with open_run(replace(run_config, output=str(folder / "asked"))) as run:
        codes = query_codes(run, found, fit(run))
    chosen = {name: codes[name] for name in layers or codes}
    ids, scores = zip(*(file_scores(found.store, name, chosen) for name in found.manifest.files), strict=True)
    order = np.argsort(np.concatenate(ids))
    return np.concatenate(ids)[order].tolist(), np.concatenate(scores)[order]


def check_scores(folder: Path, config: Config, scores_nq: np.ndarray, least: float) -> None:
    """At 8 bits and nearly the layers' width the index's own scores are within a few percent of exact ones."""
    answer_here(replace(config, output=str(folder / "dense"), scan=replace(config.scan, scores=Scores.all, rank=None)))
    dense = read_run(str(folder / "dense")).scores()
    assert dense["sequence_id"].to_pylist() == list(range(40))
    for query in range(3):
        assert np.corrcoef(dense[f"score_q{query}"].to_numpy(), scores_nq[:, query])[0, 1] > least


def test_every_sequence_has_one_row_whose_scores_are_the_scan_s(made: tuple[Path, Config, Path]) -> None:
    folder, config, index = made
    ids, scores_nq = own_scores(folder, index)
    assert ids == list(range(40))
    check_scores(folder, config, scores_nq, 0.98)


def test_the_head_is_indexed_as_any_layer(tmp_path: Path) -> None:
    """With the other layers, and alone, where nothing goes back through the blocks."""
    config = small_run(tmp_path, f"factors.path={tmp_path / 'factors'}", "model.tracked=mlp+head")
    for name, settings in (("index", {}), ("head", {"layers": "lm_head"})):
        pipeline.make_index(index_job(unasked(config), tmp_path / name, bits=8, **settings))
    (head,) = read_manifest(Store(str(tmp_path / "head"))).layers
    whole = read_manifest(Store(str(tmp_path / "index"))).layers
    assert head in whole
    assert len(whole) > 1
    # The vocabulary is twice as wide as the code.
    check_scores(tmp_path, config, own_scores(tmp_path, tmp_path / "index")[1], 0.95)
    alone = own_scores(tmp_path, tmp_path / "head")[1]
    np.testing.assert_allclose(
        own_scores(tmp_path, tmp_path / "index", head)[1], alone, rtol=1e-3, atol=0.01 * alone.std()
    )


def test_norms_stand_beside_the_codes(made: tuple[Path, Config, Path]) -> None:
    _, _, index = made
    store, manifest = Store(str(index)), read_manifest(Store(str(index)))
    layers = list(manifest.layers)
    for name in manifest.files:
        rms = [column_of("rms", layer) for layer in layers]
        found = read_columns(store, name, ["self_influence", "gradient_norm", "loss", "tokens", *rms])
        entries = [65 * 32 if "4h_to_h" in layer else 33 * 64 for layer in layers]
        squares = sum(np.square(found[column].astype(float)) * n for column, n in zip(rms, entries, strict=True))
        np.testing.assert_allclose(found["self_influence"], squares, rtol=1e-4)
        assert (found["gradient_norm"] > 0).all()
        assert (found["loss"] > found["tokens"] - 1).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_gradient_s_norm_needs_no_gradient(bias: bool) -> None:
    layer = Layer("fc", 6, 5, bias, "fc")
    s_bto, a_bti = normal(1, 3, 4, 6), normal(2, 3, 4, 5)
    if bias:
        a_bti[..., -1] = 1
    s_bto[1, 2:] = 0
    wanted = (s_bto.transpose(1, 2) @ a_bti).square().sum(dim=(1, 2))
    torch.testing.assert_close(squared_norms(layer, s_bto, a_bti, None), wanted)
    routed = Routed(torch.arange(12), 3, 4)
    torch.testing.assert_close(squared_norms(layer, routed.of(s_bto), routed.of(a_bti), routed), wanted)
    if bias:
        torch.testing.assert_close(squared_norms(layer, s_bto, a_bti[..., :-1], None), wanted)


def test_an_index_that_was_stopped_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    config, index = make(tmp_path)
    store = Store(str(index))
    before = {name: store.read(name) for name in [MANIFEST, *read_manifest(store).files]}
    gone = sorted(read_manifest(store).files)[1:3]
    kept = (index / sorted(read_manifest(store).files)[0]).stat().st_ino
    for name in [MANIFEST, gone[0]]:
        store.remove(name)
    store.write(gone[1], before[gone[1]][:-20])
    with pytest.raises(RunError, match=r"no index.json.*infscan index"):
        read_manifest(store)
    pipeline.make_index(index_job(unasked(config), index))
    assert {name: store.read(name) for name in before} == before
    assert (index / sorted(read_manifest(store).files)[0]).stat().st_ino == kept


def test_an_index_beside_a_scan_is_the_bytes_of_each_alone(tmp_path: Path, made: tuple[Path, Config, Path]) -> None:
    """One pass, both consumers; also where it dies between a shard's codes and its rows, and where codes are gone."""
    folder, config, _ = made
    for name, settings in (("whole", {"bits": 8, "gradient_norm": True}), ("suffix", {"layers": "layers.1"})):
        alone, both = tmp_path / f"{name}-index", tmp_path / f"{name}-both"
        pipeline.make_index(index_job(unasked(config), alone, **settings))
        job = index_job(config, both, **settings)
        if name == "suffix":
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(scanning, "write_shard", _dies)
                with pytest.raises(KeyboardInterrupt):
                    pipeline.make_index(job)
        pipeline.make_index(job)
        stores = [Store(str(alone)), Store(str(both))]
        if name == "suffix":
            for gone in sorted(read_manifest(stores[1]).files)[:2]:
                stores[1].remove(gone)
            pipeline.make_index(job)
        files = [MANIFEST, *read_manifest(stores[0]).files]
        assert [stores[0].read(file) for file in files] == [stores[1].read(file) for file in files]
        tables = [file for file in Store(config.output).names() if file.startswith(TABLES)]
        assert len(tables) >= 4
        for table in tables:
            assert stores[1].read(table) == Store(config.output).read(table)
        # A run and an index, of which either is asked.
        assert rows_of(both) == rows_of(Path(config.output))
        explained = run_explain(ExplainJob(run=str(both), rows=1, query_ids=["q0"], cluster=HERE))
        assert explained.tables["tokens"].num_rows
        parts = [run_verify(VerifyJob(one)).files for one in (str(alone), config.output)]
        found = run_verify(VerifyJob(str(both)))
        assert (found.files, found.is_run, found.is_index) == (sum(parts), True, True)
        ask(folder, both, output=str(tmp_path / f"{name}-answer"))


def _dies(*args: Any, **kwargs: Any) -> bool:
    raise KeyboardInterrupt


def test_an_index_with_queries_is_of_everything(made: tuple[Path, Config, Path], tmp_path: Path) -> None:
    _, config, _ = made
    with pytest.raises(ConfigError, match="an index is of all"):
        pipeline.make_index(index_job(replace(config, scan=replace(config.scan, sieve=1)), tmp_path / "sieved"))


def test_another_index_is_not_mixed_in(tmp_path: Path) -> None:
    config, index = make(tmp_path)
    with pytest.raises(RunError, match=r"other settings \(index.width: 64 -> 32"):
        pipeline.make_index(index_job(unasked(config), index, width=32))
    stranger = tmp_path / "other"
    pipeline.make_index(index_job(unasked(config), stranger, seed=1))
    name = sorted(read_manifest(Store(str(index))).files)[0]
    (index / name).write_bytes((stranger / name).read_bytes())
    with pytest.raises(DamagedError, match="another file than the one that was indexed"):
        ask(tmp_path, index)
    Store(str(index)).remove(MANIFEST)
    with pytest.raises(RunError, match="made of other inputs or settings"):
        pipeline.make_index(index_job(unasked(config), index))


def test_an_index_of_other_inputs_is_refused_by_field(tmp_path: Path) -> None:
    config, index = make(tmp_path)
    pipeline_config = replace(in_process(config), seed=7, output=str(tmp_path / "fit"))
    run_fit(replace(pipeline_config, factors=replace(config.factors, path=str(tmp_path / "refitted"))))
    # Factors know their settings; a fit with the index's own, of a sample drawn otherwise, is refused before.
    with pytest.raises(FactorsError, match="holds factors for something else"):
        ask(tmp_path, index, factors=str(tmp_path / "refitted"))
    tiny_model(tmp_path / "other-model", seed=1)
    with pytest.raises(FactorsError, match="model"):
        ask(tmp_path, index, model=str(tmp_path / "other-model"))
    token_corpus(tmp_path / "other.jsonl", 40, seed=9)
    with pytest.raises((RunError, FactorsError), match="corpus"):
        ask(tmp_path, index, corpus=str(tmp_path / "other.jsonl"))
    # The same fit again, whose files are not the same ones.
    value = json.loads((index / MANIFEST).read_text())
    for name in ("model", "corpus", "factors"):
        fields = value["fields"] | {name: "0" * 64}
        (index / MANIFEST).write_text(json.dumps(with_checksum(without_checksum(value | {"fields": fields}))))
        with pytest.raises(RunError, match=rf"index of other inputs \({name}: 000000000000"):
            ask(tmp_path, index)


def test_a_flipped_bit_is_found_or_changes_nothing(made: tuple[Path, Config, Path], tmp_path: Path) -> None:
    _, _, index = made
    name = sorted(read_manifest(Store(str(index))).files)[0]
    data, copy = (index / name).read_bytes(), Store(str(tmp_path))
    copy.write(name, data)
    columns = ["sequence_id", *(f"code|{layer}" for layer in read_manifest(Store(str(index))).layers)]
    wanted, seal = read_columns(copy, name, columns), read_header(copy, name).seal
    found = 0
    for at in np.linspace(0, len(data) - 1, 150).astype(int).tolist():
        copy.write(name, data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        try:
            columns_now = read_columns(copy, name, columns, seal)
        except (DamagedError, RunError):
            found += 1
        else:
            assert all((columns_now[column] == wanted[column]).all() for column in columns)
    assert found > 100
    for size in (0, 7, len(data) // 2, len(data) - 1):
        copy.write(name, data[:size])
        with pytest.raises(DamagedError, match="is damaged"):
            read_columns(copy, name, columns, seal)


def test_a_file_that_was_cut_off_is_found_when_the_index_is_opened(tmp_path: Path) -> None:
    _, index = make(tmp_path)
    name = sorted(read_manifest(Store(str(index))).files)[0]
    data = (index / name).read_bytes()
    (index / name).write_bytes(data[:-8])
    with pytest.raises(DamagedError, match=rf"{len(data) - 8} bytes where {len(data)} were written"):
        open_index(str(index))
    (index / name).unlink()
    with pytest.raises(DamagedError, match="it is missing"):
        open_index(str(index))


def test_an_index_is_verified_as_a_run_is(made: tuple[Path, Config, Path], tmp_path: Path) -> None:
    _, _, index = made
    found = run_verify(VerifyJob(str(index)))
    assert (found.files, found.is_run, found.is_index) == (5, False, True)
    with pytest.raises(RunError, match="is an index, no run"):
        infscan.read_top(str(index))
    for name in Store(str(index)).names():
        Store(str(tmp_path)).write(name, Store(str(index)).read(name))
    name = sorted(read_manifest(Store(str(index))).files)[3]
    data = bytearray((index / name).read_bytes())
    at = data.index(read_columns(Store(str(index)), name, ["loss"])["loss"].tobytes())
    data[at] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DamagedError, match=f"{name} is damaged .*'loss' is not what was written"):
        run_verify(VerifyJob(str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"bits": 2}, "index.bits=2"), ({"width": 0}, "index.width=0"), ({"layers": "("}, "not a regular expression"),
     ({"layers": "attention"}, "names none of the 4 tracked layers")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(tmp_path, **settings)


def test_a_question_is_needed(made: tuple[Path, Config, Path]) -> None:
    folder, _, index = made
    with pytest.raises(ConfigError, match="no question is given"):
        ask(folder, index, queries=None, output=str(folder / "none"))
    with pytest.raises(ConfigError, match=r"completion: no value given"):
        run_ask(AskJob(index=str(index), prompt="half of a question", output=str(folder / "none"), cluster=HERE))


def test_what_is_no_index_is_refused_by_what_it_is(made: tuple[Path, Config, Path], tmp_path: Path) -> None:
    _, _, index = made
    assert open_index(index).rows == open_index(str(index)).rows
    with pytest.raises(RunError, match=r"nowhere has no index.json: there is nothing at this address; check it"):
        open_index(tmp_path / "nowhere")
    shutil.copytree(index, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "index.json").unlink()
    with pytest.raises(RunError, match=r"no index.json: it is an index that is not finished, .* or a run without one"):
        open_index(tmp_path / "unfinished")
    for odd in (None, "", [], [None], {"a": "b"}, 5):
        with pytest.raises(ConfigError, match="give a finished index, folder or URI"):
            open_index(odd)  # type: ignore[arg-type]


def test_no_other_factors_are_fitted_for_a_question(tmp_path: Path) -> None:
    """An index answers for its own fit: where that is gone it says so, and fits none in its place."""
    _, index = make(tmp_path)
    os.rename(tmp_path / "factors", tmp_path / "moved")
    with pytest.raises(RunError, match=rf"{tmp_path}/factors holds no complete factors, .*factors=\.\.\."):
        ask(tmp_path, index)
    assert not (tmp_path / "factors").exists()
    assert rows_of(ask(tmp_path, index, factors=str(tmp_path / "moved")))


def test_indexes_of_a_grown_corpus_are_asked_as_one(tmp_path: Path) -> None:
    """The old part's index and the new part's, with the old part's factors, answer as one index of both would."""
    config, index = make(tmp_path, bits=8)
    token_corpus(tmp_path / "more.jsonl", 24, seed=5)
    grown = replace(in_process(config), corpus=replace(config.corpus, path=str(tmp_path / "more.jsonl")))
    grown = replace(grown, factors=replace(config.factors, corpus=replace(config.corpus, path=str(index / "corpus"))))
    pipeline.make_index(index_job(unasked(grown), tmp_path / "added", bits=8))
    answer = ask(tmp_path, index, index=[str(index), str(tmp_path / "added")])
    found = read_run(str(answer)).top()
    assert set(found["corpus"].to_pylist()) == {"part-000", "part-001"}
    old = rows_of(ask(tmp_path, index, output=str(tmp_path / "old")))
    shared = {row: score for row, score in rows_of(answer).items() if row[2] < 40}
    assert shared
    np.testing.assert_allclose(list(shared.values()), [old[row] for row in shared], rtol=1e-5)
    assert max(row[2] for row in rows_of(answer)) >= 40
    pipeline.make_index(index_job(unasked(grown), tmp_path / "narrow", width=16))
    with pytest.raises(RunError, match="index of another code than"):
        ask(tmp_path, index, index=[str(index), str(tmp_path / "narrow")])


def test_an_object_store_is_searched_as_a_disk_is(made: tuple[Path, Config, Path]) -> None:
    """There columns are read by byte range; and files may be searched in any number of groups and threads."""
    _, _, index = made
    here, there = Store(str(index)), Store("memory://index-of-test")
    manifest = read_manifest(here)
    for name in manifest.files:
        there.write(name, here.read(name))
    files = [(name, file.seal, file.rows) for name, file in manifest.files.items()]
    queries = {layer: QueryCodes.of(normal(4, 3, size).float().numpy(), 8) for layer, size in manifest.layers.items()}
    asked = Search(queries, ("proponent", "opponent"), 6)
    (whole,) = file_groups(here, files, 1)
    wanted = search_files(whole, asked)
    assert len(wanted) == 3 * 2 * 6
    remote = [search_files(group, asked) for group in file_groups(there, files, 3)]
    tracker = TopKTracker(3, asked.sides, 6)
    for part in remote:
        tracker.add(part)
    for found in (search_files(whole, asked, threads=3), tracker.best()):
        assert list(found.rows()) == list(wanted.rows())


def test_a_shell_asks_with_the_keys_of_the_job() -> None:
    from infscan.config.commands import command_of, settle
    from infscan.config.commands import compose as hydra_compose

    command = command_of("ask")
    words = ["index=[runs/a,runs/b]", "queries=q.jsonl", "model=m", "corpus=c", "factors=f", "cluster.num_workers=2"]
    job = settle(command, hydra_compose(command, words))
    assert (job.indexes, job.queries, job.model, job.corpus) == (["runs/a", "runs/b"], "q.jsonl", "m", "c")
    assert job.cluster.num_workers == 2
