"""Where a model is on this machine: as it is, downloaded once from an object store, or from the hub by its id."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infscan.errors import ModelError
from infscan.storage import Store, is_uri, localise

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What says a model's shapes and its tokens.
_SMALL = (".json", ".model", ".txt")
_ADAPTER = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def model_folder(path: str, *, weights: bool = True, revision: str | None = None, key: str = "model.path") -> Path:
    """The local folder of a model: as it is, downloaded once from a URI, or from the hub by its id.

    weights: also download the weights: those that the index names, else the one file. revision: a branch, tag or commit
    of the hub; None is its main one. key: what the path was given as, for people.

    Raises:
        ModelError: where there is no such folder, URI or hub id.
    """
    there = Path(path).expanduser()
    if revision is not None and (is_uri(path) or there.exists()):
        raise ModelError(
            f"{_sibling(key)}={revision}: {key}={path} is a folder, which has no revisions; leave it out, or give a "
            "hub id."
        )
    if is_uri(path):
        return _from_store(path, weights)
    if there.exists():
        return there
    name, _, wanted = path.partition("@")
    if wanted and _HUB_ID.fullmatch(name):
        raise ModelError(f"{key}={path}: a hub id has no '@'; give {key}={name} {_sibling(key)}={wanted}.")
    if may_be_hub_id(path):
        return _from_hub(path, weights, revision, key)
    raise ModelError(
        f"{key}={path}: there is no such folder ({there.absolute()}); give a folder in Hugging Face layout, a URI or a "
        "hub id."
    )


def may_be_hub_id(path: str) -> bool:
    """Whether a path that is no folder here may be a name on the hub: `name` or `owner/name`."""
    return _HUB_ID.fullmatch(path) is not None and not path.startswith(".")


def commit_of(folder: Path) -> str | None:
    """The commit of the hub that a folder of its cache holds; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def hub_commit(path: str, folder: str) -> str | None:
    """The commit that a hub id was resolved to, by the folder it was downloaded to; None for a folder or a URI."""
    return None if is_uri(path) or Path(path).expanduser().exists() else commit_of(Path(folder))


def indexed_files(index: Any, where: str) -> list[str]:
    """The files that a checkpoint's index names, if they are safetensors files beside it.

    Raises:
        ModelError: for an index that names none, or something else.
    """
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{where}/{WEIGHTS_INDEX} has no weight_map of file names; copy or save the model again.")
    wanted = sorted(set(names.values()))
    for name in wanted:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{where}/{WEIGHTS_INDEX} names {name[:80]!r}, which is no safetensors file beside it; nothing else "
                "is opened. Save the model again."
            )
    return wanted


def _sibling(key: str) -> str:
    group, dot, _ = key.rpartition(".")
    return f"{group}{dot}revision"


def _wanted(there: Callable[[str], bool], read: Callable[[str], Any], where: str) -> list[str]:
    """The names of a model's weights: an adapter's too, which is refused by name or merged."""
    if there(WEIGHTS) or not there(WEIGHTS_INDEX):
        return [WEIGHTS, _ADAPTER]
    return indexed_files(read(WEIGHTS_INDEX), where)


def _from_store(uri: str, weights: bool) -> Path:
    store = Store(uri)
    remote = store.local_path() is None
    names = _wanted(store.exists, store.read_json, store.uri) if weights and remote else []
    return localise(uri, (*_SMALL, *names), nested=False)


def _from_hub(name: str, weights: bool, revision: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str], revision: str | None) -> Path:
        # Copies in other layouts (onnx/, original/) lie in folders of their own.
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"))

    try:
        folder = fetch([f"*{suffix}" for suffix in _SMALL], revision)
        if weights:
            store = Store(str(folder))
            folder = fetch(_wanted(store.exists, store.read_json, str(folder)), commit_of(folder))
        return folder
    except (OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{key}={name}: there is no such folder ({Path(name).absolute()}), and the hub gave none of that id{at} "
            f"({first}); give an existing folder, a URI, or a hub id that can be reached."
        ) from None
