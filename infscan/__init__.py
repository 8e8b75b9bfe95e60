"""infscan: which pretraining sequences most raised the probability of this completion?

    found = infscan.scan("model=demo", "corpus=demo", "queries=demo", output="runs/demo")

Every command is a function (`scan`, `prepare`, `fit`, `plan`, `tfidf`, `explain`, `masks`, `write_report`, `merge`,
`status`, `verify`, `index`, `ask`, `duplicates`), `open_index` opens an index, and the tables of a run are read by
`read_top` and its like. `infscan.api` says what they take and return.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infscan.api import RunResult as RunResult
    from infscan.api import open_index as open_index
    from infscan.api import read_run as read_run
    from infscan.config import Config as Config
    from infscan.errors import InfscanError as InfscanError
    from infscan.results.read import read_answers as read_answers
    from infscan.results.read import read_documents as read_documents
    from infscan.results.read import read_layers as read_layers
    from infscan.results.read import read_queries as read_queries
    from infscan.results.read import read_scores as read_scores
    from infscan.results.read import read_sequences as read_sequences
    from infscan.results.read import read_summary as read_summary
    from infscan.results.read import read_tokens as read_tokens
    from infscan.results.read import read_top as read_top
    from infscan.steps.factor_files import read_factors as read_factors

    __version__: str

_HOMES = {
    "Config": "infscan.config",
    "InfscanError": "infscan.errors",
    "RunResult": "infscan.api",
    "read_run": "infscan.api",
    "open_index": "infscan.api",
    "read_factors": "infscan.steps.factor_files",
    "read_answers": "infscan.results.read",
    "read_documents": "infscan.results.read",
    "read_layers": "infscan.results.read",
    "read_queries": "infscan.results.read",
    "read_scores": "infscan.results.read",
    "read_sequences": "infscan.results.read",
    "read_summary": "infscan.results.read",
    "read_tokens": "infscan.results.read",
    "read_top": "infscan.results.read",
}
# Functions that run a command. `infscan.report` is the package that writes pages, so its function has another name.
_COMMANDS = {
    **{name: name for name in ("scan", "prepare", "fit", "plan", "tfidf", "explain", "masks")},
    **{
        name: name for name in ("merge", "status", "verify", "index", "ask", "duplicates", "study", "validate", "prove")
    },
    "write_report": "report",
}
__all__ = [*_HOMES, *_COMMANDS, "__version__"]


def __getattr__(name: str) -> Any:
    # On first use, so that `import infscan` stays quick and reading tables brings no torch.
    if name == "__version__":
        value: Any = importlib.metadata.version("infscan")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _COMMANDS:
        value = _function(_COMMANDS[name])
    else:
        raise AttributeError(f"module 'infscan' has no attribute {name!r}")
    globals()[name] = value
    return value


def _function(command: str) -> Any:
    """A command as a function of words and keywords (`infscan.api`)."""

    def run(*words: Any, **settings: Any) -> Any:
        from infscan.api import call

        return call(command, words, settings)

    from infscan.config.commands import command_of

    run.__name__ = run.__qualname__ = command
    run.__doc__ = f"{command_of(command).summary}\n\nThe settings are those of `infscan {command} --help`."
    return run


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
