"""Bits in which a row and a question differ, counted in one compiled loop where numba is installed.

`pip install infscan[search]` installs it. Without it `infscan.influence.packed` counts the same whole numbers in numpy,
which goes over every word several times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]
Floats = NDArray[np.float32]
Counter = Callable[[Words, Words, Floats, Floats, int, Floats], None]
# Rows of which a core holds the words while one question after another goes over them.
_ROWS = 32


@cache
def counter() -> Counter | None:
    """add(words_nw, planes_qpw, scales_n, steps_q, most, scores_nq), which needs no interpreter; None without numba.

    scores[n, q] += (most - 2 d) scale_n step_q, d = the sum over planes p, four or eight, of 2^p |w_n xor plane_qp|,
    |.| being the number of set bits: in float32 each, in this order. It is compiled at the first call, in about a
    second. Words of both are of one unsigned type and contiguous.
    """
    try:
        from numba import njit, types
        from numba.extending import intrinsic
    except ImportError:
        return None

    @intrinsic
    def set_bits(_context: Any, _word: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.ctpop(arguments[0])

        return types.uint64(types.uint64), generate

    @njit(nogil=True)
    def add(words: Words, planes: Words, scales: Floats, steps: Floats, most: int, scores: Floats) -> None:
        n, W = words.shape
        for first in range(0, n, _ROWS):
            for q in range(len(planes)):
                for row in range(first, min(n, first + _ROWS)):
                    total = np.int64(0)
                    for p in range(planes.shape[1] - 4, -1, -4):
                        # Four by name: of a loop over planes within that over words no vectors are made.
                        ones, twos, fours, eights = planes[q, p], planes[q, p + 1], planes[q, p + 2], planes[q, p + 3]
                        total *= 16
                        for k in range(W):
                            word = words[row, k]
                            weighed = np.int64(set_bits(word ^ eights[k]))
                            weighed = 2 * weighed + np.int64(set_bits(word ^ fours[k]))
                            weighed = 2 * weighed + np.int64(set_bits(word ^ twos[k]))
                            total += 2 * weighed + np.int64(set_bits(word ^ ones[k]))
                    scores[row, q] += np.float32(most - 2 * total) * (scales[row] * steps[q])

    return add
