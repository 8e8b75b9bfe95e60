"""Read what `prepare` wrote: sequences by number out of Parquet parts, decoding only the row groups asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infscan.config import Attention, Packing
from infscan.corpus.manifest import MANIFEST, Manifest, PartSummary, footer_digest
from infscan.corpus.reading import AS_STORED, Reading
from infscan.corpus.sequences import Sequence, Span, TokenBlock, check_numbers, document_starts
from infscan.errors import ChangedCorpusError, CorpusError
from infscan.storage import MissingError, Store, stamp_of

_OPEN_PARTS = 4
_DECODED_ROW_GROUPS = 4


def open_prepared(store: Store, reading: Reading = AS_STORED) -> PreparedCorpus:
    """Open a prepared corpus, its parts checked against the manifest by one listing.

    Raises:
        CorpusError: where there is no complete corpus, or a part is missing or has another size.
    """
    try:
        value = store.read_json(MANIFEST)
    except MissingError as error:
        raise CorpusError(
            f"{store} holds no prepared corpus: {MANIFEST} is missing; prepare it (again) first."
        ) from error
    corpus = PreparedCorpus(store, Manifest.from_json(value, f"{store}/{MANIFEST}"), reading)
    there = {entry.name: entry.size for entry in store.list(suffix=".parquet")}
    for part in corpus.manifest.parts:
        _check_size(store, part, there.get(part.name))
    return corpus


def _check_size(store: Store, part: PartSummary, size: int | None) -> None:
    if size is None:
        raise CorpusError(f"{store}/{part.name} is missing, and the manifest lists it; prepare the corpus again.")
    if size != part.bytes:
        raise CorpusError(
            f"{store}/{part.name} has {size} bytes and the manifest says {part.bytes}: it was changed or cut off; "
            "remove it and prepare the corpus again."
        )


class PreparedCorpus:
    """What `prepare_part` and `write_manifest` wrote. Reads only the row groups asked for and keeps the last few."""

    def __init__(self, store: Store, manifest: Manifest, reading: Reading = AS_STORED) -> None:
        self.store = store
        self.manifest = manifest
        self.reading = reading
        self._forget()

    def _forget(self) -> None:
        self._first = self.manifest.first
        self._parts: OrderedDict[int, _OpenPart] = OrderedDict()
        self._row_groups: OrderedDict[tuple[int, int], _RowGroup] = OrderedDict()
        # The parts that were looked at in this call.
        self._looked_at: set[int] = set()

    @property
    def sequences(self) -> int:
        return self.manifest.sequences

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def sequence_length(self) -> int:
        return self.manifest.sequence_length

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def tokenizer(self) -> str | None:
        return self.manifest.tokenizer

    @property
    def counts(self) -> dict[str, Any]:
        return asdict(self.manifest.counts)

    @property
    def chosen(self) -> None:
        """Every number has a sequence."""
        return None

    def read(self, ids: np.ndarray) -> list[Sequence]:
        ids = np.asarray(ids, np.int64)
        check_numbers(self.store.uri, ids, self.sequences)
        self._looked_at.clear()
        found: list[Sequence | None] = [None] * len(ids)
        # Ascending, so that every row group is decoded once however the numbers are ordered; an empty part has no row.
        for at in np.argsort(ids, kind="stable"):
            number = int(ids[at])
            part = int(np.searchsorted(self._first, number, side="right")) - 1
            found[at] = self._row(part, number)
        if self.reading.attention is Attention.within:
            found = [replace(one, starts=self._starts(one)) for one in found if one is not None]
        return [sequence for sequence in found if sequence is not None]

    def _starts(self, sequence: Sequence) -> np.ndarray:
        packed = self.manifest.settings
        concat = packed.get("packing") == Packing.concat.value
        separators = (packed.get("bos_id"), packed.get("eos_id") if concat else None)
        return document_starts(sequence.token_ids, sequence.documents, separators)

    def token_blocks(self, start: int, stop: int) -> Iterator[TokenBlock]:
        check_numbers(self.store.uri, np.array([start, stop - 1] if stop > start else [], np.int64), self.sequences)
        while start < stop:
            self._looked_at.clear()
            index = int(np.searchsorted(self._first, start, side="right")) - 1
            first = int(self._first[index])
            opened = self._part(index)
            group = int(np.searchsorted(opened.first_rows, start - first, side="right")) - 1
            begin = first + int(opened.first_rows[group])
            block = opened.tokens(group)
            end = min(stop, begin + len(block))
            yield block.part(start - begin, end - begin)
            start = end

    def _row(self, index: int, number: int) -> Sequence:
        row = number - int(self._first[index])
        opened = self._part(index)
        group = int(np.searchsorted(opened.first_rows, row, side="right")) - 1
        key = (index, group)
        if key not in self._row_groups:
            self._row_groups[key] = opened.row_group(group)
            if len(self._row_groups) > _DECODED_ROW_GROUPS:
                self._row_groups.popitem(last=False)
        self._row_groups.move_to_end(key)
        return self._row_groups[key].sequence(row - int(opened.first_rows[group]), number)

    def _part(self, index: int) -> _OpenPart:
        if index in self._parts and index not in self._looked_at and self._parts[index].changed:
            self._open_anew(index)
        self._looked_at.add(index)
        if index not in self._parts:
            self._parts[index] = _OpenPart(self.store, self.manifest.parts[index])
            if len(self._parts) > _OPEN_PARTS:
                self._parts.popitem(last=False)[1].close()
        self._parts.move_to_end(index)
        return self._parts[index]

    def _open_anew(self, index: int) -> None:
        """Open a part that was replaced or written to; its footer says whether it holds the same sequences.

        Raises:
            ChangedCorpusError: where it does not.
        """
        self._parts.pop(index).close()
        for key in [key for key in self._row_groups if key[0] == index]:
            del self._row_groups[key]
        try:
            self._parts[index] = _OpenPart(self.store, self.manifest.parts[index])
        except CorpusError as error:
            raise ChangedCorpusError(f"{error} It changed under the run.") from error

    def close(self) -> None:
        """Close the files that are open; reading opens them again."""
        for part in self._parts.values():
            part.close()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "manifest": self.manifest, "reading": self.reading}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class _OpenPart:
    """One part's open file and its footer."""

    def __init__(self, store: Store, part: PartSummary) -> None:
        self._name = f"{store}/{part.name}"
        self._stamp = stamp_of(self._name)
        with ExitStack() as stack:
            try:
                stream = stack.enter_context(store.open(part.name))
            except MissingError:
                stream = None
            _check_size(store, part, None if stream is None else stream.seek(0, 2))
            assert stream is not None, "a missing part was refused"
            if footer_digest(stream) != part.footer:
                raise self._damaged("its footer is not the one that was written")
            try:
                # A local file by its path: Arrow may let go of a Python stream while the interpreter ends, and abort.
                source = store.local_path(part.name) or stream
                self._file = stack.enter_context(pq.ParquetFile(source, page_checksum_verification=True))
            except (pa.ArrowException, OSError) as error:
                raise self._damaged(error) from error
            metadata = self._file.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            if sum(sizes) != part.sequences:
                raise self._damaged(f"{sum(sizes)} rows where the manifest says {part.sequences}")
            self.first_rows = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
            self._open = stack.pop_all()

    @property
    def changed(self) -> bool:
        """Whether the file is not the one that was opened, or was written to since."""
        return stamp_of(self._name) != self._stamp

    def row_group(self, group: int) -> _RowGroup:
        return _RowGroup.of(self._read(group, None))

    def tokens(self, group: int) -> TokenBlock:
        column = self._read(group, ["token_ids"]).column("token_ids").combine_chunks()
        return TokenBlock(column.values.to_numpy(), column.offsets.to_numpy().astype(np.int64))

    def _read(self, group: int, columns: list[str] | None) -> pa.Table:
        try:
            return self._file.read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise self._damaged(error) from error

    def _damaged(self, reason: object) -> CorpusError:
        reason = " ".join(str(reason).split())
        return CorpusError(f"{self._name} cannot be read ({reason}); remove the file and prepare the corpus again.")

    def close(self) -> None:
        self._open.close()


@dataclass(frozen=True, eq=False)
class _RowGroup:
    """A decoded row group: flat token ids and spans, and where each row's begin."""

    tokens: np.ndarray
    token_offsets: np.ndarray
    spans: pa.StructArray
    span_offsets: np.ndarray
    byte_offsets: np.ndarray
    paths: pa.Array
    loss: np.ndarray | None

    @classmethod
    def of(cls, table: pa.Table) -> _RowGroup:
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        tokens, documents = columns["token_ids"], columns["documents"]
        return cls(
            tokens=tokens.values.to_numpy(),
            token_offsets=tokens.offsets.to_numpy(),
            spans=documents.values,
            span_offsets=documents.offsets.to_numpy(),
            byte_offsets=columns["byte_offset"].to_numpy(),
            paths=columns["path"],
            # The masks lie as the tokens do, one for each.
            loss=columns["loss_mask"].values.to_numpy(zero_copy_only=False) if "loss_mask" in columns else None,
        )

    def sequence(self, row: int, number: int) -> Sequence:
        begin, end = int(self.span_offsets[row]), int(self.span_offsets[row + 1])
        tokens = slice(self.token_offsets[row], self.token_offsets[row + 1])
        return Sequence(
            sequence_id=number,
            token_ids=self.tokens[tokens].astype(np.int64),
            documents=tuple(Span(**span) for span in self.spans[begin:end].to_pylist()),
            byte_offset=int(self.byte_offsets[row]),
            path=self.paths[row].as_py(),
            loss=None if self.loss is None else self.loss[tokens],
        )
