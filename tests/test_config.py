"""Settings: impossible ones are refused by key, differing ones named; paths are absolute; cells get own folders."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from infscan.config import (
    Compression,
    Config,
    Sharding,
    Sides,
    Solver,
    differences,
    fingerprint,
    from_yaml,
    plain,
    stored_config,
    to_yaml,
)
from infscan.config.arguments import read_arguments
from infscan.config.commands import command_of, compose
from infscan.config.compose import from_hydra
from infscan.errors import ConfigError


def composed(*overrides: str) -> DictConfig:
    """What `infscan scan` composes, its output not given."""
    command = replace(command_of("scan"), values={})
    return compose(command, read_arguments(command, overrides))


NEEDED = ("model.path=m", "corpus.path=c.jsonl", "queries.path=q.jsonl", "output=out")


def make(*overrides: str) -> Config:
    return from_hydra(composed(*NEEDED, *overrides))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_defaults_are_possible_and_documented_values() -> None:
    config = make()
    assert (config.scan.rank, config.scan.top_k, config.candidates, config.scan.compression) == (
        32,
        100,
        400,
        Compression.weighted,
    )
    assert (config.factors.num_sequences, config.factors.damping.relative) == (10_000, 0.1)
    assert config.sides == ("proponent", "opponent")
    assert not config.sharded


def test_every_mandatory_key_without_a_value_is_named() -> None:
    with pytest.raises(ConfigError, match="no value given") as caught:
        from_hydra(composed())
    for key in ("model.path", "corpus.path", "queries.path", "output"):
        assert f"{key}=..." in str(caught.value)


def test_a_key_that_the_job_does_not_read_may_be_missing() -> None:
    given = [needed for needed in NEEDED if not needed.startswith("queries.")]
    assert from_hydra(composed(*given), unused=("queries.path",)).queries.path == ""
    with pytest.raises(ConfigError, match=r"^queries\.path: no value given"):
        from_hydra(composed(*given))


def test_the_factors_corpus_is_the_scanned_one_key_by_key_unless_said_otherwise() -> None:
    config = make("corpus.sequence_length=64", "corpus.bos=true", "factors.corpus.path=other.jsonl")
    assert config.factors.corpus.path == os.path.abspath("other.jsonl")
    assert (config.factors.corpus.sequence_length, config.factors.corpus.bos) == (64, True)


def test_local_paths_become_absolute_and_others_stay(here: Path) -> None:
    (here / "m").mkdir()
    config = make("factors.path=f")
    assert config.model.path == str(here / "m")
    assert (config.corpus.path, config.queries.path) == (str(here / "c.jsonl"), str(here / "q.jsonl"))
    assert (config.output, config.factors.path) == (str(here / "out"), str(here / "f"))
    remote = make("model.path=org/name", "corpus.path=s3://bucket/c", "output=s3://bucket/run")
    assert (remote.model.path, remote.corpus.path, remote.output) == ("org/name", "s3://bucket/c", "s3://bucket/run")
    assert remote.factors.path == "s3://bucket/run/factors"


IMPOSSIBLE: list[tuple[str, list[str]]] = [
    *[
        (key, [f"{key}={value}"])
        for value in (0, -1)
        for key in (
            "factors.num_sequences",
            "factors.slices",
            "factors.blocks",
            "factors.max_group_bytes",
            "factors.damping.relative",
            "factors.damping.absolute",
            "scan.rank",
            "scan.top_k",
            "scan.candidates",
            "scan.tokens_per_batch",
            "scan.shard_sequences",
            "scan.query_group_bytes",
            "scan.refine_group_bytes",
            "corpus.max_sequences",
            "factors.corpus.max_sequences",
            "cluster.num_workers",
            "cluster.ranks_per_worker",
            "cluster.cpus_per_rank",
            "cluster.max_attempts",
            "cluster.deadline_s",
            "cluster.startup_timeout_s",
            "cluster.heartbeat_s",
            "cluster.heartbeat_timeout_s",
            "cluster.placement_timeout_s",
            "cluster.lease_s",
        )
    ],
    ("factors.damping.relative", ["factors.damping.relative=nan"]),
    ("corpus.sequence_length", ["corpus.sequence_length=1"]),
    ("factors.corpus.sequence_length", ["factors.corpus.sequence_length=0"]),
    ("scan.candidates", ["scan.top_k=10", "scan.candidates=9"]),
    ("scan.sieve", ["scan.sieve=all"]),
    ("scan.sieve", ["scan.sieve=0"]),
    ("scan.max_nonfinite", ["scan.max_nonfinite=1.5"]),
    ("scan.max_nonfinite", ["scan.max_nonfinite=-0.1"]),
    ("scan.allow_quarantined", ["scan.allow_quarantined=-1"]),
    ("scan.tokens_per_batch=4194305: more than is possible; give at most 4194304", ["scan.tokens_per_batch=4194305"]),
    ("factors.iteration.tokens_per_batch", ["factors.iteration.tokens_per_batch=4194305"]),
    ("cluster.gpus_per_rank", ["cluster.gpus_per_rank=-1"]),
    ("cluster.gpus_per_rank", ["cluster.gpus_per_rank=2"]),
    ("cluster.gpus_per_rank", ["cluster.gpus_per_rank=0.5", "cluster.ranks_per_worker=2"]),
    ("cluster.rank_env", ["+cluster.rank_env.NCCL-DEBUG=INFO"]),
    ("cluster.rank_env.AWS_SECRET_ACCESS_KEY: by its name a secret", ["+cluster.rank_env.AWS_SECRET_ACCESS_KEY=x"]),
    ("model.zero.offload", ["model.zero.offload=cpu"]),
    ("model.sharding", ["model.sharding=none", "cluster.ranks_per_worker=2"]),
    ("model.tracked", ["model.tracked='(mlp'"]),
    ("scan.compression", ["factors.solver=identity", "scan.compression=weighted"]),
    ("queries.prompt", ["prompt=a", "completion=b"]),
    ("corpus.path", ["+corpus.paths.web=x"]),
]


@pytest.mark.parametrize(("key", "overrides"), IMPOSSIBLE, ids=[" ".join(overrides) for _, overrides in IMPOSSIBLE])
def test_impossible_values_are_refused_by_key(key: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make(*overrides)
    assert str(caught.value).startswith(key)


@pytest.mark.parametrize(
    "overrides",
    [
        ["factors.solver=identity", "scan.compression=plain"],
        ["factors.solver=identity"],
        ["factors=identity"],
        ["factors.solver=identity", "scan.rank=null"],
        ["scan.candidates=100"],
        ["scan.sieve=auto", "scan.sieve_candidates=1000"],
        ["cluster.ranks_per_worker=2"],
        ["cluster.gpus_per_rank=0"],
        ["cluster.gpus_per_rank=0.5"],
        ["+cluster.rank_env.NCCL_SOCKET_IFNAME=ens5"],
        ["model.zero.offload=nvme", "model.sharding=zero3"],
        ["scan.max_nonfinite=0"],
        [r"model.tracked='layers\.(0|1)\.'"],
    ],
)
def test_possible_ones_are_not(overrides: list[str]) -> None:
    make(*overrides)


@pytest.mark.parametrize("planned", [100, 20_000, 300_000, 10_000_000])
@pytest.mark.parametrize("queries", [1, 10, 300])
def test_an_audit_hits_enough_of_the_strongest_where_a_tenth_of_the_corpus_does(planned: int, queries: int) -> None:
    config = make("scan.sieve=2")
    audited = config.audited(planned, queries)
    assert min(planned, max(256, planned // 100)) <= audited <= max(256, planned // 10)
    assert config.audited_tail_rows(planned, queries, audited) >= 159 or audited >= min(planned, planned // 10)
    # All queries' candidates are a tenth of it, or as few as are refined.
    left = config.sieve_candidates(planned, queries)
    assert left == config.candidates or 2 * queries * left <= planned / 10 + 2 * queries


@pytest.mark.parametrize("override", ["scan.rnak=3", "scan.top_k=many", "factors.labels=guessed"])
def test_unknown_keys_and_other_types_are_refused_while_composing(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].rpartition(".")[2]):
        composed(*NEEDED, override)


def test_derived_values() -> None:
    assert make("scan.top_k=7").candidates == 28
    assert make("scan.top_k=7", "scan.candidates=9").candidates == 9


@pytest.mark.parametrize(
    ("overrides", "sequences", "expected"),
    [
        (["scan.top_k=100"], 10**6, 400),
        (["scan.top_k=100"], 3000, 300),
        # Of a small corpus no more than need be: two for each row that is published.
        (["scan.top_k=100"], 1057, 200),
        (["scan.top_k=10"], 1644, 40),
        (["scan.top_k=5"], 40, 20),
        (["scan.top_k=5", "scan.rank=null"], 40, 5),
        (["scan.top_k=5", "scan.rank=null", "scan.refine_dtype=float32"], 40, 20),
        (["scan.top_k=100", "scan.candidates=150"], 40, 150),
    ],
)
def test_candidates_are_a_share_of_a_small_corpus(overrides: list[str], sequences: int, expected: int) -> None:
    assert make(*overrides).candidates_of(sequences) == expected
    assert make("scan.sides=opponents").sides == ("opponent",)
    assert make(f"scan.sides={Sides.proponents.value}").sides == ("proponent",)
    assert make("model.sharding=zero3").sharded
    assert make("cluster.ranks_per_worker=2").sharded
    assert make(f"model.sharding={Sharding.none.value}").sharded is False
    assert make("scan.rank=null", f"factors.solver={Solver.identity.value}").scan.rank is None


def test_yaml_round_trip() -> None:
    config = make("factors.damping.absolute=1e-4", "scan.rank=null", r"model.tracked='layers\.(0|1)\..*mlp'")
    assert from_yaml(to_yaml(config)) == plain(config)
    assert differences(from_yaml(to_yaml(config)), config) == []
    assert yaml.safe_load(to_yaml(config))["scan"]["compression"] == "weighted"


def test_differences_are_named_with_both_values() -> None:
    before = make()
    after = make("scan.rank=8", "factors.damping.relative=0.5", "seed=3")
    assert differences(plain(before), after) == [
        "factors.damping.relative: 0.1 -> 0.5",
        "scan.rank: 32 -> 8",
        "seed: 0 -> 3",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.num_workers=4", "cluster.deadline_s=5", "cluster.placement=SPREAD"],
        ["model.sharding=zero3", "model.gradient_checkpointing=true", "model.zero.max_live_parameters=1"],
        ["scan.allow_quarantined=3", "scan.max_nonfinite=0.5", "scan.query_group_bytes=1", "scan.refine_group_bytes=1"],
        ["corpus.path=moved.jsonl", "queries.path=moved.jsonl", "output=elsewhere", "factors.path=elsewhere"],
    ],
)
def test_run_time_fields_may_differ(overrides: list[str]) -> None:
    assert differences(make(), make(*overrides)) == []


def test_the_fingerprint_is_of_values_not_of_their_types_or_order() -> None:
    assert fingerprint({"a": 1, "b": (2, Sides.both)}) == fingerprint({"b": [2, "both"], "a": 1})
    assert fingerprint(make()) == fingerprint(plain(make()))
    assert fingerprint(make()) != fingerprint(replace(make(), seed=1))


def test_each_cell_of_a_sweep_writes_below_the_output(here: Path) -> None:
    outputs = set()
    for rank in (8, 16):
        config = from_hydra(composed(*NEEDED, f"scan.rank={rank}"), cell=f"rank-{rank}")
        assert Path(config.output).parent == here / "out"
        assert config.factors.path == f"{config.output}/factors"
        outputs.add(config.output)
    assert len(outputs) == 2


def test_a_stored_configuration_never_interpolates() -> None:
    """A run folder may be a stranger's: `${oc.env:...}` in it would send the environment to an address of theirs."""
    text = to_yaml(make()).replace("path: ", "path: http://127.0.0.1/${oc.env:HOME}/", 1)
    with pytest.raises(ConfigError, match="holds an interpolation"):
        from_yaml(text)


def test_keys_that_were_renamed_are_taken_under_their_old_names() -> None:
    assert make("cluster.silence_s=7").cluster.heartbeat_timeout_s == 7
    old = to_yaml(make("cluster.heartbeat_timeout_s=7")).replace("heartbeat_timeout_s", "silence_s")
    assert stored_config(old, "/elsewhere").cluster.heartbeat_timeout_s == 7
