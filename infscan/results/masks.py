"""Masks of the loss: which tokens of a run's rows teach the model a completion most, as what it learns to predict.

A score is linear in the weights of its sequence's token losses, so that it changes by -sum of `output` over the tokens
whose loss is left out, exactly (infscan.model.token_influence, infscan.model.target_influence). No torch.
"""

from __future__ import annotations

from collections import defaultdict

import pyarrow as pa

from infscan.config import Sides, plain
from infscan.config.jobs import MasksJob
from infscan.errors import QueryError, RunError
from infscan.results.read import read_tokens
from infscan.results.schema import read_parquet, to_parquet
from infscan.storage import Store

_ROWS = "rows.parquet"

MASKS = pa.schema(
    [
        ("sequence_id", pa.int64()),
        # Ascending; the tokens at these positions of the sequence are to have no loss.
        ("positions", pa.list_(pa.int32())),
        # Their influence as targets, added up over the queries.
        ("scores", pa.list_(pa.float64())),
    ]
)


def write_masks(job: MasksJob) -> pa.Table:
    """The table of `MASKS`, by sequence; written to job.path. Ties go by sequence and position.

    Raises:
        QueryError: for a query that the explanation, or the run, does not have.
        RunError: where rows were not explained, or not with the influence of their own tokens, and the run did not
            take them apart either (scan.targets).
    """
    explained = Store(job.explained)
    influence = _influence(explained, job) if explained.exists(_ROWS) else _published(job)
    sign = {Sides.proponents: 1.0, Sides.opponents: -1.0}.get(job.sides)
    strength = {at: abs(score) if sign is None else sign * score for at, score in influence.items()}
    count = job.tokens or max(1, round(job.share * len(influence)))
    strongest = sorted((at for at, value in strength.items() if value > 0), key=lambda at: (-strength[at], at))
    by_sequence: dict[int, list[int]] = defaultdict(list)
    for sequence, position in sorted(strongest[:count]):
        by_sequence[sequence].append(position)
    rows = [
        {"sequence_id": one, "positions": at, "scores": [influence[one, position] for position in at]}
        for one, at in by_sequence.items()
    ]
    table = pa.Table.from_pylist(rows, schema=MASKS)
    folder, _, name = job.path.rpartition("/")
    Store(folder).write(name, to_parquet(table, {"masks": plain(job)}))
    return table


def _published(job: MasksJob) -> dict[tuple[int, int], float]:
    """As `_influence`, of the rows that the run itself took apart."""
    tokens = read_tokens(job.run)
    rows = tokens.filter(tokens["targets"].is_valid()) if "targets" in tokens.column_names else tokens.slice(0, 0)
    if not rows.num_rows:
        raise RunError(
            f"{job.explained} holds no explanation, and {job.run} says of no token what it taught: explain rows first, "
            f"infscan explain {job.run} name={job.name} rows=100, or scan with scan.targets=100."
        )
    wanted = _wanted(job, set(rows["query_id"].to_pylist()), job.run)
    found: dict[tuple[int, int], float] = defaultdict(float)
    for row in rows.select(["query_id", "sequence_id", "targets"]).to_pylist():
        if row["query_id"] in wanted:
            for position, value in enumerate(row["targets"][1:], start=1):
                found[row["sequence_id"], position] += value
    return dict(found)


def _wanted(job: MasksJob, known: set[str], where: str) -> set[str]:
    if missing := [query for query in job.query_ids if query not in known]:
        raise QueryError(f"query_ids={missing[0]}: {where} explains no such query; it has {', '.join(sorted(known))}.")
    return set(job.query_ids) or known


def _influence(store: Store, job: MasksJob) -> dict[tuple[int, int], float]:
    """By (sequence, position), the influence as a target, added up over the queries; the first token has none."""
    numbers = read_parquet(store, _ROWS, ["query_id", "item", "sequence_id"])
    tokens = read_parquet(store, "tokens.parquet", ["query_id", "item", "position", "output"])
    wanted = _wanted(job, set(numbers["query_id"].to_pylist()), store.uri)
    sequence_of = {row["item"]: row["sequence_id"] for row in numbers.to_pylist()}
    found: dict[tuple[int, int], float] = defaultdict(float)
    for row in tokens.to_pylist():
        sequence = sequence_of[row["item"]]
        if row["query_id"] in wanted and row["position"] > 0 and sequence is not None and sequence >= 0:
            if row["output"] is None:
                raise RunError(
                    f"{store.uri} has no influence of rows' own tokens (own_tokens=false, a sharded model or gradient "
                    f"checkpointing): explain them again with a whole model, infscan explain {job.run} name={job.name}."
                )
            found[sequence, row["position"]] += row["output"]
    if not found:
        raise RunError(f"{store.uri} explains no sequence of the run's corpus; explain published rows, not texts.")
    return dict(found)
