"""Several addressable corpora as one: numbered through in the order of their labels, read where each of them is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from infscan.config import fingerprint, with_checksum
from infscan.corpus.in_place import DESCRIPTION, SCHEMA_VERSION
from infscan.corpus.reading import Reading
from infscan.corpus.sequences import AddressableCorpus, Sequence, TokenBlock, check_numbers
from infscan.errors import CorpusError
from infscan.storage import Store, is_uri

FORMAT = "joined"


def describe_joined(store: Store, parts: Mapping[str, AddressableCorpus]) -> dict[str, Any]:
    """The content of addressable.json for corpora by label.

    Raises:
        CorpusError: where they were made with different tokenizers, or one is a filtered corpus.
    """
    known = {label: corpus.tokenizer for label, corpus in parts.items() if corpus.tokenizer is not None}
    if len(set(known.values())) > 1:
        raise CorpusError(
            f"{', '.join(known)} were made with different tokenizers; prepare them with the model's own again."
        )
    for label, corpus in parts.items():
        if corpus.chosen is not None:
            raise CorpusError(f"{label} is a filtered corpus; filter the corpora together instead (infscan tfidf).")
    entries = [
        {"label": label, "at": address(store, corpus.store), "fingerprint": corpus.fingerprint}
        for label, corpus in parts.items()
    ]
    content = [[entry["label"], entry["fingerprint"]] for entry in entries]
    return with_checksum(
        {
            "schema_version": SCHEMA_VERSION,
            "format": FORMAT,
            "fingerprint": fingerprint({"joined": content}),
            "corpora": entries,
        }
    )


def address(store: Store, other: Store) -> str:
    """Where a corpus is, as a description in `store` says it: relative where it is below, so that it moves with
    the folder."""
    return other.uri.removeprefix(f"{store.uri}/")


def at_address(store: Store, address: str) -> Store:
    return Store(address) if is_uri(address) or address.startswith("/") else store / address


class JoinedCorpus:
    """The parts' sequences, one part after the other; `labels` says of which part a number is."""

    def __init__(self, store: Store, description: Mapping[str, Any], parts: list[AddressableCorpus]) -> None:
        self.store = store
        self.parts = parts
        self.names = [str(entry["label"]) for entry in description["corpora"]]
        self.fingerprint: str = description["fingerprint"]
        for entry, part in zip(description["corpora"], parts, strict=True):
            if part.fingerprint != entry["fingerprint"]:
                raise CorpusError(
                    f"{part.store} is not the corpus that {store.uri}/{DESCRIPTION} joined as {entry['label']}; put it "
                    "back, or start a new output."
                )
        self._first = np.cumsum([0, *(part.sequences for part in parts)], dtype=np.int64)

    @property
    def reading(self) -> Reading:
        """The parts are opened alike."""
        return self.parts[0].reading

    @property
    def sequences(self) -> int:
        return int(self._first[-1])

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def sequence_length(self) -> int:
        return max(part.sequence_length for part in self.parts)

    @property
    def vocab_size(self) -> int:
        return max(part.vocab_size for part in self.parts)

    @property
    def tokenizer(self) -> str | None:
        """All parts that know theirs have the same."""
        return next((part.tokenizer for part in self.parts if part.tokenizer is not None), None)

    @property
    def counts(self) -> dict[str, Any]:
        by_label = {name: part.counts for name, part in zip(self.names, self.parts, strict=True)}
        return {"sequences": self.sequences, "tokens": self.tokens, "corpora": by_label}

    @property
    def chosen(self) -> None:
        """Every number has a sequence."""
        return None

    def label(self, number: int) -> str:
        """Of which part a sequence is."""
        return self.names[int(np.searchsorted(self._first, number, side="right")) - 1]

    def read(self, ids: np.ndarray) -> list[Sequence]:
        ids = np.asarray(ids, np.int64)
        check_numbers(self.store.uri, ids, self.sequences)
        found: dict[int, Sequence] = {}
        for part, first, after in zip(self.parts, self._first, self._first[1:], strict=False):
            own = np.unique(ids[(ids >= first) & (ids < after)])
            for number, sequence in zip(own.tolist(), part.read(own - first) if len(own) else [], strict=True):
                found[number] = replace(sequence, sequence_id=number)
        return [found[number] for number in ids.tolist()]

    def token_blocks(self, start: int, stop: int) -> Iterator[TokenBlock]:
        check_numbers(self.store.uri, np.array([start, stop - 1] if stop > start else [], np.int64), self.sequences)
        for part, first, after in zip(self.parts, self._first.tolist(), self._first[1:].tolist(), strict=False):
            low, high = max(start, first), min(stop, after)
            if low < high:
                yield from part.token_blocks(low - first, high - first)

    def close(self) -> None:
        for part in self.parts:
            part.close()
