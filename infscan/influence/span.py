"""The leading eigenvectors of a second moment that is too wide to be formed: the output embeddings' S (V x V).

S is seen through its products with a fixed Gaussian matrix alone (Nystroem; Halko, Martinsson and Tropp 2011; Tropp et
al. 2017, single pass, positive semidefinite):

    Y = S Omega = sum over tokens of s (s^T Omega),      S ~= Y (Omega^T Y)^+ Y^T,

a sum over tokens, so that it is added slice by slice as every other moment is. Inside the span of the k leading
eigenvectors U of that, EK-FAC is as ever. Outside of it one corrected eigenvalue per input axis stands for all output
directions, so that it does not matter which they are: Q_S = [U, U_perp] is orthogonal, and U_perp is never formed. With
k = V all of this is EK-FAC with S itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal

# Columns of Omega for each eigenvector that is kept: more see the leading ones more exactly.
_OVERSAMPLING = 1.5
# Of Omega's generator: a constant, so that whoever adds to Y has the same one.
_SEED = 0


def sketch_columns(outputs: int, span: int) -> int:
    """Columns of Omega, and so of Y."""
    return min(outputs, round(_OVERSAMPLING * span))


def sketch_matrix(outputs: int, span: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Omega, [O, columns]: the same numbers wherever it is made; of a smaller span its first columns."""
    if device == "meta":
        return torch.empty(outputs, sketch_columns(outputs, span), dtype=dtype, device=device)
    drawn = np.random.Generator(np.random.PCG64(_SEED)).standard_normal((sketch_columns(outputs, span), outputs))
    return torch.from_numpy(drawn).to(device, dtype).T


@dataclass(frozen=True, eq=False)
class SpannedBasis:
    """An orthogonal [n, n] matrix by k reflectors: Q = I - Y W Y^T (compact WY; Schreiber and Van Loan 1989).

    Its first k columns span what it was made of; the others are an orthonormal basis of the rest. Y_nk: the reflectors.
    W_kk: upper triangular. Products cost n k, and take what `BlockDiagonal`'s take.
    """

    Y_nk: Tensor
    W_kk: Tensor

    @staticmethod
    def of(U_nk: Tensor) -> SpannedBasis:
        """From orthonormal columns: Q's first k columns are these, up to signs."""
        packed, tau_k = torch.geqrf(U_nk)
        Y_nk = packed.tril(-1)
        Y_nk.diagonal().fill_(1)
        products_kk = Y_nk.T @ Y_nk
        W_kk = torch.zeros_like(products_kk)
        for i, tau in enumerate(tau_k.tolist()):
            W_kk[:i, i] = -tau * (W_kk[:i, :i] @ products_kk[:i, i])
            W_kk[i, i] = tau
        return SpannedBasis(Y_nk, W_kk)

    @property
    def span(self) -> int:
        return self.Y_nk.shape[1]

    @property
    def nbytes(self) -> int:
        return self.Y_nk.nbytes + self.W_kk.nbytes

    @property
    def T(self) -> SpannedBasis:
        return SpannedBasis(self.Y_nk, self.W_kk.T)

    def dense(self) -> Tensor:
        """[n, n]; for small ones."""
        return self @ torch.eye(len(self.Y_nk), dtype=self.Y_nk.dtype, device=self.Y_nk.device)

    def to(self, device: str, dtype: torch.dtype | None = None, *, non_blocking: bool = False) -> SpannedBasis:
        moved = (part.to(device, dtype, non_blocking=non_blocking) for part in (self.Y_nk, self.W_kk))
        return SpannedBasis(*moved)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Q x for x [..., n, m]."""
        return x - self.Y_nk @ (self.W_kk @ (self.Y_nk.T @ x))

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """x Q for x [..., n]."""
        return x - ((x @ self.Y_nk) @ self.W_kk) @ self.Y_nk.T


# What rotates one side of a layer's gradients.
Rotation = BlockDiagonal | SpannedBasis


def add_sketch(Y_oc: Tensor, trace: Tensor, s_btn: Tensor, Omega_oc: Tensor) -> None:
    """Y += sum over tokens of s (s^T Omega), and trace [1] += sum of |s|^2; in Y's dtype. Padding must be zero in s."""
    s_mo = s_btn.flatten(0, -2).to(Y_oc.dtype)
    Y_oc.addmm_(s_mo.T, s_mo @ Omega_oc)
    trace += s_mo.square().sum()


def spanned_eigenbasis(Y_oc: Tensor, trace: float, span: int) -> tuple[Tensor, SpannedBasis]:
    """Eigenvalues [span + 1] and eigenvectors of a second moment from its sketch, in Y's dtype.

    Y_oc: S Omega, Omega of `sketch_matrix` in Y's dtype. trace: of S. Eigenvalues fall; the last one is the mean of all
    that are outside of the span, and is not there where nothing is.
    """
    dtype, (O, _) = Y_oc.dtype, Y_oc.shape
    Omega, Y = sketch_matrix(O, span, dtype).to(torch.float64), Y_oc.to(torch.float64)
    # A shift of the size of Y's rounding keeps what is inverted positive; it is taken off the eigenvalues again.
    shift = torch.finfo(dtype).eps * float(Y.norm())
    Y = Y + shift * Omega
    core = Omega.T @ Y
    values_c, vectors_cc = torch.linalg.eigh((core + core.T) / 2)
    least = torch.finfo(torch.float64).eps * len(values_c) * float(values_c[-1])
    roots_c = torch.where(values_c > least, values_c.clamp_min(least).rsqrt(), 0.0)
    U_oc, sizes_c, _ = torch.linalg.svd(Y @ (vectors_cc * roots_c), full_matrices=False)
    kept_k = (sizes_c[:span].square() - shift).clamp_min(0)
    rest = [] if span == O else [max(0.0, trace - float(kept_k.sum())) / (O - span)]
    basis = SpannedBasis.of(U_oc[:, :span].contiguous())
    return torch.cat([kept_k, kept_k.new_tensor(rest)]).to(dtype), basis.to("cpu", dtype)


def add_spanned_squares(Lambda_ki: Tensor, s_bto: Tensor, a_bti: Tensor, Q_S: SpannedBasis, Q_A: BlockDiagonal) -> None:
    """Lambda += sum over the batch's sequences of (U^T g Q_A)^2 in the first k rows, and in one more row the sum over
    all other output directions; arguments as of `infscan.influence.eigenbasis.add_squared_gradients`.
    """
    for squares_ki in _spanned_squares(s_bto, a_bti, Q_S, Q_A, Lambda_ki):
        Lambda_ki += squares_ki


def weighted_spanned_squares(
    weights_oi: Tensor, s_bto: Tensor, a_bti: Tensor, Q_S: SpannedBasis, Q_A: BlockDiagonal
) -> Tensor:
    """sum over o, i of weights (Q_S^T g Q_A)^2, of every sequence of the batch: [B]. Beyond the span all rows of the
    weights are alike. Arguments as of `add_spanned_squares`."""
    weights_ki = weights_oi[: Q_S.span + 1]
    found = [(weights_ki * squares_ki).sum() for squares_ki in _spanned_squares(s_bto, a_bti, Q_S, Q_A, weights_ki)]
    return torch.stack(found)


def _spanned_squares(
    s_bto: Tensor, a_bti: Tensor, Q_S: SpannedBasis, Q_A: BlockDiagonal, like_ki: Tensor
) -> Iterator[Tensor]:
    """Of each sequence (U^T g Q_A)^2 in the first k rows, and in one more row, where like_ki has it, the sum over all
    other output directions, in like_ki's dtype.

    Outside of the span, |sum_t s_t (a_t . q_i)|^2 is b_i^T (s s^T) b_i with b = a Q_A: no gradient of all outputs is
    ever formed.
    """
    dtype, span = like_ki.dtype, Q_S.span
    for s_to, a_ti in zip(s_bto, a_bti, strict=True):
        s_to, a_ti = s_to.to(dtype), a_ti.to(dtype)
        rotated_to = s_to @ Q_S
        b_ti = a_ti @ Q_A if a_ti.shape[-1] == like_ki.shape[1] else Q_A.rotate_with_one(a_ti)
        inside_ki = (rotated_to[:, :span].T @ b_ti).square_()
        if len(like_ki) == span:
            yield inside_ki
        else:
            outside_to = rotated_to[:, span:]
            yield torch.cat([inside_ki, (b_ti * ((outside_to @ outside_to.T) @ b_ti)).sum(dim=0, keepdim=True)])


def for_all_outputs(kept_kx: Tensor, outputs: int) -> Tensor:
    """[O, ...] from the rows inside of the span and, where there is one, the last, which stands for all others."""
    missing = outputs - len(kept_kx)
    return kept_kx if not missing else torch.cat([kept_kx, kept_kx[-1:].expand(missing, *kept_kx.shape[1:])])
