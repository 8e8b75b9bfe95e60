"""Addresses in settings: local paths made absolute, and the folders of stages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from infscan.errors import ConfigError

if TYPE_CHECKING:
    from infscan.config.schema import Config, CorpusConfig, FactorsConfig

# What stands in a mandatory key that was left out.
_NOT_GIVEN = "???"


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


def addresses(config: Config) -> dict[str, str]:
    """By key, what a run's settings have opened or written besides its output and its query file."""
    found: dict[str, str | None] = {
        "model.path": config.model.path,
        "model.zero.offload_path": config.model.zero.offload_path,
    }
    found |= {**_of_corpus("corpus", config.corpus), **_of_factors("factors", config.factors)}
    for number, stage in enumerate(config.stages):
        key = f"stages.{number}"
        found[f"{key}.model"] = stage.model
        found |= {**_of_corpus(f"{key}.corpus", stage.corpus), **_of_factors(f"{key}.factors", stage.factors)}
    return {key: address for key, address in found.items() if address and address != _NOT_GIVEN}


def _of_factors(key: str, factors: FactorsConfig) -> dict[str, str | None]:
    return {f"{key}.path": factors.path, **_of_corpus(f"{key}.corpus", factors.corpus)}


def _of_corpus(key: str, corpus: CorpusConfig) -> dict[str, str]:
    return {f"{key}.path": corpus.path, **{f"{key}.paths.{label}": path for label, path in corpus.paths.items()}}
