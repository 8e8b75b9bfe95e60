"""A model, a corpus, queries and EK-FAC factors in one process, without Ray: what a small validation is based on."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from infscan.config import Solver
from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.plan import Selection
from infscan.corpus.sequences import Sequence
from infscan.engine.in_process import InProcessExecutor
from infscan.errors import ConfigError
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Query, queries_fingerprint
from infscan.steps.damping import fit_damping
from infscan.steps.factor_files import COMPLETE, store_plan
from infscan.steps.factors import fit_factors, lambda_task, plan_factors
from infscan.steps.inputs import open_inputs, read_measured_queries
from infscan.steps.preconditioner import Preconditioner
from infscan.steps.prepare import prepare
from infscan.storage import Store
from infscan_studies.config import ValidateJob

# What a fit took, beside its factors.
_FIT = "fit.json"


@dataclass(frozen=True)
class Study:
    """What a validation is given; curvature and candidates are seeded samples."""

    worker: ModelWorker
    queries: list[Query]
    corpus: CorpusAddress
    # The sequences that the factors are of.
    curvature: list[Sequence]
    # Those to score.
    candidates: list[Sequence]
    inverse: Preconditioner
    # What fitting took, now or when the factors were first fitted; cpu_seconds: of the process, on however many cores.
    fit_seconds: float
    fit_cpu_seconds: float
    fingerprints: dict[str, str]


def open_study(config: ValidateJob) -> Study:
    """Prepare the corpus into <output>/corpus, load the model, and fit factors into <output>/validate/factors-...

    Raises:
        InfscanError: for inputs or settings that cannot be used.
    """
    _check(config)
    store = Store(config.output)
    store.check_writable()
    config = _fitted_on_the_corpus(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = replace(open_inputs(config), device=device)
    queries = read_measured_queries(inputs)
    chosen = [queries[row] for row in Selection.of(len(queries), config.validate.queries, config.seed).ids()]
    executor = InProcessExecutor(
        WorkerSettings(config.model, inputs.layers, sharded=False),
        RankContext(device=device, threads=config.cluster.cpus_per_rank),
    )
    corpus = prepare(config.corpus, inputs.architecture, inputs.tokenizer, store / "corpus", executor)
    made = plan_factors(inputs, corpus)
    factors = store / f"validate/factors-{made.fingerprint[:16]}"
    plan = store_plan(factors, made)
    started, started_cpu, fitted_before = time.perf_counter(), time.process_time(), factors.exists(COMPLETE)
    fit_factors(executor, factors, corpus, plan, config.factors.labels, config.seed)
    if not fitted_before:
        took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
        factors.write_json(_FIT, took)
    if config.factors.damping.by_fit:
        fit_damping(executor, factors, corpus, plan, config.factors.labels, config.seed, lambda_task)
    # Another seed than the factors' sample: two samples of one seed would be one inside the other.
    candidates = Selection.of(corpus.sequences, config.validate.sequences, config.seed + 1)
    worker, took, address = executor.worker, factors.read_json(_FIT), CorpusAddress.of(corpus)
    return Study(
        worker,
        chosen,
        address,
        worker.read(address, plan.selection.ids()),
        worker.read(address, candidates.ids()),
        Preconditioner(factors, Solver.ekfac, config.factors.damping),
        float(took["seconds"]),
        # Factors of an earlier version have no such number.
        float(took.get("cpu_seconds", took["seconds"])),
        {
            "model": inputs.architecture.fingerprint,
            "corpus": corpus.fingerprint,
            "queries": queries_fingerprint(chosen),
            "factors": plan.fingerprint,
        },
    )


def _fitted_on_the_corpus(config: ValidateJob) -> ValidateJob:
    """The configuration of a fit on as many of the corpus's sequences as the curvature is of."""
    whole = type(config.factors.corpus)(**(vars(config.corpus) | {"max_sequences": None, "sample": None}))
    size = config.validate.curvature_sequences
    return replace(config, factors=replace(config.factors, corpus=whole, num_sequences=size, slices=1))


def _check(config: ValidateJob) -> None:
    config.validate.check()
    if config.corpus.paths:
        raise ConfigError(
            f"corpus.paths={', '.join(config.corpus.paths)}: a validation reads one corpus; give corpus.path, which "
            "may be the <output>/corpus of a run that joined them."
        )
    if config.sharded or config.model.gradient_checkpointing:
        raise ConfigError(
            "A validation multiplies with the Gauss-Newton matrix of a whole model on one rank; use "
            "model.sharding=auto with cluster.ranks_per_worker=1, and model.gradient_checkpointing=false."
        )
    if config.factors.solver is not Solver.ekfac:
        raise ConfigError(
            f"factors.solver={config.factors.solver.value}: a validation judges EK-FAC and takes its damping; "
            "use factors.solver=ekfac."
        )
