"""Many small reads in order, without waiting for each: what a store takes 20 ms to answer, several threads ask for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from infscan.storage.store import Store

T = TypeVar("T")
R = TypeVar("R")


def prefetch(store: Store, read: Callable[[T], R], items: Iterable[T], at_once: int = 32) -> Iterator[R]:
    """read(item) of every item, in their order; of an object store, `at_once` at a time, and as many answers held.

    A local disk answers at once: there they are read one by one. An error is raised when its item's turn comes; what
    was asked for after it is dropped.
    """
    if store.local_path() is not None:
        yield from map(read, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(at_once) as threads:
        try:
            for item in items:
                if len(waiting) == at_once:
                    yield waiting.popleft().result()
                waiting.append(threads.submit(read, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
