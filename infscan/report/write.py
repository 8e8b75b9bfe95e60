"""Write report.html: of a run, of a sweep, or of runs that someone names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from infscan.config import from_yaml
from infscan.corpus.tokenizer import Tokenizer, is_hub_id, load_tokenizer
from infscan.errors import InfscanError, RunError
from infscan.report.assemble import Archive, assemble
from infscan.report.contents import run_contents, settle
from infscan.results.manifest import SUCCESS
from infscan.results.read import read_cells, read_summary
from infscan.storage import Store, check_addresses

NAME = "report.html"
_CONFIG = "config.yaml"
ROWS = 100
MEGABYTES = 64
_FIX = "the page needs the tokenizer of the run's model; give a folder, URI or hub id that has it: tokenizer=..."


def write_report(
    runs: Sequence[str],
    output: str | None = None,
    *,
    rows: int = ROWS,
    megabytes: float = MEGABYTES,
    tokenizer: str | None = None,
) -> tuple[str, list[str]]:
    """Where the page is, and which cells of a sweep are left out of it because they are not finished.

    runs: finished runs; a sweep's folder means the finished runs in it. output: a file's path or URI
    (the folder's own report.html). rows: at most so many per query and side. megabytes: of sequences, compressed; the
    deepest ranks of all queries are left out until they fit. tokenizer: a folder, URI or hub id in place of the run's
    model's, of which a hub id is not asked of the hub: what this machine has of it is used.

    Raises:
        RunError: where there is no finished run, or several runs and no output.
        StorageError: where a run names a model outside its folder, and is neither this user's own nor allowed.
    """
    if not runs:
        raise RunError("no run is given; name a run's folder, a sweep's, or a list of them.")
    if output is None and len(runs) > 1:
        raise RunError(f"{len(runs)} runs are given and no output; say where their page goes: output=compared.html.")
    if rows < 1 or not megabytes > 0:
        raise RunError(f"rows={rows}, megabytes={megabytes}: a page needs at least one row and some room; raise them.")
    found, unfinished = _cells(runs)
    archive = Archive(int(megabytes * 2**20))
    contents: list[dict[str, Any]] = []
    for name, uri in found:
        summary = read_summary(uri)
        scanned, asked = _models(uri)
        cut = _tokenizer(tokenizer or _allowed(uri, scanned), summary["inputs"]["tokenizer"], told=bool(tokenizer))
        asking = cut if asked == scanned else _tokenizer(_allowed(uri, asked), None)
        contents.append(run_contents(uri, name, archive, rows, cut, asking))
    title = ", ".join(Store(run).uri.rpartition("/")[2] for run in runs)
    page = assemble(title, {"runs": [settle(run, archive) for run in contents]}, archive)
    target = output or f"{Store(runs[0]).uri}/{NAME}"
    folder, _, name = target.rpartition("/")
    Store(folder or ("/" if target.startswith("/") else ".")).write(name, page)
    return target, unfinished


def report_page(run: str, query_id: str) -> bytes:
    """The page of one query of a finished run, and of no other."""
    archive = Archive(MEGABYTES << 20)
    scanned, asked = _models(run)
    cut = _tokenizer(scanned, read_summary(run)["inputs"]["tokenizer"])
    asking = _tokenizer(asked, None) if asked != scanned else cut
    found = run_contents(run, query_id, archive, ROWS, cut, asking, only=query_id)
    return assemble(query_id, {"runs": [settle(found, archive)]}, archive)


def _cells(runs: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, uri) of every finished run, and the cells that are not."""
    found: list[tuple[str, str]] = []
    unfinished = []
    for run in runs:
        store = Store(run)
        if store.exists(SUCCESS):
            found.append((store.uri.rpartition("/")[2], store.uri))
            continue
        cells = read_cells(store.uri)
        finished = [cell for cell, whole in cells.items() if whole]
        if not finished:
            raise RunError(
                f"{store.uri} has no {SUCCESS}, and no finished run is in it: run the scan again to finish it, or "
                "check the path."
            )
        found += [(cell, f"{store.uri}/{cell}") for cell in finished]
        unfinished += [f"{store.uri}/{cell}" for cell, whole in cells.items() if not whole]
    return found, unfinished


def _models(uri: str) -> tuple[str, str]:
    """The model that was scanned, and the one that was asked (of stages, the last)."""
    config = from_yaml(Store(uri).read(_CONFIG).decode(errors="replace"))
    try:
        scanned = config["model"]["path"]
        asked = config["stages"][-1]["model"] if config["stages"] else scanned
    except (KeyError, TypeError, IndexError):
        scanned = asked = None
    if not isinstance(scanned, str) or not isinstance(asked, str):
        raise RunError(f"{uri}/{_CONFIG} names no model; restore it.")
    return scanned, asked


def _allowed(uri: str, path: str) -> str:
    """A model that the run names, where it may be opened."""
    if not is_hub_id(path):
        check_addresses(f"{uri}/{_CONFIG}", Store(uri).read(_CONFIG), [path])
    return path


def _tokenizer(path: str, digest: str | None, *, told: bool = False) -> Tokenizer | None:
    """The tokenizer that cut the run's texts, by its digest (null: any); None where the run had none.

    told: a person named it, and the hub may be asked.
    """
    try:
        found = _loaded(path, told)
    except InfscanError as error:
        raise RunError(f"{path}: {_FIX} ({error})") from None
    if digest and (found is None or found.digest != digest):
        raise RunError(f"{path}: {_FIX} ({'there is none' if found is None else 'it has another one now'}).")
    return found


@lru_cache(maxsize=4)
def _loaded(path: str, told: bool) -> Tokenizer | None:
    return load_tokenizer(path, from_hub=told)
