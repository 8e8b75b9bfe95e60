"""Sweeps (`-m`): the cells of a command line, and the folder that each has below `output`."""

from __future__ import annotations

import re

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode

from infscan.config.identity import fingerprint
from infscan.errors import ConfigError

_FLAGS = ("-m", "--multirun")
# What says where a cell's results go, and what changes no result.
_NOT_NAMED = ("output=", "cluster.", "cluster=")


def in_sweep() -> bool:
    """Whether what is being composed, or run, is one cell of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def this_cell() -> str:
    """The name of the cell that is being run."""
    return cell_name(list(HydraConfig.get().overrides.task))


def cell_name(overrides: list[str]) -> str:
    """A folder name for one cell of a sweep: its overrides, harmless in a path, distinct by a digest."""
    cell = [override for override in sorted(overrides) if not override.startswith(_NOT_NAMED)]
    readable = re.sub(r"[^A-Za-z0-9_=.,-]+", "-", ",".join(cell))[:80].strip("-.")
    return f"{readable or 'cell'}-{fingerprint(cell)[:8]}"


def sweep_cells(arguments: list[str]) -> list[list[str]]:
    """The overrides of every cell of a job's command line, checked; [] where it is no sweep.

    What Hydra cannot read is left to it: it says so itself.

    Raises:
        ConfigError: where two cells would write to one folder.
    """
    if not any(argument in _FLAGS or argument == "hydra.mode=MULTIRUN" for argument in arguments):
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
