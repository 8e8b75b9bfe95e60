"""Whatever a path leads to is changed under a run: the tables are an undisturbed run's, or the run ends and says it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infscan.config import Config
from infscan.errors import InfscanError
from infscan.results.read import read_scores, read_summary, read_top
from infscan.steps import publish as publishing
from infscan.steps import scan as scanning
from tests.steps.runs import answer_here, in_process, small_run, tiny_model, token_corpus

SHARDS = 5


class Interrupt(BaseException):
    """The driver is gone: no code may take it for an error."""


def at_shard(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None], *, kill_rank: bool = False) -> None:
    """Act once `number` shards are done; kill_rank: and have the rank die, so that another is loaded."""
    add, done = scanning._Tally.add, []

    def added(tally: scanning._Tally, shard: int, result: scanning.ShardResult) -> None:
        add(tally, shard, result)
        done.append(shard)
        if len(done) == number:
            act()
            if kill_rank:
                tally.run.executor.close()

    patch.setattr(scanning._Tally, "add", added)


def interrupt() -> None:
    raise Interrupt


def stopped(config: Config, shards: int = 2) -> None:
    """A run whose driver died after so many shards."""
    with pytest.MonkeyPatch.context() as patch:
        at_shard(patch, shards, interrupt)
        with pytest.raises(Interrupt):
            answer_here(config)


def in_place(old: Path, new: Path) -> None:
    """Overwrite a file, its times kept as `touch -r` and `rsync -t` do."""
    times = os.stat(old)
    with open(old, "r+b") as file:
        file.write(new.read_bytes())
    os.utime(old, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_a_model_folder_that_is_overwritten_before_a_rank_is_rebuilt(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path)
    other = tiny_model(tmp_path / "other", seed=1)
    weights = tmp_path / "model" / "model.safetensors"
    at_shard(patch, 2, lambda: in_place(weights, other / "model.safetensors"), kill_rank=True)
    with pytest.raises(InfscanError, match=r"model.*is not the one that the run was planned with"):
        answer_here(config)


def test_a_model_folder_that_is_overwritten_before_it_is_loaded_in_another_dtype(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path, "scan.refine_dtype=float64")
    other = tiny_model(tmp_path / "other", seed=1)
    weights = tmp_path / "model" / "model.safetensors"
    at_shard(patch, SHARDS, lambda: in_place(weights, other / "model.safetensors"))
    with pytest.raises(InfscanError, match=r"model.*is not the one that the run was planned with"):
        answer_here(config)


def replaced_corpus(tmp_path: Path, *overrides: str) -> tuple[Config, Callable[[], None]]:
    """A run over a prepared corpus, and what puts another prepared corpus in its place."""
    for name, seed in (("first", 0), ("second", 7)):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        source = token_corpus(tmp_path / f"{name}.jsonl", 40, seed=seed)
        made = small_run(tmp_path, f"corpus.path={source}", f"output={tmp_path / name}")
        answer_here(made)

    def replace() -> None:
        shutil.rmtree(tmp_path / "first" / "corpus")
        shutil.copytree(tmp_path / "second" / "corpus", tmp_path / "first" / "corpus")

    return small_run(tmp_path, f"corpus.path={tmp_path / 'first' / 'corpus'}", *overrides), replace


def test_a_prepared_corpus_that_is_replaced_before_a_rank_is_rebuilt(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    config, replace = replaced_corpus(tmp_path)
    at_shard(patch, 2, replace, kill_rank=True)
    with pytest.raises(InfscanError, match=r"first/corpus.*is not the one that the run was planned with"):
        answer_here(config)


def array_run(tmp_path: Path, seed: int) -> tuple[Config, Path]:
    """A run over a token array, and another array of the same size."""
    for name, number in (("tokens.npy", seed), ("other.npy", seed + 1)):
        tokens = np.random.default_rng(number).integers(1, 97, 40 * 64).astype(np.uint16)
        np.save(tmp_path / name, tokens)
    config = small_run(
        tmp_path,
        f"corpus.path={tmp_path / 'tokens.npy'}",
        "corpus.tokens_field=null",
        "corpus.packing=concat",
        "corpus.sequence_length=64",
    )
    return config, tmp_path / "other.npy"


@pytest.mark.parametrize("times_kept", [False, True])
def test_a_token_array_that_is_overwritten_during_the_scan(
    tmp_path: Path, patch: pytest.MonkeyPatch, times_kept: bool
) -> None:
    config, other = array_run(tmp_path, 0)
    tokens = tmp_path / "tokens.npy"

    def overwrite() -> None:
        in_place(tokens, other) if times_kept else tokens.write_bytes(other.read_bytes())

    at_shard(patch, 2, overwrite)
    with pytest.raises(InfscanError, match=r"tokens\.npy.*changed under the run"):
        answer_here(config)


def test_a_driver_that_slept_while_another_finished_the_run_publishes_nothing(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path)
    twin = small_run(tmp_path, f"output={tmp_path / 'twin'}")
    answer_here(twin)
    scan_task = scanning.scan_task

    def poisoned(worker: object, task: scanning.ScanTask, *rest: object) -> object:
        if task.shard == "shard-000003":
            raise ValueError("poison")
        return scan_task(worker, task, *rest)  # type: ignore[arg-type]

    asked, slept = publishing.asked, []

    def sleep(*arguments: object) -> object:
        about = asked(*arguments)  # type: ignore[arg-type]
        if not slept:
            slept.append(True)
            # While this driver sleeps, another takes the run over for dead, and finishes it.
            (tmp_path / "run" / "driver.json").unlink()
            patch.setattr(scanning, "scan_task", scan_task)
            answer_here(config)
        return about

    patch.setattr(scanning, "scan_task", poisoned)
    patch.setattr(publishing, "asked", sleep)
    with pytest.raises(InfscanError, match=r"taken over|driver\.json is gone"):
        answer_here(in_process(config))
    assert slept
    assert read_top(config.output).equals(read_top(twin.output))
    assert read_summary(config.output)["counts"] == read_summary(twin.output)["counts"]


def other_factors(tmp_path: Path) -> tuple[str, str]:
    source = token_corpus(tmp_path / "elsewhere.jsonl", 40, seed=9)
    fitted = small_run(tmp_path, f"corpus.path={source}", f"output={tmp_path / 'elsewhere'}")
    answer_here(fitted)
    return f"factors.path={fitted.factors.path or fitted.output + '/factors'}", f"factors.corpus.path={source}"


@pytest.mark.parametrize("finished", [False, True])
def test_a_resume_with_other_factors_is_refused_by_name(tmp_path: Path, finished: bool) -> None:
    others = other_factors(tmp_path)
    config = small_run(tmp_path)
    answer_here(config) if finished else stopped(config)
    with pytest.raises(InfscanError, match=r"planned with another factors"):
        answer_here(small_run(tmp_path, *others))


def test_shards_of_another_scan_are_refused_by_their_footers(tmp_path: Path) -> None:
    """A run that earlier versions planned says nothing of its factors: what its shards say is compared."""
    one, other = small_run(tmp_path), small_run(tmp_path, "seed=3", f"output={tmp_path / 'other'}")
    answer_here(other)
    stopped(one)
    name = next((tmp_path / "run" / "shards").iterdir()).name
    shutil.copy(tmp_path / "other" / "shards" / name, tmp_path / "run" / "shards" / name)
    with pytest.raises(InfscanError, match=rf"{name} was made of other inputs or settings"):
        answer_here(one)


def test_a_resume_under_another_version_is_refused_by_name_and_may_be_allowed(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    from infscan.steps import provenance

    config = small_run(tmp_path)
    stopped(config)
    made_by = provenance.made_by()
    patch.setattr(provenance, "made_by", lambda: made_by | {"torch": "9.9.9"})
    with pytest.raises(InfscanError, match=r"torch: .* -> '9\.9\.9'.*resume\.allow_other_versions=true"):
        answer_here(config)
    answer_here(small_run(tmp_path, "resume.allow_other_versions=true"))
    assert any("torch" in warning and "9.9.9" in warning for warning in read_summary(config.output)["warnings"])


def test_a_resume_under_another_arithmetic_is_refused_whatever_is_allowed(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    from infscan.steps import provenance

    config = small_run(tmp_path)
    stopped(config)
    patch.setattr(provenance, "ARITHMETIC", provenance.ARITHMETIC + 1)
    with pytest.raises(InfscanError, match=r"arithmetic"):
        answer_here(small_run(tmp_path, "resume.allow_other_versions=true"))


def test_a_resume_where_auto_means_another_dtype_is_refused(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    from infscan.steps import inputs

    config = small_run(tmp_path, "factors.solver=identity")
    stopped(config)
    patch.setattr(inputs, "resolve_dtype", lambda *_: __import__("torch").bfloat16)
    with pytest.raises(InfscanError, match=r"dtype: 'float32' -> 'bfloat16'"):
        answer_here(config)


@pytest.mark.parametrize("kind", ["A", "S", "Lambda"])
@pytest.mark.parametrize("shards", [0, 2])
def test_factor_files_of_another_fit_with_the_same_shapes_are_refused(tmp_path: Path, kind: str, shards: int) -> None:
    other_factors(tmp_path)
    config = small_run(tmp_path)
    if shards:
        stopped(config, shards)
    else:
        answer_here(config)
        shutil.rmtree(tmp_path / "run" / "shards")
    shutil.copytree(tmp_path / "elsewhere" / "factors" / kind, tmp_path / "run" / "factors" / kind, dirs_exist_ok=True)
    with pytest.raises(InfscanError, match=rf"{kind}/.*is damaged"):
        answer_here(config)


def test_a_part_of_the_scores_that_is_gone_is_made_again(tmp_path: Path) -> None:
    config = small_run(tmp_path, "scan.scores=all")
    answer_here(config)
    whole = read_scores(config.output)
    (tmp_path / "run" / "scores" / "shard-000002.parquet").unlink()
    with pytest.raises(InfscanError, match=r"scores/shard-000002\.parquet is missing"):
        read_scores(config.output)
    answer_here(config)
    assert read_scores(config.output).equals(whole)
    assert pq.read_table(tmp_path / "run" / "scores").num_rows == 40
