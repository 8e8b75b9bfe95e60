"""A finished run whose files a disk damaged: what can be made again is, with the same tables; the rest is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from infscan.config import Config
from infscan.errors import CorpusError, DamagedError, FactorsError, InfscanError, RunError, StorageError
from infscan.pipeline import answer
from infscan.results.read import read_layers, read_sequences, read_summary, read_tokens, read_top
from tests.chaos.one_process import without_ray
from tests.steps.runs import small_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("whole")
    with without_ray():
        answer(small_run(folder))
        yield folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Config:
    shutil.copytree(finished, tmp_path / "copy")
    # The corpus's files are listed with their time of change, which a copy keeps; their place is the old one.
    return small_run(
        finished, f"output={tmp_path / 'copy' / 'run'}", f"factors.path={tmp_path / 'copy' / 'run/factors'}"
    )


def tables(uri: str) -> list[object]:
    return [read(uri).to_pylist() for read in (read_top, read_sequences, read_layers, read_tokens)]


def flip(path: Path, at: float) -> None:
    """Change a byte at this share of the file."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def test_damaged_shards_and_query_batches_are_made_again_and_the_tables_stay(finished: Path, run: Config) -> None:
    output = Path(run.output)
    (output / "shards" / "shard-000000.parquet").write_bytes(b"")
    # Of a single byte nothing might be read: those of statistics are not.
    for at in range(30, 60):
        flip(output / "shards" / "shard-000001.parquet", at / 100)
    cut = output / "shards" / "shard-000002.parquet"
    cut.write_bytes(cut.read_bytes()[:-50])
    (batch,) = (output / "queries").glob("batch-*.safetensors")
    flip(batch, 0.9)
    answer(run)
    assert tables(run.output) == tables(str(finished / "run"))
    warnings = " ".join(read_summary(run.output)["warnings"])
    for name in ("shard-000000", "shard-000001", "shard-000002", batch.name):
        assert name in warnings


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("plan.json", RunError),
        ("config.yaml", InfscanError),
        ("factors/plan.json", FactorsError),
        ("factors/factors.json", DamagedError),
    ],
)
def test_a_damaged_plan_is_refused_by_name(run: Config, name: str, kind: type[InfscanError]) -> None:
    path = Path(run.output) / name
    text = path.read_text()
    for damaged in (text.replace("40", "41", 1).replace("mlp", "mlq", 1), text[: len(text) // 2], ""):
        path.write_text(damaged)
        with pytest.raises((kind, StorageError, RunError), match=name.rpartition("/")[2] if "json" in name else None):
            answer(run)
    path.write_text(text)


def test_factors_that_are_cut_off_are_refused_before_a_worker_starts(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infscan.engine.ray_executor.Pool", lambda *_: pytest.fail("a worker was started"))
    path = next((Path(run.output) / "factors" / "S").iterdir())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DamagedError, match=rf"S/{path.name} is damaged .*fit again"):
        answer(run)


def test_a_flipped_bit_in_the_factors_or_the_corpus_is_never_computed_with(run: Config) -> None:
    output = Path(run.output)
    (batch,) = (output / "queries").glob("batch-*.safetensors")
    batch.unlink()
    path = next((output / "factors" / "Lambda").iterdir())
    flip(path, 0.9)
    with pytest.raises(DamagedError, match=rf"Lambda/{path.name} is damaged"):
        answer(run)
    flip(path, 0.9)
    flip(output / "corpus" / "part-00000.parquet", 0.2)
    (output / "shards" / "shard-000003.parquet").unlink()
    (output / "approximation.json").unlink()
    with pytest.raises((CorpusError, RunError), match=r"quarantined|part-00000"):
        answer(run)
    note = output / "quarantine" / "shard-000003.json"
    assert not note.exists() or "part-00000.parquet" in note.read_text()
