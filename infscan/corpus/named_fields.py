"""Whether a field that the settings name is in any row: a slip in a name would else pass without a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice

from infscan.config import CorpusConfig
from infscan.corpus.documents import file_format, read_documents
from infscan.corpus.rows import Document
from infscan.corpus.tally import Tally
from infscan.errors import CorpusError, InfscanError
from infscan.storage import InputFile

_FILES, _ROWS = 8, 2000
_KEYS = ("id_field", "source_field")
_ROWED = ("jsonl", "parquet", "arrow")


def asked_fields(config: CorpusConfig) -> dict[str, str]:
    """The fields of ids and sources that are not the settings' own, by key."""
    named = {key: str(getattr(config, key)) for key in _KEYS}
    return {key: field for key, field in named.items() if field != getattr(CorpusConfig, key)}


def check_named_fields(corpora: Sequence[tuple[CorpusConfig, Sequence[InputFile]]]) -> None:
    """Look into the first rows of some files of every corpus for the fields that the settings name.

    Raises:
        CorpusError: for a field that none of them has.
    """
    missing = asked_fields(corpora[0][0])
    if not missing or not any(files for _, files in corpora):
        return
    there: list[str] = []
    read = 0
    for document in (one for config, files in corpora for one in _first_documents(config, files)):
        read += 1
        lacks = document.lacks or {}
        missing = {key: field for key, field in missing.items() if key in lacks}
        there = there or [name for names in lacks.values() for name in names]
        if not missing:
            return
    if not read:
        return  # whoever prepares it says why
    where = ", ".join(config.path for config, _ in corpora)
    for key, field in missing.items():
        close = get_close_matches(field, there, 1)
        hint = f"did you mean {close[0]}?" if close else f"rows have {', '.join(there[:10]) or 'no fields'}."
        raise CorpusError(f"corpus.{key}={field} is in no row of {where}; {hint} Without the key labels are made up.")


def _first_documents(config: CorpusConfig, files: Sequence[InputFile]) -> Iterator[Document]:
    step = -(-len(files) // _FILES) or 1
    for file in files[::step]:
        if file_format(file.uri, config.format) not in _ROWED:
            continue
        try:
            yield from islice(read_documents(file, config, Tally(_ROWS)), _ROWS)
        except InfscanError:
            continue  # whoever prepares it says what is wrong
