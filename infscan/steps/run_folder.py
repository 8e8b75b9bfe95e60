"""A run's folders: its output and its factors, claimed for one configuration and driven by one process at a time."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from infscan.config import Config, differences, from_yaml, plain, to_yaml
from infscan.config.identity import leaves
from infscan.engine.lease import Lease
from infscan.errors import ConfigError, RunError, StorageError
from infscan.results.manifest import SUCCESS
from infscan.steps.factor_files import COMPLETE
from infscan.steps.sizes import as_stored
from infscan.storage import MissingError, Store, remember_written

log = logging.getLogger("infscan")

CONFIG = "config.yaml"
PLAN = "plan.json"
# What a run that failed before it had a plan may leave.
_OWN = {
    "driver.json",
    "corpus",
    "factors",
    "stages",
    "tfidf",
    "shards.parquet",
    "candidates",
    "candidates.parquet",
    "sieve",
}
# Where Ray unpacks what `ray job submit --working-dir` uploads, below its session's folder.
_SUBMITTED = "runtime_resources/working_dir_files"


@dataclass(frozen=True)
class RunFolder:
    """Where one stage's results and factors are stored."""

    store: Store
    factors: Store
    # Of the whole run: every stage's driver is the same.
    lease: Lease

    @property
    def factors_apart(self) -> bool:
        """Whether factors are stored elsewhere than in the output."""
        return not self.factors.uri.startswith(f"{self.store.uri}/")

    @property
    def finished(self) -> bool:
        return self.store.exists(SUCCESS)

    def fence(self) -> None:
        """Raises RunError where this driver may not publish or remove anything any more: another one took over."""
        self.lease.confirm()

    def check_writable(self) -> None:
        """Write to the output, and to factors.path where factors are to be put there.

        Raises:
            ConfigError: where one is a folder that Ray will remove.
            StorageError: where one cannot be written: permissions, credentials, a full disk, a server that does not
                answer.
        """
        _refuse_submitted("output", self.store)
        self.store.check_writable()
        if self.factors_apart and not self.factors.exists(COMPLETE):
            _refuse_submitted("factors.path", self.factors)
            self.factors.check_writable()

    def check_claim(self, config: Config) -> None:
        """Refuse an output that holds work of other settings, naming each field that differs.

        Raises:
            RunError: where it does. Settings of a run that failed before it kept anything bind nobody.
        """
        if not self.store.exists(PLAN):
            return
        try:
            before = from_yaml(self.store.read(CONFIG).decode(errors="replace"))
        except MissingError:
            raise RunError(
                f"{self.store.uri} has a {PLAN} and no {CONFIG}; restore it, or give another output=..."
            ) from None
        except ConfigError as error:
            raise RunError(
                f"{self.store.uri}/{CONFIG} is damaged ({error}); restore it, or give another output=..."
            ) from None
        changed = differences(before, plain(as_stored(config, before)))
        if changed:
            raise RunError(
                f"{self.store.uri} belongs to other settings ({'; '.join(changed)}). Resume it with its own, "
                "or give another output=..."
            )

    def kept(self) -> dict[str, Any] | None:
        """The settings of what is there already; None where nothing is."""
        try:
            return from_yaml(self.store.read(CONFIG).decode(errors="replace")) if self.store.exists(PLAN) else None
        except (MissingError, ConfigError):
            # `check_claim` says so.
            return None

    def pinned(self, config: Config) -> Config:
        """The configuration with hub ids at the commits that the run was planned with, wherever branches lead by now.

        An id or a branch that the run was not begun with stays as it is: `make_plan` says what is another.
        """
        before = self.kept()
        try:
            made_by = self.store.read_json(PLAN).get("made_by", {}) if before else {}
            was = {key: value for key, value in leaves(before or {}) if isinstance(value, str | None)}
        except (StorageError, AttributeError):
            return config
        model, stages = config.model, list(config.stages)
        commit = made_by.get("model_revision")
        if commit and (was.get("model.path"), was.get("model.revision")) == (model.path, model.revision):
            model = replace(model, revision=commit)
        later = range(config.scan.stage, len(stages))
        for number, commit in zip(later, made_by.get("later_revisions", []), strict=False):
            key, stage = f"stages.{number}", stages[number]
            if commit and (was.get(f"{key}.model"), was.get(f"{key}.revision")) == (stage.model, stage.revision):
                stages[number] = replace(stage, revision=commit)
        return replace(config, model=model, stages=stages)

    def claim(self, config: Config) -> None:
        """Write config.yaml, now that there is something to keep: before the plan, and once all inputs were read."""
        if not self.store.exists(PLAN):
            data = to_yaml(config).encode()
            self.store.write(CONFIG, data)
            remember_written(data)
        self.check_claim(config)

    def others(self) -> list[str]:
        """Names in a local output that infscan does not make, where no run was there before."""
        names = self.store.top_names()
        return [] if PLAN in names or CONFIG in names else [name for name in names if name not in _OWN]

    def sweep(self) -> None:
        """Remove what earlier processes that died were writing to the output and to the factors."""
        removed = self.store.sweep() + (self.factors.sweep() if self.factors_apart else 0)
        if removed:
            log.info("storage     %d unfinished files of earlier processes removed", removed)


def open_folder(config: Config, lease: Lease | None = None) -> RunFolder:
    """A configuration's folders, tried by writing. lease: of the run that it is a stage of."""
    store = Store(config.output)
    factors = Store(config.factors.path or f"{config.output}/factors")
    folder = RunFolder(store, factors, lease or Lease(store, config.cluster.lease_s))
    folder.check_writable()
    return folder


def _refuse_submitted(key: str, store: Store) -> None:
    folder = store.local_path()
    if folder is not None and _SUBMITTED in folder.as_posix():
        raise ConfigError(
            f"{key}={store.uri} is in the submitted job's copy of the working folder, which Ray removes; give an "
            "address on object storage (s3://...), or the whole path of a folder that every node has."
        )
