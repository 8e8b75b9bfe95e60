"""The whole method, in order; each step finds what an earlier process finished, and does what is missing."""

from __future__ import annotations

from infscan.config import Config
from infscan.sizing.reserve import reserve_memory
from infscan.steps.check import check
from infscan.steps.factors import fit
from infscan.steps.measure import measure
from infscan.steps.plan import make_plan
from infscan.steps.prepare import prepare_corpora
from infscan.steps.publish import publish
from infscan.steps.queries import query_batch
from infscan.steps.refine import refine
from infscan.steps.run import open_run
from infscan.steps.scan import scan
from infscan.steps.solve import solve
from infscan.steps.stability import stability
from infscan.steps.stages import pull_back_queries


def answer(config: Config) -> None:
    """Scan a corpus for the sequences that most raised or lowered each query's completion, and publish the tables."""
    with open_run(config) as run:
        # Documents -> tokens -> numbered sequences, in <output>/corpus; nothing to do where that exists.
        corpus = prepare_corpora(run)
        # Which sequences, in which shards: fixed once, so that any process can go on where one stopped.
        plan = make_plan(run, corpus)
        planned_bytes = reserve_memory(run, corpus.sequence_length)
        # Does the model know the completions? log p of each, beforehand.
        measure(run)
        # stages: grad(-f) at the last stage's model, brought back through the later stages; else nothing to do.
        vectors = pull_back_queries(run)
        # G ~= EK-FAC: A, S, their eigenbases and Lambda, fitted on the corpus or reused.
        factors = fit(run, vectors)
        # factors.solver=cg|astra: on from EK-FAC's solution to the true G's, query by query; else nothing.
        factors = solve(run, factors)
        # (G + lambda)^-1 grad(-f) of every query, compressed to low rank, given to every rank.
        batch = query_batch(run, factors)
        # How good is the compression? A sample, scored with it and without.
        approximation = check(run, plan, corpus, batch, factors)
        # One forward and one activation-gradient backward per sequence scores it against all queries.
        scanned = scan(run, plan, corpus, batch)
        # The best candidates again, with full-rank query gradients, by layer and by token.
        refined = refine(run, plan, scanned, factors)
        # scan.stability: the strongest rows once more, after other contexts; else nothing.
        steadiness = stability(run, plan, scanned, refined, factors)
        # top, sequences, layers, tokens as Parquet; summary.json; _SUCCESS last.
        publish(run, plan, corpus, scanned, refined, approximation, factors.iteration, planned_bytes, steadiness)
