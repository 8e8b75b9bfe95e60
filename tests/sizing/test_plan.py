"""What a plan says before a run is what the run then finds: sequences, tokens, shards and bytes, to the last one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infscan.config import Config, QueriesConfig
from infscan.config.jobs import IndexConfig, IndexJob, PlanConfig, PlanJob
from infscan.errors import ConfigError
from infscan.pipeline import answer, make_index
from infscan.results.read import read_summary
from infscan.results.tensor_files import read_tensors
from infscan.sizing.devices import DEVICES, Rates
from infscan.sizing.estimate import Estimate
from infscan.sizing.hours import Rate, Work, timed
from infscan.sizing.plan import estimate
from infscan.steps.factor_files import check_files
from infscan.storage import Store
from tests.chaos.one_process import without_ray
from tests.steps.runs import compose, in_process, small_run, text_corpus, text_queries, tiny_model, token_queries


def job(config: Config, **asked: object) -> PlanJob:
    return PlanJob(**vars(config), plan=PlanConfig(**asked))  # type: ignore[arg-type]


def texts(tmp_path: Path) -> list[str]:
    tiny_model(tmp_path / "model", family="llama", tokenizer=True)
    corpus, queries = text_corpus(tmp_path / "c.jsonl", 60), text_queries(tmp_path / "q.jsonl", 2)
    packed = ["corpus.tokens_field=null", "corpus.packing=concat", "corpus.sequence_length=32"]
    return [*packed, f"corpus.path={corpus}", f"queries.path={queries}"]


@pytest.mark.parametrize("kind", ["documents", "texts", "sample", "identity", "rows"])
def test_counts_and_bytes_are_those_of_the_run(kind: str, tmp_path: Path) -> None:
    given = {
        "documents": ["factors.blocks=2", "factors.num_sequences=21"],
        "texts": texts(tmp_path) if kind == "texts" else [],
        "sample": ["corpus.max_sequences=17", "scan.scores=all", "factors.max_group_bytes=30000"],
        "identity": ["factors=identity", "scan.compression=plain", "queries.measure=tokens"],
        # All that is done again with published rows, and before the scan.
        "rows": [
            *("scan.targets=2", "scan.stability=2", "scan.self_influence=2", "factors.damping.auto=true"),
            *("factors.solver=cg", "factors.iteration.steps=2", "scan.rank=null"),
        ],
    }[kind]
    config = small_run(tmp_path, *given)
    before = estimate(job(config))
    with without_ray():
        answer(config)
    summary, store = read_summary(config.output), Store(config.output)
    assert before.corpus.how == "exact"
    assert before.corpus.sequences == summary["counts"]["planned"]["sequences"]
    assert before.corpus.tokens == summary["counts"]["scanned"]["tokens"]
    assert before.shards == summary["counts"]["planned"]["shards"] == before.writes["shards"]
    phases = {work.name: work for work in before.work}
    # Every phase of the run, in its order, and no other.
    assert list(phases) == list(summary["phases"])
    for name in ("covariance", "lambda", "scan"):
        if name in summary["phases"]:
            assert phases[name].tokens == summary["phases"][name]["tokens"]
            assert phases[name].sequences == summary["phases"][name]["sequences"]
    # One query group here: no more sequences than there are, however many candidates.
    refined = summary["phases"]["refine"]["sequences"]
    assert refined <= phases["refine"].sequences <= summary["counts"]["planned"]["sequences"]
    # At most: a row may be published for several queries.
    for name in ("solve", "stability", "self_influence", "similarity", "targets"):
        if name in phases:
            assert summary["phases"][name]["sequences"] <= phases[name].sequences
            assert phases[name].flop > 0
            assert before.costs[name].memory.total > 0
    assert before.corpus.prepared_bytes == sum(
        entry.size for entry in store.list("corpus", suffix=".parquet") if "/part-" in entry.name
    )
    files = store.list("queries", suffix=".safetensors")
    taken = [entry.size for entry in files if "/gradients-" in entry.name]
    assert len(taken) == before.writes["query gradients"]
    # Queries of several lengths are taken for equally long, and a file has a header.
    assert before.bytes["query gradients"] == pytest.approx(sum(taken), rel=0.3, abs=1 << 15)
    batch = [entry for entry in files if entry.name.rpartition("/")[2].startswith(("batch-", "joint-"))]
    said = before.bytes["query batch"], before.writes["query batch"]
    assert (sum(entry.size for entry in batch), len(batch)) == said
    stored = [read_tensors(store, entry.name) for entry in batch]
    columns = [tensor for file in stored for key, tensor in file.items() if key[-2:] in ("|U", "|V", "|P")]
    assert before.hosts.node == sum(tensor.nbytes for tensor in columns)
    assert before.hosts.driver < before.hosts.node
    if kind != "identity":
        files = check_files(Store(config.factors.path or ""))["files"]
        assert (before.factors.bytes, before.factors.files) == (sum(files.values()), len(files))
    assert len(store.list("scores")) == before.writes["dense scores"]
    assert len(store.list("refined")) <= before.writes["refined units, at most"]
    assert summary["workers"]["planned_bytes"] == vars(before.costs["scan"].memory)
    # Afterwards: what lies there is read in place of the input, and says the same.
    after = estimate(job(config))
    assert (after.corpus.sequences, after.corpus.tokens, after.shards) == (
        before.corpus.sequences, before.corpus.tokens, before.shards,
    )  # fmt: skip
    assert "covariance" not in {work.name for work in after.work}
    json.dumps(before.to_json(), allow_nan=False)


def test_a_sieve_is_a_pass_of_its_own_and_spares_the_blocks_below_it(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", layers=4)
    everything = estimate(job(small_run(tmp_path)))
    sieve = ("scan.sieve=1", "scan.sieve_candidates=20", "scan.audit_sequences=4", "scan.sides=proponents")
    config = small_run(tmp_path, *sieve, f"queries.path={token_queries(tmp_path / 'one.jsonl', 1)}")
    found = estimate(job(config))
    phases = {work.name: work for work in found.work}
    whole = {work.name: work for work in everything.work}["scan"]
    assert phases["sieve"].tokens == whole.tokens
    assert phases["scan"].sequences == 24
    # Forward, and of a backward as long a quarter: with the head, which both have.
    assert found.costs["sieve"].flop_per_token < 0.8 * found.costs["scan"].flop_per_token
    assert found.costs["sieve"].memory.activations <= found.costs["scan"].memory.activations
    assert any("the audit of 4 sequences" in note and "certify nothing" in note for note in found.notes)
    auto = estimate(job(small_run(tmp_path, "scan.sieve=auto")))
    # The longest that is tried, and what it is chosen by.
    names = [work.name for work in auto.work]
    assert names.index("suffix") < names.index("sieve") < names.index("scan")
    assert found.costs["sieve"].flop_per_token < auto.costs["sieve"].flop_per_token < auto.costs["scan"].flop_per_token
    with pytest.raises(ConfigError, match="4 blocks"):
        estimate(job(small_run(tmp_path, "scan.sieve=4")))


@pytest.mark.slow
def test_an_index_s_bytes_and_passes_are_planned(tmp_path: Path) -> None:
    """Bytes to within the files' headers; of a selection of layers less is computed; beside a scan the pass is one."""
    config = small_run(tmp_path)
    settings = IndexConfig(width=16, gradient_norm=True)
    alone = replace(config, queries=QueriesConfig(path=""))

    def planned(of: Config, index: IndexConfig) -> Estimate:
        return estimate(PlanJob(**vars(of), index=index, plan=PlanConfig(index=True)))

    before = planned(alone, settings)
    made = vars(in_process(alone)) | {"output": str(tmp_path / "index")}
    make_index(IndexJob(**made, index=settings))
    store = Store(str(tmp_path / "index"))
    files = [entry.size for entry in store.list("codes")]
    assert before.writes["codes"] == len(files) == 5
    assert before.bytes == {"codes": 40 * (20 + 4 + 4 * (32 + 8))}
    assert before.bytes["codes"] <= sum(files) <= before.bytes["codes"] + len(files) * 16_384
    assert any("184 bytes" in note for note in before.notes)
    works = {work.name: work for work in before.work}
    assert list(works) == ["prepare", "workers", "covariance", "eigenbasis", "lambda", "factors", "index"]
    suffix = {work.name: work for work in planned(alone, replace(settings, layers="layers.1")).work}
    assert suffix["index"].flop < works["index"].flop
    beside = planned(config, settings)
    scan = {work.name: work for work in estimate(job(config)).work}["scan"]
    both = {work.name: work for work in beside.work}
    assert "index" not in both
    assert both["scan"].flop - scan.flop == pytest.approx(works["index"].own_flop)
    assert beside.costs["scan"].memory.factors == before.costs["index"].memory.factors > 0


def test_an_index_that_the_disk_does_not_take_is_said_before(tmp_path: Path) -> None:
    config = replace(small_run(tmp_path), queries=QueriesConfig(path=""))
    asked = PlanConfig(index=True, sequences=10**14)
    (note,) = [note for note in estimate(PlanJob(**vars(config), plan=asked)).notes if "the disk has" in note]
    assert f"output={config.output}" in note


def test_a_large_corpus_is_estimated_from_all_over_it(tmp_path: Path) -> None:
    config = small_run(tmp_path, *texts(tmp_path))
    exact = estimate(job(config))
    sampled = estimate(job(config, sample_bytes=2000))
    assert sampled.corpus.how.startswith("estimated from ")
    assert sampled.corpus.tokens == pytest.approx(exact.corpus.tokens, rel=0.3)


@pytest.mark.slow
def test_a_model_that_is_a_configuration_alone_is_planned_by_numbers(tmp_path: Path) -> None:
    plan = ["plan.sequences=10000000", "plan.queries=100", "plan.device=h100", "plan.price_per_hour=2"]
    config = compose("plan", "model=shape-7b", f"output={tmp_path}", *plan)
    assert isinstance(config, PlanJob)
    found = estimate(config)
    assert (found.corpus.sequences, found.corpus.tokens, found.shards) == (10_000_000, 5_120_000_000, 2442)
    assert found.parameters == 6_738_415_616
    scan = next(work for work in found.work if work.name == "scan")
    # 4 N and what 100 queries of rank 32 take: 2 * 3200 * (O + I) a layer.
    N = found.parameters - 32000 * 4096
    scoring = 32 * 2 * 3200 * 3 * (4096 + 11008)
    assert scan.flop / scan.tokens == pytest.approx(4 * N + scoring, rel=0.05)
    rates = DEVICES["h100"].rates()
    computed = (scan.flop - scan.own_flop) / rates.model["bfloat16"] + scan.own_flop / rates.products["bfloat16"]
    # A second between two shards, in which the device waits.
    assert scan.seconds == pytest.approx(computed + 2442)
    assert scan.own_flop / scan.tokens == pytest.approx(scoring, rel=0.05)
    # What loads and writes alone is timed by a finished run (plan.like), or not at all.
    assert {work.name for work in found.work if not work.seconds} == {"workers", "publish"}
    assert found.rank_hours == pytest.approx(sum(work.seconds or 0 for work in found.work) / 3600)
    assert found.price == pytest.approx(2 * (found.rank_hours or 0))


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    config = job(small_run(tmp_path))
    config.corpus.path = ""
    with pytest.raises(ConfigError, match=r"corpus\.path=\.\.\., or plan\.sequences"):
        estimate(config)
    config = job(small_run(tmp_path), device="abacus")
    with pytest.raises(ConfigError, match=r"plan\.device=abacus.*h100"):
        estimate(config)
    config = job(small_run(tmp_path))
    config.queries.path = ""
    with pytest.raises(ConfigError, match=r"queries\.path=\.\.\., or plan\.queries"):
        estimate(config)


def test_a_measured_rate_is_of_the_scan_and_others_go_by_their_work() -> None:
    work = [Work("covariance", 5, 50, 300.0), Work("scan", 10, 100, 200.0), Work("eigenbasis", 0, 0, 0.0, 9.0)]
    by_rate = timed(work, Rate(tokens_per_s=10.0), workers=2, ranks=1)
    assert [one.seconds for one in by_rate] == [7.5, 5.0, None]
    like = {"scan": {"seconds": 1.0, "tokens_per_s": 20.0}, "eigenbasis": {"seconds": 3.0}}
    measured = timed(work, Rate(measured=like), workers=2, ranks=1)
    assert [one.seconds for one in measured] == [None, 2.5, 3.0]
    again = [*work, Work("refine", 1, 10, 40.0)]
    rate = Rate(tokens_per_s=10.0, refine_speed=0.5)
    assert [one.seconds for one in timed(again, rate, workers=2, ranks=1)] == [7.5, 5.0, None, 2.0]


RATES = Rates({"bfloat16": 20.0}, {"moments": 10.0, "float32": 2.0}, eigh=3.0, link=40.0)


def test_every_part_of_a_phase_takes_its_own_time_and_ranks_share_it() -> None:
    how = {"own_flop": 100.0, "products": "moments", "dtype": "bfloat16"}
    one = Work("covariance", 5, 50, 300.0, **how, gathered=80.0, stored=5e9, units=6)  # type: ignore[arg-type]
    # Products of the model and of the pass, storage; what a rank gathers is each rank's; between units a worker waits.
    products, waiting = 200 / 20 + 100 / 10, 5e9 / 5e8 + 6
    assert timed([one], Rate(RATES), workers=1, ranks=1)[0].seconds == products + 80 / 40 + waiting
    assert timed([one], Rate(RATES), workers=2, ranks=2)[0].seconds == products / 4 + 80 / 40 + waiting / 2
    # Written while the next unit is computed, of all units but a worker's last; and never longer than computing takes.
    behind = replace(one, behind=3e9)
    hidden = timed([one, behind], Rate(RATES), workers=2, ranks=1)
    assert (hidden[0].seconds or 0) - (hidden[1].seconds or 0) == pytest.approx(4 / 6 * 3e9 / 5e8 / 2)
    hidden = timed([one, replace(one, behind=1e12)], Rate(RATES), workers=1, ranks=1)
    assert (hidden[0].seconds or 0) - (hidden[1].seconds or 0) == pytest.approx(5 / 6 * products)
    assert timed([Work("eigenbasis", 0, 0, 0.0, 9.0)], Rate(RATES), workers=3, ranks=1)[0].seconds == 1.0
    unknown = Work("scan", 1, 1, 10.0, own_flop=5.0, products="tf32", dtype="bfloat16")
    assert timed([unknown], Rate(RATES), workers=1, ranks=1)[0].seconds is None
