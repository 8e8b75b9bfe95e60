"""A part of another corpus, under the other's own numbers: what the TF-IDF filter leaves to scan."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infscan.config import fingerprint, with_checksum
from infscan.corpus.in_place import DESCRIPTION, SCHEMA_VERSION
from infscan.corpus.joined import address
from infscan.corpus.reading import Reading
from infscan.corpus.sequences import AddressableCorpus, Sequence, TokenBlock
from infscan.errors import CorpusError
from infscan.storage import MissingError, Store, remember_written

FORMAT = "filtered"
CHOSEN = "chosen.parquet"


def describe_filtered(store: Store, base: AddressableCorpus, chosen: np.ndarray) -> None:
    """Lay down which sequences of `base` (int64, ascending) are to be scanned; the description last."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"sequence_id": chosen}), sink, compression="zstd")
    store.write(CHOSEN, sink.getvalue().to_pybytes())
    store.write_json(
        DESCRIPTION,
        with_checksum(
            {
                "schema_version": SCHEMA_VERSION,
                "format": FORMAT,
                "base": address(store, base.store),
                "base_fingerprint": base.fingerprint,
                "chosen": len(chosen),
                "fingerprint": _fingerprint(base, chosen),
            }
        ),
    )
    remember_written(store.read(DESCRIPTION))


def _fingerprint(base: AddressableCorpus, chosen: np.ndarray) -> str:
    digest = sha256(chosen.astype("<i8").tobytes()).hexdigest()
    return fingerprint({"base": base.fingerprint, "chosen": digest})


class FilteredCorpus:
    """Reads like its base and has its numbers; `chosen` are those that a scan takes."""

    def __init__(self, store: Store, base: AddressableCorpus, description: dict[str, Any]) -> None:
        self.store = store
        self.base = base
        self.fingerprint: str = description["fingerprint"]

    @cached_property
    def chosen(self) -> np.ndarray:
        """int64, ascending, as the filter left them.

        Raises:
            CorpusError: where the file is missing, or does not hold what was written.
        """
        try:
            table = pq.read_table(pa.BufferReader(self.store.read(CHOSEN)))
            chosen: np.ndarray = table["sequence_id"].to_numpy()
            intact = _fingerprint(self.base, chosen) == self.fingerprint
        except MissingError:
            raise CorpusError(f"{self.store}/{CHOSEN} is missing; filter the corpus again (infscan tfidf).") from None
        except (pa.ArrowException, OSError, MemoryError, ValueError, KeyError):
            intact = False
        if not intact:
            raise CorpusError(f"{self.store}/{CHOSEN} was changed or damaged; filter the corpus again (infscan tfidf).")
        return chosen

    @property
    def reading(self) -> Reading:
        return self.base.reading

    @property
    def sequences(self) -> int:
        return self.base.sequences

    @property
    def tokens(self) -> int:
        return self.base.tokens

    @property
    def sequence_length(self) -> int:
        return self.base.sequence_length

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def tokenizer(self) -> str | None:
        return self.base.tokenizer

    @property
    def counts(self) -> dict[str, Any]:
        return self.base.counts | {"chosen": len(self.chosen)}

    def read(self, ids: np.ndarray) -> list[Sequence]:
        return self.base.read(ids)

    def token_blocks(self, start: int, stop: int) -> Iterator[TokenBlock]:
        return self.base.token_blocks(start, stop)

    def close(self) -> None:
        self.base.close()
