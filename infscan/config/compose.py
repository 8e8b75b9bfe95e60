"""From what Hydra composed, or a typed `Config`, to checked settings. With `commands` and `sweep` all that knows
Hydra."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from infscan.config.checks import check
from infscan.config.identity import leaves, plain
from infscan.config.inherit import inherit
from infscan.config.paths import absolute, stage_output
from infscan.config.schema import Config, CorpusConfig
from infscan.errors import ConfigError

JobT = TypeVar("JobT")
ConfigT = TypeVar("ConfigT", bound=Config)


def from_hydra(cfg: DictConfig, unused: tuple[str, ...] = (), cell: str | None = None) -> Config:
    """Turn composed settings into a checked `Config`: what is not given is inherited, local paths become absolute.

    unused: mandatory keys that this command does not read; they may be missing.
    cell: in a sweep, the name of this cell's folder below `output`.

    Raises:
        ConfigError: for a mandatory key without a value, or an impossible one.
    """
    cfg = inherited(cfg)
    if OmegaConf.select(cfg, "queries.prompt") is not None:
        unused = (*unused, "queries.path")
    _refuse_missing([key for key in _missing(cfg) if key not in unused])
    for key in unused:
        if OmegaConf.is_missing(*_parent(cfg, key)):
            OmegaConf.update(cfg, key, "")
    config = cast(Config, _to_object(cfg))
    check(config, unused)
    config = config.at_stage(config.scan.stage)
    if cell is not None:
        config.output = f"{config.output.rstrip('/')}/{cell}"
    _settle_paths(config)
    return config


def parse_job(cfg: DictConfig, kind: type[JobT]) -> JobT:
    """The settings of a command that is no run, such as explain or report: `cfg` was composed of the schema of `kind`.

    Raises:
        ConfigError: for a mandatory key without a value, or a value of another type.
    """
    _refuse_missing(_missing(cfg))
    job = _to_object(cfg)
    assert isinstance(job, kind)
    return job


def typed(kind: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Plain values as settings of a kind; what they do not give is inherited.

    Raises:
        ConfigError: for a key that there is not, or a value of another type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), values)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from None
    return cast(ConfigT, _to_object(inherited(cast(DictConfig, merged))))


def inherited(cfg: DictConfig) -> DictConfig:
    """The same settings with everything inherited that is not given (`infscan.config.inherit`).

    Raises:
        ConfigError: where a value refers to one that there is not.
    """
    try:
        values = cast("dict[str, Any]", plain(OmegaConf.to_container(cfg, resolve=True)))
        inherit(values)
        # Labels of several corpora are the user's own keys.
        open_cfg = cfg.copy()
        OmegaConf.set_struct(open_cfg, False)
        return cast(DictConfig, OmegaConf.merge(open_cfg, values))
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from None


def sentence(error: Exception) -> str:
    """The first line of a library's error, which says what is wrong, with the key; the rest names its internals."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key and key not in first else first


def _settle_paths(config: Config) -> None:
    """Absolute local paths, since workers run in other folders; factors that are not given a place get one."""
    config.output = absolute(config.output)
    config.model.path = absolute(config.model.path, only_existing=True)
    if config.model.zero.offload_path:
        config.model.zero.offload_path = absolute(config.model.zero.offload_path)
    config.queries.path = absolute(config.queries.path) if config.queries.path else ""
    if config.scan.candidates_from is not None:
        config.scan.candidates_from = absolute(config.scan.candidates_from)
    for corpus in (config.corpus, config.factors.corpus):
        _settle_corpus(corpus)
    config.factors.path = absolute(config.factors.path) if config.factors.path else f"{config.output}/factors"
    for number, stage in enumerate(config.stages, start=1):
        stage.model = absolute(stage.model, only_existing=True)
        for corpus in (stage.corpus, stage.factors.corpus):
            _settle_corpus(corpus)
        own = f"{stage_output(config.output, number)}/factors"
        stage.factors.path = absolute(stage.factors.path) if stage.factors.path else own


def _settle_corpus(corpus: CorpusConfig) -> None:
    if corpus.path:
        corpus.path = absolute(corpus.path)
    corpus.paths = {label: absolute(path) for label, path in sorted(corpus.paths.items())}


def _missing(cfg: DictConfig) -> list[str]:
    """Mandatory keys without a value; not those that would inherit another one of them."""
    found = [key for key, value in leaves(OmegaConf.to_container(cfg, resolve=False)) if value == MISSING]
    return [key for key in found if key.replace("factors.corpus.", "corpus.") not in found or "factors." not in key]


def _parent(cfg: DictConfig, key: str) -> tuple[Any, str]:
    group, _, name = key.rpartition(".")
    return (OmegaConf.select(cfg, group) if group else cfg), name


def _refuse_missing(keys: list[str]) -> None:
    if keys:
        raise ConfigError(f"{', '.join(keys)}: no value given. Add {' '.join(f'{key}=...' for key in keys)}.")


def _to_object(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from None
