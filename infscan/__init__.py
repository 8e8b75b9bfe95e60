"""Read what infscan wrote: the tables of a run and the factors. Runs themselves are started by jobs/."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infscan.results.read import read_layers, read_scores, read_sequences, read_summary, read_tokens, read_top
    from infscan.steps.factor_files import read_factors

    __version__: str

__all__ = [
    "__version__",
    "read_factors",
    "read_layers",
    "read_scores",
    "read_sequences",
    "read_summary",
    "read_tokens",
    "read_top",
]


def __getattr__(name: str) -> Any:
    # On first use, so that `import infscan` stays quick and reading tables brings no torch.
    if name == "__version__":
        value: Any = importlib.metadata.version("infscan")
    elif name in __all__:
        home = "infscan.steps.factor_files" if name == "read_factors" else "infscan.results.read"
        value = getattr(importlib.import_module(home), name)
    else:
        raise AttributeError(f"module 'infscan' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
