"""What the ranks of every node read together: made once on each, where it is first asked for, and kept there.

The driver never holds it. On a node it is in Ray's object store, piece by piece, and ranks read it there without a
copy; the process that makes it holds one piece at a time beside those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infscan.engine.attempts import NotMadeError, reason_of
from infscan.errors import InfscanError, RunError

# A node on which so many attempts in a row came to nothing is not asked again.
_ATTEMPTS = 3


@dataclass(frozen=True)
class NodePieces:
    """One node's copy, as its ranks have it."""

    refs: Sequence[ray.ObjectRef]

    def read(self) -> Iterator[Any]:
        """Its pieces in order, once each is made.

        Raises:
            NotMadeError: where one could not be made.
        """
        for ref in self.refs:
            try:
                piece = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                raise NotMadeError(
                    error.cause if isinstance(error.cause, Exception) else None, reason_of(error)
                ) from None
            except ray.exceptions.RayError as error:
                raise NotMadeError(None, reason_of(error)) from None
            yield piece


class NodeShare:
    """What `function(*arguments)` yields, `pieces` times, made on every node that has a rank."""

    def __init__(self, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], pieces: int) -> None:
        self.function, self.arguments, self.pieces = function, arguments, pieces
        self._made: dict[str, NodePieces] = {}
        self._failed: Counter[str] = Counter()

    def on(self, node: str) -> NodePieces:
        """A node's copy; it is made from now on, where it was not asked for before. Never waits."""
        if node not in self._made:
            remote: Any = ray.remote(
                num_cpus=0,
                num_returns=self.pieces,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )(self.function)
            refs = remote.remote(*self.arguments)
            self._made[node] = NodePieces([refs] if self.pieces == 1 else refs)
        return self._made[node]

    def failed_on(self, node: str, error: NotMadeError) -> None:
        """Make a node's copy again when it is next asked for.

        Raises:
            InfscanError: where another attempt cannot mend it.
            RunError: where it failed too often there.
        """
        self._made.pop(node, None)
        if isinstance(error.cause, InfscanError) and not error.transient:
            raise error.cause
        self._failed[node] += not error.transient
        if self._failed[node] >= _ATTEMPTS:
            raise RunError(
                f"what every rank reads could not be put into the memory of a node, {_ATTEMPTS} times: {error.reason}. "
                "Look at its object store's size (docs/cluster.md) and at the Ray logs."
            )
