"""Bytes that follow from shapes are those of the files, to the byte; a disk that they do not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.corpus.plan import Selection
from infscan.errors import StorageError
from infscan.influence.layers import Layer
from infscan.queries import Part, Query
from infscan.results.tensor_files import tensor_bytes, tensors_file_bytes
from infscan.steps.factor_files import FactorsPlan, layer_groups, partial_bytes
from infscan.steps.volume import check_disk_for_factors, check_disk_for_scan, factor_files, scan_bytes, size
from infscan.storage import Store
from tests.steps.runs import small_run

DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32}


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(st.sampled_from("abcXYZ.|_0189"), min_size=1, max_size=40),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 12), max_size=3).map(tuple)),
        min_size=1,
        max_size=8,
    ),
    facts=st.dictionaries(st.sampled_from(["digest", "tokens", "fingerprint"]), st.text("0123456789abcdef")),
)
def test_a_file_of_tensors_has_the_bytes_that_its_shapes_say(
    shapes: dict[str, tuple[str, tuple[int, ...]]], facts: dict[str, str]
) -> None:
    tensors = {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in shapes.items()}
    assert tensors_file_bytes(shapes, facts) == len(tensor_bytes(tensors, facts, "A/layer.safetensors"))


def test_bytes_are_said_in_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1024, 40_000_000, 722 * 10**9, 2**41)] == [
        "0 bytes", "999 bytes", "1 KiB", "38.1 MiB", "672 GiB", "2 TiB",
    ]  # fmt: skip


QUERIES = [Query(f"q{number}", (Part((5, 6, 7), (2,)),)) for number in range(10)]
LAYERS = (Layer("up", 400, 100, False, "up"), Layer("down", 100, 400, False, "down"))


def test_a_disk_that_the_scan_would_fill_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path, "scan.scores=all")
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1 << 20)
    with pytest.raises(StorageError, match=r"output=.*/run: about \d+.*dense scores 38\.1 MiB.* 1 MiB free.*top"):
        check_disk_for_scan(config, LAYERS, QUERIES, 1_000_000, 512, 1.0, Store(config.output))
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1 << 40)
    check_disk_for_scan(config, LAYERS, QUERIES, 1_000_000, 512, 1.0, Store(config.output))
    # An object store has no bound that could be asked for.
    monkeypatch.setattr(Store, "free_bytes", lambda self: None)
    check_disk_for_scan(config, LAYERS, QUERIES, 1_000_000, 512, 1.0, Store(config.output))


def test_what_is_done_already_needs_no_space_again(tmp_path: Path) -> None:
    config = small_run(tmp_path, "scan.scores=all")
    whole, half = (scan_bytes(config, LAYERS, 10, 1_000_000, 512, left) for left in (1.0, 0.5))
    assert half["dense scores"] == whole["dense scores"] / 2
    assert half["candidates"] <= whole["candidates"] / 2 + 1


def test_a_disk_that_the_factors_would_fill_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path)
    plan = FactorsPlan({}, LAYERS, Selection.of(100), ((0, 50), (50, 100)), (("up", "down"),), 512)
    finished = 4 * 2 * (2 * (400**2 + 100**2) + 100 * 400)
    written = factor_files(config, LAYERS, [(50, 256), (50, 256)], 100)
    # The matrices, and beside them labels, eigenvalues and headers.
    assert finished < written.bytes < 1.2 * finished
    needed = plan.partial_bytes() + written.bytes
    monkeypatch.setattr(Store, "free_bytes", lambda self: needed)
    check_disk_for_factors(config, plan, Store(config.factors.path or ""))
    monkeypatch.setattr(Store, "free_bytes", lambda self: needed - 1)
    with pytest.raises(StorageError, match=r"factors\.path=.*partial sums .*free some space"):
        check_disk_for_factors(config, plan, Store(config.factors.path or ""))


def test_free_bytes_are_those_of_the_disk(tmp_path: Path) -> None:
    free = Store(str(tmp_path / "not" / "there" / "yet")).free_bytes()
    assert free is not None
    assert free > 0
    assert Store("memory://anywhere").free_bytes() is None


def test_a_head_with_a_span_is_nowhere_a_matrix_of_its_vocabulary(tmp_path: Path) -> None:
    head = Layer("lm_head", 128_000, 64, False, "lm_head", span=256)
    assert partial_bytes([head], 1, 2) == 4 * 2 * (64**2 + 128_000 * 384 + 1 + 257 * 64)
    assert layer_groups([head], 1 << 30) == (("lm_head",),)
    written = factor_files(small_run(tmp_path), [head], [(50, 256), (50, 256)], 100)
    # Reflectors and their weights, A and its eigenvectors, Lambda's rows; and headers, labels, eigenvalues.
    finished = 4 * (128_000 * 256 + 256**2 + 2 * 64**2 + 257 * 64)
    assert finished < written.bytes < 1.01 * finished
