"""A run's plan: which sequences are scanned in which shards, fixed by the first process that works on the run."""

from __future__ import annotations

import json

from infscan.config import Solver, checksum_ok, fingerprint, with_checksum
from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.plan import Plan, Selection, default_shard_sequences
from infscan.corpus.reading import AS_STORED
from infscan.errors import RunError
from infscan.results.schema import to_parquet
from infscan.results.shard_file import finished_shards
from infscan.steps.factors import plan_factors
from infscan.steps.prepare import prepare_factors_corpus
from infscan.steps.provenance import check_resumed, computed_by
from infscan.steps.run import Run
from infscan.steps.run_folder import PLAN
from infscan.steps.volume import check_disk_for_scan


def make_plan(run: Run, corpus: AddressableCorpus) -> Plan:
    """The run's plan: created if absent, then read back; inputs whose content changed are refused by name.

    Raises:
        RunError: where the model, the queries, the corpus or the factors' are not those the run was planned with, or
            another version is to go on with it (`infscan.steps.provenance`).
        StorageError: where a local disk has no space for what the scan will write.
    """
    settings = run.config.corpus
    selection = Selection.of(corpus.sequences, settings.max_sequences, settings.seed, corpus.chosen, settings.sample)
    shard_sequences = run.config.scan.shard_sequences or default_shard_sequences(selection.size)
    made = Plan(corpus.fingerprint, corpus.sequences, selection, shard_sequences, run.config.seed)
    run.store.write("shards.parquet", to_parquet(made.shards_table(), {"corpus": corpus.fingerprint}))
    run.folder.claim(run.config)
    reading = corpus.reading.fields()
    inputs, made_by = run.inputs.fingerprints() | _factors(run), computed_by(run)
    value = with_checksum(made.to_json() | {"inputs": inputs, **reading, "made_by": made_by})
    run.store.create(PLAN, json.dumps(value, indent=2).encode() + b"\n")
    found = run.store.read_json(PLAN)
    if not checksum_ok(found):
        raise RunError(f"{run.store.uri}/{PLAN} is not what was written; restore it, or give another output=...")
    others = run.config.resume.allow_other_versions
    for warning in check_resumed(run.store.uri, found.get("made_by", {}), made_by, others_allowed=others):
        run.telemetry.warn(warning)
    wanted = {"corpus": corpus.fingerprint, **reading, **inputs}
    # Of a property that there was not when the run was planned, nothing was chosen.
    known = {key: found.get(key, usual) for key, usual in AS_STORED.fields().items()}
    planned = {"corpus": found["corpus_fingerprint"], **known, **found["inputs"]}
    changed = sorted(key for key in wanted if wanted[key] != planned.get(key))
    if changed:
        raise RunError(
            f"{run.store.uri} was planned with another {', '.join(changed)}: the content differs, whatever the path. "
            f"Put back what it was planned with, or give another output=...; to ask other queries of the same corpus, "
            f"add corpus.path={corpus.store.uri} factors.path={run.folder.factors.uri}, which are then reused."
        )
    plan = Plan.from_json(found, corpus.chosen)
    # With a sieve other shards are finished than those planned here, maybe more.
    left = max(0, plan.num_shards - len(finished_shards(run.store))) / plan.num_shards
    N, T = plan.selection.size, corpus.sequence_length
    check_disk_for_scan(run.config, run.inputs.layers, run.queries, N, T, left, run.store)
    return plan


def few_shards(plan: Plan, workers: int) -> str | None:
    """What is said where workers have not two shards each, so that some wait for the others at the end.

    A plan does not go by its workers of itself: rows would then depend on them, in the last bits.
    """
    shards, each = plan.num_shards, plan.selection.size // (2 * workers)
    if workers == 1 or shards >= 2 * workers or not each:
        return None
    return (
        f"{shards} shards for {workers} workers: in a new output, scan.shard_sequences={each} or less gives each of "
        "them two"
    )


def _factors(run: Run) -> dict[str, str]:
    """The fingerprint of what every stage's factors are fitted on and how; none without factors."""
    found = {
        str(number): plan_factors(stage.inputs, prepare_factors_corpus(stage)).fingerprint
        for number, stage in enumerate((run, *run.later), start=run.config.scan.stage)
        if stage.config.factors.solver is not Solver.identity
    }
    return {"factors": fingerprint(found)} if found else {}
