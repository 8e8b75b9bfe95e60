"""Golden numbers of an independent implementation, typed: see README.md beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class GoldenQuery:
    """The completion is input_ids[prompt_len:]."""

    input_ids: list[int]
    prompt_len: int


@dataclass(frozen=True)
class Golden:
    """One model's golden numbers. kind: `full`, or `lr<rank>` for plain truncated query gradients.

    tracked: module paths, in module order. train: N sequences of T token ids. dtype: what the numbers were computed in.
    """

    folder: Path
    tracked: tuple[str, ...]
    rank: int
    dtype: str
    train: list[list[int]]
    queries: list[GoldenQuery]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def scores(self, kind: str) -> Floats:
        """[Q, N]."""
        found: Floats = np.load(self.folder / f"scores_{kind}.npy")
        return found

    def by_layer(self, kind: str) -> dict[str, Floats]:
        """Layer -> [Q, N]."""
        with np.load(self.folder / f"scores_{kind}_per_module.npz") as file:
            return {name: file[name] for name in self.tracked}

    def by_token(self, kind: str) -> Floats:
        """[Q, N, T], by input position."""
        plain = self.folder / f"scores_{kind}_per_token.npy"
        if plain.exists():
            found: Floats = np.load(plain)
            return found
        with np.load(plain.with_suffix(".npz")) as file:
            return np.asarray(file["scores"])

    def factor(self, name: Literal["A", "S", "Lambda"]) -> dict[str, Floats]:
        """Layer -> A [I, I], S [O, O] or Lambda [O, I]; `small` alone has them."""
        key = {"S": "G"}.get(name, name)
        with np.load(self.folder / "factors.npz") as file:
            return {layer: file[f"{layer}|{key}"] for layer in self.tracked}

    def corpus_rows(self) -> list[dict[str, Any]]:
        """The training sequences as rows of a JSONL corpus (corpus.tokens_field=tokens, corpus.packing=document)."""
        return [{"id": f"sequence-{index}", "tokens": tokens} for index, tokens in enumerate(self.train)]

    def query_rows(self) -> list[dict[str, Any]]:
        """The queries as rows of a query file; ids sort in their order."""
        return [
            {"id": f"q{index:02d}", "input_ids": query.input_ids, "prompt_len": query.prompt_len}
            for index, query in enumerate(self.queries)
        ]


def golden(name: Literal["small", "medium"]) -> Golden:
    folder = Path(__file__).parent / name
    data = json.loads((folder / "data.json").read_text())
    meta = json.loads((folder / "meta.json").read_text())
    return Golden(
        folder=folder,
        tracked=tuple(meta["tracked"]),
        rank=meta["low_rank"],
        dtype=meta["dtype"],
        train=data["train"],
        queries=[GoldenQuery(query["input_ids"], query["prompt_len"]) for query in data["queries"]],
    )
