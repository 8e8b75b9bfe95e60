"""The kit's results as they come: cases within a budget of seconds, one JSON file that is whole after each."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """A quantity held against a limit: at most, or with `least` at least. ok: whether it holds; NaN never does."""

    name: str
    dtype: str
    value: float
    limit: float
    least: bool = False

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        # JSON has no NaN.
        value = self.value if math.isfinite(self.value) else None
        return asdict(self) | {"value": value, "ok": self.ok}


@dataclass(frozen=True)
class Case:
    """Something to measure. kind: the list of the results that its own go to. needs: seconds it takes, guessed; a case
    that no longer fits the budget is skipped."""

    name: str
    kind: str
    run: Callable[[], Iterable[Check | dict[str, Any]]]
    needs: float = 5.0


@dataclass
class Record:
    """What was found so far. `path` holds all of it after every result."""

    path: Path
    budget: float
    began: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=lambda: {"skipped": [], "errors": [], "seconds": {}, "ok": True})

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def run(self, case: Case) -> None:
        """Run a case that fits; what it raises is a result, too."""
        if case.needs > self.left:
            why = f"needs about {case.needs:.0f} s and {max(0, self.left):.0f} s are left"
            self.found["skipped"].append({"case": case.name, "why": why})
            self.write()
            return
        began = time.monotonic()
        try:
            for result in case.run():
                self.add(case.kind, result.to_json() if isinstance(result, Check) else result)
        except Exception as error:  # whatever a device does, the other cases are worth their seconds
            self.fail(case.name, error)
        self.found["seconds"][case.name] = round(time.monotonic() - began, 2)
        self.write()

    def fail(self, name: str, error: Exception) -> None:
        self.found["errors"].append({"case": name, "error": f"{type(error).__name__}: {error}"[:2000]})
        self.found["ok"] = False
        self.write()

    def add(self, kind: str, result: dict[str, Any]) -> None:
        self.found.setdefault(kind, []).append(result)
        self.found["ok"] = self.found["ok"] and result.get("ok", True)
        print(kind, json.dumps(result), file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """The whole file or the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(new, self.path)
