"""The whole method, in order."""

from __future__ import annotations

from infscan.config import Config
from infscan.runtime.check import check
from infscan.runtime.fit import fit, prepare_corpus
from infscan.runtime.publish import publish
from infscan.runtime.run import Run
from infscan.runtime.scan import make_plan, query_batch, refine, scan
from infscan.runtime.solve import solve
from infscan.runtime.stages import bring_back


def answer(config: Config) -> None:
    """Which sequences most raised or lowered each completion? Each step finds what an earlier process finished."""
    with Run(config) as run:
        # Documents -> tokens -> numbered sequences, in <output>/corpus; nothing to do where that exists.
        corpus = prepare_corpus(run)
        # Which sequences, in which shards: fixed once, so that any process can go on where one stopped.
        plan = make_plan(run, corpus)
        # stages: grad(-f) at the last stage's model, brought back through the later stages; else nothing to do.
        vectors = bring_back(run)
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
        # top, sequences, layers, tokens as Parquet; summary.json; _SUCCESS last.
        publish(run, plan, corpus, scanned, refined, approximation, factors.iteration)
