"""Open a corpus whose sequences are read by number: prepared parts, or token arrays that are read where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from infscan.config import Packing, checksum_ok
from infscan.corpus.arrays import TokenArrays
from infscan.corpus.filtered import FORMAT as FILTERED
from infscan.corpus.filtered import FilteredCorpus
from infscan.corpus.in_place import DESCRIPTION, Description, InPlace
from infscan.corpus.joined import FORMAT as JOINED
from infscan.corpus.joined import JoinedCorpus, at_address
from infscan.corpus.manifest import MANIFEST
from infscan.corpus.mds import MdsSamples
from infscan.corpus.parts import PreparedCorpus, open_prepared
from infscan.corpus.reading import AS_STORED, Reading
from infscan.corpus.sequences import AddressableCorpus
from infscan.errors import ChangedCorpusError, CorpusError
from infscan.storage import Identity, MissingError, Store, check_addresses
from infscan.storage.foreign import parse_stored
from infscan.storage.shapes import check_types

__all__ = [
    "AddressableCorpus",
    "CorpusAddress",
    "PreparedCorpus",
    "is_prepared",
    "label_of",
    "open_corpus",
]

# Token ids among which an EOS is looked for, in so many runs spread over the corpus.
_LOOKED_AT, _RUNS = 1 << 22, 64

_IN_PLACE: dict[str, type[InPlace]] = {"megatron": TokenArrays, "npy": TokenArrays, "mds": MdsSamples}


def is_prepared(path: str) -> bool:
    """Whether a folder or URI holds what `open_corpus` opens: a complete prepared corpus, or a description of one."""
    store = Store(path)
    return store.exists(MANIFEST) or store.exists(DESCRIPTION)


def open_corpus(store: Store, reading: Reading = AS_STORED, *, foreign: bool = False) -> AddressableCorpus:
    """Open what is in a folder: prepared parts (manifest.json), or a description (addressable.json) of token arrays.

    reading: how its sequences are read, which the opened corpus then has.
    foreign: somebody else may have written the folder: what its description or its links lead to is held to
    `infscan.storage.allowed` before it is asked for.

    Raises:
        StorageError: where a foreign folder leads elsewhere, and the user has not allowed it.
        CorpusError: where there is no complete corpus, or a part is missing or has another size.
    """
    where = f"{store}/{DESCRIPTION}"
    if store.exists(MANIFEST):
        corpus = open_prepared(store, reading)
        if foreign:
            files = [f"{store}/{part.name}" for part in corpus.manifest.parts]
            check_addresses(f"{store}/{MANIFEST}", store.read(MANIFEST), files)
        return corpus
    try:
        data = store.read(DESCRIPTION)
    except MissingError as error:
        raise CorpusError(
            f"{store} holds no prepared corpus: {MANIFEST} is missing; prepare it (again) first."
        ) from error
    value = parse_stored(data, where)
    kind = value.get("format") if isinstance(value, dict) else None
    if kind in (FILTERED, JOINED) and not checksum_ok(value):
        raise CorpusError(f"{where} was changed or damaged; remove it, and it is written again.")
    try:
        if kind == FILTERED:
            check_types([value[key] for key in ("base", "base_fingerprint", "fingerprint")], list[str])
        elif kind == JOINED:
            check_types([value["fingerprint"]], list[str])
            wanted = [[entry[key] for key in ("at", "label", "fingerprint")] for entry in value["corpora"]]
            check_types(wanted, list[list[str]])
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{where} describes no corpus ({error!r}); remove it, and it is written again.") from None
    if kind == FILTERED:
        at = at_address(store, value["base"])
        if foreign:
            check_addresses(where, data, [at.uri])
        whole = open_corpus(at, reading, foreign=foreign)
        if whole.fingerprint != value["base_fingerprint"]:
            raise CorpusError(f"{at} is not the corpus that {store} was chosen from; filter it again.")
        return FilteredCorpus(store, whole, value)
    if kind == JOINED:
        at_each = [at_address(store, entry["at"]) for entry in value["corpora"]]
        if foreign:
            check_addresses(where, data, [at.uri for at in at_each])
        parts = [open_corpus(at, reading, foreign=foreign) for at in at_each]
        return JoinedCorpus(store, value, parts)
    description = Description.from_json(value, where)
    if foreign:
        check_addresses(where, data, [source.uri for file in description.files for source in file.sources])
    return _IN_PLACE[description.format](store, description, reading)


@dataclass(frozen=True)
class CorpusAddress:
    """How a task opens the corpus that it reads: what travels to a rank in place of the corpus.

    identity: what it is; None where whatever is there is to be read.
    """

    store: Store
    reading: Reading = AS_STORED
    identity: Identity | None = None

    @classmethod
    def of(cls, corpus: AddressableCorpus) -> CorpusAddress:
        return cls(corpus.store, corpus.reading, identity_of(corpus))

    def open(self) -> AddressableCorpus:
        """Raises ChangedCorpusError where another corpus is there by now."""
        corpus = open_corpus(self.store, self.reading)
        if self.identity is not None:
            self.identity.check(corpus.fingerprint, ChangedCorpusError)
        return corpus


def identity_of(corpus: AddressableCorpus) -> Identity:
    """A corpus as it travels with units of work."""
    return Identity("corpus", corpus.store.uri, corpus.fingerprint, "manifest or description; parts when opened")


def label_of(corpus: AddressableCorpus, number: int) -> str | None:
    """Of which of several corpora a sequence is; None where there is one."""
    if isinstance(corpus, FilteredCorpus):
        return label_of(corpus.base, number)
    return corpus.label(number) if isinstance(corpus, JoinedCorpus) else None


def require_document_boundaries(corpus: AddressableCorpus) -> None:
    """Refuse token arrays in which nothing says where documents begin: corpus.attention=within would keep none apart.

    Megatron has an index, and what was prepared of documents their spans; npy and MDS are separated by EOS.

    Raises:
        CorpusError: where there is no EOS among the token ids looked at, by the corpus's name.
    """
    if isinstance(corpus, FilteredCorpus):
        require_document_boundaries(corpus.base)
    elif isinstance(corpus, JoinedCorpus):
        for part in corpus.parts:
            require_document_boundaries(part)
    elif isinstance(corpus, InPlace):
        description = corpus.description
        if description.format != "megatron" and description.packing is Packing.concat:
            _check_eos(corpus, description.eos_id, description.files[0].data.uri)
    elif isinstance(corpus, PreparedCorpus):
        settings, counts = corpus.manifest.settings, corpus.manifest.counts
        # Only token arrays have a dtype: one without an EOS was read as one document, and has the packing's own now.
        packed = settings["packing"] == Packing.concat.value
        pieces = max(counts.files_read, len(corpus.manifest.parts))
        if packed and "dtype" in settings and counts.documents_read <= pieces:
            raise _no_boundaries(corpus.store.uri, counts.tokens_read, settings["eos_id"])


def _check_eos(corpus: AddressableCorpus, eos_id: int | None, where: str) -> None:
    step = max(1, _LOOKED_AT // _RUNS // corpus.sequence_length)
    looked_at = 0
    for start in np.unique(np.linspace(0, max(0, corpus.sequences - step), _RUNS).astype(np.int64)).tolist():
        for block in corpus.token_blocks(start, min(start + step, corpus.sequences)):
            if (block.tokens == eos_id).any():
                return
            looked_at += len(block.tokens)
    raise _no_boundaries(where, looked_at, eos_id)


def _no_boundaries(where: str, looked_at: int, eos_id: int | None) -> CorpusError:
    return CorpusError(
        f"{where}: corpus.attention=within keeps documents apart, and nothing says where they begin: none of "
        f"{looked_at:,} token ids is EOS ({eos_id}). Give corpus.eos_id=<what documents end with>, or "
        "corpus.attention=across."
    )
