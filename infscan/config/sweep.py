"""Sweeps (`-m`): the cells of a command line, and the folder that each has below `output`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from infscan.config.arguments import is_sweep
from infscan.config.identity import fingerprint
from infscan.errors import ConfigError

# What says where a cell's results go, and what changes no result.
_NOT_NAMED = ("output=", "cluster.", "cluster=")
# How a cell's process, wherever a launcher starts it, knows which keys the sweep varies.
SWEPT = "INFSCAN_SWEPT"
_MOST_CHARACTERS = 80
_QUOTED = re.compile(r"([^=]*=)'(.*)'", re.DOTALL)


def this_cell() -> tuple[str, str]:
    """The name of the cell that is being run, and the one that infscan 0.1 gave it."""
    overrides = list(HydraConfig.get().overrides.task)
    return cell_name(overrides, os.environ.get(SWEPT, "").split(",")), cell_name(overrides)


def cell_name(overrides: Sequence[str], swept: Collection[str] = ()) -> str:
    """A folder name for one cell of a sweep: the overrides that vary first, harmless in a path, distinct by a
    digest."""
    cell = sorted(map(_unquoted, (override for override in overrides if not override.startswith(_NOT_NAMED))))
    first = [override for override in cell if key_of(override) in swept]
    rest = [override for override in cell if override not in first]
    readable = re.sub(r"[^A-Za-z0-9_=.,-]+", "-", ",".join([*first, *rest]))[:_MOST_CHARACTERS].strip("-.")
    return f"{readable or 'cell'}-{fingerprint(cell)[:8]}"


def _unquoted(override: str) -> str:
    """An override as it was typed: texts are quoted for Hydra."""
    found = _QUOTED.fullmatch(override)
    return override if found is None else found[1] + found[2].replace("\\'", "'")


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def swept_keys(cells: Sequence[Sequence[str]]) -> list[str]:
    """The keys whose values differ between cells."""
    varied = {override for cell in cells for override in cell if any(override not in other for other in cells)}
    return sorted({key_of(override) for override in varied})


def sweep_cells(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every cell of a command line, checked; [] where it is no sweep.

    What Hydra cannot read is left to it: its refusal becomes a sentence when the cells are composed.

    Raises:
        ConfigError: where two cells would write to one folder.
    """
    if not is_sweep(arguments):
        return []
    words = [word for word in arguments if "=" in word and not word.lstrip("+~").startswith(("-", "hydra.", "hydra/"))]
    try:
        (cells,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    except (HydraException, AssertionError, NotImplementedError):
        return []
    seen: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        outputs = [override for override in cell if override.startswith("output=")]
        before = seen.setdefault(("".join(outputs), cell_name(cell)), cell)
        if before is not cell:
            differ = sorted(set(before) ^ set(cell))
            reason = (
                f"they differ in {', '.join(differ)} alone, which changes no result" if differ else "they are the same"
            )
            raise ConfigError(
                f"-m: two cells of the sweep would write to one folder, {cell_name(cell)}: {reason}. Give one value of "
                "cluster.* and every other value once."
            )
    return cells
