"""The whole method, in order; each step finds what an earlier process finished, and does what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infscan.config import Config
from infscan.config.jobs import IndexJob
from infscan.engine.executor import Machines
from infscan.queries import Query
from infscan.results.index_file import IndexManifest
from infscan.sizing.reserve import reserve_memory, use_machine
from infscan.steps.ask import Indexes, candidates
from infscan.steps.background import background
from infscan.steps.candidates import choose_candidates, full_pass
from infscan.steps.certificate import certificate
from infscan.steps.check import check
from infscan.steps.factors import fit
from infscan.steps.index import index
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


def answer(config: Config) -> None:
    """Scan a corpus for the sequences that most raised or lowered each query's completion, and publish the tables."""
    with open_run(config) as run:
        # Documents -> tokens -> numbered sequences, in <output>/corpus; nothing to do where that exists.
        corpus = prepare_corpora(run)
        # Which sequences, in which shards: fixed once, so that any process can go on where one stopped.
        plan = make_plan(run, corpus)
        planned_bytes = reserve_memory(run, corpus.sequence_length)
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
        # scan.sieve: what a cheaper pass leaves, and an audit; else all that is planned.
        chosen = choose_candidates(run, plan, corpus, batch)
        # One forward and one activation-gradient backward per sequence scores it against all queries.
        scanned = scan(run, chosen.plan, corpus, batch, full_pass(run, chosen))
        # The best candidates again, with full-rank query gradients, by layer and by token.
        refined = refine(run, chosen.plan, scanned, factors)
        # Of them those that are published.
        ranked = rank(run, scanned, refined)
        # What was missed, from the audit.
        searched = certificate(run, chosen, scanned)
        # scan.stability: the strongest rows once more, after other contexts; else nothing.
        steadiness = stability(run, chosen.plan, scanned, ranked, factors)
        # scan.self_influence: how strongly they would act on themselves; else nothing.
        own = self_influence(run, chosen.plan, scanned, ranked, factors)
        # What a reader would call relevant: hidden states of the published rows beside the query's, forward only.
        likeness = similarity(run, chosen.plan, corpus, scanned, ranked.ranking)
        # scan.targets: what each token of the strongest rows taught as a target; else nothing.
        taught = targets(run, chosen.plan, scanned, ranked.ranking, factors)
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
        publish(run, chosen.plan, corpus, scanned, ranked, found)


def make_index(config: IndexJob) -> IndexManifest:
    """Keep a code of every sequence's whitened gradient, for any number of later questions."""
    config.index.check()
    with open_run(config, needs_queries=False) as run:
        corpus = prepare_corpora(run)
        plan = make_plan(run, corpus)
        use_machine(run, corpus.sequence_length)
        factors = fit(run)
        # One forward and one activation-gradient backward per sequence, and two thin products per layer.
        return index(run, plan, corpus, factors, config.index)


def ask(
    config: Config,
    found: Indexes,
    *,
    queries: Sequence[Query] | None = None,
    machines: Machines | None = None,
    verify: bool = True,
    on_found: Callable[[], None] = lambda: None,
) -> None:
    """Answer queries from an index: what it finds is scanned, refined and published as a run of its own.

    queries, machines: as of `open_run`. verify: hold the index's files to their digests. on_found: called once
    candidates.parquet is there.
    """
    with open_run(config, queries=queries, machines=machines) as run:
        corpus = prepare_corpora(run)
        vectors = pull_back_queries(run, measure(run))
        factors = solve(run, fit(run, vectors))
        # Every row of the index against every query; the best of each are the corpus of what follows.
        chosen = candidates(run, corpus, found, factors, verify=verify)
        on_found()
        plan = make_plan(run, chosen)
        planned_bytes = reserve_memory(run, chosen.sequence_length)
        batch = query_batch(run, factors)
        scanned = scan(run, plan, chosen, batch)
        refined = refine(run, plan, scanned, factors)
        ranked = rank(run, scanned, refined)
        likeness = similarity(run, plan, chosen, scanned, ranked.ranking)
        taught = targets(run, plan, scanned, ranked.ranking, factors)
        publish(
            run,
            plan,
            chosen,
            scanned,
            ranked,
            Findings(iteration=factors.iteration, planned_bytes=planned_bytes, likeness=likeness, taught=taught),
        )
