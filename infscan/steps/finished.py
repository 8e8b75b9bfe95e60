"""A finished run, opened again: for further passes over its model, with its factors and its queries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from infscan.config import (
    ClusterConfig,
    Config,
    CorpusConfig,
    Solver,
    addresses,
    from_yaml,
    stage_output,
    stored_config,
)
from infscan.config.jobs import IndexJob
from infscan.corpus.addressable import AddressableCorpus, is_prepared
from infscan.corpus.tokenizer import is_hub_id
from infscan.errors import ConfigError, RunError
from infscan.queries import MEASURED, choose, read_measured
from infscan.results.manifest import read_manifest
from infscan.results.read import read_summary
from infscan.steps.factor_files import COMPLETE
from infscan.steps.factors import Factors, fit
from infscan.steps.prepare import prepare_corpus
from infscan.steps.run import Run, open_run
from infscan.steps.run_folder import CONFIG
from infscan.steps.solve import solve
from infscan.steps.stages import pull_back_queries
from infscan.storage import Store, check_addresses


def reopen(uri: str, cluster: ClusterConfig, query_ids: Sequence[str] = ()) -> AbstractContextManager[Run]:
    """A finished run, to be entered as from `open_run`; nothing of its folder is changed by it.

    What the run prepared is read where it is; its corpus's files and its query file are not asked for again. The
    model must be where the run found it. query_ids: that are wanted of it.

    Raises:
        QueryError: for a query id that the run does not have.
        RunError: where the run is not finished, its config.yaml is damaged or its factors are gone.
    """
    config = finished_config(uri)
    config.cluster = cluster
    for factors in (config.factors, *(stage.factors for stage in config.stages[config.scan.stage :])):
        if factors.solver is not Solver.identity and not Store(factors.path or "").exists(COMPLETE):
            raise RunError(f"{factors.path} holds no complete factors any more; run infscan scan on {uri} again.")
    queries = read_measured(Store(uri))
    choose(queries, query_ids)
    return open_run(config, queries=queries)


def finished_config(uri: str) -> Config:
    """The settings of a finished run, its corpora where it prepared them.

    Raises:
        RunError: where the run is not finished, or its config.yaml is damaged.
        StorageError: where it names places outside the run's folder, and is neither this user's own nor allowed.
    """
    store = Store(uri)
    read_summary(uri)
    _check_committed(store)
    data = store.read(CONFIG)
    text = data.decode(errors="replace")
    try:
        # A run may be an index too.
        config: Config = stored_config(text, store.uri, IndexJob if "index" in from_yaml(text) else Config)
    except ConfigError as error:
        raise RunError(f"{store.uri}/{CONFIG} is damaged ({error}); restore it.") from None
    _check_addresses(store, data, config, of_corpora=False)
    read_what_was_prepared(config)
    _check_addresses(store, data, config, of_corpora=True)
    return config


def _check_addresses(store: Store, data: bytes, config: Config, *, of_corpora: bool) -> None:
    """Hold what a run's settings name to `infscan.storage.allowed`: the run may be a stranger's.

    of_corpora: the corpora too, once they are settled.
    """
    named = {key: address for key, address in addresses(config).items() if of_corpora or "corpus" not in key}
    check_addresses(f"{store.uri}/{CONFIG}", data, [one for one in named.values() if not is_hub_id(one)])


def _check_committed(store: Store) -> None:
    """Hold settings and queries to what the run committed.

    Raises:
        DamagedError: where one is not what was committed.
    """
    manifest = read_manifest(store)
    for name in (CONFIG, MEASURED) if manifest else ():
        assert manifest is not None
        manifest.parts[name].check(f"{store.uri}/{name}", store.read(name))


def factors_of(run: Run) -> tuple[AddressableCorpus, Factors]:
    """The run's corpus, and its inverse as refining used it: nothing is computed that the run left in storage."""
    corpus = prepare_corpus(run)
    return corpus, solve(run, fit(run, pull_back_queries(run)))


def read_what_was_prepared(config: Config) -> None:
    """Point the corpora at what the run made of them, where it made something."""
    places = [(config.scan.stage, config.corpus, config.factors)]
    places += [(number, stage.corpus, stage.factors) for number, stage in enumerate(config.stages, start=1)]
    for number, corpus, factors in places:
        output = config.output if number == config.scan.stage else stage_output(config.output, number)
        of_one = factors.corpus.same_corpus(corpus)
        _read_from(corpus, f"{output}/corpus")
        _read_from(factors.corpus, f"{output}/corpus" if of_one else f"{factors.path}/corpus")


def _read_from(corpus: CorpusConfig, folder: str) -> None:
    if is_prepared(folder):
        corpus.path, corpus.paths = folder, {}
