"""config.yaml: the settings of a run as its folder keeps them."""

from __future__ import annotations

from typing import Any, TypeVar, cast, overload

import yaml  # type: ignore[import-untyped]

from infscan.config.identity import leaves, plain
from infscan.config.schema import RENAMED, Config
from infscan.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Config)


def to_yaml(config: Config) -> str:
    return cast(str, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def from_yaml(text: str) -> dict[str, Any]:
    """What `to_yaml` wrote. Nothing in it is interpolated: a run folder may come from somebody else.

    Raises:
        ConfigError: for anything else.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"not a configuration ({first_line})") from None
    if not isinstance(value, dict) or not value:
        raise ConfigError("not a configuration (no key)")
    for key, item in leaves(value):
        if "${" in f"{key}{item}":
            raise ConfigError(f"not a configuration ({key} holds an interpolation, which a run never writes)")
    return cast("dict[str, Any]", value)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of an earlier version under the names that they have now."""
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        if name in values.get(group, {}):
            values[group][new.partition(".")[2]] = values[group].pop(name)
    return values


@overload
def stored_config(text: str, output: str) -> Config: ...


@overload
def stored_config(text: str, output: str, kind: type[ConfigT]) -> ConfigT: ...


def stored_config(text: str, output: str, kind: type[Any] = Config) -> Any:
    """What `to_yaml` wrote, as a configuration again; `output` is where the run is now, wherever it was made.

    kind: of the settings, where a command has more than a run's.

    Raises:
        ConfigError: where it is not what this infscan writes.
    """
    # Here and not above: reading tables and running steps needs no OmegaConf.
    from infscan.config.compose import typed

    try:
        config = typed(kind, _renamed(from_yaml(text)))
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if said.startswith("not a conf") else f"not a configuration ({said})") from None
    made_in, config.output = config.output, output
    for factors in (config.factors, *(stage.factors for stage in config.stages)):
        if factors.path and factors.path.startswith(f"{made_in}/"):
            factors.path = output + factors.path.removeprefix(made_in)
    return config
