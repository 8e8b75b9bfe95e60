"""Which sequences are scanned in full: all that are planned, or candidates that something cheaper found, and an audit.

The candidates are what a sieve leaves (scan.sieve: the same scan of the last blocks alone), what a list names
(scan.candidates_from), or both together. The audit is a uniform sample of all planned sequences. Candidates and audit
are one plan, which the scan then treats as any other, and its scores say what was missed (`infscan.steps.certificate`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from infscan.corpus.addressable import AddressableCorpus, is_prepared, open_corpus
from infscan.corpus.plan import Plan, Selection, default_shard_sequences
from infscan.errors import ConfigError
from infscan.model.suffix import ends_at, last_blocks
from infscan.results.dense import FOLDER as SCORES
from infscan.results.read import read_top
from infscan.results.shard_file import FOLDER as SHARDS
from infscan.steps.queries import BroadcastQueries
from infscan.steps.run import Run
from infscan.steps.scan import Scanned, ScanPass, scan, whole
from infscan.steps.suffix_choice import choose_suffix
from infscan.storage import MissingError, Store

log = logging.getLogger("infscan")

FOLDER = "sieve"
RECORD = "sieve/candidates.json"
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Chosen:
    """What is scanned in full.

    plan: of it. planned: the run's own. found: of those, the candidates, ascending; None where all are
    scanned. audited: the audit's, ascending, which may be candidates too. sieve: what the sieve left, where there is
    one.
    """

    plan: Plan
    planned: Plan
    found: Ids | None = None
    audited: Ids | None = None
    sieve: Scanned | None = None


def choose_candidates(run: Run, plan: Plan, corpus: AddressableCorpus, batch: BroadcastQueries) -> Chosen:
    """The plan of what is scanned in full; a sieve's pass is made, or found finished.

    Raises:
        ConfigError: where scan.candidates_from names nothing that is planned.
    """
    config = run.config
    if not config.searches:
        return Chosen(plan, plan)
    parts: list[Ids] = []
    sieved = None
    blocks = config.scan.sieve
    if isinstance(blocks, str):
        blocks = choose_suffix(run, plan, corpus, batch)
    if blocks is not None:
        sieved = scan(run, plan, corpus, batch, sieve_pass(run, plan.selection.size, blocks))
        parts.append(sieved.best.sequence_ids)
    if config.scan.candidates_from is not None:
        parts.append(listed(config.scan.candidates_from, plan))
    if not parts:
        return Chosen(plan, plan)
    return chosen(run, plan, np.unique(np.concatenate(parts)), sieved)


def chosen(run: Run, plan: Plan, found: Ids, sieve: Scanned | None = None) -> Chosen:
    """Candidates (ascending, however they were found) and the audit as a plan to scan.

    Shard files of other candidates (a sieve's shard that was given up before and is there now) are removed.
    """
    selection = plan.selection
    audit = Selection.of(selection.size, run.config.audited(selection.size, len(run.queries)), run.config.seed + 1)
    audited = selection.at(audit.ids())
    ids = np.union1d(found, audited)
    shard_sequences = min(plan.shard_sequences, default_shard_sequences(len(ids)))
    some = Selection(selection.total, len(ids), selection.seed, ids)
    made = Plan(plan.corpus_fingerprint, plan.sequences, some, shard_sequences, plan.order_seed)
    record = {"digest": some.digest(), "candidates": len(found), "audited": len(audited), "sequences": len(ids)}
    _settle(run, record | {"shards": made.num_shards})
    log.info("candidates  %d sequences and %d of the audit, of %d", len(found), len(audited), selection.size)
    return Chosen(made, plan, found, audited, sieve)


def sieve_pass(run: Run, planned: int, blocks: int) -> ScanPass:
    """The last so many blocks alone, of which no tokens are kept: what is left is read again where it lies."""
    config, layers = run.config, last_blocks(run.inputs.layers, blocks)
    return ScanPass(
        name="sieve",
        store=run.store / FOLDER,
        layers=layers,
        candidates=config.sieve_candidates(planned, len(run.queries)),
        tokens=False,
        ends_at=ends_at(layers),
        fields={"sieve": [layer.name for layer in layers]},
    )


def full_pass(run: Run, chosen: Chosen) -> ScanPass:
    """All tracked layers; of candidates and audit the scores are kept, for the certificate."""
    how = whole(run, chosen.planned.selection.size)
    return how if chosen.found is None else replace(how, scores=run.store / FOLDER)


def listed(path: str, plan: Plan) -> Ids:
    """The planned sequences that scan.candidates_from names, ascending.

    Raises:
        ConfigError: where it is no finished run, no filter and no file of numbers, or names none that is planned.
    """
    if Store(path).exists("plan.json"):
        ids = np.unique(read_top(path)["sequence_id"].to_numpy())
    elif is_prepared(path) and (left := open_corpus(Store(path)).chosen) is not None:
        ids = left
    else:
        ids = _numbers(path)
    planned = np.intersect1d(ids, plan.selection.ids())
    if not len(planned):
        raise ConfigError(
            f"scan.candidates_from={path} names {len(ids)} sequences, and none of them is planned; give numbers of "
            "this corpus's sequences, or a run over the same corpus."
        )
    return planned


def _numbers(path: str) -> Ids:
    folder, _, name = path.rpartition("/")
    try:
        words = Store(folder or ".").read(name).decode(errors="replace").split()
    except MissingError:
        raise ConfigError(
            f"scan.candidates_from={path} is not there; give a file of sequence numbers, one a line, or the output of "
            "a finished run or of infscan tfidf."
        ) from None
    odd = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) < 19)), None)
    if odd is not None:
        raise ConfigError(
            f"scan.candidates_from={path} holds {odd[:40]!r}, which is no sequence number; give one number a line "
            "(sequence_id of a run's tables)."
        )
    return np.unique(np.asarray(words, np.int64))


def _settle(run: Run, record: dict[str, object]) -> None:
    """Write what the candidates are; where they were others, what was scanned of those goes."""
    try:
        before = run.store.read_json(RECORD)
    except MissingError:
        before = None
    if before == record:
        return
    if before is not None:
        for name in [*run.store.names(SHARDS), *run.store.names(f"{FOLDER}/{SCORES}")]:
            run.folder.fence()
            run.store.remove(name)
    run.folder.fence()
    run.store.write_json(RECORD, record)
