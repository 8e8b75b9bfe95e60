"""A model, a corpus, queries and EK-FAC factors in one process, without Ray: what a small validation stands on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from infscan.config import Attention, Labels, Solver
from infscan.corpus.addressable import AddressableCorpus, check_told_apart, is_prepared, open_corpus
from infscan.corpus.documents import document_files, document_pieces
from infscan.corpus.plan import Selection
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.sequences import Sequence
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.errors import ConfigError
from infscan.model.architecture import Architecture, describe
from infscan.model.load import Place
from infscan.passes.decompose import decompose_layer, finish_layer
from infscan.passes.factor_store import COMPLETE, FactorsPlan, check_files, complete, layer_groups
from infscan.passes.factors import FitTask, covariance_task, lambda_task, slice_bounds
from infscan.passes.queries import Inverse
from infscan.passes.rank import Rank, RankSettings
from infscan.queries import Query, queries_fingerprint, read_queries
from infscan.runtime.prepare import settings_for
from infscan.storage import Store
from infscan_studies.config import ValidateJob


@dataclass(frozen=True)
class Study:
    """curvature: the sequences that the factors are of. candidates: those to score; both are seeded samples.

    fit_seconds: what fitting took, now or when the factors were first fitted.
    """

    rank: Rank
    queries: list[Query]
    curvature: list[Sequence]
    candidates: list[Sequence]
    inverse: Inverse
    fit_seconds: float
    fingerprints: dict[str, str]


def open_study(config: ValidateJob) -> Study:
    """Prepare the corpus into <output>/corpus, load the model, and fit factors into <output>/validate/factors-...

    Raises:
        InfscanError: for inputs or settings that cannot be used.
    """
    _check(config)
    store = Store(config.output)
    store.check_writable()
    architecture = describe(config.model.path, config.model.tracked)
    tokenizer = load_tokenizer(architecture.folder)
    pack = settings_for(config.corpus, architecture, tokenizer)
    queries = read_queries(
        config.queries,
        tokenizer,
        vocab_size=architecture.vocab_size,
        context=architecture.context,
        bos_id=pack.bos_id if config.corpus.bos else None,
    )
    queries = sorted(queries, key=lambda query: query.id)
    chosen = [queries[row] for row in Selection.of(len(queries), config.validate.queries, config.seed).ids()]
    corpus = prepare_here(config, architecture, tokenizer, store / "corpus")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank = Rank(
        RankSettings(config.model, architecture.layers, sharded=False),
        Place(device=device, threads=config.cluster.cpus_per_rank),
    )
    plan = _plan(config, architecture, corpus, rank)
    factors = store / f"validate/factors-{plan.fingerprint[:16]}"
    fit_seconds = fit_here(rank, factors, corpus, plan, config)
    # Another seed than the factors' sample: two samples of one seed would be one inside the other.
    candidates = Selection.of(corpus.sequences, config.validate.sequences, config.seed + 1)
    return Study(
        rank,
        chosen,
        rank.read(corpus.store, plan.selection.ids(), config.corpus.attention),
        rank.read(corpus.store, candidates.ids(), config.corpus.attention),
        Inverse(factors, Solver.ekfac, config.factors.damping),
        fit_seconds,
        {
            "model": architecture.fingerprint,
            "corpus": corpus.fingerprint,
            "queries": queries_fingerprint(chosen),
            "factors": plan.fingerprint,
        },
    )


def _check(config: ValidateJob) -> None:
    config.validate.check()
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


def prepare_here(
    config: ValidateJob, architecture: Architecture, tokenizer: Tokenizer | None, store: Store
) -> AddressableCorpus:
    """The corpus where it lies prepared, else its files prepared into `store`, one after another.

    Raises:
        ConfigError: for several corpora.
    """
    if config.corpus.paths:
        raise ConfigError(
            f"corpus.paths={', '.join(config.corpus.paths)}: a validation reads one corpus; give corpus.path, which "
            "may be the <output>/corpus of a run that joined them."
        )
    if is_prepared(config.corpus.path):
        corpus = open_corpus(Store(config.corpus.path))
        if config.corpus.attention is Attention.within:
            check_told_apart(corpus)
        return corpus
    pack = settings_for(config.corpus, architecture, tokenizer)
    pieces = document_pieces(document_files(config.corpus), config.corpus)
    parts = [prepare_part(piece, index, config.corpus, pack, tokenizer, store) for index, piece in enumerate(pieces)]
    write_manifest(store, config.corpus, pack, tokenizer.digest if tokenizer else None, parts)
    return open_corpus(store)


def _plan(config: ValidateJob, architecture: Architecture, corpus: AddressableCorpus, rank: Rank) -> FactorsPlan:
    selection = Selection.of(corpus.sequences, config.validate.curvature_sequences, config.seed)
    return FactorsPlan(
        fields={
            "model": architecture.fingerprint,
            "dtype": str(rank.model.dtype).removeprefix("torch."),
            "tracked": [layer.name for layer in architecture.layers],
            "corpus": corpus.fingerprint,
            "attention": config.corpus.attention.value,
            "labels": config.factors.labels.value,
            "blocks": config.factors.blocks,
            "sample": [selection.size, selection.digest()],
            "seed": config.seed,
        },
        layers=architecture.layers,
        selection=selection,
        slices=slice_bounds(selection.size, 1),
        groups=layer_groups(architecture.layers, config.factors.max_group_bytes, config.factors.blocks),
        tokens_per_batch=config.scan.tokens_per_batch,
    )


def fit_here(rank: Rank, store: Store, corpus: AddressableCorpus, plan: FactorsPlan, config: ValidateJob) -> float:
    """Every task of a fit in turn, or nothing where `store` has the finished factors; the seconds the fit took."""
    if store.exists(COMPLETE):
        return float(check_files(store)["seconds"])
    started = time.perf_counter()

    def task(group: int, *, draw_labels: bool) -> FitTask:
        labels, attention = config.factors.labels, config.corpus.attention
        return FitTask(store, corpus.store, plan, group, 0, labels, config.seed, draw_labels, attention)

    for group in range(len(plan.groups)):
        covariance_task(rank, task(group, draw_labels=group == 0 and config.factors.labels is Labels.sampled))
    for layer in plan.layers:
        decompose_layer(store, plan, layer)
    for group in range(len(plan.groups)):
        lambda_task(rank, task(group, draw_labels=False))
    for layer in plan.layers:
        finish_layer(store, plan, layer)
    rank.forget()
    seconds = time.perf_counter() - started
    store.write_json(COMPLETE, complete(store, plan, seconds=seconds))
    return seconds
