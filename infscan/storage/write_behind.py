"""Writing the last unit's output while the next one is computed: a store that takes seconds keeps nobody waiting.

The mirror image of `infscan.corpus.read_ahead`. What is written behind is no guess: the unit counts as done only once
its files are in storage, and an error is always that of the unit whose files they are.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class WriteBehind:
    """A rank's writer. One unit waits for its writing at most, on a thread that writes nothing else meanwhile."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, "write-behind")
        self._last: Future[Any] | None = None

    def begin(self, write: Callable[[], Any]) -> Future[Any]:
        """Have a unit's output written, once that of the unit before is; the future has what `write` returns."""
        self.wait()
        self._last = self.start(write)
        return self._last

    def wait(self) -> None:
        """Until nothing waits for its writing, however that ends."""
        if self._last is not None:
            self._last.exception()
        self._last = None

    def start(self, write: Callable[[], Any]) -> Future[Any]:
        """Have it done on the thread."""
        return self._writer.submit(write)
