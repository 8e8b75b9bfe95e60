"""Write a prepared corpus: documents tokenised, packed, numbered and laid down as Parquet that can be read by number.

part-00000.parquet ...   one per piece of the input, in order; sequences are numbered through the parts
_inputs.parquet          the files they were made of
manifest.json            written last: its presence is the fact that the corpus is complete
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Row
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import numpy as np

from infscan.config import CorpusConfig, Packing, TextRecords, fingerprint
from infscan.corpus.documents import file_format, read_documents
from infscan.corpus.duplicates import HASH, hashes_of
from infscan.corpus.files import file_name, folder_below, name_below
from infscan.corpus.manifest import (
    INPUTS,
    MANIFEST,
    Manifest,
    PartSummary,
    footer_digest,
    inputs_parquet,
    part_name,
)
from infscan.corpus.packing import Counts, Lengths, Packer, PackSettings
from infscan.corpus.part_file import finished_part, part_bytes
from infscan.corpus.rows import Document
from infscan.corpus.sequences import Sequence
from infscan.corpus.splits import InputSplit
from infscan.corpus.tally import LeftOut, Tally
from infscan.corpus.tokenised import with_tokens
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.errors import BadFileError, CorpusError, ModelError
from infscan.storage import Identity, InputFile, Store

_PART = re.compile(r"part-(\d{5,})\.parquet")
NOTHING = np.empty(0, np.int64)
# The version of what makes a corpus of files: since 2, made-up ids and sources have the path below corpus.path, a
# prompt is tokenised with what follows, and a document's own EOS is not doubled.
RULES = 2


def prepare_settings(config: CorpusConfig, pack: PackSettings, tokenizer_digest: str | None) -> dict[str, Any]:
    """Everything besides the files that decides what a prepared corpus holds, as plain JSON."""
    fields = {key: getattr(config, key) for key in ("format", "text_field", "id_field", "source_field", "tokens_field")}
    if config.text_records is not TextRecords.file:
        fields["text_records"] = config.text_records.value
    # What token arrays are read by; null for text.
    fields |= {key: value for key in ("dtype",) if (value := getattr(config, key)) is not None}
    if config.deduplicate:
        fields["deduplicate"] = True
    settings = {**fields, **asdict(pack), "packing": pack.packing.value, "tokenizer": tokenizer_digest, "rules": RULES}
    del settings["masked"]
    if settings["eos_id"] is None and config.eos_id is not None:
        # Not packed with, and yet what npy's documents are told by.
        settings["eos_id"] = config.eos_id
    # Where the loss is everywhere, nothing is said of it.
    masks = {"prompt_field": config.prompt_field, "mask_field": config.mask_field} if pack.masked else {}
    return settings | masks


def prepare_part(
    piece: InputSplit,
    index: int,
    config: CorpusConfig,
    pack: PackSettings,
    tokenizer: Tokenizer | None,
    store: Store,
    dropped: np.ndarray = NOTHING,
) -> PartSummary:
    """Read, tokenise, pack and write one piece; a part already there, of the same piece and settings, is kept.

    The same piece gives the same bytes. Documents stream through, but the finished part is held in memory, compressed
    (about two bytes per token), because it is written by one put: corpus.part_bytes bounds it.

    A file that cannot be read to its end is left out where corpus.allow_bad_files lets it; of one that was cut, the
    stretch. dropped: int64, ascending: which of the piece's documents are left out as duplicates.

    Raises:
        CorpusError: naming file and line, for anything that cannot be read; nothing is written then.
    """
    settings = fingerprint(prepare_settings(config, pack, tokenizer.digest if tokenizer else None))
    drops = sha256(dropped.astype("<i8").tobytes()).hexdigest() if len(dropped) else ""
    done = finished_part(store, index)
    if done is not None and (done.piece, done.settings, done.dropped) == (piece, settings, drops):
        return done
    bad: dict[InputFile, str] = {}
    while True:
        reading = _Reading(piece, config, pack, tokenizer, dropped, bad)

        def summary_of(digest: str, reading: _Reading = reading) -> PartSummary:
            counts = reading.counts
            left_out, lengths = LeftOut.together(reading.left_out), reading.lengths
            return PartSummary(
                index, counts.sequences, counts.tokens, digest, 0, piece, settings, counts, left_out, lengths, drops
            )

        try:
            data, summary = part_bytes(reading.sequences(), pack, summary_of)
        except BadFileError as error:
            if not config.allow_bad_files:
                raise
            # Its first documents are in the part by now: once more, without it.
            bad[reading.file] = str(error)
        else:
            store.write(part_name(index), data)
            return replace(summary, bytes=len(data), footer=footer_digest(io.BytesIO(data)))


class _Reading:
    """A piece's sequences, file by file, and what was counted on the way."""

    def __init__(
        self,
        piece: InputSplit,
        config: CorpusConfig,
        pack: PackSettings,
        tokenizer: Tokenizer | None,
        dropped: np.ndarray,
        bad: dict[InputFile, str],
    ) -> None:
        self.piece, self.config, self.pack, self.tokenizer, self.bad = piece, config, pack, tokenizer, bad
        self.dropped = set(dropped.tolist())
        self.position = 0
        self.file = piece.files[0]
        self.counts = Counts()
        self.left_out: list[LeftOut] = []
        self.lengths = Lengths()

    def sequences(self) -> Iterator[Sequence]:
        for file in self.piece.files:
            self.file = file
            if file in self.bad:
                self.counts += Counts(files_bad=1)
                self.left_out.append(LeftOut({"file cannot be read": 1}, [self.bad[file]]))
                continue
            tally = Tally(self.config.allow_bad_documents)
            packer = Packer(self.pack, tally)
            documents = read_documents(file, self.config, tally, stretch=self.piece.stretch)
            yield from packer.pack(with_tokens(self._kept(documents), self.tokenizer, tally))
            # Of a file that was cut, its first stretch says that it was read.
            first = int(self.piece.stretch.start == 0)
            self.counts += packer.counts + Counts(
                files_read=first, records_read=tally.records, records_blank=tally.blank, documents_bad=tally.bad
            )
            self.left_out.append(tally.left_out())
            self.lengths += packer.lengths

    def _kept(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            if self.position in self.dropped:
                self.counts += Counts(documents_duplicate=1)
            else:
                yield document
            self.position += 1


def hash_piece(piece: InputSplit, config: CorpusConfig) -> np.ndarray:
    """HASH [n]: the content of every document of a piece, in order; of a file that cannot be read to its end, none.

    Raises:
        CorpusError: for what corpus.allow_bad_* do not let pass.
    """
    found = [np.empty(0, HASH)]
    for file in piece.files:
        try:
            tally = Tally(config.allow_bad_documents)
            found.append(hashes_of(read_documents(file, config, tally, stretch=piece.stretch)))
        except BadFileError:
            if not config.allow_bad_files:
                raise
    return np.concatenate(found)


def prepare_task(
    piece: InputSplit,
    index: int,
    config: CorpusConfig,
    pack: PackSettings,
    folder: str,
    digest: str | None,
    store: Store,
    dropped: np.ndarray,
) -> tuple[int, int]:
    """`prepare_part` with the tokenizer of a model's folder, in a process of its own. Returns (sequences, tokens).

    Raises:
        ModelError: where the folder's tokenizer is not the one of that digest.
    """
    tokenizer = load_tokenizer(folder)
    Identity("tokenizer", folder, digest or "", "its files").check(tokenizer.digest if tokenizer else "", ModelError)
    part = prepare_part(piece, index, config, pack, tokenizer, store, dropped)
    return part.sequences, part.tokens


def store_hashes(piece: InputSplit, config: CorpusConfig, store: Store, name: str) -> None:
    """Put `hash_piece` of a piece in storage."""
    store.write(name, hash_piece(piece, config).tobytes())


def finished_parts(store: Store, pieces: Row[InputSplit]) -> list[PartSummary]:
    """The parts of these pieces, all of which are there by now.

    Raises:
        CorpusError: where one is missing, or is of another piece: something else writes to the same folder.
    """
    found: list[PartSummary] = []
    for index, piece in enumerate(pieces):
        part = finished_part(store, index)
        if part is None or part.piece != piece:
            raise CorpusError(
                f"{store}/{part_name(index)}: the part of {piece.files[0].uri} is gone or another file's, though it "
                "was written; does another job prepare into this folder? Run this one again when it alone does."
            )
        found.append(part)
    return found


def write_manifest(
    store: Store,
    config: CorpusConfig,
    pack: PackSettings,
    tokenizer_digest: str | None,
    parts: Iterable[PartSummary],
    *,
    files_aside: int = 0,
) -> Manifest:
    """Number the parts through and write manifest.json; every part must be there. files_aside: beside the data.

    The fingerprint is of the content (token ids, document ids, T): the same documents prepared elsewhere have the same.

    Raises:
        CorpusError: if the parts hold no sequence at all, or leave out more than corpus.allow_bad_* allow.
    """
    ordered = tuple(sorted(parts, key=lambda part: part.index))
    settings = prepare_settings(config, pack, tokenizer_digest)
    assert [part.index for part in ordered] == list(range(len(ordered))), "a part is missing or twice"
    assert {part.settings for part in ordered} <= {fingerprint(settings)}, "parts of different settings"
    counts = sum((part.counts for part in ordered), Counts(files_aside=files_aside))
    check_allowed(config, counts, LeftOut.together(part.left_out for part in ordered))
    if not counts.sequences:
        raise CorpusError(
            f"{config.path}: {counts.files_read} files with {counts.documents_read} documents hold no token; "
            f"check the files and corpus.text_field={config.text_field!r}."
        )
    digests = [part.digest for part in ordered if part.sequences]
    inputs = inputs_parquet(ordered)
    manifest = Manifest(
        fingerprint=fingerprint({"sequence_length": pack.sequence_length, "parts": digests}),
        settings=settings,
        sequence_length=pack.sequence_length,
        vocab_size=pack.vocab_size,
        tokenizer=tokenizer_digest,
        sequences=counts.sequences,
        tokens=counts.tokens,
        counts=counts,
        parts=ordered,
        inputs=sha256(inputs).hexdigest(),
    )
    store.write(INPUTS, inputs)
    store.write_json(MANIFEST, manifest.to_json())
    _remove_stale(store, len(ordered))
    return manifest


def earlier_rules(before: Mapping[str, Any], config: CorpusConfig, files: Row[InputFile]) -> str | None:
    """How a corpus that an earlier version prepared would come out otherwise now; None where it would not."""
    if before.get("rules", 1) >= RULES:
        return None
    if config.prompt_field is not None:
        return "prompts were tokenised apart from what follows"
    if config.tokens_field is not None and before.get("packing") == Packing.concat.value:
        return "an EOS that documents bring was doubled"
    names = [(name_below(file.uri, config.path), folder_below(file.uri, config.path)) for file in files]
    by_folder = files and file_format(files[0].uri, config.format) == "text"
    if any(name != file_name(file.uri) for file, (name, _) in zip(files, names, strict=True)):
        return "documents were named by their file alone, without its folder"
    if by_folder and config.text_records is TextRecords.file and any(name != folder for name, folder in names):
        return "each text was a source of its own, not its folder"
    return None


def check_allowed(config: CorpusConfig, counts: Counts, left_out: LeftOut) -> None:
    """Refuse a corpus of which more was left out than its settings allow: the limits count over all files.

    Raises:
        CorpusError: with both numbers and the first sentence.
    """
    for bad, allowed, key in (
        (counts.documents_bad, config.allow_bad_documents, "documents"),
        (counts.files_bad, config.allow_bad_files, "files"),
    ):
        if bad > allowed:
            raise CorpusError(
                f"{config.path}: {bad} {key} cannot be used, more than corpus.allow_bad_{key}={allowed}. The first: "
                f"{left_out.first[0]}"
            )


def _remove_stale(store: Store, parts: int) -> None:
    """Parts of ours that an earlier attempt with more input files left; a folder is often read as a whole."""
    known = {part_name(index) for index in range(parts)}
    for entry in store.list(suffix=".parquet"):
        match = _PART.fullmatch(entry.name)
        if match and entry.name not in known and finished_part(store, int(match[1])) is not None:
            store.remove(entry.name)
