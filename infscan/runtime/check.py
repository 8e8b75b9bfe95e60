"""How good is this number? The scan's own approximation, measured on a sample and written into summary.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.plan import Plan, Selection
from infscan.influence.agreement import agreement
from infscan.passes.check import CheckTask, check_task
from infscan.passes.queries import query_groups
from infscan.runtime.fit import Factors
from infscan.runtime.run import Run
from infscan.runtime.scan import QueryBatch

REPORT = "approximation.json"


def check(
    run: Run, plan: Plan, corpus: AddressableCorpus, batch: QueryBatch, factors: Factors
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

        given_up = run.pool.run(range(len(cells)), check_task, task, on_done, batch.arrays, on_given_up=on_given_up)
    if given_up:
        return None
    finite = np.isfinite(approximate).all(axis=1) & np.isfinite(exact).all(axis=1)
    found = agreement(approximate[finite], exact[finite], config.seed)
    by_query = {query.id: _plain(asdict(row)) for query, row in zip(run.queries, found, strict=True)}
    pearsons = np.asarray([row.pearson for row in found if np.isfinite(row.pearson)] or [np.nan])
    report = {
        "query_batch": batch.fingerprint,
        "rank": config.scan.rank,
        "compression": config.scan.compression.value,
        "sequences": int(finite.sum()),
        "pearson": _plain({"mean": float(np.mean(pearsons)), "min": float(np.min(pearsons))}),
        "queries": by_query,
    }
    run.store.write_json(REPORT, report)
    return report


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """NaN (a query whose scores do not vary) as null, which JSON has."""
    return {key: None if value is None or np.isnan(value) else round(value, 6) for key, value in values.items()}
