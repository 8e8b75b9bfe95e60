"""Whatever a key is set to, the settings are accepted, or refused by a sentence of ours, never by another traceback."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import infscan.api
from infscan import cli
from infscan.config import Config, plain
from infscan.config.arguments import read_arguments
from infscan.config.checks import BOUNDS
from infscan.config.commands import command_of, compose
from infscan.config.compose import from_hydra
from infscan.config.identity import leaves
from infscan.errors import ConfigError, InfscanError
from infscan.pipeline import answer
from infscan.results.read import read_summary
from infscan.steps.run import open_run
from infscan.telemetry import shown
from tests.chaos.one_process import without_ray
from tests.steps.runs import in_process, small_run

INTEGERS = [-(2**70), -(2**63) - 1, -(2**63), -1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30]
FLOATS = [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 1e308, -1.5]
STRINGS = [
    *("", " ", ".", "..", "\n", "\0", "a\0b", "\ud800", "\x1b[31m", "\u202egnp.x", "é" * 200, "a" * 300, "a/" * 3000),
    *("~nosuchuser/x", "~nosuchuser", "://", "file://", "x://y", "infscan://demo/../../x", "/dev/null/x", "/proc/1/x"),
    *("${nope}", "${output}", "${oc.env:NO_SUCH_VARIABLE}", "???", "null", "auto", "[", "(?P<", "a{99999999999}"),
]
OTHERS: list[Any] = [[], {}, [1], {"a": 1}, [{}], [{"model": "x"}, {"model": "y"}], True, None, b"bytes"]

values = st.one_of(
    st.sampled_from([*INTEGERS, *FLOATS, *STRINGS, *OTHERS]), st.integers(), st.floats(), st.text(max_size=20)
)


@functools.cache
def composed(staged: bool) -> DictConfig:
    """A scan's settings, which are possible; with two stages, a stage's keys too."""
    given = ["model.path=m", "corpus.path=c.jsonl", "queries.path=q.jsonl", "output=out"]
    if staged:
        given += ["stages=two", "stages.1.model=m", "stages.1.corpus.path=c", "stages.1.alpha=1"]
    return compose(command_of("scan"), read_arguments(command_of("scan"), given))


def keys(staged: bool) -> list[str]:
    return [key for key, _ in leaves(OmegaConf.to_container(composed(staged), resolve=False))]


ALL = [(False, key) for key in keys(False)] + [(True, key) for key in keys(True) if key.startswith("stages.")]


def is_a_sentence(error: InfscanError) -> None:
    said = shown(str(error))
    assert 10 < len(said) < 10_000
    assert "\n" not in said


def settled(cfg: DictConfig, key: str, value: Any) -> Config | None:
    """What a job makes of it: settings; None where Hydra refuses the type, or we do, in a sentence."""
    cfg = copy.deepcopy(cfg)
    try:
        OmegaConf.update(cfg, key, value)
    except OmegaConfBaseException:
        return None
    try:
        return from_hydra(cfg)
    except ConfigError as error:
        return is_a_sentence(error)


@pytest.fixture(scope="module")
def possible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DictConfig]:
    """Settings of a run that would go well, and no Ray behind it."""
    folder = tmp_path_factory.mktemp("possible")
    cfg = OmegaConf.create(plain(small_run(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield OmegaConf.merge(OmegaConf.structured(Config), cfg)


_outputs = itertools.count()


def opened(possible: DictConfig, key: str, value: Any) -> None:
    """Everything that is found out before the first worker starts: it opens, or says in a sentence why not."""
    config = settled(possible, key, value)
    if config is None or "://" in config.output:
        return
    if key != "output":
        config.output = str(Path(config.output).with_name(f"run-{next(_outputs)}"))
    try:
        with open_run(in_process(config)):
            pass
    except InfscanError as error:
        is_a_sentence(error)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ALL), values)
@example((False, "cluster.gpus_per_rank"), float("nan"))
@example((False, "seed"), -1)
@example((False, "stages"), "${output}")
@example((False, "output"), "~nosuchuser/x")
@example((True, "stages.1.alpha"), float("inf"))
def test_a_value_is_settled_or_refused(where: tuple[bool, str], value: Any) -> None:
    staged, key = where
    settled(composed(staged), key, value)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(keys(False)), values)
def test_a_run_opens_or_says_why_not(possible: DictConfig, key: str, value: Any) -> None:
    opened(possible, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("key", keys(False))
def test_every_key_at_every_extreme(possible: DictConfig, key: str) -> None:
    for value in [*INTEGERS, *FLOATS, *STRINGS, *OTHERS]:
        opened(possible, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for staged, key in ALL if staged])
def test_every_key_of_a_stage_at_every_extreme(key: str) -> None:
    for value in [*INTEGERS, *FLOATS, *STRINGS, *OTHERS]:
        settled(composed(True), key, value)


# What a key needs beside it, without which it is refused.
BESIDE = {"scan.sieve_candidates": {"scan.sieve": 1}, "scan.audit_sequences": {"scan.sieve": 1}}
LARGEST = [key for key in keys(False) if key in BOUNDS and not key.startswith(("cluster.", "model."))]


@pytest.mark.slow
@pytest.mark.parametrize("key", LARGEST)
def test_the_whole_job_at_the_most_that_a_key_may_be(possible: DictConfig, tmp_path: Path, key: str) -> None:
    """No number is so large that a phase hangs, fills the memory or overflows: the run ends, or says why it cannot."""
    possible = copy.deepcopy(possible)
    for other, value in BESIDE.get(key, {}).items():
        OmegaConf.update(possible, other, value)
    config = settled(possible, key, min(BOUNDS[key][1], sys.float_info.max))
    assert config is not None
    config = replace(config, output=str(tmp_path / "run"), factors=replace(config.factors, path=str(tmp_path / "f")))
    with without_ray():
        try:
            answer(config)
        except InfscanError as error:
            is_a_sentence(error)
        else:
            assert read_summary(config.output)["counts"]["scanned"]["sequences"] > 0


COMMANDS = {
    "a key alone": "output",
    "nothing behind it": "output=",
    "an unknown group": "model=nosuch",
    "a path for a group": "model=../../etc/passwd",
    "an unknown key": "scan.nosuch=1",
    "an impossible value": "scan.top_k=0",
    "a value of another type": "scan.top_k=many",
    "a key that is added": "+nosuch=1",
    "a key that is taken away": "~scan.rank",
    "a key that is added deep down": "+scan.nosuch=1",
    "a group that is taken away": "~output",
    "a value for a group of keys": "scan.stage={a:1}",
    "a number with very many digits": "seed=" + "9" * 5000,
    "a quote that does not end": "scan.top_k='x",
    "brackets that do not end": "output=[[[[",
    "a resolver that there is not": "output=${nosuch:x}",
    "itself": "output=${output}",
    "a variable that is not set": "output=${oc.env:NO_SUCH_VARIABLE}",
    "a function of the grammar": "scan.rank=int(x)",
    "NaN": "cluster.gpus_per_rank=nan",
    "bytes that are not UTF-8": "output=\udcff",
    "a control character": "model.path=\x1b[31m",
    "a secret": "output=s3://key:hidden-secret@bucket/run",
    "a secret where Hydra would stop": "output=[s3://key:hidden-secret@bucket",
    "an option of Hydra's": "--no-such-option",
    "deep brackets": "output=" + "[" * 500 + "]" * 500,
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_ends_with_a_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needed = ["model.path=m", "corpus.path=c", "queries.path=q", "output=x"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infscan.api, "run_scan", lambda config: pytest.fail("it was accepted"))
    with pytest.raises(SystemExit) as ended:
        cli.main("scan", [*needed, COMMANDS[case]])
    assert ended.value.code == 2
    said = capfd.readouterr()
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert "Traceback" not in said.out + said.err
    assert "hidden-secret" not in said.out + said.err
    assert "\x1b" not in said.err
    assert len(said.err) > 20


def test_a_sweep_writes_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Hydra would write every argument of a sweep to multirun.yaml, before any job looks at them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main("scan", ["-m", "scan.rank=4,8", "output=s3://key:hidden-secret@bucket/run"])
    assert not list(tmp_path.rglob("*"))
    assert "output=*** carries credentials" in capfd.readouterr().err
