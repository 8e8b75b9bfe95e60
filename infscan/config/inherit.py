"""The one rule of inheritance: a setting that is not given is the outer group's, for every key.

factors.corpus inherits corpus; stages.N.corpus inherits corpus; stages.N.factors inherits factors, and its corpus the
stage's. The first stage is the run's own model, corpus and factors. Two things are never inherited: the sample that is
scanned says nothing about what factors are fitted on (`SELECTION`), and a later stage has a place of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from infscan.config.schema import MISSING, SELECTION, Compression, Solver

Values = dict[str, Any]
# Where a corpus is: one setting in two keys.
_PLACE = ("path", "paths")


def inherit(values: Values) -> None:
    """Fill what is not given in the plain values of a `Config`, in place; what nothing gives stays MISSING."""
    corpus, factors, stages = values["corpus"], values["factors"], values["stages"]
    _settle_place(corpus)
    if isinstance(stages, list):
        for number, stage in enumerate(stages):
            if isinstance(stage, dict):
                _fill_stage(stage, values, first=number == 0)
    _fill_corpus(factors["corpus"], corpus, without=SELECTION)
    _fill(factors["corpus"], dict.fromkeys(SELECTION))
    _fill(values["scan"], {"compression": _compression(values)})


def _fill_stage(stage: Values, values: Values, *, first: bool) -> None:
    place = () if first else _PLACE
    if first:
        if stage["model"] == MISSING and stage["revision"] is None:
            stage["revision"] = values["model"]["revision"]
        _fill(stage, {"model": values["model"]["path"]})
        _fill_corpus(stage["factors"]["corpus"], values["factors"]["corpus"])
    _fill_corpus(stage["corpus"], values["corpus"], without=place)
    _fill(stage["factors"], values["factors"], without=("corpus", *place))
    _fill(stage["factors"], {"path": None})
    _fill_corpus(stage["factors"]["corpus"], stage["corpus"], without=SELECTION)
    _fill(stage["factors"]["corpus"], dict.fromkeys(SELECTION))


def _fill_corpus(target: Values, source: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """One address and several by label are one setting: where either is given, neither is inherited."""
    own_place = any(target[key] not in (MISSING, {}, "") for key in _PLACE)
    if not own_place and "path" not in without:
        target.update({key: deepcopy(source[key]) for key in _PLACE})
    _fill(target, source, (*without, *_PLACE))
    _settle_place(target)


def _settle_place(corpus: Values) -> None:
    if corpus["paths"] == MISSING:
        corpus["paths"] = {}
    if corpus["path"] == MISSING and corpus["paths"]:
        corpus["path"] = ""


def _fill(target: Values, source: Mapping[str, Any], without: Collection[str] = ()) -> None:
    for key, value in source.items():
        if key in without:
            continue
        if isinstance(target[key], dict) and isinstance(value, dict):
            _fill(target[key], {inner: value[inner] for inner in value if inner in target[key]})
        elif target[key] == MISSING:
            target[key] = deepcopy(value)


def _compression(values: Values) -> str:
    """Without factors there is nothing to weigh a truncation by."""
    plain = values["factors"]["solver"] == Solver.identity and values["scan"]["rank"] is not None
    return (Compression.plain if plain else Compression.weighted).value
