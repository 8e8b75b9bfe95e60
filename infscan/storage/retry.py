"""How long a store is waited for: one retry for every call of every store, and a count of what it was for.

A passing fault (busy, broken inside, out of reach, silent, cut off) is met by asking again after a pause drawn
uniformly from [0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2^n)], n faults before ("full jitter", M. Brooker, "Exponential
Backoff And Jitter", 2015): clients that failed together come back apart. No attempt begins after `retry_s` seconds.
"""

from __future__ import annotations

import math
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from infscan.errors import StorageError

RETRY_VARIABLE, TIMEOUT_VARIABLE = "INFSCAN_STORAGE_RETRY_S", "INFSCAN_STORAGE_TIMEOUT_S"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 20.0
SLOWEST_BYTES_S = 1 << 20
GIVEN_UP = "given_up"
_BRIEF_S = 10.0
T = TypeVar("T")

_counts: Counter[str] = Counter()
_lock = threading.Lock()


@dataclass(frozen=True)
class RetryPolicy:
    """retry_s: after the first attempt no further one begins later than this. timeout_s: each wait for an answer."""

    retry_s: float = 120.0
    timeout_s: float = 30.0

    @classmethod
    def from_environment(cls) -> RetryPolicy:
        """From INFSCAN_STORAGE_RETRY_S and INFSCAN_STORAGE_TIMEOUT_S; StorageError for what is no number of seconds."""
        return cls(_seconds(RETRY_VARIABLE, cls.retry_s, 0.0), _seconds(TIMEOUT_VARIABLE, cls.timeout_s, 1e-3))

    def brief(self) -> RetryPolicy:
        """For a first look, at which a wrong address should not cost minutes."""
        return RetryPolicy(min(self.retry_s, _BRIEF_S), min(self.timeout_s, _BRIEF_S))

    def attempt_s(self, size: int = 0) -> float:
        """When one attempt that moves `size` bytes is given up, however often something of it arrived."""
        return 2 * self.timeout_s + size / SLOWEST_BYTES_S

    def call_with_retry(
        self,
        request: Callable[[], T],
        kind_of: Callable[[Exception], str | None],
        explain: Callable[[Exception, int], StorageError],
    ) -> T:
        """`request()`, again while what goes wrong passes.

        kind_of(error): what summary.json calls a passing fault, or None for one that another attempt does not fix.
        Raises explain(error, attempts) from the last error. Both see what this request met alone, also where it is made
        while another error is handled.
        """
        began, attempts, handled = time.monotonic(), 0, sys.exception()
        while True:
            attempts += 1
            try:
                return request()
            except Exception as error:  # drivers raise what they like; the cause is kept
                _forget(handled, error)
                kind = kind_of(error)
                if kind is None:
                    raise explain(error, attempts) from error
                _count(kind)
                pause = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempts - 1, 16)))
                if time.monotonic() - began + pause > self.retry_s:
                    _count(GIVEN_UP)
                    given_up = explain(error, attempts)
                    given_up.transient = True
                    raise given_up from error
            time.sleep(pause)


def storage_faults() -> dict[str, int]:
    """Passing faults that this process met so far, by kind, and the calls `given_up` in spite of all retries."""
    with _lock:
        return dict(sorted(_counts.items()))


def _forget(handled: BaseException | None, error: BaseException | None) -> None:
    """Take what was being handled when a request began out of what the request met: it is the context of that, and no
    cause; a driver's own errors are told by both."""
    while error is not None:
        if error.__context__ is handled:
            error.__context__ = None
        error = error.__cause__ or error.__context__


def _count(kind: str) -> None:
    with _lock:
        _counts[kind] += 1


def _seconds(variable: str, default: float, least: float) -> float:
    value = os.environ.get(variable)
    if not value:
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not least <= seconds < math.inf:
        raise StorageError(f"{variable}={value} is no number of seconds; give one, or unset it for {default:g}")
    return seconds
