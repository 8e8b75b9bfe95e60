"""The whole method, in order; each step finds what an earlier process finished, and does what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infscan.config import Config
from infscan.config.jobs import IndexConfig, IndexJob
from infscan.engine.executor import Machines
from infscan.queries import Query
from infscan.sizing.memory import Codes
from infscan.sizing.reserve import reserve_memory
from infscan.steps.ask import Indexes, candidates, indexed
from infscan.steps.background import background
from infscan.steps.candidates import choose_candidates, chosen, full_pass
from infscan.steps.certificate import certificate
from infscan.steps.check import check
from infscan.steps.factors import fit
from infscan.steps.index import finish_index, index, index_pass
from infscan.steps.inputs import Inputs
from infscan.steps.measure import measure
from infscan.steps.plan import make_plan
from infscan.steps.prepare import prepare_corpora
from infscan.steps.publish import Findings, publish
from infscan.steps.queries import query_batch
from infscan.steps.ranking import rank
from infscan.steps.refine import refine
from infscan.steps.run import open_run
from infscan.steps.scan import scan
from infscan.steps.self_influence import self_influence
from infscan.steps.similarity import similarity
from infscan.steps.solve import solve
from infscan.steps.stability import stability
from infscan.steps.stages import pull_back_queries
from infscan.steps.targets import targets


def answer(config: Config, index: IndexConfig | None = None) -> None:
    """Scan a corpus for the sequences that most raised or lowered each query's completion, and publish the tables.

    index: of a code of every sequence, which the scan writes in the same pass.
    """
    with open_run(config) as run:
        # Documents -> tokens -> numbered sequences, in <output>/corpus; nothing to do where that exists.
        corpus = prepare_corpora(run)
        # Which sequences, in which shards: fixed once, so that any process can go on where one stopped.
        plan = make_plan(run, corpus)
        codes = None if index is None else Codes.of(index, run.inputs.layers, plan.shard_sequences)
        planned_bytes = reserve_memory(run, corpus.sequence_length, codes)
        # Does the model know the completions? log p of each, beforehand, and grad(-f), taken once.
        taken = measure(run)
        # stages: from the last stage's model brought back through the later stages; else nothing to do.
        vectors = pull_back_queries(run, taken)
        # G ~= EK-FAC: A, S, their eigenbases and Lambda, fitted on the corpus or reused.
        factors = fit(run, vectors)
        # factors.solver=cg|astra: on from EK-FAC's solution to the true G's, query by query; else nothing.
        factors = solve(run, factors)
        # scan.background_queries: beginnings of sequences, asked along to know hubs; else none.
        along = background(run, plan, corpus)
        # (G + lambda)^-1 grad(-f) of every query, compressed to low rank, given to every rank.
        batch = query_batch(run, factors, along)
        # How good is the compression? A sample, scored with it and without.
        approximation = check(run, plan, corpus, batch, factors)
        # An index of the same plan, from the scan's own forward and backward; else nothing.
        beside = None if index is None else index_pass(run, plan, corpus, factors, index)
        # scan.sieve: what a cheaper pass leaves, and an audit; else all that is planned.
        some = choose_candidates(run, plan, corpus, batch)
        # One forward and one activation-gradient backward per sequence scores it against all queries.
        scanned = scan(run, some.plan, corpus, batch, full_pass(run, some), beside)
        # The best candidates again, with full-rank query gradients, by layer and by token.
        refined = refine(run, some.plan, scanned, factors)
        # Of them those that are published.
        ranked = rank(run, scanned, refined)
        # What was missed, from the audit.
        searched = certificate(run, some, scanned)
        # scan.stability: the strongest rows once more, after other contexts; else nothing.
        steadiness = stability(run, some.plan, scanned, ranked, factors)
        # scan.self_influence: how strongly they would act on themselves; else nothing.
        own = self_influence(run, some.plan, scanned, ranked, factors)
        # What a reader would call relevant: hidden states of the published rows beside the query's, forward only.
        likeness = similarity(run, some.plan, corpus, scanned, ranked.ranking)
        # scan.targets: what each token of the strongest rows taught as a target; else nothing.
        taught = targets(run, some.plan, scanned, ranked.ranking, factors)
        # top, sequences, layers, tokens as Parquet; summary.json; _SUCCESS last.
        found = Findings(
            approximation=approximation,
            iteration=factors.iteration,
            planned_bytes=planned_bytes,
            searched=searched,
            asked_along=along,
            steadiness=steadiness,
            own=own,
            likeness=likeness,
            taught=taught,
        )
        publish(run, some.plan, corpus, scanned, ranked, found)
        if beside is not None:
            finish_index(run, plan, beside)


def make_index(config: IndexJob) -> None:
    """Keep a code of every sequence's whitened gradient, for any number of later questions; where there are queries, in
    the pass that answers them."""
    config.check_index()
    if config.asks:
        answer(config, config.index)
        return
    with open_run(config, needs_queries=False) as run:
        corpus = prepare_corpora(run)
        plan = make_plan(run, corpus)
        reserve_memory(run, corpus.sequence_length, Codes.of(config.index, run.inputs.layers, plan.shard_sequences))
        factors = fit(run)
        # One forward and one activation-gradient backward per sequence, and two thin products per layer.
        index(run, plan, corpus, index_pass(run, plan, corpus, factors, config.index))


def ask(
    config: Config,
    found: Indexes,
    *,
    queries: Sequence[Query] | None = None,
    machines: Machines | None = None,
    inputs: Inputs | None = None,
    verify: bool = True,
    on_found: Callable[[], None] = lambda: None,
) -> None:
    """Answer queries from an index: what it finds is scanned, refined and published as a run of its own.

    queries, machines, inputs: as of `open_run`. verify: hold the index's files to their digests. on_found: called once
    candidates.parquet is there.
    """
    with open_run(config, queries=queries, machines=machines, inputs=inputs) as run:
        corpus = prepare_corpora(run)
        vectors = pull_back_queries(run, measure(run))
        factors = solve(run, fit(run, vectors))
        corpus = indexed(run, corpus, found, factors)
        plan = make_plan(run, corpus)
        # Every row of the index against every query. The best of each are scanned in full, with an audit.
        best = candidates(run, corpus, found, factors, verify=verify)
        on_found()
        planned_bytes = reserve_memory(run, corpus.sequence_length)
        batch = query_batch(run, factors)
        some = chosen(run, plan, best)
        scanned = scan(run, some.plan, corpus, batch, full_pass(run, some))
        refined = refine(run, some.plan, scanned, factors)
        ranked = rank(run, scanned, refined)
        more = Findings(
            iteration=factors.iteration,
            planned_bytes=planned_bytes,
            searched=certificate(run, some, scanned),
            likeness=similarity(run, some.plan, corpus, scanned, ranked.ranking),
            taught=targets(run, some.plan, scanned, ranked.ranking, factors),
        )
        publish(run, some.plan, corpus, scanned, ranked, more)
