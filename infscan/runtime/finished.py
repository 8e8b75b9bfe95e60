"""A finished run, opened again: for further passes over its model, with its factors and its queries."""

from __future__ import annotations

from infscan.config import ClusterConfig, Config, CorpusConfig, Solver, stage_output, stored_config
from infscan.corpus.addressable import AddressableCorpus, is_prepared
from infscan.errors import ConfigError, RunError
from infscan.passes.factor_store import COMPLETE
from infscan.queries import read_measured
from infscan.results.read import read_summary
from infscan.runtime.fit import Factors, fit, prepare_corpus
from infscan.runtime.run import CONFIG, Run
from infscan.runtime.solve import solve
from infscan.runtime.stages import bring_back
from infscan.storage import Store


def reopen(uri: str, cluster: ClusterConfig) -> Run:
    """A `Run` of what a finished run's folder says, to be entered; nothing of the folder is changed by it.

    What the run prepared is read where it lies; its corpus's files and its query file are not asked for again. The
    model must be where the run found it.

    Raises:
        RunError: where the run is not finished, its config.yaml is damaged or its factors are gone.
    """
    store = Store(uri)
    read_summary(uri)
    try:
        config = stored_config(store.read(CONFIG).decode(errors="replace"), store.uri)
    except ConfigError as error:
        raise RunError(f"{store.uri}/{CONFIG} is damaged ({error}); restore it.") from None
    config.cluster = cluster
    _read_what_was_prepared(config)
    for factors in (config.factors, *(stage.factors for stage in config.stages[config.scan.stage :])):
        if factors.solver is not Solver.identity and not Store(factors.path or "").exists(COMPLETE):
            raise RunError(f"{factors.path} holds no complete factors any more; run jobs/scan.py on {uri} again.")
    return Run(config, queries=read_measured(store))


def factors_of(run: Run) -> tuple[AddressableCorpus, Factors]:
    """The run's corpus, and its inverse as refining used it: nothing is computed that the run left in storage."""
    corpus = prepare_corpus(run)
    return corpus, solve(run, fit(run, bring_back(run)))


def _read_what_was_prepared(config: Config) -> None:
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
