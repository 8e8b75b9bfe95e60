"""What a device computes per second, and what it takes to read a plan's FLOP as hours."""

from __future__ import annotations

from dataclasses import dataclass

from infscan.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """peak_flops: dense bfloat16, and float32 without tensor cores, as the maker's data sheet says; memory in bytes."""

    name: str
    bfloat16_flops: float
    float32_flops: float
    memory: int

    def peak(self, dtype: str) -> float:
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


_T, _GB = 1e12, 10**9
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40", 312 * _T, 19.5 * _T, 40 * _GB),
        Device("a100-80", 312 * _T, 19.5 * _T, 80 * _GB),
        Device("h100", 989 * _T, 67 * _T, 80 * _GB),
        Device("h200", 989 * _T, 67 * _T, 141 * _GB),
        Device("l40s", 362 * _T, 91.6 * _T, 48 * _GB),
        Device("a10g", 70 * _T, 35 * _T, 24 * _GB),
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
