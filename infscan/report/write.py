"""Write report.html: of a run, of a sweep, or of runs that someone names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from infscan.config import from_yaml
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.errors import InfscanError, RunError
from infscan.report.assemble import Archive, assemble
from infscan.report.contents import run_contents, settle
from infscan.results.manifest import SUCCESS
from infscan.results.read import read_cells, read_summary
from infscan.storage import Store

NAME = "report.html"
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
    model's.

    Raises:
        RunError: where there is no finished run, or several runs and no output.
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
        scanned, asked = _models(uri)
        cut = _tokenizer(tokenizer or scanned, read_summary(uri)["inputs"]["tokenizer"])
        contents.append(
            run_contents(uri, name, archive, rows, cut, _tokenizer(asked, None) if asked != scanned else cut)
        )
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
    config = from_yaml(Store(uri).read("config.yaml").decode())
    scanned = config["model"]["path"]
    return scanned, (config["stages"][-1]["model"] if config["stages"] else scanned)


def _tokenizer(path: str, digest: str | None) -> Tokenizer | None:
    """The tokenizer that cut the run's texts, by its digest (null: any); None where the run had none."""
    try:
        found = _loaded(path)
    except InfscanError as error:
        raise RunError(f"{path}: {_FIX} ({error})") from None
    if digest and (found is None or found.digest != digest):
        raise RunError(f"{path}: {_FIX} ({'there is none' if found is None else 'it has another one now'}).")
    return found


@lru_cache(maxsize=4)
def _loaded(path: str) -> Tokenizer | None:
    return load_tokenizer(path)
