"""From work to hours: what a phase computes, moves and waits for, and the rates that turn it into seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infscan.sizing.devices import Rates

# Phases that have the model in scan.refine_dtype.
AS_REFINED = (
    "refine",
    "stability",
    "self_influence",
    "whitening",
    "similarity_sample",
    "similarity",
    "targets",
)
# Bytes per second at which a rank takes sums from its device, hashes, serialises and stores them, or reads them back.
_STORED_PER_S = 5e8
# Seconds between two units, in which a rank's device has nothing to do: choosing rows, writing, being handed the next
# one, whose sequences are read meanwhile. A guess.
_BETWEEN_UNITS_S = 1.0


@dataclass(frozen=True)
class Work:
    """One phase. flop: on the ranks' devices; cpu_flop: of decompositions in float64, on a CPU core or, where its rate
    is known, on a device. seconds: with all workers; None where neither a device nor a rate says it."""

    name: str
    sequences: int
    tokens: int
    flop: float
    cpu_flop: float = 0.0
    seconds: float | None = None
    # Of flop, what is done beside the model's forward and backward, and how it is multiplied (`Rates.products`).
    own_flop: float = 0.0
    products: str = ""
    # The dtype that the model is in.
    dtype: str = ""
    # Bytes that ranks of one worker gather of each other's weights, each of them; that are written to storage, or read;
    # and of these, the units' own sums, which are written while the next units are computed.
    gathered: float = 0.0
    stored: float = 0.0
    behind: float = 0.0
    # Units, between two of which a rank waits.
    units: int = 0


@dataclass(frozen=True)
class Rate:
    """What turns work into time: a device's rates, or a measured rate of the scan.

    tokens_per_s: of one worker's scan; other phases go by their FLOP. refine_speed: the refining dtype's rate over the
    scan's. measured: by phase, of a finished run: (tokens or sequences per second and worker, or None; seconds, where
    nothing is counted).
    """

    rates: Rates | None = None
    refine_speed: float = 1.0
    tokens_per_s: float | None = None
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def timed(work: Sequence[Work], rate: Rate, workers: int, ranks: int) -> tuple[Work, ...]:
    """The same phases with seconds where they are known."""
    scan = next((one for one in work if one.name == "scan"), None)
    per_token = scan.flop / scan.tokens if scan and scan.tokens else None

    def seconds(one: Work) -> float | None:
        if known := rate.measured.get(one.name):
            return _as_measured(one, known, workers)
        speed = rate.refine_speed if one.name in AS_REFINED else 1.0
        if rate.tokens_per_s and per_token and one.flop:
            return one.flop / per_token / rate.tokens_per_s / workers / speed
        return by_rates(one, rate.rates, workers, ranks) if rate.rates and not rate.tokens_per_s else None

    return tuple(replace(one, seconds=seconds(one)) for one in work)


def _as_measured(one: Work, known: Mapping[str, float], workers: int) -> float:
    if "tokens_per_s" in known and one.tokens:
        return one.tokens / known["tokens_per_s"] / workers
    if "sequences_per_s" in known and one.sequences:
        return one.sequences / known["sequences_per_s"] / workers
    return known["seconds"]


def by_rates(one: Work, rates: Rates, workers: int, ranks: int) -> float | None:
    """A phase's seconds: its parts one after the other, but for what is written while the next units are computed, of
    every worker's units but its last. None where a rate that it needs is not known, or nothing of it is counted."""
    count = workers * ranks
    parts = [
        (one.flop - one.own_flop, rates.model.get(one.dtype), count),
        (one.own_flop, rates.products.get(one.products), count),
        (one.cpu_flop, rates.eigh, count),
        # Of each rank, at the same time.
        (one.gathered, rates.link, 1),
        # A worker's first rank stores while the others wait.
        (one.stored, _STORED_PER_S, workers),
        (one.units, 1 / _BETWEEN_UNITS_S, workers),
    ]
    if not any(amount for amount, _, _ in parts) or any(amount and not speed for amount, speed, _ in parts):
        return None
    seconds = [amount / speed / together if amount and speed else 0.0 for amount, speed, together in parts]
    others = 1 - min(1.0, workers / one.units) if one.units else 0.0
    return sum(seconds) - others * min(one.behind / _STORED_PER_S / workers, seconds[0] + seconds[1])


def rates_of(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Each phase in a finished run's summary.json: tokens, else sequences, per second and worker."""
    workers = summary["workers"]["num_workers"]
    found: dict[str, dict[str, float]] = {}
    for name, phase in summary["phases"].items():
        took = max(phase["seconds"], 1e-3)
        found[name] = {"seconds": took}
        for kind in ("tokens", "sequences"):
            if phase[kind]:
                found[name][f"{kind}_per_s"] = phase[kind] / took / workers
    return found
