"""From Hydra's composed configuration to a checked `Config`, and config.yaml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from infscan.config.checks import check
from infscan.config.identity import leaves, plain
from infscan.config.schema import Config, CorpusConfig
from infscan.config.sweep import in_sweep, this_cell
from infscan.errors import ConfigError

Asked = TypeVar("Asked")


def from_hydra(cfg: DictConfig, unused: tuple[str, ...] = ()) -> Config:
    """Turn Hydra's composed configuration into a checked `Config`; local paths become absolute.

    In a sweep (`-m`) each cell gets a folder of its own below `output`, named after its overrides.
    unused: mandatory keys that this job does not read; they may be missing.

    Raises:
        ConfigError: for a mandatory key without a value, or an impossible one.
    """
    unresolved = OmegaConf.to_container(cfg, resolve=False)
    missing = [key for key, value in leaves(unresolved) if value == MISSING]
    for key in [key for key in missing if key.endswith("corpus.path") and OmegaConf.select(cfg, f"{key}s")]:
        OmegaConf.update(cfg, key, "")
        missing.remove(key)
    for key in set(missing) & set(unused):
        OmegaConf.update(cfg, key, "")
    missing = [key for key in missing if key not in unused]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no value given. Add {' '.join(f'{key}=...' for key in missing)}.")
    try:
        config = cast(Config, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    check(config, unused)
    config = config.at_stage(config.scan.stage)
    if in_sweep():
        config.output = f"{config.output.rstrip('/')}/{this_cell()}"
    config.output = absolute(config.output)
    config.model.path = absolute(config.model.path, only_existing=True)
    if config.model.zero.offload_path:
        config.model.zero.offload_path = absolute(config.model.zero.offload_path)
    config.queries.path = absolute(config.queries.path) if config.queries.path else ""
    for corpus in (config.corpus, config.factors.corpus):
        _settle_paths(corpus)
    config.factors.path = absolute(config.factors.path) if config.factors.path else f"{config.output}/factors"
    for number, stage in enumerate(config.stages, start=1):
        stage.model = absolute(stage.model, only_existing=True)
        for corpus in (stage.corpus, stage.factors.corpus):
            _settle_paths(corpus)
        own = f"{stage_output(config.output, number)}/factors"
        stage.factors.path = absolute(stage.factors.path) if stage.factors.path else own
    return config


def _settle_paths(corpus: CorpusConfig) -> None:
    """Absolute addresses; a path of its own stands before the several that may be inherited."""
    if corpus.path:
        corpus.path, corpus.paths = absolute(corpus.path), {}
    else:
        corpus.paths = {label: absolute(path) for label, path in sorted(corpus.paths.items())}


def stage_output(output: str, number: int) -> str:
    """Where a run keeps what it makes of a stage that it does not scan."""
    return f"{output}/stages/{number}"


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


def of_finished(cfg: DictConfig, kind: type[Asked]) -> Asked:
    """What a job that looks at finished runs is told: `kind`, of whose schema `cfg` was composed.

    Raises:
        ConfigError: for a mandatory key without a value, or a value that is none.
    """
    missing = [key for key, value in leaves(OmegaConf.to_container(cfg, resolve=False)) if value == MISSING]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no value given. Add {' '.join(f'{key}=...' for key in missing)}.")
    try:
        asked = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    assert isinstance(asked, kind)
    return asked


def stored_config(text: str, output: str) -> Config:
    """What `to_yaml` wrote, as a configuration again; `output` is where the run lies now, wherever it was made.

    Raises:
        ConfigError: where it is not what this infscan writes.
    """
    try:
        config = cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), from_yaml(text))))
    except OmegaConfBaseException as error:
        raise ConfigError(f"not a configuration ({str(error).splitlines()[0]})") from None
    made_in, config.output = config.output, output
    for factors in (config.factors, *(stage.factors for stage in config.stages)):
        if factors.path and factors.path.startswith(f"{made_in}/"):
            factors.path = output + factors.path.removeprefix(made_in)
    return config


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def from_yaml(text: str) -> dict[str, Any]:
    """What `to_yaml` wrote.

    Raises:
        ConfigError: for anything else.
    """
    try:
        value = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"not a configuration ({next(iter(str(error).splitlines()), '')})") from None
    if not isinstance(value, dict) or not value:
        raise ConfigError("not a configuration (no key)")
    return cast("dict[str, Any]", value)
