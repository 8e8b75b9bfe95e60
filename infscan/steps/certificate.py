"""What a search over candidates missed, by the audit that was scanned beside them (`infscan.influence.certificate`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infscan.corpus.plan import Plan, shard_name
from infscan.influence.certificate import CONFIDENCE, Audit, Certificate, Evidence, certify, certify_together
from infscan.influence.spread import ShardSpread, Spread
from infscan.influence.topk import SIDES, strength
from infscan.influence.topk_tracker import ScoredRows
from infscan.results.dense import score_column, scores_path
from infscan.results.schema import read_parquet
from infscan.results.shard_file import ScanCounts
from infscan.steps.candidates import FOLDER, Chosen
from infscan.steps.run import Run
from infscan.steps.scan import Scanned
from infscan.storage.prefetch import prefetch

# Of a query and side, so many of the strongest candidates: the detection curve is of them.
_MOST_CANDIDATES = 1 << 16
_QUERIES_AT_ONCE = 16


@dataclass(frozen=True)
class Searched:
    """What summary.json says of a run that scanned candidates alone.

    planned: what the run is of. candidates, audited: how many. sieve: what the sieve's pass counted, and the
    shards that it gave up; None without one. certificate, spread: what the audit says of what was missed, and of how
    all scores are spread; None without one.
    """

    planned: Plan
    candidates: int
    audited: int
    sieve: ScanCounts | None
    given_up: Mapping[int, str]
    certificate: dict[str, Any] | None
    spread: Spread | None


def certificate(run: Run, chosen: Chosen, scanned: Scanned) -> Searched | None:
    """What the audit says; None where everything was scanned."""
    if chosen.found is None or chosen.audited is None:
        return None
    given_up = dict(chosen.sieve.quarantined) if chosen.sieve else {}
    found, spread = None, None
    if len(chosen.audited):
        if given_up or scanned.quarantined:
            found = unknown(chosen, "shards were given up, so that the audit is no uniform sample")
        else:
            found, spread = certified(run, chosen)
        found["sentence"] = sentence(found)
    counts = chosen.sieve.counts if chosen.sieve else None
    return Searched(chosen.planned, len(chosen.found), len(chosen.audited), counts, given_up, found, spread)


def unknown(chosen: Chosen, reason: str) -> dict[str, Any]:
    """A certificate that states nothing."""
    assert chosen.audited is not None
    return {"confidence": CONFIDENCE, "audited": len(chosen.audited), "together": None, "reason": reason, "queries": {}}


def certified(run: Run, chosen: Chosen) -> tuple[dict[str, Any], Spread]:
    """By query and side, and of all together, from the scores of what was scanned in full; and how all planned scores
    are spread, by the audit's, a uniform sample of them."""
    assert chosen.found is not None
    assert chosen.audited is not None
    config, audit = run.config, Audit(chosen.planned.selection.size, len(chosen.audited))
    evidence: dict[tuple[str, str], Evidence] = {}
    audited: list[NDArray[np.float32]] = []
    for names, ids, scores_nq in _scores(run, chosen.plan):
        audited.append(scores_nq[np.searchsorted(ids, chosen.audited)])
        for name, scores in zip(names, scores_nq.T, strict=True):
            for side in config.sides:
                evidence[name, side] = evidence_of(ids, strength(scores, side), chosen.found, chosen.audited)
    together = certify_together(list(evidence.values()), audit, config.scan.top_k)
    queries: dict[str, dict[str, Any]] = {}
    for (name, side), mine in evidence.items():
        found = stated(certify(mine, audit, config.scan.top_k, len(evidence)))
        if chosen.sieve is not None:
            query = run.inputs.query_ids.index(name)
            found["published"] = traces(chosen.sieve.best, query, side, mine, config.scan.top_k)
        queries.setdefault(name, {})[side] = found
    # Where questions that have nothing to do with each other were asked together, each has its own.
    sentences = {}
    for name in queries if len(queries) > 1 else ():
        of_sides = [evidence[name, side] for side in config.sides]
        mine_alone = certify_together(of_sides, audit, config.scan.top_k)
        sentences[name] = sentence(_said(chosen, mine_alone), "this query's sides")
    spread = Spread(len(run.queries), sampled=len(chosen.audited) < chosen.planned.selection.size)
    spread.add(ShardSpread.of(np.concatenate(audited, axis=1)))
    return _said(chosen, together) | {"queries": queries, "sentences": sentences}, spread


def _said(chosen: Chosen, together: Certificate) -> dict[str, Any]:
    assert chosen.audited is not None
    return {
        "confidence": CONFIDENCE,
        "audited": len(chosen.audited),
        "together": stated(together),
        "reason": together.reason,
    }


def traces(best: ScoredRows, query: int, side: str, evidence: Evidence, top: int) -> dict[str, int]:
    """Where the top strongest rows that were found come from: what a sieve misses leaves traces, at no cost.

    last_tenth: those among the last tenth of the candidates that the sieve left for this query and side, in its own
    order; many of them say that more lie beyond. elsewhere: those that it did not leave for it, and that were found for
    another query or side, or by a list (`scan.candidates_from`).
    """
    mine = best.take((best.queries == query) & (best.sides == SIDES.index(side)))
    ids = mine.sequence_ids[np.lexsort((mine.sequence_ids, -strength(mine.scores, side)))]
    published = evidence.strongest_first().sequence_ids[:top]
    last = ids[len(ids) - len(ids) // 10 :]
    return {"last_tenth": int(np.isin(published, last).sum()), "elsewhere": int((~np.isin(published, ids)).sum())}


def _scores(run: Run, plan: Plan) -> Iterator[tuple[list[str], NDArray[np.int64], NDArray[np.float32]]]:
    """Names, sequence ids and scan scores [n, Q] of some queries at a time."""
    for first in range(0, len(run.queries), _QUERIES_AT_ONCE):
        names = [query.id for query in run.queries[first : first + _QUERIES_AT_ONCE]]
        yield names, *read_scores(run, plan, names)


def evidence_of(
    ids: NDArray[np.int64], scores: NDArray[np.float32], found: NDArray[np.int64], audited: NDArray[np.int64]
) -> Evidence:
    """ids, scores: of everything that was scanned in full, ascending by id; a score that is not finite counts for
    nothing. found, audited: ascending ids."""
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    places = np.searchsorted(ids, found)
    strongest = places[np.argsort(-scores[places], kind="stable")[:_MOST_CANDIDATES]]
    return Evidence(scores[strongest], ids[strongest], scores[np.searchsorted(ids, audited)], np.isin(audited, found))


def read_scores(run: Run, plan: Plan, query_ids: list[str]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Scan scores of all that the plan has, for some queries: sequence ids, ascending, and [n, Q]."""
    store, columns = run.store / FOLDER, ["sequence_id", *map(score_column, query_ids)]

    def read(number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        table = read_parquet(store, scores_path(shard_name(number)), columns)
        found = [table[name].to_numpy() for name in columns]
        return found[0], np.stack(found[1:], axis=1)

    ids, scores = zip(*prefetch(store, read, range(plan.num_shards)), strict=True)
    order = np.argsort(np.concatenate(ids))
    return np.concatenate(ids)[order], np.concatenate(scores)[order]


def stated(found: Certificate) -> dict[str, Any]:
    """A certificate as JSON. at_least: of `top` rows, how many are published, at the stated confidence."""
    return {
        "top": found.top,
        "at_least": found.at_least,
        "recall": found.recall,
        "tail_fraction": found.level.tail_fraction if found.level and found.recall is not None else None,
        "without_assumption": found.without_assumption,
        "p_monotone": found.p_monotone,
        "reason": found.reason,
        "curve": [asdict(level) for level in found.curve],
    }


def sentence(found: Mapping[str, Any], over: str = "all queries and sides") -> str:
    """A certificate in one sentence, which the screen, the page and run.parquet have."""
    mine = found["together"]
    if mine is None or mine["at_least"] is None:
        return f"How many of the strongest sequences were missed is not known: {found['reason']}."
    without = int(mine["without_assumption"] * mine["top"])
    return (
        f"At least {mine['at_least']:,} of the {mine['top']:,} strongest rows, over {over}, are in this "
        f"table ({found['confidence']:.0%} confidence; from {found['audited']:,} sequences drawn at random and scanned "
        f"in full, if rows further out than the top {mine['tail_fraction']:.2g} of the corpus are found no less often "
        f"than those there; without that, at least {without:,}). Strongest is by the scan's score over all tracked "
        "layers."
    )
