"""The settings of the scores that a sweep of methods, dampings and layers judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from infscan.errors import ConfigError


class BankMethod(StrEnum):
    """How a sweep's models score sequences: EK-FAC, K-FAC (its eigenvalues uncorrected), the gradient dot product,
    BM25, the whitened cosine of hidden states, and the iterated inverses."""

    ekfac = "ekfac"
    kfac = "kfac"
    identity = "identity"
    bm25 = "bm25"
    cosine = "cosine"
    cg = "cg"
    astra = "astra"


@dataclass
class ScoresConfig:
    """The scores that a sweep judges."""

    methods: list[BankMethod] = field(default_factory=list)
    """Of ekfac, kfac, identity, bm25, cosine, cg and astra; none where the bank is only trained."""
    damping: list[float] = field(default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
    """Values of factors.damping.relative, for ekfac and kfac."""
    auto: bool = True
    """Judge ekfac with factors.damping.auto as well."""
    tracked: list[str] = field(
        default_factory=lambda: ["mlp", "mlp+attention", "head", "mlp+head", "last", "last+head"]
    )
    """Sets of layers: of mlp, attention, head, the MLPs of the blocks' `lower`, `middle` and `upper` third and `last`
    (the last block's), several joined by +."""
    iterated: list[str] = field(default_factory=lambda: ["mlp"])
    """The sets of layers that cg and astra are judged on."""
    iterated_damping: list[float] = field(default_factory=lambda: [0.1])
    """Values of factors.damping.relative, for cg and astra."""
    iterated_auto: bool = False
    """Judge cg and astra with factors.damping.auto as well."""
    iterated_sequences: list[int] = field(default_factory=lambda: [0])
    """Sequences that cg's G is of, as factors.iteration.batch has it; 0 is all."""
    steps: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Iterations of cg that are judged."""
    astra_steps: int = 50
    """Steps of astra, of 32 sequences each."""
    iterated_queries: int | None = None
    """Queries of each kind that cg and astra solve for; null is all."""
    resamples: int = 2000
    """Bootstrap resamples, over queries, behind an interval."""

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        parts = {part for one in [*self.tracked, *self.iterated] for part in one.split("+")}
        known = ("mlp", "attention", "head", "lower", "middle", "upper", "last")
        if unknown := parts - set(known):
            raise ConfigError(
                f"sweep.tracked: {', '.join(sorted(unknown))} is unknown; join {', '.join(known[:-1])} and {known[-1]} "
                "by +."
            )
        if min([*self.damping, *self.iterated_damping], default=1) <= 0:
            raise ConfigError(f"sweep.damping={self.damping}: every value has to be above 0.")
        self._check_counts(("steps", "resamples"))

    def _check_counts(self, names: tuple[str, ...]) -> None:
        found = [getattr(self, name) for name in names]
        counts = [one for value in found for one in (value if isinstance(value, list) else [value])]
        if min(counts) < 1 or min(self.iterated_sequences, default=0) < 0 or self.resamples < 20:
            said = ", ".join(f"sweep.{name}={getattr(self, name)}" for name in (*names, "iterated_sequences"))
            raise ConfigError(f"{said}: give at least 1 (iterated_sequences: or 0, all), and 20 resamples.")
