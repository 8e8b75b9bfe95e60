"""Whether a worker's machine is sick: a pure record of what failed on it in a row, and on which node.

A sick GPU fails whatever it is given, in a second each, and a process that it has failed once stays useless: without
this record one card of many would fail the whole corpus (docs/faults.md#a-sick-gpu).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from infscan.engine.attempts import NotMadeError
from infscan.errors import InfscanError
from infscan.model.out_of_memory import RankMemoryError

# Failures in a row, with a rebuild after each but the last.
STRIKES = 3
# What Ray says of a rank that went with its node: the next one there, or elsewhere, has another machine.
_NODE_DIED = "its node has died"


def is_fault(error: BaseException) -> bool:
    """Whether an error says nothing that a person or a smaller micro-batch could mend: on a GPU it may be the device's,
    and what the process does next cannot be trusted."""
    if _NODE_DIED in str(error):
        return False
    if isinstance(error, RankMemoryError):
        # Its GPU is another's for the most part: not one sequence fits beside.
        return error.rows == 1 and error.foreign > 0
    return not isinstance(error, InfscanError | NotMadeError)


@dataclass
class Health:
    """Workers by number; a strike is a failure of a worker's machine since it last finished a unit."""

    # By worker: what it was at, None for a start.
    strikes: dict[int, list[Hashable | None]] = field(default_factory=dict)
    _nodes: dict[int, str] = field(default_factory=dict)

    def strike(self, worker: int, unit: Hashable | None) -> None:
        self.strikes.setdefault(worker, []).append(unit)

    def well(self, worker: int) -> None:
        """It finished a unit, or what failed is known to be something else's."""
        self.strikes.pop(worker, None)

    def started_on(self, worker: int, node: str) -> None:
        """Its ranks are there. On another node, where the first went away, what failed before says nothing of it."""
        if self._nodes.get(worker, node) != node:
            self.well(worker)
        self._nodes[worker] = node

    def is_sick(self, worker: int, others: list[int]) -> bool:
        """Whether so much failed in a row that it is the worker's. others: the workers that are still in use.

        Where they all have failures, or there are none, the unit may be the reason: then several have to have failed.
        """
        failed = self.strikes.get(worker, [])
        if len(failed) < STRIKES:
            return False
        return any(other not in self.strikes for other in others) or len(set(failed) - {None}) > 1
