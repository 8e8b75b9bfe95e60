"""What became of a file's records (lines of JSONL, rows of Parquet): none is skipped without being counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from infscan.errors import BadDocumentError

# Sentences kept of documents and files that are left out; all are counted.
LISTED = 20


@dataclass(frozen=True)
class LeftOut:
    """Documents and files that could not be used: how many by reason, and the first ones' full sentences."""

    by_reason: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)

    @classmethod
    def together(cls, parts: Iterable[LeftOut]) -> LeftOut:
        reasons: Counter[str] = Counter()
        first: list[str] = []
        for part in parts:
            reasons.update(part.by_reason)
            first += part.first
        return cls(dict(sorted(reasons.items())), first[:LISTED])


class Tally:
    """Counts one file's records: records == blank + bad + the documents handed on, always.

    allowed: bad documents that may be left out before one ends the reading (corpus.allow_bad_documents).
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.records = 0
        self.blank = 0
        self.bad = 0
        self._reasons: Counter[str] = Counter()
        self._first: list[str] = []

    def leave_out(self, error: BadDocumentError) -> None:
        """Count a document that cannot be used.

        Raises:
            BadDocumentError: where no more may be left out, with the limit.
        """
        if self.bad >= self.allowed:
            limit = f" corpus.allow_bad_documents={self.allowed} was reached before it." if self.allowed else ""
            raise BadDocumentError(f"{error}{limit}", error.reason) from error
        self.bad += 1
        self._reasons[error.reason] += 1
        if len(self._first) < LISTED:
            self._first.append(str(error))

    def left_out(self) -> LeftOut:
        return LeftOut(dict(sorted(self._reasons.items())), list(self._first))
