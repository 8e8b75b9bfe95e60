"""Reading the next unit's sequences while this one is computed: what a store takes seconds for is there when its turn
comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from threading import Thread

import numpy as np

from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.sequences import AddressableCorpus, Sequence


@dataclass(frozen=True, eq=False)
class Reads:
    """What a unit of work reads: sequences of a corpus, by number."""

    corpus: CorpusAddress
    sequence_ids: np.ndarray

    @cached_property
    def key(self) -> tuple[CorpusAddress, bytes]:
        return self.corpus, sha256(self.sequence_ids.astype("<i8").tobytes()).digest()


class ReadAhead:
    """A rank's reader. One unit is read ahead at most, on a thread that nothing else reads beside.

    What is read ahead is a guess. One that was wrong is dropped; so is one that failed, and its sequences are read
    again when their turn comes: an error is always that of the unit that needs them.
    """

    def __init__(self) -> None:
        # What the next unit will most likely read; begun once this unit has what it needs itself.
        self.next: Reads | None = None
        # Units that found their sequences read.
        self.found = 0
        self._thread: Thread | None = None
        self._held: tuple[Reads, list[Sequence]] | None = None

    def read(self, wanted: Reads, corpus: AddressableCorpus) -> list[Sequence]:
        """A unit's sequences; then `next`, of the same corpus, is read while the unit is at work."""
        held, following = self._end(), self.next
        if held is not None and held[0].key == wanted.key:
            self.found += 1
            sequences = held[1]
        else:
            sequences = corpus.read(wanted.sequence_ids)
        self.next = None
        if following is not None and following.corpus == wanted.corpus:
            self._thread = self.begin(partial(self._read, following, corpus))
        return sequences

    def begin(self, work: Callable[[], None]) -> Thread:
        """Have it done on a thread."""
        thread = Thread(target=work, name="read-ahead")
        thread.start()
        return thread

    def forget(self) -> None:
        """Drop what was read ahead, once it is."""
        self._end()
        self.next = None

    def _read(self, wanted: Reads, corpus: AddressableCorpus) -> None:
        try:
            self._held = wanted, corpus.read(wanted.sequence_ids)
        except Exception:
            # Read again by the unit that needs it, which says so where that fails as well.
            return

    def _end(self) -> tuple[Reads, list[Sequence]] | None:
        """What the thread has read, which nothing holds any longer here."""
        if self._thread is not None:
            self._thread.join()
        held, self._thread, self._held = self._held, None, None
        return held
