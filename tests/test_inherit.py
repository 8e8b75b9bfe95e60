"""One rule of inheritance: every key that is not given is the outer group's; the walk is over every key there is."""

from __future__ import annotations

from typing import Any

import pytest

from infscan.config import Config, plain
from infscan.config.arguments import read_arguments
from infscan.config.commands import command_of, compose, settle
from infscan.config.identity import leaves
from infscan.config.schema import SELECTION, CorpusConfig, FactorsConfig
from infscan.config.settings import Setting, settings_of

SCAN = command_of("scan")
NEEDED = ("model.path=m", "queries.path=q", "output=o")
TWO = ("stages=two", "stages.1.model=n", "stages.1.corpus.path=d", "stages.1.alpha=1")
PLACE = ("path", "paths")
CORPUS = [setting for setting in settings_of(CorpusConfig) if setting.key not in PLACE]
FACTORS = [setting for setting in settings_of(FactorsConfig) if not setting.key.startswith(("corpus.", "path"))]


def given(setting: Setting) -> str:
    """A value other than the default."""
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    if setting.type == "true or false":
        return "false" if setting.default == "true" else "true"
    if setting.type == "number":
        return "0.5"
    return "17" if setting.type == "whole number" else f"other_{setting.key}"


def settled(*words: str) -> dict[str, Any]:
    """Every leaf of what `infscan scan` comes to, by key; checks that need a whole world are not what is tested."""
    config: Config = settle(SCAN, compose(SCAN, read_arguments(SCAN, [*NEEDED, *words])))
    return dict(leaves(plain(config)))


def words_for(group: str, setting: Setting) -> list[str]:
    words = [f"{group}.{setting.key}={given(setting)}"]
    # What a key needs beside it to be possible.
    if setting.key == "mask_field":
        words.append(f"{group}.tokens_field=ids")
    return words


@pytest.mark.parametrize("setting", CORPUS, ids=lambda setting: setting.key)
def test_a_key_of_the_corpus_reaches_factors_and_every_stage(setting: Setting) -> None:
    found = settled("corpus.path=c", *words_for("corpus", setting), *TWO)
    value = found[f"corpus.{setting.key}"]
    assert str(value).lower() == given(setting)
    for stage in ("stages.0", "stages.1"):
        assert found[f"{stage}.corpus.{setting.key}"] == value
    expected = None if setting.key in SELECTION else value
    for factors in ("factors", "stages.0.factors", "stages.1.factors"):
        assert found[f"{factors}.corpus.{setting.key}"] == expected, "a sample of what is scanned is not one of factors"


@pytest.mark.parametrize("setting", CORPUS, ids=lambda setting: setting.key)
def test_a_key_that_is_given_wins(setting: Setting) -> None:
    words = words_for("factors.corpus", setting) + words_for("stages.1.corpus", setting)
    found = settled("corpus.path=c", *words, *TWO)
    default = found[f"corpus.{setting.key}"]
    assert str(default).lower() != given(setting)
    for key in ("factors.corpus", "stages.0.factors.corpus", "stages.1.corpus"):
        assert str(found[f"{key}.{setting.key}"]).lower() == given(setting)
    assert found[f"stages.0.corpus.{setting.key}"] == default


@pytest.mark.parametrize("setting", FACTORS, ids=lambda setting: setting.key)
def test_a_key_of_the_factors_reaches_every_stage(setting: Setting) -> None:
    found = settled("corpus.path=c", f"factors.{setting.key}={given(setting)}", *TWO)
    assert str(found[f"factors.{setting.key}"]).lower() == given(setting)
    assert found[f"stages.1.factors.{setting.key}"] == found[f"factors.{setting.key}"]


def test_the_first_stage_is_the_run_itself_and_a_later_one_has_a_place_of_its_own() -> None:
    found = settled("corpus.path=c", "factors.path=f", "factors.corpus.path=g", *TWO)
    for key in ("corpus.path", "factors.path", "factors.corpus.path"):
        assert found[f"stages.0.{key}"] == found[key]
    assert found["stages.0.model"] == found["model.path"]
    assert found["stages.1.factors.path"].endswith("/o/stages/2/factors")
    assert found["stages.1.factors.corpus.path"] == found["stages.1.corpus.path"]


def test_several_corpora_are_inherited_as_one_place_is() -> None:
    found = settled("+corpus.paths.web=w", "+corpus.paths.books=b", *TWO)
    for key in ("corpus", "factors.corpus", "stages.0.corpus", "stages.0.factors.corpus"):
        assert found[f"{key}.path"] == ""
        assert {found[f"{key}.paths.web"][-1], found[f"{key}.paths.books"][-1]} == {"w", "b"}
    apart = settled("corpus.path=c", "+factors.corpus.paths.web=w")
    assert (apart["factors.corpus.path"], apart["factors.corpus.paths.web"][-1]) == ("", "w")
    assert apart["corpus.paths"] == {}


def test_without_factors_a_compression_that_is_not_given_is_plain() -> None:
    assert settled("corpus.path=c")["scan.compression"] == "weighted"
    assert settled("corpus.path=c", "factors=identity")["scan.compression"] == "plain"
    assert settled("corpus.path=c", "factors.solver=identity")["scan.compression"] == "plain"
