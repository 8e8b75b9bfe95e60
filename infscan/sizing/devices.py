"""What a device computes per second, by what it multiplies and how, and what turns a plan's FLOP into hours.

No entry of the table was measured with infscan: peaks are the makers', and the shares of them that are reached are
guesses from arithmetic (docs/gpu.md). `plan.calibration` puts what `tests/gpu/verify.py` measured in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infscan.errors import ConfigError, InfscanError
from infscan.storage import Store

# Of a peak, what a pass of the model reaches (norms, rotary embeddings and activations among its products), and what
# products alone do. `moments`: bfloat16 operands, float32 sums, in panels.
_MODEL_SHARE = {"bfloat16": 0.45, "float32": 0.7}
_PRODUCT_SHARE = {"bfloat16": 0.6, "moments": 0.5, "tf32": 0.65, "float32": 0.75}


@dataclass(frozen=True)
class Rates:
    """FLOP per second that one rank reaches.

    model: forward and backward, by the model's dtype. products: what a pass adds to them, by how it multiplies
    (`bfloat16`, `moments`, `tf32`, `float32`). eigh: of the 9 n^3 of a decomposition in float64. link: bytes per second
    between a worker's ranks.
    """

    model: Mapping[str, float]
    products: Mapping[str, float]
    eigh: float | None = None
    link: float | None = None

    def known(self, measured: Rates) -> Rates:
        """These, and what was measured in their place."""
        return Rates(
            {**self.model, **measured.model},
            {**self.products, **measured.products},
            measured.eigh or self.eigh,
            measured.link or self.link,
        )

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Rates:
        """Raises KeyError, TypeError or ValueError for something else."""
        model, products = ({str(k): float(v) for k, v in value[key].items()} for key in ("model", "products"))
        eigh, link = (None if value.get(key) is None else float(value[key]) for key in ("eigh", "link"))
        return Rates(model, products, eigh, link)


@dataclass(frozen=True)
class Device:
    """Dense peaks as the maker's data sheet says: bfloat16, float32 without tensor cores, TF32; memory in bytes."""

    name: str
    bfloat16_flops: float
    float32_flops: float
    tf32_flops: float
    # Of a decomposition's 9 n^3 in float64, per second.
    eigh_flops: float
    # Bytes per second from and to the other GPUs of its node.
    link: float
    memory: int

    def peak(self, dtype: str) -> float:
        found = {"tf32": self.tf32_flops, "float32": self.float32_flops, "float64": self.float32_flops / 2}
        return found.get(dtype, self.bfloat16_flops)

    def rates(self, utilisation: float | None = None) -> Rates:
        """utilisation: of every peak, in place of the table's shares."""
        model = {kind: self.peak(kind) * (utilisation or share) for kind, share in _MODEL_SHARE.items()}
        products = {kind: self.peak(kind) * (utilisation or share) for kind, share in _PRODUCT_SHARE.items()}
        return Rates(model, products, self.eigh_flops, self.link)


_T, _GB = 1e12, 10**9
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40", 312 * _T, 19.5 * _T, 156 * _T, 0.5 * _T, 300 * _GB, 40 * _GB),
        Device("a100-80", 312 * _T, 19.5 * _T, 156 * _T, 0.5 * _T, 300 * _GB, 80 * _GB),
        Device("h100", 989 * _T, 67 * _T, 494 * _T, 0.6 * _T, 450 * _GB, 80 * _GB),
        Device("h200", 989 * _T, 67 * _T, 494 * _T, 0.6 * _T, 450 * _GB, 141 * _GB),
        Device("l40s", 362 * _T, 91.6 * _T, 183 * _T, 0.3 * _T, 25 * _GB, 48 * _GB),
        Device("a10g", 70 * _T, 35 * _T, 35 * _T, 0.12 * _T, 25 * _GB, 24 * _GB),
    )
}


def device(name: str) -> Device:
    """Raises ConfigError for a device that the table does not have."""
    if name not in DEVICES:
        raise ConfigError(
            f"plan.device={name}: not in the table ({', '.join(sorted(DEVICES))}); give one of these, or what was "
            "measured: plan.tokens_per_s=..."
        )
    return DEVICES[name]


@dataclass(frozen=True)
class Calibration:
    """What the kit measured on a card. name: as the driver calls it. memory: bytes, 0 on a CPU."""

    name: str
    rates: Rates
    memory: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def calibration(path: str) -> Calibration:
    """The output of `tests/gpu/verify.py`: its file, or the folder that it is in.

    Raises:
        ConfigError: where there is none, or it measured nothing that a plan can use.
    """
    folder, _, name = path.rpartition("/") if path.endswith(".json") else (path, "", "verify.json")
    try:
        found = Store(folder or ".").read_json(name)
        measured = found["calibration"]
        return Calibration(
            measured["device"], Rates.from_json(measured), int(measured.get("memory") or 0), found.get("env", {})
        )
    except (InfscanError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"plan.calibration={path}: not a result of tests/gpu/verify.py with a calibration ({error}); run it on a "
            "card, and give the verify.json that it writes."
        ) from None
