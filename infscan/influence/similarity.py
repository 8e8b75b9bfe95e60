"""How alike a query and a sequence are in what the model makes of them: whitened cosines of hidden states.

    similarity(q, z) = mean over the query's tokens i of  max over the sequence's tokens t of  cos(x_i, x_t),
    x = L^-1 (h - mu),   L L^T = C + RIDGE (tr C / d) I

h: hidden states. mu, C: their mean and covariance over a sample of the corpus, so that directions in which all states
are alike count little. It says nothing of what training does: what a reader would call relevant, beside influence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of the mean variance, what is added to every one: a sample may have fewer tokens than the states have entries.
RIDGE = 1e-2
# Of fewer sampled sequences a median distance says little.
_FEWEST = 32
# Of a normal distribution, the standard deviation in median absolute deviations.
_NORMAL = 1.4826


class StateMoments:
    """Sums over tokens of hidden states and of their products: total_nn = sum [1, h]^T [1, h], [1 + d, 1 + d]
    float64."""

    def __init__(self, width: int, device: str) -> None:
        self.total_nn = torch.zeros(1 + width, 1 + width, dtype=torch.float64, device=device)

    def add(self, h_md: Tensor) -> None:
        """h_md: float32 or wider, the states of M tokens; those that are not finite are left out."""
        h_md = h_md[h_md.isfinite().all(dim=1)]
        h_mn = torch.cat([h_md.new_ones(len(h_md), 1), h_md], dim=1)
        self.total_nn += h_mn.T @ h_mn


@dataclass(frozen=True)
class Whitening:
    """mean_d, and root_dd: the lower triangle L; both of one dtype."""

    mean_d: Tensor
    root_dd: Tensor

    @staticmethod
    def of(total_nn: Tensor) -> Whitening:
        """From the sums of `StateMoments`; float64. Of no token it has no meaning, and is no error."""
        count = total_nn[0, 0].clamp_min(1)
        mean_d = total_nn[0, 1:] / count
        cov_dd = total_nn[1:, 1:] / count - torch.outer(mean_d, mean_d)
        ridge = RIDGE * cov_dd.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        cov_dd = cov_dd + ridge * torch.eye(len(cov_dd), dtype=cov_dd.dtype, device=cov_dd.device)
        return Whitening(mean_d, torch.linalg.cholesky(cov_dd))

    def to(self, device: str, dtype: torch.dtype) -> Whitening:
        return Whitening(self.mean_d.to(device, dtype), self.root_dd.to(device, dtype))

    def directions(self, h_xd: Tensor) -> Tensor:
        """x / |x| of states [..., d]; of one that is the mean itself, zero."""
        flat_md = h_xd.flatten(0, -2).to(self.mean_d.dtype) - self.mean_d
        x_md = torch.linalg.solve_triangular(self.root_dd, flat_md.T, upper=False).T
        return torch.nn.functional.normalize(x_md, dim=1).view(h_xd.shape)


def best_cosines(own_id: Tensor, x_btd: Tensor, counts_bt: Tensor) -> Tensor:
    """Similarity of a query to B sequences, [B]. Directions: own_id of its tokens, x_btd of theirs.

    counts_bt: bool, the sequences' tokens that take part; one of each at least.
    """
    cosines_bti = x_btd @ own_id.T
    return cosines_bti.masked_fill(~counts_bt[..., None], -torch.inf).amax(dim=1).mean(dim=1)


def standing(
    values: NDArray[np.float32], queries: NDArray[np.int32], sampled_qn: NDArray[np.float32]
) -> NDArray[np.float32]:
    """z = (similarity - median) / (1.4826 MAD), median and MAD of the query's similarities to a sample of the corpus.

    values: similarities of some rows, and their queries. sampled_qn: [Q, n]. NaN where the sample has fewer than 32
    sequences with a finite similarity, or all of one.
    """
    median_q, scale_q = np.full((2, len(sampled_qn)), np.nan)
    for query, sampled_n in enumerate(sampled_qn):
        known_n = sampled_n[np.isfinite(sampled_n)]
        if len(known_n) >= _FEWEST:
            median_q[query] = np.median(known_n)
            scale = _NORMAL * np.median(np.abs(known_n - median_q[query]))
            scale_q[query] = scale if scale > 0 else np.nan
    return ((values - median_q[queries]) / scale_q[queries]).astype(np.float32)
