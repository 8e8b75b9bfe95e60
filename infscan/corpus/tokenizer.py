"""The model's tokenizer, where its folder has one: text to token ids without special tokens, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np

from infscan.errors import BadDocumentError, ModelError
from infscan.storage import LFS_POINTER, Store, is_lfs_pointer, is_uri, localise, look_up

# A vocabulary in any of these is a tokenizer; tokenizer_config.json alone is not.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_SUFFIXES = (".json", ".txt", ".model")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@contextmanager
def _without_panic() -> Iterator[None]:
    """A panic of the tokenizers library, which is no Exception, as what it means: it cannot tokenise the text."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise BadDocumentError(
            f"the tokenizer gave a text up ({reason}); shorten it: is it a run of one character?", "not tokenised"
        ) from None


class Tokenizer:
    """A Hugging Face tokenizer behind the few calls that infscan makes.

    Attributes:
        digest: SHA-256 of tokenizer.json, else of the files that make up the tokenizer.
        eos_id, bos_id: what the tokenizer names, or None.
        unk_id: what stands for text that it cannot spell; None where it spells all (and names EOS for it, as GPT-2's).
        adds_bos: whether it puts BOS before a text, where special tokens are not left out.
    """

    def __init__(self, backend: Any, digest: str) -> None:
        self._backend = backend
        self.digest = digest
        self.eos_id: int | None = backend.eos_token_id
        self.bos_id: int | None = backend.bos_token_id
        unknown: int | None = getattr(backend, "unk_token_id", None)
        self.unk_id = None if unknown in (self.eos_id, self.bos_id) else unknown
        self.adds_bos = self.bos_id is not None and list(backend("a")["input_ids"][:1]) == [self.bos_id]
        # The tokenizers library's own object, where the family has one: transformers' way round it costs a tenth.
        self._library: Any = getattr(backend, "backend_tokenizer", None)
        if self._library is not None:
            self._library.no_truncation()
            self._library.no_padding()
            # Without special tokens all it does is to take spaces out of offsets.
            self._library.post_processor = None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 [n] per text, no special tokens added.

        Raises:
            BadDocumentError: where the tokenizers library panics at one of them.
        """
        if not texts:
            return []
        if self._library is not None:
            with _without_panic():
                encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.int64) for encoding in encodings]
        rows = self._backend(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [np.array(row, np.int64) for row in rows]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """int64 [n] as `encode_batch`, and int64 [n, 2]: the characters [begin, end) of each token, spaces included.

        None for a family without the tokenizers library, which does not say.
        """
        if self._library is None:
            return None
        with _without_panic():
            encodings = self._library.encode_batch(list(texts), add_special_tokens=False) if texts else []
        return [
            (np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2))
            for encoding in encodings
        ]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, token_ids: np.ndarray | Sequence[int]) -> str:
        """The text of token ids as they are: special tokens shown, spaces untouched."""
        return str(self._backend.decode([int(t) for t in token_ids], clean_up_tokenization_spaces=False))

    def pieces(self, token_ids: np.ndarray | Sequence[int]) -> list[tuple[str, int]]:
        """The text cut where whole characters end: (text, tokens it took), in order.

        A character may take several tokens (bytes), and a token may stand for none. The texts joined are `decode`'s,
        and the counts add up to the tokens. A family without the tokenizers library is decoded token by token.
        """
        ids = [int(t) for t in token_ids]
        if self._library is None:
            return [(self.decode([token]), 1) for token in ids]
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        found: list[tuple[str, int]] = []
        waiting = 0
        for token in ids:
            waiting += 1
            text = stream.step(self._library, token)
            if text is not None:
                found.append((text, waiting))
                waiting = 0
        if waiting:
            # Bytes at the end that no character came of.
            whole = str(self._library.decode(ids, skip_special_tokens=False))
            found.append((whole[sum(len(text) for text, _ in found) :], waiting))
        return found

    def texts(self, token_ids: np.ndarray | Sequence[int]) -> list[str]:
        """Of every token, its text; that of a character which takes several tokens comes with the last of them."""
        return [text for piece, count in self.pieces(token_ids) for text in (*[""] * (count - 1), piece)]


def load_tokenizer(path: str, *, from_hub: bool = True) -> Tokenizer | None:
    """Load the tokenizer of a model folder, URI or hub id; None where the folder has none.

    from_hub: a hub id may be asked of the hub; else what its cache on this machine holds is all.

    Raises:
        ModelError: where there is one that cannot be loaded.
    """
    if is_uri(path):
        path = str(localise(path, _SUFFIXES))
    hub = is_hub_id(path)
    if hub and not from_hub:
        path, hub = _cached(path), False
    if not hub and not _files(path):
        return None
    for name in [] if hub else _files(path):
        file = look_up(f"{path}/{name}")
        if file is not None and is_lfs_pointer(file):
            raise ModelError(f"{file.uri} {LFS_POINTER}.")
    from transformers import AutoTokenizer  # here, since it takes seconds and brings torch

    try:
        with _without_panic():
            backend = AutoTokenizer.from_pretrained(path, local_files_only=not hub, trust_remote_code=False)
    except Exception as error:  # every tokenizer family raises errors of its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{path}: its tokenizer cannot be loaded ({reason}). Mend the folder's tokenizer files, or remove them and "
            "bring token ids (corpus.tokens_field)."
        ) from error
    digest = _digest(_snapshot(path) if hub else path)
    try:
        with _without_panic():
            tokenizer = Tokenizer(backend, digest)
            made = len(tokenizer.encode("a"))
    except BadDocumentError as error:
        raise ModelError(f"{path}: {error}") from None
    if not made:
        raise ModelError(
            f"{path}: its tokenizer makes no token of a text, so its vocabulary is cut off or damaged; copy the "
            "tokenizer's files again."
        )
    return tokenizer


def is_hub_id(path: str) -> bool:
    """Whether a model path is a name on the hub: `name` or `owner/name`, and no such folder here."""
    return _HUB_ID.fullmatch(path) is not None and not Store(path).exists("config.json") and not _files(path)


def _files(folder: str) -> list[str]:
    store = Store(folder)
    return [name for name in _VOCABULARIES if store.exists(name)]


def _digest(folder: str) -> str:
    store = Store(folder)
    found = _files(folder)
    names = found[:1] if "tokenizer.json" in found else found + [name for name in _SETTINGS if store.exists(name)]
    content = sha256()
    for name in sorted(names):
        data = store.read(name)
        content.update(f"{name}:{len(data)}:".encode() + data)
    return content.hexdigest()


def _cached(hub_id: str) -> str:
    """The local folder of a hub id, the hub not asked."""
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError):
        raise ModelError(f"{hub_id}: this machine's cache of the hub has none, and the hub is not asked.") from None


def _snapshot(hub_id: str) -> str:
    """The local folder in which the hub's client has put the tokenizer that was just loaded."""
    from transformers.utils import cached_file

    for name in _VOCABULARIES:
        found = cached_file(
            hub_id, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found:
            return str(found).rsplit("/", 1)[0]
    raise ModelError(f"{hub_id}: the hub has no tokenizer for it; give a local folder that has one.")
