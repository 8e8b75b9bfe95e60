"""A run: one configuration, one output, one set of workers. What is known before any worker starts is checked here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any

import ray
import torch

from infscan.config import Config, Dtype, LogFormat, differences, fingerprint, from_yaml, plain, stage_output, to_yaml
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.errors import ConfigError, RunError
from infscan.model.architecture import Architecture, check_agree, describe, load_config, model_folder
from infscan.model.load import resolve_dtype
from infscan.passes.query_batch import in_dtype
from infscan.passes.rank import RankSettings
from infscan.queries import Query, queries_fingerprint, read_queries
from infscan.results.publish import SUCCESS
from infscan.runtime import preflight
from infscan.runtime.group import RankFacts
from infscan.runtime.lease import Lease
from infscan.runtime.losses import Losses
from infscan.runtime.pool import Pool, connect, gpus_per_rank
from infscan.runtime.prepare import input_files, settings_for
from infscan.runtime.watch import Watch
from infscan.sizing.memory import PassMemory
from infscan.storage import MissingError, Store, storage_faults
from infscan.telemetry import Telemetry, configure_logs

log = logging.getLogger("infscan")

CONFIG = "config.yaml"


class Run:
    """Opened with `with`: inputs checked, the output claimed for this configuration, Ray reached; workers start lazily.

    queries: what is measured, where it need not be read from the query file: a finished run's, opened again.
    later: with stages, a run for every stage after the one that is scanned, in order. Each has its own model, corpus
    and factors, and workers of its own, started and closed while none of another stage are there.

    Raises (on entering):
        InfscanError: for anything wrong with the model, tokenizer, corpus files, queries, output or settings.
        RunError: where another driver works on this output.
    """

    def __init__(
        self,
        config: Config,
        *,
        needs_queries: bool = True,
        queries: Sequence[Query] | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        if telemetry is None:
            configure_logs(run=config.output, json_lines=config.cluster.log_format is LogFormat.json)
        self.config = config
        self.needs_queries = needs_queries
        self.telemetry = telemetry or Telemetry()
        self.watch = Watch(config.output, traced=config.cluster.trace)
        if telemetry is None:
            self.telemetry.listener = self.watch
        self.losses = Losses()
        self._faults_before = storage_faults()
        self.store = Store(config.output)
        self.factors_store = Store(config.factors.path or f"{config.output}/factors")
        self.architecture: Architecture
        self.tokenizer: Tokenizer | None
        self.queries = list(queries or ())
        self.gpus = 0.0
        self.lease = Lease(self.store, config.cluster.lease_s)
        self.later: list[Run] = []
        # What the workers hold the model in, and what those that ended said of themselves.
        self._held = config.model.dtype
        self._ended: list[list[RankFacts]] = []
        self._halvings = 0
        # What a rank of the scan will hold at once, once that is known.
        self.memory: PassMemory | None = None

    def __enter__(self) -> Run:
        self._open()
        if self.needs_queries:
            self._open_later()
            self.queries = self.queries or self._read_queries()
            self._claim()
        self.lease.take()
        self.losses.followed = str(self.lease.followed) if self.lease.followed else None
        try:
            for part in (self, *self.later):
                part._sweep()
            connect(self.config.cluster)
            self.gpus = gpus_per_rank(self.config.cluster)
            preflight.check_capacity(self.config.cluster, self.gpus)
        except BaseException:
            self.lease.release()
            raise
        for stage in self.later:
            stage.queries, stage.gpus, stage.lease = self.queries, self.gpus, self.lease
            stage.losses, stage.watch = self.losses, self.watch
        return self

    def _open_later(self) -> None:
        """Every stage after the scanned one, its model held against the scanned one's."""
        config = self.config
        for number in range(config.scan.stage + 1, len(config.stages) + 1):
            at_stage = replace(config.at_stage(number), output=stage_output(config.output, number))
            stage = Run(at_stage, needs_queries=False, telemetry=self.telemetry.within(f"stage {number} "))
            stage._open()
            check_agree(
                self.architecture, stage.architecture, f"stages.{config.scan.stage - 1}", f"stages.{number - 1}"
            )
            self.later.append(stage)

    def _open(self) -> None:
        """What is known of the inputs, without a worker."""
        config = self.config
        preflight.check_writable(self)
        self.architecture = describe(config.model.path, config.model.tracked)
        self.tokenizer = load_tokenizer(self.architecture.folder)
        for corpus in (config.corpus, config.factors.corpus):
            input_files(corpus)
            settings_for(corpus, self.architecture, self.tokenizer)

    def _read_queries(self) -> list[Query]:
        """Measured at the last stage's model, so read with its tokenizer. By id: the tables are sorted so, and nothing
        depends on the order of the file."""
        last = self.later[-1] if self.later else self
        corpus = last.config.corpus
        queries = read_queries(
            self.config.queries,
            last.tokenizer,
            vocab_size=last.architecture.vocab_size,
            context=last.architecture.context,
            bos_id=settings_for(corpus, last.architecture, last.tokenizer).bos_id if corpus.bos else None,
        )
        return sorted(queries, key=lambda query: query.id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_workers()
        self.lease.release()

    def close_workers(self) -> None:
        """End the worker groups, where there are any; the next pass that asks for them starts new ones."""
        if pool := self.__dict__.pop("pool", None):
            if self.watch.traced:
                self.watch.write_trace(self.store, pool.trace(False))
            pool.close()

    def hold_model_in(self, dtype: Dtype) -> None:
        """Have workers hold the model in `dtype`: those that hold it in another end; the next pass starts new ones."""
        pool: Pool | None = self.__dict__.get("pool")
        if pool and self._resolved(dtype) != self._resolved(self._held):
            self._ended += pool.facts()
            self._halvings += pool.halvings
            self.close_workers()
        self._held = dtype

    def _sweep(self) -> None:
        """Remove what earlier processes that died were writing to the output and to the factors."""
        removed = self.store.sweep() + (self.factors_store.sweep() if self.factors_apart else 0)
        if removed:
            log.info("storage     %d unfinished files of earlier processes removed", removed)

    def _claim(self) -> None:
        """Write config.yaml, or refuse an output that belongs to other settings, naming each field that differs."""
        self.store.create(CONFIG, to_yaml(self.config).encode())
        try:
            before = from_yaml(self.store.read(CONFIG).decode(errors="replace"))
        except MissingError:
            raise RunError(f"{self.store.uri}/{CONFIG} vanished while it was read; run the command again.") from None
        except ConfigError as error:
            raise RunError(
                f"{self.store.uri}/{CONFIG} is damaged ({error}); restore it, or give another output=..."
            ) from None
        changed = differences(before, plain(self.config))
        if changed:
            raise RunError(
                f"{self.store.uri} belongs to other settings ({'; '.join(changed)}). Resume it with its own, "
                "or give another output=..."
            )

    @property
    def factors_apart(self) -> bool:
        """Whether factors lie elsewhere than in the output."""
        return not self.factors_store.uri.startswith(f"{self.store.uri}/")

    @cached_property
    def pool(self) -> Pool:
        """The worker groups; started when the first pass asks for them."""
        model = replace(self.config.model, dtype=self._held)
        settings = RankSettings(model, self.architecture.layers, self.config.sharded, self.lease.store)
        with self.telemetry.phase("workers", self.config.cluster.num_workers, "workers") as phase:
            pool = Pool(self.config.cluster, settings, self.gpus, self.losses, self.lease.check, self.watch)
            phase.advance(units=pool.wait_for_one())
            if self.watch.traced:
                pool.trace(True)
        return pool

    @cached_property
    def dtype(self) -> str:
        """The dtype the model runs in, `auto` resolved: part of what factors are fitted for."""
        return self._resolved(self.config.model.dtype)

    @cached_property
    def refine_dtype(self) -> str:
        """The dtype that candidates are scored again in, `auto` resolved."""
        return self._resolved(self.config.refine_dtype)

    @cached_property
    def query_dtype(self) -> torch.dtype:
        """The dtype that queries are laid out in, as on every rank."""
        return in_dtype(self.config.scan.query_dtype, getattr(torch, self.dtype))

    def _resolved(self, dtype: Dtype) -> str:
        if dtype is not Dtype.auto:
            return dtype.value
        config = load_config(model_folder(self.architecture.folder))
        device = "cuda" if self.gpus else "cpu"
        return str(resolve_dtype(dtype, config, device)).removeprefix("torch.")

    @property
    def query_ids(self) -> tuple[str, ...]:
        return tuple(query.id for query in self.queries)

    @property
    def finished(self) -> bool:
        return self.store.exists(SUCCESS)

    def workers(self) -> dict[str, Any]:
        """What summary.json says of the workers; by rank only where this process started them, and first those that
        ended when the model was to be held in another dtype."""
        cluster = self.config.cluster
        started: Pool | None = self.__dict__.get("pool")
        facts = self._ended + (started.facts() if started else [])
        return {
            "num_workers": cluster.num_workers,
            "ranks_per_worker": cluster.ranks_per_worker,
            "parameters": self.architecture.parameters,
            "rebuilds": len(self.losses.all),
            "losses": [loss.to_json() for loss in self.losses.all],
            "halvings": self._halvings + (started.halvings if started else 0),
            "planned_bytes": vars(self.memory) if self.memory else None,
            "ranks": [[vars(rank) for rank in group] for group in facts],
        }

    def storage_faults(self, workers: dict[str, Any]) -> dict[str, int]:
        """Passing faults of storage by kind: of this process since the run was made, and of the ranks in `workers`."""
        mine = Counter(storage_faults())
        mine.subtract(self._faults_before)
        for rank in (rank for group in workers["ranks"] for rank in group):
            mine.update(rank["storage_faults"])
        return {kind: count for kind, count in sorted(mine.items()) if count}

    def inputs(self) -> dict[str, str | None]:
        """Fingerprints of the run's inputs by content: what lies at a path, not the path."""
        return {
            "model": self.architecture.fingerprint,
            "tokenizer": self.tokenizer.digest if self.tokenizer else None,
            "queries": queries_fingerprint(self.queries),
            # The models that come after, the last of which is asked.
            **({"stages": fingerprint([stage.architecture.fingerprint for stage in self.later])} if self.later else {}),
        }


def shutdown() -> None:
    """Leave Ray; a local one ends."""
    ray.shutdown()
