"""The plan: which sequences are scanned and how they are cut into shards. It depends on no number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.errors import RunError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Selection:
    """The sequence numbers a pass reads, ascending: all of 0..total-1, or a uniform sample of `size` of them.

    among: int64, ascending: the only numbers to choose from, where the corpus is a filtered one; they do not travel.
    """

    total: int
    size: int
    seed: int = 0
    among: np.ndarray | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        total: int,
        max_sequences: int | None = None,
        seed: int = 0,
        among: np.ndarray | None = None,
        share: float | None = None,
    ) -> Selection:
        """At most `max_sequences`, and `share` (rounded, at least one) of what there is to choose from; null: all."""
        there = total if among is None else len(among)
        size = there if max_sequences is None else min(max_sequences, there)
        return cls(total, size if share is None else min(size, max(1, round(share * there))), seed, among)

    @classmethod
    def stored(cls, total: int, size: int, seed: int, among: np.ndarray | None = None) -> Selection:
        """As a file says it. Raises RunError for numbers that no selection has."""
        numbers = (total, size, seed)
        if not all(type(one) is int and 0 <= one < 1 << 62 for one in numbers) or size > total:
            raise RunError(
                f"a plan chooses {size!r} of {total!r} sequences (seed {seed!r}): it is not what was written."
            )
        return cls(total, size, seed, among)

    def __post_init__(self) -> None:
        assert 0 <= self.size <= self.total, f"cannot choose {self.size} of {self.total} sequences"

    def ids(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int64: the numbers at positions [start, stop) of the selection."""
        stop = self.size if stop is None else stop
        assert 0 <= start <= stop <= self.size, f"positions [{start}, {stop}) of {self.size}"
        return np.arange(start, stop, dtype=np.int64) if self.size == self.total else self._sample[start:stop]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """int64: the numbers at these positions."""
        return positions.astype(np.int64) if self.size == self.total else self._sample[positions]

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """int64: where these numbers, all of them chosen, stand in the selection."""
        return ids.astype(np.int64) if self.size == self.total else np.searchsorted(self._sample, ids)

    @cached_property
    def _sample(self) -> np.ndarray:
        there = self.total if self.among is None else len(self.among)
        chosen = np.random.default_rng(self.seed).choice(there, self.size, replace=False, shuffle=False)
        positions = np.sort(chosen.astype(np.int64))
        return positions if self.among is None else self.among[positions]

    def digest(self) -> str:
        """SHA-256 of the sample: numpy does not promise that another version draws the same one."""
        return sha256(self._sample.astype("<i8").tobytes()).hexdigest() if self.size < self.total else "all"

    def __getstate__(self) -> dict[str, Any]:
        # The sample is drawn again where it is needed; it does not travel with every task, and one of a filtered corpus
        # is needed by the driver alone.
        return {"total": self.total, "size": self.size, "seed": self.seed}


def shard_name(number: int) -> str:
    """What a shard's files are called."""
    return f"shard-{number:06d}"


@dataclass(frozen=True)
class Shard:
    """Positions [start, stop) of the selection: the unit of work, of retry and of output."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return shard_name(self.number)

    def __len__(self) -> int:
        return self.stop - self.start


def default_shard_sequences(n: int) -> int:
    """n / 256 rounded up, between 64 and 4096, and 16 shards of 8 or more where that would be fewer: enough for several
    workers on a small corpus, short retries on a large one.

    It does not go by the workers: a plan is the same for any number of them.
    """
    fewest = min(64, max(8, -(-n // 16)))
    return min(max(-(-n // 256), fewest), 4096)


@dataclass(frozen=True)
class Plan:
    """The shards over one addressable corpus; written once, then only read.

    Attributes:
        corpus_fingerprint: of the corpus's content.
        sequences: how many sequences the corpus has; the selection says which are read.
        shard_sequences: sequences per shard; the last one may have fewer.
        order_seed: of the order in which shards are handed out, which no result depends on.
    """

    corpus_fingerprint: str
    sequences: int
    selection: Selection
    shard_sequences: int
    order_seed: int = 0

    def __post_init__(self) -> None:
        assert self.selection.total == self.sequences, "the selection is of another corpus"
        assert self.shard_sequences > 0, "a shard holds at least one sequence"

    @property
    def num_shards(self) -> int:
        return -(-self.selection.size // self.shard_sequences)

    def shard(self, number: int) -> Shard:
        assert 0 <= number < self.num_shards, f"shard {number} of {self.num_shards}"
        start = number * self.shard_sequences
        return Shard(number, start, min(start + self.shard_sequences, self.selection.size))

    def ids(self, number: int) -> np.ndarray:
        """int64, ascending: the sequence numbers of one shard."""
        shard = self.shard(number)
        return self.selection.ids(shard.start, shard.stop)

    def by_shard(self, sequence_ids: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Sequence_ids, ascending and each once, grouped by the shard whose file has them, in plan order."""
        ordered = np.unique(sequence_ids)
        shards, starts = np.unique(self.selection.positions(ordered) // self.shard_sequences, return_index=True)
        for number, mine in zip(shards, np.split(ordered, starts)[1:], strict=True):
            yield shard_name(int(number)), mine

    def order(self) -> np.ndarray:
        """int64 [num_shards]: a seeded permutation, so that early thresholds come from all over the corpus."""
        return np.random.default_rng(self.order_seed).permutation(self.num_shards).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        selection = self.selection
        return {
            "schema_version": SCHEMA_VERSION,
            "corpus_fingerprint": self.corpus_fingerprint,
            "sequences": self.sequences,
            "selection": {"size": selection.size, "seed": selection.seed, "digest": selection.digest()},
            "shard_sequences": self.shard_sequences,
            "shards": self.num_shards,
            "order_seed": self.order_seed,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], among: np.ndarray | None = None) -> Plan:
        """Read a plan back; `among` are a filtered corpus's numbers.

        Raises:
            RunError: for another schema version, or if this numpy draws another sample than the plan was made with.
        """
        if value.get("schema_version") != SCHEMA_VERSION:
            raise RunError(
                f"the plan has schema version {value.get('schema_version')!r} and this infscan reads {SCHEMA_VERSION}; "
                "finish the run with the version that began it, or start a new output."
            )
        chosen = value["selection"]
        selection = Selection.stored(value["sequences"], chosen["size"], chosen["seed"], among)
        if selection.digest() != value["selection"]["digest"]:
            raise RunError(
                f"numpy {np.__version__} draws another sample of {selection.size} sequences than the plan was made "
                "with; finish the run with the numpy that began it, or start a new output."
            )
        return cls(
            corpus_fingerprint=value["corpus_fingerprint"],
            sequences=value["sequences"],
            selection=selection,
            shard_sequences=value["shard_sequences"],
            order_seed=value["order_seed"],
        )

    def shards_table(self) -> pa.Table:
        """One row per shard: shard, start, stop, first_sequence_id, last_sequence_id (all int64, ends inclusive)."""
        start = np.arange(self.num_shards, dtype=np.int64) * self.shard_sequences
        stop = np.minimum(start + self.shard_sequences, self.selection.size)
        return pa.table(
            {
                "shard": np.arange(self.num_shards, dtype=np.int64),
                "start": start,
                "stop": stop,
                "first_sequence_id": self.selection.at(start),
                "last_sequence_id": self.selection.at(stop - 1),
            }
        )
