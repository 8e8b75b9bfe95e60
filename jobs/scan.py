"""Scan a corpus: which of its sequences most raised (or lowered) the probability of each query's completion?

python jobs/scan.py model=demo corpus=demo queries=demo output=runs/demo
"""

import hydra
from omegaconf import DictConfig

from infscan.config import Config, from_hydra
from infscan.report.terminal import show
from infscan.steps.check import check
from infscan.steps.factors import fit
from infscan.steps.prepare import prepare_corpus
from infscan.steps.publish import publish
from infscan.steps.run import Run
from infscan.steps.scan import make_plan, scan
from infscan.steps.queries import query_batch
from infscan.steps.refine import refine
from infscan.steps.solve import solve
from infscan.steps.stages import bring_back
from infscan.telemetry import command, sentences


def answer(config: Config) -> None:
    """The whole method, in order; each step finds what an earlier process finished."""
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


@hydra.main(version_base=None, config_path="../conf", config_name="scan")
def main(cfg: DictConfig) -> None:
    with sentences():
        config = from_hydra(cfg)
        answer(config)
        show(config.output)


if __name__ == "__main__":
    command(main)
