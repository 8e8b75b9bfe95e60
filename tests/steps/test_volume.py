"""Bytes that follow from shapes are those of the files, to the byte."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.results.tensor_files import tensor_bytes, tensors_file_bytes
from infscan.steps.volume import size

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
    assert tensors_file_bytes(shapes, facts) == len(tensor_bytes(tensors, facts))


def test_bytes_are_said_in_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1024, 40_000_000, 722 * 10**9, 2**41)] == [
        "0 bytes", "999 bytes", "1 KiB", "38.1 MiB", "672 GiB", "2 TiB",
    ]  # fmt: skip
