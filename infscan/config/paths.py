"""Addresses in settings: local paths made absolute, and the folders of stages."""

from __future__ import annotations

import os
from pathlib import Path

from infscan.errors import ConfigError


def absolute(path: str, *, only_existing: bool = False) -> str:
    """A local path made absolute, since workers run in other folders; URIs (and hub ids) stay as they are.

    Raises:
        ConfigError: for the home of a user that there is not.
    """
    if "://" in path:
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = path.partition("/")[0]
        raise ConfigError(
            f"{path}: this machine has no user {name[1:]!r}; write the whole path, or ./{name} for a folder."
        )
    return path if only_existing and not os.path.exists(expanded) else str(Path(expanded).absolute())


def stage_output(output: str, number: int) -> str:
    """Where a run keeps what it makes of a stage that it does not scan."""
    return f"{output}/stages/{number}"
