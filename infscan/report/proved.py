"""What `infscan prove` wrote beside a run, as the page shows it: effects of training steps on rows and on controls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from infscan.results.schema import read_parquet
from infscan.storage import Store

FOLDER = "prove"
ROWS, EFFECTS = f"{FOLDER}/prove.parquet", f"{FOLDER}/effects.parquet"
# Of these the rows are the run's own; the others are controls.
_SIDES = ("proponent", "opponent")
_SHOWN = ("kind", "rows", "mean", "low", "high", "raises")


@dataclass(frozen=True)
class Proved:
    """By (query_id, sequence_id) the effect of the most steps that were taken, nats; by query_id (None: over all), the
    kinds of rows with their mean effects and intervals."""

    steps: int = 0
    effects: dict[tuple[str, int], float] = field(default_factory=dict)
    kinds: dict[str | None, list[list[Any]]] = field(default_factory=dict)

    def of(self, query_id: str | None) -> dict[str, Any] | None:
        """What the page shows of a query, or of all; None where there is nothing."""
        kinds = self.kinds.get(query_id)
        return {"steps": self.steps, "kinds": kinds} if kinds else None


def read_proved(store: Store) -> Proved:
    """Nothing where the run was not proved, or into another folder.

    Raises:
        DamagedError: where a file does not hold what was written.
    """
    if not store.exists(ROWS) or not store.exists(EFFECTS):
        return Proved()
    table = read_parquet(store, ROWS, ["query_id", "kind", "sequence_id", "effect", "steps"]).to_pylist()
    steps = max((row["steps"] for row in table), default=0)
    effects = {
        (row["query_id"], row["sequence_id"]): row["effect"]
        for row in table
        if row["steps"] == steps and row["kind"] in _SIDES
    }
    kinds: dict[str | None, list[list[Any]]] = {}
    for row in read_parquet(store, EFFECTS).to_pylist():
        if row["steps"] == steps:
            kinds.setdefault(row["query_id"], []).append([row[name] for name in _SHOWN])
    return Proved(steps, effects, kinds)
