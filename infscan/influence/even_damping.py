"""A layer's damping, found without training anything: the one under which whitened gradients spread most evenly.

    lambda = argmin over lambda of  sum w^2 / (sum w)^2,   w = v / (Lambda + lambda)

v [O, I]: second moments of true-label gradients of sequences, in the layer's eigenbases; Lambda: those of sampled
labels, by which EK-FAC divides. Were the entries of gradients independent, sum w^2 would be the mean square of the
influence of one sequence on another, and sum w the mean influence of a sequence on itself: the damping is the one with
the least influence between sequences that have nothing to do with each other. Where Lambda is right up to a factor,
w is constant without damping, and none is needed; where Lambda misses directions that gradients do have (an output head
whose rare tokens were hardly drawn), they would outweigh all others, and damping takes them back.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Multiples of the mean of Lambda that are tried, smallest first: a quarter of a decade apart.
GRID = tuple(10 ** (step / 4) for step in range(-20, 5))
# Where nearly as even a spread is had with more damping, more is taken: a smaller one only lets more rounding in.
_ALIKE = 1.01


def even_damping(Lambda_oi: Tensor, v_oi: Tensor, times_o: Tensor | None = None) -> float | None:
    """The largest of GRID, as a multiple of the mean of Lambda, whose spread is within 1 % of the most even one's.

    Lambda_oi, v_oi: [O, I], of one scale each: a factor on either changes nothing. times_o: how many rows each of these
    stands for, [O]; None is one. Sums are float64. None where a moment is zero or not finite, as of an expert that no
    token went to: nothing can be said then.
    """
    times_o = torch.ones(len(Lambda_oi), dtype=torch.float64) if times_o is None else times_o.double()
    mean = _sum(Lambda_oi, times_o) / float(times_o.sum()) / Lambda_oi.shape[1]
    total = _sum(v_oi, times_o)
    if not (0 < mean < float("inf") and 0 < total < float("inf")):
        return None
    spreads = [_unevenness(Lambda_oi, v_oi, relative * mean, times_o) for relative in GRID]
    least = min(spreads)
    return max(relative for relative, spread in zip(GRID, spreads, strict=True) if spread <= _ALIKE * least)


def _sum(x_oi: Tensor, times_o: Tensor) -> float:
    return float(x_oi.sum(dim=1, dtype=torch.float64) @ times_o)


def _unevenness(Lambda_oi: Tensor, v_oi: Tensor, lam: float, times_o: Tensor) -> float:
    """P sum w^2 / (sum w)^2: 1 where w is constant, P where a single entry has all of it."""
    w_oi = v_oi / (Lambda_oi + lam)
    entries = float(times_o.sum()) * w_oi.shape[1]
    # Before it is squared, so that float32 does not overflow.
    w_oi = w_oi / (_sum(w_oi, times_o) / entries)
    return _sum(w_oi * w_oi, times_o) / entries
