"""docs/families.md is what the families do: right against plain autograd, or refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model import zoo
from tests.model.families_page import page, row

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
# One of every kind: attention's variants, mixtures in every layout, states beside attention, wrappers, refusals.
FEW = ("bert", "bloom", "deepseek_v3", "gemma3", "gpt_oss", "jamba", "lfm2", "llama4_text", "qwen2_5_vl", "qwen3_moe")


@pytest.mark.parametrize("family", FEW)
def test_a_few_families_are_as_the_page_says(family: str, tmp_path: Path) -> None:
    assert str(row(family, tmp_path)) in PAGE.read_text()


def test_the_page_promises_enough() -> None:
    lines = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert {line[0].removeprefix("| ") for line in lines[1:]} == set(zoo.FAMILIES)
    assert sum(line[1] == "right" for line in lines) >= 60
    assert not any("WRONG" in cell for line in lines for cell in line)


@pytest.mark.slow
def test_all_families_are_as_the_page_says() -> None:
    assert page() == PAGE.read_text()
