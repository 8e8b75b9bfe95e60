"""Layer parts: each row's add up to 1, thirds split the blocks, and the average is over queries."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.results.read import read_layers, read_top
from infscan_studies.config import LayersConfig
from infscan_studies.layers import ALL, THIRDS, block_of, by_layer, third_parts, thirds, words
from tests.infscan_studies.builders import top_rows, write_run

NAMES = [f"gpt_neox.layers.{block}.mlp.dense_{kind}" for block in range(3) for kind in ("h_to_4h", "4h_to_h")]


@given(blocks=st.integers(1, 40), per_block=st.integers(1, 3))
def test_thirds_are_in_order_and_differ_by_one_block_at_most(blocks: int, per_block: int) -> None:
    names = [f"model.layers.{block}.mlp.{kind}" for block in range(blocks) for kind in range(per_block)]
    found = thirds(names)
    assert [found[name] for name in names] == sorted((found[name] for name in names), key=THIRDS.index)
    counts = [sum(third == name for third in found.values()) // per_block for name in THIRDS]
    assert sum(counts) == blocks
    assert max(counts) - min(counts) <= 1


def test_a_layer_outside_the_blocks_is_lower_before_them_and_upper_after() -> None:
    found = thirds(["embed_out_in", "h.0.mlp.c_fc", "h.1.mlp.c_fc", "h.2.mlp.c_fc", "lm_head"])
    assert list(found.values()) == ["lower", "lower", "middle", "upper", "upper"]
    assert [block_of(name) for name in ("transformer.h.12.mlp.c_fc", "lm_head", "model.layers.0")] == [12, -1, 0]


def rows(query: str, number: int, margins: list[float]) -> list[dict[str, object]]:
    return [
        {"query_id": query, "sequence_id": number, "layer": layer, "score": score}
        for layer, score in zip(NAMES, margins, strict=True)
    ]


@pytest.fixture
def run(tmp_path: Path) -> str:
    return write_run(
        tmp_path / "run",
        top=[*top_rows("a", "proponent", [0, 1]), *top_rows("b", "proponent", [0])],
        layers=[
            *rows("a", 0, [1, 1, 0, 0, 0, 2]),
            *rows("a", 1, [-1, 3, 0, 0, 0, 0]),
            *rows("b", 0, [0, 0, 5, 5, 0, 0]),
        ],
    )


def test_parts_are_of_absolute_margins_and_every_query_counts_alike(run: str) -> None:
    table = by_layer(read_top(run), read_layers(run), LayersConfig(), seed=0)
    assert third_parts(table, "proponent") == {
        # Of row 0 half is lower and half upper, of row 1 all is lower.
        "a": {"lower": 0.75, "middle": 0.0, "upper": 0.25},
        "b": {"lower": 0.0, "middle": 1.0, "upper": 0.0},
        ALL: {"lower": 0.375, "middle": 0.5, "upper": 0.125},
    }
    average = table.filter(pc.field("query") == ALL)
    assert sum(average["part"].to_pylist()) == pytest.approx(1)
    assert average["signed"].to_pylist()[0] == pytest.approx(0)
    for row in table.to_pylist():
        assert row["low"] <= row["part"] + 1e-12
        assert row["part"] <= row["high"] + 1e-12


def test_only_the_strongest_rows_count(run: str) -> None:
    table = by_layer(read_top(run), read_layers(run), LayersConfig(rows=1), seed=0)
    assert third_parts(table, "proponent")["a"] == {"lower": 0.5, "middle": 0.0, "upper": 0.5}


def test_words_name_the_query_that_is_most_of_a_third(run: str) -> None:
    said = "\n".join(words(by_layer(read_top(run), read_layers(run), LayersConfig(), seed=0)))
    assert "Most middle: b (100%)." in said
    assert "Most lower: a (75%)." in said
