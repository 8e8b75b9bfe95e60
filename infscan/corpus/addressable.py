"""Open a corpus whose sequences are read by number: prepared parts, or token arrays that are read where they lie."""

from __future__ import annotations

from infscan.config import is_intact
from infscan.corpus.arrays import TokenArrays
from infscan.corpus.filtered import FORMAT as FILTERED
from infscan.corpus.filtered import FilteredCorpus
from infscan.corpus.in_place import DESCRIPTION, Description, InPlace
from infscan.corpus.joined import FORMAT as JOINED
from infscan.corpus.joined import JoinedCorpus, at_address
from infscan.corpus.manifest import MANIFEST
from infscan.corpus.mds import MdsSamples
from infscan.corpus.parts import PreparedCorpus, open_prepared
from infscan.corpus.sequences import AddressableCorpus
from infscan.errors import CorpusError
from infscan.storage import MissingError, Store

__all__ = ["AddressableCorpus", "PreparedCorpus", "is_prepared", "label_of", "open_corpus"]

_IN_PLACE: dict[str, type[InPlace]] = {"megatron": TokenArrays, "npy": TokenArrays, "mds": MdsSamples}


def is_prepared(path: str) -> bool:
    """Whether a folder or URI holds what `open_corpus` opens: a complete prepared corpus, or a description of one."""
    store = Store(path)
    return store.exists(MANIFEST) or store.exists(DESCRIPTION)


def open_corpus(store: Store) -> AddressableCorpus:
    """Open what lies in a folder: prepared parts (manifest.json), or a description (addressable.json) of token arrays.

    Raises:
        CorpusError: where there is no complete corpus, or a part is missing or has another size.
    """
    if store.exists(MANIFEST):
        return open_prepared(store)
    try:
        value = store.read_json(DESCRIPTION)
    except MissingError as error:
        raise CorpusError(
            f"{store} holds no prepared corpus: {MANIFEST} is missing; prepare it (again) first."
        ) from error
    kind = value.get("format")
    if kind in (FILTERED, JOINED) and not is_intact(value):
        raise CorpusError(f"{store.uri}/{DESCRIPTION} was changed or damaged; remove it, and it is written again.")
    if kind == FILTERED:
        at = at_address(store, value["base"])
        whole = open_corpus(at)
        if whole.fingerprint != value["base_fingerprint"]:
            raise CorpusError(f"{at} is not the corpus that {store} was chosen from; filter it again.")
        return FilteredCorpus(store, whole, value)
    if kind == JOINED:
        parts = [open_corpus(at_address(store, entry["at"])) for entry in value["corpora"]]
        return JoinedCorpus(store, value, parts)
    description = Description.from_json(value, f"{store}/{DESCRIPTION}")
    return _IN_PLACE[description.format](store, description)


def label_of(corpus: AddressableCorpus, number: int) -> str | None:
    """Of which of several corpora a sequence is; None where there is one."""
    if isinstance(corpus, FilteredCorpus):
        return label_of(corpus.base, number)
    return corpus.label(number) if isinstance(corpus, JoinedCorpus) else None
