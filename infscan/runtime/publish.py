"""Rank what was refined, write the tables, the summary and _SUCCESS."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.config import fingerprint, lasting
from infscan.corpus.addressable import AddressableCorpus, label_of
from infscan.corpus.plan import Plan, shard_name
from infscan.errors import RunError
from infscan.results.publish import INDEX, SUCCESS, Publisher, rank_rows
from infscan.results.refined import RefinedRows
from infscan.results.schema import RUN, SCHEMA_VERSION, to_parquet
from infscan.runtime.run import Run
from infscan.runtime.scan import Refined, Scanned, by_shard


def publish(
    run: Run,
    plan: Plan,
    corpus: AddressableCorpus,
    scanned: Scanned,
    refined: Refined,
    approximation: dict[str, Any] | None = None,
    iteration: dict[str, Any] | None = None,
) -> None:
    """Write top, layers, tokens, sequences and summary.json, then _SUCCESS, which was removed before the scan.

    approximation, iteration: what `infscan.runtime.check` and `infscan.runtime.solve` found, for summary.json.

    Raises:
        RunError: where more shards are quarantined than scan.allow_quarantined; the tables are written all the same,
            without _SUCCESS.
    """
    with run.telemetry.phase("publish", 1, "tables") as phase:
        layers = [layer.name for layer in run.architecture.layers]
        decode = run.tokenizer.decode if run.tokenizer else None
        publisher = Publisher(
            run.store, layers, run.query_ids, decode, fingerprint(run.inputs()), partial(label_of, corpus)
        )
        rows = RefinedRows(run.store, refined.groups, refined.paths, layers, run.query_ids, scanned.best)
        nonfinite = int((~np.isfinite(rows.scores)).sum())
        if nonfinite:
            run.telemetry.warn(f"{nonfinite} rows are left out: their refined scores are NaN or infinite")
        ranking = rank_rows(scanned.best, rows.scores, run.config.scan.top_k)
        # Ids and scores first, since top says of each row which document it is; margins later, some at a time.
        provenance = publisher.write_sequences(by_shard(plan, ranking.sequence_ids))
        publisher.write_rows(ranking, rows.margins, provenance, corpus.sequence_length)
        publisher.remove_stale()
        phase.advance(sequences=len(provenance))
    if scanned.counts.halved:
        run.telemetry.warn(
            f"{scanned.counts.halved} shards ran out of memory at "
            f"scan.tokens_per_batch={run.config.scan.tokens_per_batch} and were scanned in smaller micro-batches; "
            "a lower value saves the attempts that failed"
        )
    summary = _summary(run, plan, corpus, scanned, nonfinite, len(ranking), len(provenance))
    run.store.write_json("summary.json", summary | {"approximation": approximation, "iteration": iteration})
    if len(scanned.quarantined) > run.config.scan.allow_quarantined:
        names = ", ".join(map(shard_name, sorted(scanned.quarantined)[:3]))
        raise RunError(
            f"{len(scanned.quarantined)} shards are quarantined ({names}; see in {run.store.uri}/quarantine/), more "
            f"than scan.allow_quarantined={run.config.scan.allow_quarantined}. Mend the cause and run it again, or "
            "raise the limit."
        )
    run.store.write(INDEX, to_parquet(_index(run, summary), publisher.footer))
    run.store.write(SUCCESS, b"")


def _index(run: Run, summary: dict[str, Any]) -> pa.Table:
    """The row by which a sweep's runs are told apart (`infscan.results.schema.RUN`)."""
    config, counts, inputs = run.config, summary["counts"], summary["inputs"]
    several = ", ".join(f"{label}={path}" for label, path in config.corpus.paths.items())
    row = {
        "model": config.model.path,
        "corpus": config.corpus.path or several,
        "queries": config.queries.path,
        "model_fingerprint": inputs["model"],
        "corpus_fingerprint": inputs["corpus"],
        "queries_fingerprint": inputs["queries"],
        "parameters": run.architecture.parameters,
        "sequences": counts["scanned"]["sequences"],
        "tokens": counts["scanned"]["tokens"],
        "num_queries": len(run.queries),
        "quarantined_shards": counts["quarantined"]["shards"],
        "settings": [{"key": key, "value": str(value)} for key, value in lasting(config)],
    }
    return pa.Table.from_pylist([row], schema=RUN)


def _summary(
    run: Run, plan: Plan, corpus: AddressableCorpus, scanned: Scanned, nonfinite: int, rows: int, sequences: int
) -> dict:
    """Counts that add up: what was read, scanned, kept and published, and what was not."""
    counts = scanned.counts
    left_out = sum(len(plan.shard(number)) for number in scanned.quarantined)
    workers = run.workers()
    return {
        "schema_version": SCHEMA_VERSION,
        "inputs": run.inputs() | {"corpus": corpus.fingerprint},
        "counts": {
            "corpus": corpus.counts,
            "planned": {"sequences": plan.selection.size, "shards": plan.num_shards},
            "scanned": {
                "shards": counts.shards,
                "sequences": counts.sequences,
                "tokens": counts.tokens,
                "nonfinite": counts.nonfinite,
                "rows_kept": counts.rows,
                "sequences_kept": counts.kept,
                "halved": counts.halved,
            },
            "quarantined": {"shards": len(scanned.quarantined), "sequences": left_out},
            "refined": {"rows": len(scanned.best), "nonfinite": nonfinite},
            "published": {"rows": rows, "sequences": sequences},
        },
        "warnings": run.telemetry.warnings,
        "workers": workers,
        "driver": run.losses.driver(),
        "storage_faults": run.storage_faults(workers),
        "phases": run.telemetry.phases,
    }
