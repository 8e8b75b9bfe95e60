"""Rank what was refined, write the tables, the summary and _SUCCESS."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.config import fingerprint, lasting
from infscan.corpus.addressable import AddressableCorpus, label_of
from infscan.corpus.plan import Plan
from infscan.errors import RunError
from infscan.influence.topk import SIDES
from infscan.results.publish import INDEX, SUCCESS, Publisher, Ranked, rank_rows
from infscan.results.refined import Margins, join_layer_groups, read_unit
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
        publisher = Publisher(run.store, layers, decode, fingerprint(run.inputs()), partial(label_of, corpus))
        ranked: list[list[Ranked]] = []
        nonfinite = 0
        for mine, lost in _ranked(run, scanned, refined, layers):
            ranked.append(mine)
            nonfinite += lost
        if nonfinite:
            run.telemetry.warn(f"{nonfinite} rows are left out: their refined scores are NaN or infinite")
        published = np.asarray([row.sequence_id for rows in ranked for row in rows], np.int64)
        provenance = publisher.write_sequences(by_shard(plan, published))
        rows = publisher.write_rows(ranked, provenance)
        publisher.remove_stale()
        phase.advance(sequences=len(provenance))
    halved = sum(shard.halvings > 0 for shard in scanned.counts.values())
    if halved:
        run.telemetry.warn(
            f"{halved} shards ran out of memory at scan.tokens_per_batch={run.config.scan.tokens_per_batch} and were "
            "scanned in smaller micro-batches; a lower value saves the attempts that failed"
        )
    summary = _summary(run, plan, corpus, scanned, nonfinite, rows, len(provenance))
    run.store.write_json("summary.json", summary | {"approximation": approximation, "iteration": iteration})
    if len(scanned.quarantined) > run.config.scan.allow_quarantined:
        names = ", ".join(sorted(scanned.quarantined)[:3])
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


def _ranked(run: Run, scanned: Scanned, refined: Refined, layers: list[str]) -> Iterator[tuple[list[Ranked], int]]:
    """Query by query, the published rows and how many were refined to NaN or infinity.

    One query group's refined units are in memory at a time.
    """
    best = scanned.best
    for group, paths in zip(refined.groups, refined.paths, strict=True):
        by_layer_group = []
        for files in paths:
            names: list[str] = []
            margins: dict[tuple[str, int], Margins] = {}
            for path in files:
                names, unit = read_unit(run.store, path)
                margins |= unit
            by_layer_group.append((names, margins))

        for query in group:
            query_id = run.queries[query].id

            def joined(sequence_id: int, query_id: str = query_id, parts: list = by_layer_group) -> Margins:
                return join_layer_groups([(names, part[query_id, sequence_id]) for names, part in parts], layers)

            rows: list[Ranked] = []
            nonfinite = 0
            for side in run.config.sides:
                mine = (best.queries == query) & (best.sides == SIDES.index(side))
                ids, scores = best.sequence_ids[mine], best.scores[mine]
                refined_rows = {int(sequence_id): joined(int(sequence_id)) for sequence_id in ids}
                rows += rank_rows(query_id, side, ids, scores, refined_rows.__getitem__, run.config.scan.top_k)
                # In float32, as they are ranked and published.
                nonfinite += sum(not np.isfinite(np.float32(row.score)) for row in refined_rows.values())
            yield rows, nonfinite


def _summary(
    run: Run, plan: Plan, corpus: AddressableCorpus, scanned: Scanned, nonfinite: int, rows: int, sequences: int
) -> dict:
    """Counts that add up: what was read, scanned, kept and published, and what was not."""
    shards = scanned.counts.values()
    planned = map(plan.shard, range(plan.num_shards))
    left_out = sum(len(shard) for shard in planned if shard.name not in scanned.counts)
    workers = run.workers()
    return {
        "schema_version": SCHEMA_VERSION,
        "inputs": run.inputs() | {"corpus": corpus.fingerprint},
        "counts": {
            "corpus": corpus.counts,
            "planned": {"sequences": plan.selection.size, "shards": plan.num_shards},
            "scanned": {
                "shards": len(scanned.counts),
                "sequences": sum(shard.sequences for shard in shards),
                "tokens": sum(shard.tokens for shard in shards),
                "nonfinite": sum(shard.nonfinite for shard in shards),
                "rows_kept": sum(shard.rows for shard in shards),
                "sequences_kept": sum(shard.kept for shard in shards),
                "halved": sum(shard.halvings > 0 for shard in shards),
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
