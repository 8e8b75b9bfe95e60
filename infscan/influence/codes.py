"""Codes of whitened gradients: what an index keeps of a sequence, and the inner products that it answers with.

In the eigenbases a score is <C_q, C_z>, C_z = Q_S^T g Q_A the sequence's gradient and C_q the query's preconditioned
one (`infscan.influence.inverse.inverse_core`). For any whitening w > 0, entry by entry, it is <C_q / w, w C_z>. A code
keeps a linear map u of w C_z, and a query has the same map v of C_q / w, so that E<v, u> is the exact score, whatever w
is. The nearer w is to (Lambda + lambda)^(-1/2), the smaller is the variance (docs/index-ask.md).

Shapes: O outputs and I inputs of a layer, m and n what they are projected to, D = m n coordinates of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from infscan.influence.layers import Layer, LayerFactors
from infscan.influence.routed import Routed

Kind = Literal["projected", "sketched"]
DampedFactors = tuple[LayerFactors, float] | None


@dataclass(frozen=True)
class CodeSettings:
    """What a code is: it fixes an index's bytes, and is in its plan.

    kind: `projected`, two-sided random projections of Kronecker-whitened tokens (no gradient is formed); `sketched`, a
    CountSketch of the gradient, whitened exactly. width: m = n of a projection at most; a sketch has width^2 cells.
    bits: of a coordinate, 1 (its sign) or 8. seed: of what is random.
    """

    kind: Kind = "projected"
    width: int = 64
    bits: Literal[1, 8] = 1
    seed: int = 0

    def coordinates(self, layer: Layer) -> int:
        """D, the coordinates of the layer's code: as many as its gradient has entries where the code is exact."""
        if self.kind == "sketched":
            return min(self.width**2, layer.size)
        return min(self.width, layer.outputs) * min(self.width, layer.inputs)

    def code_bytes(self, layer: Layer) -> int:
        """Bytes of the layer's coordinates in a row."""
        return -(-self.coordinates(layer) * self.bits // 8)


class LayerCode(Protocol):
    """The linear map of one layer. Both sides are float32 or wider, on one device."""

    @property
    def nbytes(self) -> int:
        """Bytes of what it keeps of the layer."""
        ...

    def of_tokens(self, s_bto: Tensor, a_bti: Tensor, routed: Routed | None = None) -> Tensor:
        """u of every sequence of a micro-batch: [B, D].

        s_bto: [B, T, O], a_bti: [B, T, I], zero on padding; or [B, T, I - 1], the 1 that a bias multiplies left out and
        taken as read. routed: of an expert, whose s is [M, O] and a [M, I].
        """
        ...

    def of_query(self, C_qoi: Tensor) -> Tensor:
        """v of preconditioned query gradients in the eigenbases: [Q, D] from [Q, O, I]."""
        ...


def layer_code(
    settings: CodeSettings, layer: Layer, known: DampedFactors, device: str, dtype: torch.dtype
) -> LayerCode:
    """The map of one layer. known: its factors and damping on the device, in `dtype`; None: nothing is whitened.

    On the device `meta` it has its shapes alone.
    """
    if settings.kind == "sketched":
        return _Sketched(settings, layer, known, device, dtype)
    return _Projected(settings, layer, known, device, dtype)


def kronecker_whitening(Lambda_oi: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """x [O] and y [I], positive, with x_o y_i near (Lambda_oi + lambda)^(-1/2): least squares of the logarithms.

    It is exact where Lambda + lambda is an outer product.
    """
    logs_oi = -0.5 * torch.log(Lambda_oi.double() + lam)
    half = logs_oi.mean() / 2
    x_o, y_i = (torch.exp(logs_oi.mean(dim=dim) - half).to(Lambda_oi.dtype) for dim in (1, 0))
    return x_o, y_i


def random_frame(n: int, m: int, key: str) -> NDArray[np.float64]:
    """R [n, m] with R^T R = (n / m) 1 and, over keys, E[R R^T] = 1; m = n is a rotation. A key has one R everywhere.

    The orthonormal basis of m columns of numbers from (-1, 1): turning the sign of a row turns that of the basis, so
    that R R^T has no expectation off its diagonal, and all rows are alike.
    """
    drawn = _generator(key).random_raw(n * m).reshape(n, m)
    # An odd multiple of 2^-53, turned by the lowest bit.
    q_nm, r_mm = np.linalg.qr((2.0 * (drawn >> np.uint64(12)) + 1) * 2.0**-53 * np.where(drawn & np.uint64(1), -1, 1))
    # LAPACKs differ in the signs of columns.
    turned = np.where(np.diag(r_mm) < 0, -1.0, 1.0)
    return (q_nm * turned * np.sqrt(n / m)).astype(np.float64)


def _signs(count: int, key: str) -> NDArray[np.float64]:
    # The raw bits of a counter-based generator are the same in every version of numpy; drawn numbers may not be.
    words = _generator(key).random_raw(-(-count // 64)).astype("<u8")
    return 1.0 - 2.0 * np.unpackbits(words.view(np.uint8), count=count).astype(np.float64)


def _generator(key: str) -> np.random.Philox:
    return np.random.Philox(key=int.from_bytes(sha256(key.encode()).digest()[:16], "little"))


class _Projected:
    """u = R_S^T (diag(x) Q_S^T g Q_A diag(y)) R_A = sum_t (s_t M)^T (a_t N): two thin products a token."""

    def __init__(
        self, settings: CodeSettings, layer: Layer, known: DampedFactors, device: str, dtype: torch.dtype
    ) -> None:
        def frame(n: int, side: str) -> Tensor:
            if device == "meta":
                return torch.empty(n, min(settings.width, n), device=device, dtype=dtype)
            key = f"{settings.seed}|{layer.name}|{side}"
            return torch.from_numpy(random_frame(n, min(settings.width, n), key)).to(device, dtype)

        R_om, R_in = frame(layer.outputs, "outputs"), frame(layer.inputs, "inputs")
        if known is None:
            self.M_om, self.N_in = R_om, R_in
            self.V_om, self.W_in = R_om, R_in
            return
        factors, lam = known
        x_o, y_i = kronecker_whitening(factors.Lambda, lam)
        self.M_om, self.N_in = factors.Q_S @ (x_o[:, None] * R_om), factors.Q_A @ (y_i[:, None] * R_in)
        self.V_om, self.W_in = R_om / x_o[:, None], R_in / y_i[:, None]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.M_om, self.N_in, self.V_om, self.W_in))

    def of_tokens(self, s_bto: Tensor, a_bti: Tensor, routed: Routed | None = None) -> Tensor:
        wide = self.M_om.dtype
        s_btm = s_bto.to(wide) @ self.M_om
        a_bti = a_bti.to(wide)
        I = a_bti.shape[-1]
        a_btn = a_bti @ self.N_in[:I]
        if len(self.N_in) > I:
            a_btn += self.N_in[-1]
        u_bmn = torch.bmm(s_btm.transpose(1, 2), a_btn) if routed is None else routed.gradients(s_btm, a_btn)
        return u_bmn.flatten(1)

    def of_query(self, C_qoi: Tensor) -> Tensor:
        return (self.V_om.T @ C_qoi @ self.W_in).flatten(1)


class _Sketched:
    """u_d = sum over the cell's entries of +-z, z = Q_S^T g Q_A / sqrt(Lambda + lambda): CountSketch.

    Source: Charikar, Chen and Farach-Colton 2002. With as many cells as entries each has its own.
    """

    def __init__(
        self, settings: CodeSettings, layer: Layer, known: DampedFactors, device: str, dtype: torch.dtype
    ) -> None:
        self.known, self.inputs, self.D = known, layer.inputs, settings.coordinates(layer)
        self.root_oi = None if known is None else (known[0].Lambda + known[1]).sqrt()
        if device == "meta":
            self.cells_x = torch.empty(layer.size, device=device, dtype=torch.int64)
            self.signs_x = torch.empty(layer.size, device=device, dtype=dtype)
            return
        key = f"{settings.seed}|{layer.name}"
        cells = np.arange(layer.size)
        if layer.size > self.D:
            cells = (_generator(f"{key}|cells").random_raw(layer.size) % np.uint64(self.D)).astype(np.int64)
        self.cells_x = torch.from_numpy(cells).to(device)
        self.signs_x = torch.from_numpy(_signs(layer.size, f"{key}|signs")).to(device, dtype)

    @property
    def nbytes(self) -> int:
        held = self.cells_x.nbytes + self.signs_x.nbytes
        if self.known is None or self.root_oi is None:
            return held
        factors = self.known[0]
        bases = (one.nbytes for one in (factors.A, factors.S, factors.Q_A, factors.Q_S) if one is not None)
        return held + self.root_oi.nbytes + factors.Lambda.nbytes + sum(bases)

    def of_tokens(self, s_bto: Tensor, a_bti: Tensor, routed: Routed | None = None) -> Tensor:
        wide = self.signs_x.dtype
        s_bto, a_bti = s_bto.to(wide), a_bti.to(wide)
        # A 1 on padding, where s is zero, adds nothing.
        ones = a_bti.shape[-1] == self.inputs
        if self.known is not None:
            factors = self.known[0]
            s_bto, a_bti = s_bto @ factors.Q_S, a_bti @ factors.Q_A if ones else factors.Q_A.rotate_with_one(a_bti)
        elif not ones:
            a_bti = pad(a_bti, (0, 1), value=1.0)
        z_boi = torch.bmm(s_bto.transpose(1, 2), a_bti) if routed is None else routed.gradients(s_bto, a_bti)
        return self._sketch(z_boi if self.root_oi is None else z_boi / self.root_oi)

    def of_query(self, C_qoi: Tensor) -> Tensor:
        return self._sketch(C_qoi if self.root_oi is None else C_qoi * self.root_oi)

    def _sketch(self, z_boi: Tensor) -> Tensor:
        signed_bx = z_boi.flatten(1) * self.signs_x
        return signed_bx.new_zeros(len(signed_bx), self.D).index_add_(1, self.cells_x, signed_bx)
