"""Sweeps before anything runs: what the cells are called, and that no two write to one folder."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.config.sweep import cell_name, sweep_cells, swept_keys
from infscan.errors import ConfigError

WORDS = st.text("abcXYZ019-_./=, é", min_size=1, max_size=30)
OVERRIDES = st.lists(st.builds("model.path={}".format, WORDS) | st.builds("seed={}".format, st.integers()), max_size=4)


def test_the_cells_are_every_combination() -> None:
    cells = sweep_cells(
        ["-m", "model=pythia-70m,pythia-160m", "queries.path=a.jsonl,b.jsonl", "output=runs/x", "+hydra.launcher.n=0"]
    )
    assert {tuple(cell) for cell in cells} == {
        (f"model={model}", f"queries.path={queries}", "output=runs/x")
        for model, queries in itertools.product(("pythia-70m", "pythia-160m"), ("a.jsonl", "b.jsonl"))
    }
    assert len({cell_name(cell) for cell in cells}) == 4


@pytest.mark.parametrize("arguments", [["model=a,b"], ["--cfg", "job"], ["-m", "model=[unclosed"], []])
def test_what_is_no_sweep_has_no_cells(arguments: list[str]) -> None:
    """Nor has what Hydra will refuse in its own words."""
    assert sweep_cells(arguments) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cluster.num_workers=1,2"], "differ in cluster.num_workers=1, cluster.num_workers=2 alone, which changes no"),
        (["cluster=laptop,gpu"], "differ in cluster=gpu, cluster=laptop alone"),
        (["queries.path=a.jsonl,b.jsonl,a.jsonl"], "they are the same"),
    ],
)
@pytest.mark.parametrize("flag", ["-m", "--multirun", "hydra.mode=MULTIRUN"])
def test_two_cells_that_would_write_to_one_folder_are_refused(flag: str, arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep_cells([flag, "model=demo", *arguments])


def test_cells_with_outputs_of_their_own_may_differ_in_nothing_else() -> None:
    assert len(sweep_cells(["-m", "model=demo", "output=runs/a,runs/b"])) == 2


@given(OVERRIDES, st.randoms())
def test_a_cell_is_named_after_what_it_asks(overrides: list[str], random: Random) -> None:
    """Whatever their order, and wherever and by how many workers it is done; a name that any disk takes."""
    shuffled = [*overrides, "cluster.num_workers=7", "output=elsewhere"]
    random.shuffle(shuffled)
    name = cell_name(overrides)
    assert cell_name(shuffled) == name
    assert len(name) < 100
    assert not set(name) & set("/\\: ")
    assert not name.startswith((".", "-"))


@given(OVERRIDES, OVERRIDES)
def test_cells_that_ask_for_different_things_have_different_names(one: list[str], other: list[str]) -> None:
    assert (cell_name(one) == cell_name(other)) == (sorted(one) == sorted(other))


@given(OVERRIDES, OVERRIDES)
def test_the_keys_that_a_sweep_varies_are_the_first_of_a_name(fixed: list[str], varied: list[str]) -> None:
    cells = [[*fixed, f"scan.rank={rank}", *varied] for rank in (8, 32)]
    assert swept_keys(cells) == ["scan.rank"]
    for cell in cells:
        name = cell_name(cell, swept_keys(cells))
        assert name.startswith("scan.rank=")
        # The digest is the same, so a sweep that was begun without this order is found again.
        assert name[-8:] == cell_name(cell)[-8:]
