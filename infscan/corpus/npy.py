"""Arrays of token ids in .npy files: with numpy's header, or raw, as OLMo's tools write them, with a given dtype."""

from __future__ import annotations

import io
from tokenize import TokenError
from typing import Any

import numpy as np

from infscan.errors import CorpusError
from infscan.storage import InputFile, read_range

_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 1 << 16
# What other tools put before their ids: the tool, and the header's bytes.
_HEADERS = {
    b"LITPKDS": ("litgpt's packed data sets", 24),
    (20240520).to_bytes(4, "little"): ("llm.c", 1024),
    (20240801).to_bytes(4, "little"): ("llm.c", 1024),
}
DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")


def read_layout(
    file: InputFile, dtype: str | None, vocab_size: int, sequence_length: int
) -> tuple[int, dict[str, Any]]:
    """How many token ids a file has, and where and as what they lie (`begin` in bytes, `dtype`).

    dtype: of a raw file; null is uint16 where that holds the vocabulary, else uint32. A file with a header has its own.

    Raises:
        CorpusError: for a file that is cut off, or holds something else than a row of token ids.
    """
    head = read_range(file.uri, 0, min(file.size, _HEADER_BYTES))
    if not head.startswith(_MAGIC):
        for magic, (tool, size) in _HEADERS.items():
            if head.startswith(magic):
                raise CorpusError(
                    f"{file.uri} begins with a header of {tool}, which is no token ids; write the ids alone (such as "
                    f"`tail -c +{size + 1}`)."
                )
        kind = np.dtype(dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32")).newbyteorder("<")
        if file.size % kind.itemsize:
            raise CorpusError(
                f"{file.uri} has {file.size} bytes, which is no number of {kind.name}: it was cut off, or its dtype is "
                "another (corpus.dtype)."
            )
        return file.size // kind.itemsize, {"begin": 0, "dtype": kind.str}
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(stream)
    except (ValueError, TypeError, TokenError) as error:  # what numpy's parser lets through of Python's own
        raise CorpusError(f"{file.uri}: its npy header cannot be read ({error}); write the file again.") from error
    if kind.kind not in "iu":
        raise CorpusError(f"{file.uri} holds {kind}, and token ids are whole numbers; write them as uint16 or uint32.")
    if len(shape) != 1 and (len(shape) != 2 or fortran or shape[1] % sequence_length):
        raise CorpusError(
            f"{file.uri} has the shape {shape}; infscan reads one row of token ids, or rows (C order) whose length "
            f"is a multiple of corpus.sequence_length={sequence_length}."
        )
    tokens = int(np.prod(shape, dtype=np.int64))
    begin = stream.tell()
    if file.size != begin + tokens * kind.itemsize:
        raise CorpusError(
            f"{file.uri} has {file.size} bytes, and its header says {begin + tokens * kind.itemsize}: it was cut off; "
            "copy it again."
        )
    return tokens, {"begin": begin, "dtype": kind.str}


def check_dtype(file: InputFile, begin: int, tokens: int, dtype: str) -> None:
    """Refuse a raw file whose dtype was guessed too narrow: every second id of its first block would be zero.

    Raises:
        CorpusError: naming the wider dtype.
    """
    kind = np.dtype(dtype)
    count = min(tokens, 2048) // 2 * 2
    ids = np.frombuffer(read_range(file.uri, begin, begin + count * kind.itemsize), kind)
    if count >= 64 and not ids[1::2].any() and ids[::2].any():
        raise CorpusError(
            f"{file.uri}: read as {kind.name}, every second token id is 0; its ids are wider, so set "
            f"corpus.dtype=uint{16 * kind.itemsize}."
        )
