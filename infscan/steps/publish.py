"""Rank what was refined, write the tables, the summary and _SUCCESS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.config import Solver, fingerprint, resume_keys
from infscan.corpus.addressable import AddressableCorpus, identity_of, label_of
from infscan.corpus.filtered import FilteredCorpus
from infscan.corpus.plan import Plan, shard_name
from infscan.errors import RunError
from infscan.influence.spread import Spread
from infscan.queries import MEASURED, measured_jsonl
from infscan.results.dense import FOLDER as SCORES
from infscan.results.dense import scores_path
from infscan.results.manifest import Manifest, Part, commit
from infscan.results.publish import INDEX, Publisher, Ranking
from infscan.results.schema import RUN, SCHEMA_VERSION, damaged, read_parquet, to_parquet
from infscan.results.shard_file import ScanCounts
from infscan.results.statements import Asked, relatif_ranks
from infscan.steps.background import NO_BACKGROUND, Background
from infscan.steps.certificate import Searched
from infscan.steps.factor_files import found_damping
from infscan.steps.measure import NAME as QUERIES
from infscan.steps.measure import measured_part
from infscan.steps.provenance import computed_by
from infscan.steps.ranking import Ranked
from infscan.steps.run import Run
from infscan.steps.run_folder import CONFIG, PLAN
from infscan.steps.scan import Scanned
from infscan.steps.self_influence import SelfInfluence
from infscan.steps.similarity import Similarities
from infscan.steps.stability import Stability
from infscan.steps.targets import Targets
from infscan.storage import json_bytes, storage_faults


@dataclass(frozen=True)
class Findings:
    """What the steps beside scan and refine found, each None where it was not asked for.

    approximation, iteration: of `infscan.steps.check` and `infscan.steps.solve`, for summary.json. planned_bytes: what
    a rank of the scan was to hold at once, by part. searched: where candidates alone were scanned, how they were found
    and what that missed. asked_along: the background queries. The rest are of the steps `stability` (steadiness),
    `self_influence` (own), `similarity` (likeness) and `targets` (taught).
    """

    approximation: dict[str, Any] | None = None
    iteration: dict[str, Any] | None = None
    planned_bytes: Mapping[str, int] | None = None
    searched: Searched | None = None
    asked_along: Background = NO_BACKGROUND
    steadiness: Stability | None = None
    own: SelfInfluence | None = None
    likeness: Similarities | None = None
    taught: Targets | None = None


def publish(run: Run, plan: Plan, corpus: AddressableCorpus, scanned: Scanned, ranked: Ranked, found: Findings) -> None:
    """Write top, layers, tokens, sequences and summary.json, then _SUCCESS, which was removed before the scan.

    Whatever is written or removed is so while the lease is this driver's alone (`RunFolder.fence`).

    Raises:
        RunError: where more shards are quarantined than scan.allow_quarantined; the tables are written all the same,
            without _SUCCESS.
    """
    with run.telemetry.phase("publish", 1, "tables") as phase:
        layers = [layer.name for layer in run.inputs.layers]
        tokenizer = run.inputs.tokenizer
        publisher = Publisher(
            run.store,
            layers,
            run.inputs.query_ids,
            tokenizer.decode if tokenizer else None,
            fingerprint(run.inputs.fingerprints()),
            partial(label_of, corpus),
            scanned.fingerprint,
            run.folder.fence,
            _spread(corpus, scanned, found.searched),
            tokenizer.texts if tokenizer else None,
            asked(run),
        )
        rows, ranking = ranked.rows, ranked.ranking
        nonfinite = int((~np.isfinite(rows.scores)).sum())
        if nonfinite:
            run.telemetry.warn(f"{nonfinite} rows are left out: their refined scores are NaN or infinite")
        # Their documents first, since top says of each row which one carries it; margins later, some at a time.
        documents = publisher.documents(plan.by_shard(ranking.sequence_ids))
        beside = publisher.beside(
            ranking, plan.by_shard(ranking.sequence_ids), found.asked_along.near(scanned.background)
        )
        if found.steadiness is not None:
            beside |= _steady(found.steadiness, ranking)
        if found.own is not None:
            beside |= _relative(found.own, ranking)
        if found.likeness is not None:
            beside["similarity"] = pa.array(found.likeness.of(ranking), from_pandas=True)
            beside["similarity_z"] = pa.array(found.likeness.standing(ranking), from_pandas=True)
        by_target = found.taught.of if found.taught is not None else None
        publisher.write_rows(ranking, rows.margins, documents, corpus.sequence_length, beside, by_target)
        publisher.write_sequences(plan.by_shard(ranking.sequence_ids), documents)
        phase.advance(sequences=len(documents))
    if scanned.counts.halved:
        run.telemetry.warn(
            f"{scanned.counts.halved} shards were scanned in smaller micro-batches than "
            f"scan.tokens_per_batch={run.config.tokens_per_batch}, which do not fit a rank's memory; a lower value "
            "saves the attempts that failed"
        )
    summary = _summary(run, plan, corpus, scanned, nonfinite, len(ranking), len(documents), found.planned_bytes)
    summary |= {"approximation": found.approximation, "iteration": found.iteration}
    summary["background_queries"] = len(found.asked_along.queries)
    if run.config.factors.damping.by_fit and run.config.factors.solver is not Solver.identity:
        summary["damping"] = {layer.name: found_damping(run.folder.factors, layer) for layer in run.inputs.layers}
    if found.searched is not None:
        _add_search(summary, found.searched)
    publisher.put("summary.json", json_bytes(summary))
    sieved = found.searched.given_up if found.searched else {}
    if (lost := len(scanned.quarantined) + len(sieved)) > run.config.scan.allow_quarantined:
        names = ", ".join(map(shard_name, sorted(scanned.quarantined or sieved)[:3]))
        folder = "quarantine" if scanned.quarantined else "sieve/quarantine"
        raise RunError(
            f"{lost} shards are quarantined ({names}; see in {run.store.uri}/{folder}/), more than "
            f"scan.allow_quarantined={run.config.scan.allow_quarantined}. Mend the cause and run it again, or "
            "raise the limit."
        )
    publisher.put(INDEX, to_parquet(_index(run, summary), publisher.footer), 1)
    # Before the commit: without _SUCCESS they are nobody's, and once it is there a glob sees the committed parts alone.
    publisher.remove_stale()
    commit(run.store, _manifest(run, plan, scanned, publisher, summary), run.folder.fence)


def _spread(corpus: AddressableCorpus, scanned: Scanned, searched: Searched | None) -> Spread | None:
    """How all scores are spread. Those of a filter's or a search's candidates, the strongest of a corpus, do not say;
    a search has its audit's."""
    if isinstance(corpus, FilteredCorpus):
        return None
    return scanned.counts.spread if searched is None else searched.spread


def _steady(found: Stability, ranking: Ranking) -> dict[str, pa.Array]:
    low, high = found.of(ranking)
    unknown = np.isnan(low)
    return {
        "score_low": pa.array(low, from_pandas=True),
        "score_high": pa.array(high, from_pandas=True),
        "sign_sure": pa.array((low > 0) | (high < 0), pa.bool_(), mask=unknown),
    }


def _relative(found: SelfInfluence, ranking: Ranking) -> dict[str, pa.Array]:
    values = found.of(ranking)
    sides = ranking.candidates.sides[ranking.rows]
    ranks = relatif_ranks(ranking.queries, sides, ranking.scores, values, ranking.sequence_ids)
    return {
        "self_influence": pa.array(values.astype(np.float32), from_pandas=True),
        "relatif_rank": pa.array(ranks, mask=ranks == 0),
    }


def asked(run: Run) -> list[Asked]:
    """Of every query, what its rows are held against; its log-probability as `infscan.steps.measure` measured it."""
    measured = {row["query_id"]: row["log_probability"] for row in read_parquet(run.store, QUERIES).to_pylist()}
    found = []
    for query in run.queries:
        part = query.parts[0]
        nats = -measured.get(query.id, float("nan"))
        found.append(
            Asked(
                question=fingerprint([query.prompt, query.completion] if query.prompt else list(part.token_ids)),
                completion=query.completion,
                token_ids=tuple(part.token_ids[position] for position in part.positions),
                nats=nats if nats > 0 else float("nan"),
            )
        )
    return found


def _manifest(run: Run, plan: Plan, scanned: Scanned, publisher: Publisher, summary: dict[str, Any]) -> Manifest:
    """What _SUCCESS says: the tables as they were written, and what is there of the run's other results."""
    run.folder.check_claim(run.config)
    beside = {name: Part.of(run.store.read(name)) for name in (CONFIG, PLAN)}
    beside |= {QUERIES: measured_part(run), MEASURED: Part.of(measured_jsonl(run.queries))}
    return Manifest(
        token=run.folder.lease.mine.token,
        parts=publisher.parts | beside,
        scores=_scores(run, plan, scanned),
        scan=scanned.fingerprint,
        counts=summary["counts"],
        made_by=computed_by(run),
    )


def _scores(run: Run, plan: Plan, scanned: Scanned) -> dict[str, int] | None:
    """The parts of scores/ by size; their footers say what is in them.

    Raises:
        DamagedError: where a finished shard's is gone.
    """
    if not run.config.dense:
        return None
    there = {entry.name: entry.size for entry in run.store.list(SCORES, suffix=".parquet")}
    wanted = [scores_path(shard_name(n)) for n in range(plan.num_shards) if n not in scanned.quarantined]
    for name in wanted:
        if name not in there:
            raise damaged(f"{run.store.uri}/{name}", "it is missing")
    return {name: there[name] for name in wanted}


def _index(run: Run, summary: dict[str, Any]) -> pa.Table:
    """The row by which a sweep's runs are distinguished (`infscan.results.schema.RUN`)."""
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
        "settings": [{"key": key, "value": str(value)} for key, value in resume_keys(config)],
        **computed_by(run),
        "certificate": (summary.get("certificate") or {}).get("sentence"),
    }
    return pa.Table.from_pylist([row], schema=RUN)


def _summary(
    run: Run,
    plan: Plan,
    corpus: AddressableCorpus,
    scanned: Scanned,
    nonfinite: int,
    rows: int,
    sequences: int,
    planned_bytes: Mapping[str, int] | None,
) -> dict[str, Any]:
    """Counts that add up: what was read, scanned, kept and published, and what was not."""
    counts = scanned.counts
    left_out = sum(len(plan.shard(number)) for number in scanned.quarantined)
    workers = _workers(run, planned_bytes)
    return {
        "schema_version": SCHEMA_VERSION,
        "inputs": run.inputs.fingerprints() | {"corpus": corpus.fingerprint},
        "identities": [asdict(identity) for identity in (run.inputs.model_identity, identity_of(corpus))],
        "made_by": computed_by(run),
        "counts": {
            "corpus": corpus.counts,
            "planned": {"sequences": plan.selection.size, "shards": plan.num_shards},
            "scanned": _scanned(counts),
            "sources": _sources(counts),
            "quarantined": {"shards": len(scanned.quarantined), "sequences": left_out},
            "refined": {"rows": len(scanned.best), "nonfinite": nonfinite},
            "published": {"rows": rows, "sequences": sequences},
        },
        "warnings": run.telemetry.warnings,
        "workers": workers,
        "driver": run.records.recovery.driver(),
        "storage_faults": _storage_faults(run, workers),
        "phases": run.telemetry.phases,
    }


def _add_search(summary: dict[str, Any], searched: Searched) -> None:
    """With a sieve, planned are the sequences that it passed over; of them some were scanned in full."""
    counts = summary["counts"]
    counts["planned"] = {"sequences": searched.planned.selection.size, "shards": searched.planned.num_shards}
    counts["quarantined"]["shards"] += len(searched.given_up)
    counts["quarantined"]["sequences"] += sum(len(searched.planned.shard(number)) for number in searched.given_up)
    counts["candidates"] = {"sequences": searched.candidates, "audited": searched.audited}
    if searched.sieve is not None:
        counts["sieve"] = _scanned(searched.sieve)
    summary["certificate"] = searched.certificate


def _scanned(counts: ScanCounts) -> dict[str, int]:
    return {
        "shards": counts.shards,
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "nonfinite": counts.nonfinite,
        "rows_kept": counts.rows,
        "sequences_kept": counts.kept,
        "halved": counts.halved,
    }


def _sources(counts: ScanCounts) -> dict[str, dict[str, int]] | None:
    """What was scanned of every source: what its published rows are to be held against."""
    if counts.sources is None:
        return None
    return {source: {"sequences": one, "tokens": two} for source, (one, two) in sorted(counts.sources.items())}


def _workers(run: Run, planned_bytes: Mapping[str, int] | None) -> dict[str, Any]:
    """The workers; by rank only where this process started them, those that ended for another dtype first."""
    cluster, failures = run.config.cluster, run.records.recovery.failures
    return {
        "num_workers": run.executor.num_workers,
        "ranks_per_worker": cluster.ranks_per_worker,
        "parameters": run.architecture.parameters,
        "rebuilds": len(failures),
        "losses": [failure.to_json() for failure in failures],
        "retired": run.records.recovery.retired,
        "reissued": run.records.recovery.reissued,
        "halvings": run.executor.oom_retries,
        "planned_bytes": dict(planned_bytes) if planned_bytes else None,
        "ranks": [[vars(rank) for rank in group] for group in run.executor.facts()],
    }


def _storage_faults(run: Run, workers: dict[str, Any]) -> dict[str, int]:
    """Transient faults of storage by kind: of this process since the run was opened, and of the ranks in `workers`."""
    found = Counter(storage_faults())
    found.subtract(run.records.faults_before)
    for rank in (rank for group in workers["ranks"] for rank in group):
        found.update(rank["storage_faults"])
    return {kind: count for kind, count in sorted(found.items()) if count}
