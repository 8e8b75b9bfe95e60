"""How good is this number? The scan's own approximation, measured on a sample and written into summary.json."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.plan import Plan, Selection
from infscan.influence.agreement import MAX_CANDIDATE_SHARE, agreement, pearson, recall_agreement
from infscan.passes.check import CheckTask, check_task
from infscan.passes.queries import query_groups
from infscan.runtime.fit import Factors
from infscan.runtime.run import Run
from infscan.runtime.scan import BroadcastQueries

REPORT = "approximation.json"
# Recall is of the strongest ten among forty, or in that proportion of as many as a smaller sample allows.
_TOP, _CANDIDATES_PER_TOP = 10, 4
_RESAMPLES = 500


def check(
    run: Run, plan: Plan, corpus: AddressableCorpus, batch: BroadcastQueries, factors: Factors
) -> dict[str, Any] | None:
    """Agreement of the scan's scores with full-rank ones over a uniform sample of the planned sequences, per query.

    None where the scan is at full rank already (scan.rank=null), with scan.check_sequences=0, or (with a warning) where
    the sample cannot be read. A report that an earlier process wrote for the same query batch is read back.
    """
    config = run.config
    wanted = min(config.scan.check_sequences, plan.selection.size)
    if config.scan.rank is None or wanted < 3:
        return None
    if run.store.exists(REPORT):
        report: dict[str, Any] = run.store.read_json(REPORT)
        if report["query_batch"] == batch.fingerprint:
            return report
    ids = plan.selection.at(Selection.of(plan.selection.size, wanted, config.seed).ids())
    groups, layer_groups = query_groups(len(run.queries), run.architecture.layers, config.scan.query_group_bytes)
    cells = [(group, layers) for group in groups for layers in layer_groups]
    approximate = np.zeros((wanted, len(run.queries)))
    exact = np.zeros_like(approximate)

    def task(unit: int) -> CheckTask:
        group, layers = cells[unit]
        return CheckTask(
            corpus=corpus.store,
            sequence_ids=ids,
            queries=tuple(run.queries[query] for query in group),
            columns=tuple(group),
            layers=layers,
            inverse=factors.inverse,
            query_batch=batch.fingerprint,
            tokens_per_batch=config.scan.tokens_per_batch,
            attention=config.corpus.attention,
            query_dtype=config.scan.query_dtype,
        )

    with run.telemetry.phase("check", len(cells), "groups") as phase:

        def on_done(unit: int, result: tuple[np.ndarray, np.ndarray]) -> None:
            columns = list(cells[unit][0])
            approximate[:, columns] += result[0]
            exact[:, columns] += result[1]
            phase.advance(sequences=wanted)

        def on_given_up(unit: int, reason: str) -> None:
            # The shard that cannot be read is the scan's to quarantine; a sample without it would not be uniform.
            run.telemetry.warn(f"the scan's approximation could not be measured: {reason}")

        given_up = run.pool.run(range(len(cells)), check_task, task, on_done, batch.batch, on_given_up=on_given_up)
    if given_up:
        return None
    finite = np.isfinite(approximate).all(axis=1) & np.isfinite(exact).all(axis=1)
    report = {
        "query_batch": batch.fingerprint,
        "rank": config.scan.rank,
        "compression": config.scan.compression.value,
        "layouts": batch.layouts,
        **judged([query.id for query in run.queries], exact[finite].T, approximate[finite].T, config.seed),
    }
    run.store.write_json(REPORT, report)
    return report


def judged(
    query_ids: list[str], exact_qn: NDArray[np.floating], approximate_qn: NDArray[np.floating], seed: int
) -> dict[str, Any]:
    """Pearson and recall of the strongest, per query and on average, each with its 95 % interval (bootstrap).

    Recall counts only where candidates are at most 2 % of the sequences: else it is null, with the reason. A query
    whose scores do not vary has no correlation (null) and is left out of the averages.
    """
    n = exact_qn.shape[1]
    varies = np.isfinite(pearson(exact_qn, approximate_qn))
    exact_qn, approximate_qn = exact_qn[varies], approximate_qn[varies]
    by_query: dict[str, dict[str, Any]] = {
        name: dict.fromkeys(("pearson", "low", "high", "recall", "recall_low", "recall_high")) for name in query_ids
    }
    ids = [name for name, kept in zip(query_ids, varies, strict=True) if kept]
    top = min(_TOP, int(MAX_CANDIDATE_SHARE * n) // _CANDIDATES_PER_TOP)
    report: dict[str, Any] = {
        "sequences": n,
        "pearson": dict.fromkeys(("mean", "low", "high", "min")),
        "recall": {"top": top, "candidates": _CANDIDATES_PER_TOP * top, "mean": None, "low": None, "high": None},
        "queries": by_query,
    }
    if not ids:
        return report
    found = agreement(exact_qn, approximate_qn, seed=seed, resamples=_RESAMPLES)
    report["pearson"] = _rounded(
        mean=found.mean, low=found.mean_low, high=found.mean_high, min=float(found.values.min())
    )
    for name, value, low, high in zip(ids, found.values, found.low, found.high, strict=True):
        by_query[name] |= _rounded(pearson=value, low=low, high=high)
    if not top:
        report["recall"] |= {
            "reason": f"candidates may be at most {MAX_CANDIDATE_SHARE:.0%} of the sequences compared, and "
            f"{n} sequences are too few for {_CANDIDATES_PER_TOP}: raise scan.check_sequences, if the corpus has more"
        }
        return report
    recalled = recall_agreement(
        exact_qn, approximate_qn, top=top, candidates=_CANDIDATES_PER_TOP * top, seed=seed, resamples=_RESAMPLES
    )
    report["recall"] |= _rounded(mean=recalled.mean, low=recalled.mean_low, high=recalled.mean_high)
    for name, value, low, high in zip(ids, recalled.values, recalled.low, recalled.high, strict=True):
        by_query[name] |= _rounded(recall=value, recall_low=low, recall_high=high)
    return report


def _rounded(**values: float) -> dict[str, float]:
    return {key: round(float(value), 6) for key, value in values.items()}
