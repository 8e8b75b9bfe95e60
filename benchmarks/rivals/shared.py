"""What the rivals' scripts have in common; they run without infscan, in environments of their own."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def arguments(description: str | None, **integers: int | list[int]) -> argparse.Namespace:
    """FOLDER, --output, --threads (set for torch at once) and the integers (or lists of them) named, with defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    for name, default in {**integers, "threads": 2}.items():
        many = "+" if isinstance(default, list) else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs=many, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


class Phases:
    """Seconds by phase, printed as a line of JSON at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def show(self) -> None:
        print(json.dumps(self.seconds))
