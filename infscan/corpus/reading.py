"""How a corpus's stored sequences are read: what a model sees of them beside their tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from infscan.config import Attention, CorpusConfig, plain


@dataclass(frozen=True)
class Reading:
    """The properties of a corpus that are chosen when it is read; by default, its tokens are all there is.

    An opened corpus has them, `CorpusAddress` takes them to the ranks, and whatever depends on them has them in its
    fingerprint: a new property is a new field here, and what reads by it.

    attention: whether it crosses the documents of a sequence; where it stays within them, sequences have `starts`.
    """

    attention: Attention = Attention.across

    @classmethod
    def of(cls, config: CorpusConfig) -> Reading:
        return cls(config.attention)

    def fields(self) -> dict[str, Any]:
        """Every property by its key, for plans and fingerprints."""
        fields: dict[str, Any] = plain(asdict(self))
        return fields


AS_STORED = Reading()
