"""Find out how token arrays lie, and describe them: what lets a corpus be scanned without preparing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from infscan.config import CorpusConfig, Packing, fingerprint
from infscan.corpus import mds, megatron, npy
from infscan.corpus.beside import data_files, refuse_foreign, refuse_parts_twice, refuse_pointer
from infscan.corpus.files import file_name, name_below
from infscan.corpus.in_place import Description, TokenFile, check_vocabulary, read_bytes, sampled_digest
from infscan.corpus.packing import PackSettings
from infscan.errors import CorpusError, StorageError
from infscan.storage import InputFile, expand, look_up

FORMATS = ("megatron", "npy", "mds")
_AT_ONCE = 16
_FIRST_TOKENS = 2048
# Beside the arrays of some tools lie files that say where their documents came from; they are no arrays.
_SHUFFLED = ("doc_idx", "sample_idx", "shuffle_idx", "document_index", "sample_index", "shuffle_index")
_BESIDE = {
    "megatron": (".json", ".txt", *(f"{name}.npy" for name in _SHUFFLED)),
    "npy": (".csv.gz", ".csv", ".json", ".index", ".metadata", ".idx"),
    "mds": (),
}


def token_files(config: CorpusConfig) -> tuple[str, list[InputFile]] | None:
    """The format and the files of a corpus of token arrays that is scanned where it is; None for another.

    MDS is read in place where corpus.tokens_field names its token ids.

    Raises:
        StorageError, CorpusError: as `array_files`.
    """
    found = array_files(config) if config.in_place else None
    return None if found is None or (found[0] == "mds" and config.tokens_field is None) else found


def array_files(config: CorpusConfig, files: list[InputFile] | None = None) -> tuple[str, list[InputFile]] | None:
    """The format and the files, indices included, of a corpus of token arrays; None where the path holds something
    else.

    `corpus.format=auto` goes by names: .bin with .idx is Megatron, .npy an array, index.json with .mds shards MDS.
    files: what is at the path, where that was looked up before.

    Raises:
        StorageError: where nothing is there.
        CorpusError: for a file that does not belong to the format.
    """
    if config.format not in ("auto", *FORMATS):
        return None
    files = list_files(config) if files is None else files
    kind = config.format if config.format != "auto" else _guess(files)
    if kind is None:
        return None
    files, _ = data_files(files)
    suffixes = {"megatron": (".bin", ".idx"), "npy": (".npy",), "mds": (mds.INDEX, ".mds", ".mds.zstd")}[kind]
    if config.format == "auto":
        for file in files:
            if not file.uri.endswith((*suffixes, *_BESIDE[kind])):
                raise CorpusError(
                    f"{file.uri} is not one of the {kind} files beside it; name the files by a glob in corpus.path, or "
                    "move it."
                )
        files = [file for file in files if file.uri.endswith(suffixes)]
    else:
        files = [file for file in files if not file.uri.endswith(_BESIDE[kind])] or files
        for file in files:
            refuse_foreign(file.uri)
    refuse_parts_twice(files, config.path)
    return kind, files


def list_files(config: CorpusConfig) -> list[InputFile]:
    """What is at corpus.path, in the order of the addresses.

    Raises:
        StorageError: where nothing is there.
    """
    try:
        return expand(config.path)
    except StorageError:
        # Megatron's own tools name a dataset by its prefix.
        beside = [look_up(f"{config.path.rstrip('/')}{suffix}") for suffix in (".bin", ".idx")]
        found = [file for file in beside if file is not None]
        if not found:
            raise
        if beside[0] is None:
            with suppress(StorageError):
                found += expand(f"{config.path.rstrip('/')}-*-of-*.bin")
        return found


def _guess(files: Sequence[InputFile]) -> str | None:
    names = [file_name(file.uri) for file in files]
    if any(name.endswith((".bin", ".idx")) for name in names):
        return "megatron"
    if any(name.endswith(".npy") for name in names):
        return "npy"
    return "mds" if any(name.endswith((".mds", ".mds.zstd")) for name in names) else None


def describe(kind: str, files: Sequence[InputFile], config: CorpusConfig, pack: PackSettings) -> Description:
    """Read the headers, and enough of every file for a fingerprint, in parallel.

    Raises:
        CorpusError: for files that are cut off, do not belong together, or hold token ids the model does not have.
    """
    for file in files:
        refuse_pointer(file)
    found, truncated, documents = _FILES[kind](files, config, pack)
    found = [
        replace(file, label=file.label or name_below(file.data.uri, config.path)) for file in found if file.sequences
    ]
    if not found:
        raise CorpusError(f"{config.path}: its {len(files)} files hold no token.")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        digests = list(pool.map(lambda file: _digests(file, len(found)), found))
    found = [replace(file, digests=tuple(digest)) for file, digest in zip(found, digests, strict=True)]
    content = {
        "format": kind,
        "packing": pack.packing,
        "sequence_length": pack.sequence_length,
        "separators": [pack.bos_id, pack.eos_id],
        "files": [
            [
                file.name,
                file.sequences,
                file.tokens,
                digest,
                _content_facts(file),
            ]
            for file, digest in zip(found, digests, strict=True)
        ],
    }
    return Description(
        format=kind,
        packing=pack.packing,
        sequence_length=pack.sequence_length,
        vocab_size=pack.vocab_size,
        eos_id=pack.eos_id,
        bos_id=pack.bos_id,
        documents=documents,
        tokens_truncated=truncated,
        fingerprint=fingerprint(content),
        files=tuple(found),
    )


def _content_facts(file: TokenFile) -> dict[str, Any]:
    """What is known of a file wherever it is."""
    return {key: value for key, value in file.facts.items() if key not in ("index", "pieces")}


def _digests(file: TokenFile, files: int) -> list[str]:
    return [sampled_digest(each, files) for each in file.sources]


Found = tuple[list[TokenFile], int, int | None]


def _megatron(files: Sequence[InputFile], config: CorpusConfig, pack: PackSettings) -> Found:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda pair: _megatron_file(pair[0], pair[1], config, pack), _pairs(files)))
    return (
        [file for file, _, _ in found],
        sum(truncated for _, truncated, _ in found),
        sum(documents for _, _, documents in found),
    )


Pieces = tuple[InputFile, ...]


def _pairs(files: Sequence[InputFile]) -> list[tuple[Pieces, InputFile]]:
    """Tokens and their index: a .bin, or Pythia's pieces of one (`document-00000-of-00020.bin` with `document.idx`)."""
    by_uri = {file.uri: file for file in files}
    cut = megatron.pieces_of([uri for uri in by_uri if uri.endswith(".bin")])
    of_piece = {uri for uris in cut.values() for uri in uris}
    pairs: list[tuple[Pieces, InputFile]] = []
    for stem in sorted({uri.rpartition(".")[0] for uri in by_uri if uri not in of_piece} | cut.keys()):
        index = by_uri.get(f"{stem}.idx") or look_up(f"{stem}.idx")
        whole = by_uri.get(f"{stem}.bin") or look_up(f"{stem}.bin")
        data = tuple(by_uri[uri] for uri in cut[stem]) if stem in cut else (whole,) if whole else ()
        if not data or index is None:
            missing = ".bin" if not data else ".idx"
            raw = "" if not data else "; a raw array of token ids, such as nanoGPT's, is read with corpus.format=npy"
            raise CorpusError(
                f"{stem}{missing} is missing: Megatron's tokens (.bin) and index (.idx) go together{raw}."
            )
        pairs.append((data, index))
    return pairs


def _megatron_file(
    data: Pieces, file: InputFile, config: CorpusConfig, pack: PackSettings
) -> tuple[TokenFile, int, int]:
    shape = megatron.read_header(file)
    index = megatron.Index(file, shape)
    size = np.dtype(shape.dtype).itemsize
    tokens = index.tokens()
    there = sum(piece.size for piece in data)
    if tokens * size != there:
        raise CorpusError(
            f"{data[0].uri} has {there} bytes{' with its other pieces' * (len(data) > 1)}, and its index says "
            f"{tokens * size}: one of the two was cut off or belongs to another; copy both again."
        )
    facts = index.to_facts()
    if len(data) > 1:
        facts["pieces"] = [{"uri": one.uri, "size": one.size, "etag": one.etag} for one in data]
    label = name_below(f"{file.uri.removesuffix('.idx')}.bin", config.path)
    _check_first(data, facts, tokens, pack)
    documents = shape.indices - 1
    if pack.packing is Packing.concat:
        return TokenFile(data[0], -(-tokens // pack.sequence_length), tokens, facts, label=label), 0, documents
    kept = 0
    for lengths in index.lengths():
        if len(lengths) and lengths.min() < 1:
            raise CorpusError(f"{file.uri} has documents without a token, which corpus.packing=document cannot number.")
        kept += int(np.minimum(lengths, pack.sequence_length).sum())
    return TokenFile(data[0], documents, kept, facts, label=label), tokens - kept, documents


def _npy(files: Sequence[InputFile], config: CorpusConfig, pack: PackSettings) -> Found:
    if pack.packing is not Packing.concat:
        raise CorpusError(
            f"{config.path}: npy arrays have no index of documents, so corpus.packing=document cannot number them; use "
            "corpus.packing=concat."
        )
    if config.dtype is not None and config.dtype not in npy.DTYPES:
        raise CorpusError(f"corpus.dtype={config.dtype!r} is none of {', '.join(npy.DTYPES)}.")

    def one(file: InputFile) -> TokenFile:
        tokens, facts = npy.read_layout(file, config.dtype, pack.vocab_size, pack.sequence_length)
        npy.check_dtype(file, facts["begin"], tokens, facts["dtype"])
        _check_first((file,), facts, tokens, pack)
        return TokenFile(file, -(-tokens // pack.sequence_length), tokens, facts)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, files)), 0, None


def _check_first(pieces: Pieces, facts: dict[str, Any], tokens: int, pack: PackSettings) -> None:
    """Token ids of another model show in the first ones, before anything is scanned."""
    kind = np.dtype(facts["dtype"])
    count = min(tokens, _FIRST_TOKENS)
    if count:
        data = read_bytes(pieces, facts["begin"], facts["begin"] + count * kind.itemsize)
        check_vocabulary(pieces[0].uri, np.frombuffer(data, kind), pack.vocab_size)


def _mds(files: Sequence[InputFile], config: CorpusConfig, pack: PackSettings) -> Found:
    by_uri = {file.uri: file for file in files}
    indices = [file for file in files if file_name(file.uri) == mds.INDEX]
    if not indices:
        raise CorpusError(f"{config.path}: MDS shards come with an {mds.INDEX}, and there is none; copy it too.")
    column = config.tokens_field
    assert column is not None, "MDS without a column of token ids is not read in place"
    found = []
    seen: set[str] = set()
    for index in indices:
        # An index that was merged of others lists their shards again.
        shards = [one for one in mds.read_index(index, by_uri) if one.samples and one.file.uri not in seen]
        seen |= {shard.file.uri for shard in shards}
        for shard in shards:
            if column not in shard.names:
                raise CorpusError(
                    f"{index.uri} has the columns {', '.join(shard.names)}, and no {column!r}; name one in "
                    "corpus.tokens_field."
                )
        if not shards:
            continue
        length = mds.sample_tokens(shards[0], column, config.dtype)
        windows = max(1, -(-length // pack.sequence_length))
        for key in ("id_field", "source_field"):
            mds.label_column(shards[0], config, key)
        facts: dict[str, Any] = {
            key: getattr(config, key) for key in ("tokens_field", "id_field", "source_field", "dtype")
        }
        facts["windows"] = windows
        facts["uneven"] = not shards[0].sizes[shards[0].names.index(column)]
        # Told from the first sample; every other one is held against it when it is read.
        found += [
            TokenFile(shard.file, shard.samples * windows, shard.samples * length, facts | shard.to_facts())
            for shard in shards
        ]
    return found, 0, None


_FILES: dict[str, Callable[[Sequence[InputFile], CorpusConfig, PackSettings], Found]] = {
    "megatron": _megatron,
    "npy": _npy,
    "mds": _mds,
}


def difference(before: Description, now: Description) -> str | None:
    """What differs between two descriptions, in words; None where nothing does, wherever the files lie."""
    known = {file.data.uri: file.data for file in before.files}
    for file in now.files:
        old = known.get(file.data.uri, file.data)
        if old != file.data:
            return f"{file.data.uri} changed: {old.size} bytes then, {file.data.size} now, or written anew"
    if before.fingerprint == now.fingerprint:
        return None
    for old_file, file in zip(before.files, now.files, strict=False):
        if old_file.name != file.name:
            return f"earlier versions named its documents {old_file.name}, without their folder, not {file.name}"
    old_settings, settings = (replace(each, files=(), fingerprint="").to_json() for each in (before, now))
    changed = [
        f"{key}: {old_settings[key]!r} -> {settings[key]!r}" for key in settings if old_settings[key] != settings[key]
    ]
    return "; ".join(changed) or "its files hold something else"
