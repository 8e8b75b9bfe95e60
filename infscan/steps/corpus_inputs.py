"""How a corpus is read for a model: its files, its packing, the tokens that join documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from infscan.config import Attention, CorpusConfig, Packing
from infscan.corpus.addressable import is_prepared
from infscan.corpus.describe import FORMATS as ARRAYS
from infscan.corpus.describe import token_files
from infscan.corpus.documents import document_files, file_format
from infscan.corpus.manifest import MANIFEST
from infscan.corpus.packing import PackSettings, pack_settings
from infscan.corpus.tokenizer import Tokenizer
from infscan.errors import CorpusError
from infscan.model.architecture import Architecture
from infscan.model.attention import refusal
from infscan.storage import InputFile, Store


def settings_for(config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None) -> PackSettings:
    """How this corpus is packed for this model: T, vocabulary, and the EOS and BOS that join documents.

    Raises:
        ModelError: where documents are to be kept apart, and the model cannot.
        CorpusError: where a separator is needed that the model does not have.
    """
    if config.attention is Attention.within and (architecture.recurrent or not architecture.takes_positions):
        raise refusal(architecture.family, architecture.recurrent)
    eos_id = _eos_id(config, architecture, tokenizer)
    bos_id = tokenizer.bos_id if tokenizer and tokenizer.bos_id is not None else architecture.bos_id
    length = architecture.sequence_length(config.sequence_length)
    begins, by_eos = bool(config.bos), separated(config, tokenizer) and eos_id is not None
    # What the documents are is looked at where it matters alone.
    if config.bos is None and (by_eos or wants_bos(config, tokenizer)):
        begins = _is_text(config)
        bos_id = eos_id if by_eos else bos_id
    return pack_settings(replace(config, bos=begins), length, architecture.vocab_size, eos_id, bos_id)


def bos_of(config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None) -> int | None:
    """The token that queries begin with, which is what the corpus's texts begin with; None where that is none."""
    if config.bos is None and not wants_bos(config, tokenizer):
        if not config.paths and (store := Store(config.path)).exists(MANIFEST):
            prepared: int | None = store.read_json(MANIFEST)["settings"].get("bos_id")
            return prepared
        return settings_for(config, architecture, tokenizer).bos_id
    told = replace(config, bos=wants_bos(config, tokenizer))
    return settings_for(told, architecture, tokenizer).bos_id


def separators(config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that stand between documents, EOS first, as far as the model has them."""
    bos_id = tokenizer.bos_id if tokenizer and tokenizer.bos_id is not None else architecture.bos_id
    known = (_eos_id(config, architecture, tokenizer), bos_id)
    return tuple(dict.fromkeys(token for token in known if token is not None))


def separated(config: CorpusConfig, tokenizer: Tokenizer | None) -> bool:
    """Whether a text is to begin with EOS: where each is a sequence of its own, and the tokenizer puts nothing before
    it. Training joined documents by EOS, so that each had one before it."""
    return config.bos is None and config.packing is Packing.document and not wants_bos(config, tokenizer)


def wants_bos(config: CorpusConfig, tokenizer: Tokenizer | None) -> bool:
    """Whether a text is to begin with BOS: as corpus.bos says, else as the tokenizer does."""
    return tokenizer is not None and tokenizer.adds_bos if config.bos is None else config.bos


def _is_text(config: CorpusConfig) -> bool:
    """Whether documents are tokenised here, and do not bring token ids of their own."""
    if config.paths:
        return all(_is_text(one) for one in config.several.values())
    if config.tokens_field is not None or is_prepared(config.path) or token_files(config) is not None:
        return False
    return all(file_format(file.uri, config.format) not in ARRAYS for file in document_files(config))


def _eos_id(config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None) -> int | None:
    if config.eos_id is not None:
        return config.eos_id
    return tokenizer.eos_id if tokenizer and tokenizer.eos_id is not None else architecture.eos_id


def input_files(config: CorpusConfig) -> list[InputFile]:
    """The files to prepare, found before anything runs; none for a corpus that is addressable already.

    Raises:
        StorageError: where there is no such file.
        CorpusError: where a file's format is unknown.
    """
    if config.paths:
        return [file for one in config.several.values() for file in input_files(one)]
    if is_prepared(config.path) or token_files(config) is not None:
        return []
    files = document_files(config)
    if config.masked and any(file_format(file.uri, config.format) in ("text", *ARRAYS) for file in files):
        raise no_rows(config)
    return files


def with_array_settings(
    config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None, files: Sequence[InputFile]
) -> CorpusConfig:
    """Token arrays that are prepared: what ends their documents, and npy's dtype, where the model has to say it."""
    kind = file_format(files[0].uri, config.format)
    if kind not in ARRAYS:
        return config
    narrow = architecture.vocab_size <= 1 << 16
    dtype = config.dtype or ("uint16" if narrow else "uint32") if kind == "npy" else config.dtype
    return replace(config, eos_id=_eos_id(config, architecture, tokenizer), dtype=dtype)


def no_rows(config: CorpusConfig) -> CorpusError:
    """The error for a loss mask that is asked of files without rows."""
    return CorpusError(
        f"{config.path} has no rows that could have a prompt_field or mask_field; leave both null, or give JSONL, "
        "Parquet or Arrow."
    )
