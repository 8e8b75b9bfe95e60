"""The words of a command line, checked before Hydra reads them; and Hydra's refusals as sentences of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

from infscan.config.schema import MISSING, RENAMED
from infscan.config.settings import Setting
from infscan.errors import ConfigError
from infscan.secrets import MEND, holds_secret, redact

if TYPE_CHECKING:
    from infscan.config.commands import Command

_MOST_BYTES = 4096
_DEEPEST = 20  # brackets in an argument; Hydra's parser takes many stack frames for each
_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~|)(?P<key>[\w./@:-]+)(?:=(?P<value>.*))?", re.DOTALL)
_NUMBER = re.compile(r"(?<=\bstages\.)\d+(?=\.|$)")
# Hydra's functions that make a sweep of a value.
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
SWEEP_FLAGS = ("-m", "--multirun")
# The override by which Hydra searches a folder of presets.
_SEARCH = "hydra.searchpath=[file://"
# One query of one's own, for short.
_SHORT = {key: f"queries.{key}" for key in ("prompt", "completion", "contrast")}
# What is measured, or scored, letter by letter.
_VERBATIM = frozenset({*_SHORT, *_SHORT.values(), "text"})
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
# A list or an object, and no regular expression that begins like one.
_STRUCTURE = re.compile(r"\[.*\]|\{.*\}", re.DOTALL)
# What a group was set to where it set nothing.
_NOTHING = ("default", "local")


def check_argument(argument: str) -> None:
    """Refuse what Hydra would print, write down, or stumble over with a traceback, before it reads the command line.

    It repeats arguments that it does not understand, and writes all of a sweep's to multirun.yaml.

    Raises:
        ConfigError: for credentials, control characters, bytes that are not UTF-8, and what is too long or too deep.
    """
    key = argument.partition("=")[0]
    if holds_secret(argument):
        raise ConfigError(f"{redact(key)}=*** carries credentials, {MEND}.")
    # Spaces and joiners of other scripts are no control characters.
    if any(category(character) in ("Cc", "Cs") and character not in "\n\t" for character in argument):
        raise ConfigError(f"{_shorten(argument)} holds a control character, or bytes that are not UTF-8; remove it.")
    if len(argument) > _MOST_BYTES:
        raise ConfigError(f"{_shorten(argument)} has {len(argument):,} characters; give at most {_MOST_BYTES:,}.")
    depth = deepest = 0
    for character in argument:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise ConfigError(f"{_shorten(argument)} is nested {deepest} deep; give at most {_DEEPEST}.")


def is_sweep(words: Sequence[str]) -> bool:
    return any(word in SWEEP_FLAGS or word == "hydra.mode=MULTIRUN" for word in words)


def read_arguments(command: Command, words: Sequence[str]) -> list[str]:
    """The command's words as overrides and flags that Hydra reads as they were meant.

    Every key and preset is looked up; the value of a text is taken as it was typed, whatever it looks like; a word
    without `=` is a positional argument, and `--name value` is `name=value`.

    Raises:
        ConfigError: for what there is not, with what was probably meant.
    """
    known = command.all_settings
    found, sweep = list(_as_overrides(command, known, words)), is_sweep(words)
    folders = [Path(word.removeprefix(_SEARCH).removesuffix("]")) for word in found if word.startswith(_SEARCH)]
    return _without_taken_away(command, [_read(command, known, word, folders, sweep=sweep) for word in found])


def _without_taken_away(command: Command, words: Sequence[str]) -> list[str]:
    """`group=null` takes the presets of that group before it away; Hydra itself takes null for none."""
    kept: list[str] = []
    for word in words:
        group, _, value = word.lstrip("+~").partition("=")
        if group not in command.groups or value != "null":
            kept.append(word)
            continue
        kept = [other for other in kept if other.lstrip("+").partition("=")[0] != group]
        if group in command.presets:
            kept.append(f"~{group}")
    return kept


def _as_overrides(command: Command, known: dict[str, Setting], words: Sequence[str]) -> Iterator[str]:
    """Positional words and options of the command's own keys, written as overrides."""
    positional, rest = list(command.positional), list(words)
    while rest:
        word = rest.pop(0)
        check_argument(word)
        name, _, value = word.removeprefix("--").partition("=")
        if word in ("--cfg", "-c"):
            yield f"--cfg={rest.pop(0) if rest else ''}"
        elif word in ("--config-dir", "-cd") or word.startswith("--config-dir="):
            yield f"{_SEARCH}{Path(value or (rest.pop(0) if rest else '')).absolute()}]"
        elif word.startswith("--") and name in known:
            if "=" in word:
                yield word[2:]
            elif known[name].type == "true or false":
                yield f"{name}=true"
            else:
                yield f"{name}={rest.pop(0) if rest else ''}"
        elif positional and not word.startswith(("-", "+")) and _is_positional(word, name):
            yield f"{positional.pop(0)}={word}"
        else:
            yield word


def _is_positional(word: str, before: str) -> bool:
    """Whether a word is a value by itself; a path may have a `=` in it (`runs/lang=en`), which no key has after a /."""
    if word.startswith("~"):
        return word.startswith("~/")
    return "=" not in word or ("/" in before and not before.startswith("hydra/"))


def _read(command: Command, known: dict[str, Setting], word: str, folders: Sequence[Path], *, sweep: bool) -> str:
    if word.startswith("-") or word.lstrip("+~").startswith(("hydra.", "hydra/")):
        return word
    match = _OVERRIDE.fullmatch(word)
    if match is None or (match["value"] is None and match["sign"] != "~"):
        raise ConfigError(
            f"{_shorten(word)}: settings are written key=value; infscan {command.name} --help lists them."
        )
    sign, key, value = match["sign"], match["key"], match["value"]
    key = RENAMED.get(key, key)
    key = _SHORT.get(key, key) if "queries.prompt" in known else key
    if key in (*command.groups, *command.variants):
        return f"{sign}{key}={_preset(command, key, value, folders)}" if value is not None else word
    setting = _known(command, known, key)
    if setting.is_open and key != setting.key and not sign:
        # A label of the user's own: to Hydra, a key that is not there yet.
        sign = "++"
    if value is None or not setting.is_text:
        return word if value is None else f"{sign}{key}={value}"
    verbatim = key in _VERBATIM
    check_text(key, value)
    if not verbatim:
        _check_references(key, value, known)
    return f"{sign}{key}={_text(value, sweep=sweep and not verbatim, verbatim=verbatim)}"


def _preset(command: Command, group: str, value: str, folders: Sequence[Path]) -> str:
    """A preset that there is, or several of a sweep. folders: of presets of the user's own (--config-dir)."""
    options = command.options(group, folders)
    chosen = [part.strip().strip("'\"") for part in value.split(",")]
    for name in chosen:
        if name in options or name in ("null", *_NOTHING) or _SWEEP.fullmatch(value):
            continue
        raise ConfigError(_no_preset(command, group, name, options))
    return ",".join("null" if name in _NOTHING and name not in options else name for name in chosen)


def _no_preset(command: Command, group: str, name: str, options: Sequence[str]) -> str:
    said = f"{group}={_shorten(name)}: there is no such preset"
    looks_like_address = any(mark in name for mark in "/.:~") or not get_close_matches(name, options)
    if f"{group}.path" in command.all_settings and looks_like_address:
        hint = f"Is it a folder, a file or a URI? Then say {group}.path={_shorten(name)}"
        return f"{said}. {hint}; presets are {_listed(options)}."
    close = get_close_matches(name, options, 1)
    return f"{said}; did you mean {group}={close[0]}?" if close else f"{said}; presets are {_listed(options)}."


def _known(command: Command, known: dict[str, Setting], key: str) -> Setting:
    """The setting that a key names."""
    numbered = _NUMBER.sub("N", key)
    if numbered in known:
        return known[numbered]
    label = next(
        (setting for setting in known.values() if setting.is_open and numbered.startswith(f"{setting.key}.")), None
    )
    if label is not None:
        return label
    if any(setting.startswith(f"{numbered}.") for setting in known):
        below = [setting for setting in known if setting.startswith(f"{numbered}.")]
        hint = f"{key}.path" if f"{numbered}.path" in known else below[0].replace(".N.", ".0.")
        raise ConfigError(
            f"{key}: this is a group of keys, which takes no value; give one of its keys, such as {hint}=..."
        )
    raise ConfigError(f"{_shorten(key)}: there is no such key{_suggestion(key, numbered, known)}")


def _suggestion(key: str, numbered: str, known: dict[str, Setting]) -> str:
    names = [name for name in known if ".N." not in name or ".N." in numbered]
    last = numbered.rpartition(".")[2]
    leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = [leaves[last]] if last in leaves else get_close_matches(numbered, names, 1, 0.75)
    close = close or [leaves[leaf] for leaf in get_close_matches(last, leaves, 1, 0.75)]
    if not close:
        return "; infscan <command> --help lists those that there are."
    number = _NUMBER.search(key)
    return f"; did you mean {close[0].replace('.N.', f'.{number[0]}.') if number else close[0]}?"


def _check_references(key: str, value: str, known: dict[str, Setting]) -> None:
    """Refuse `${...}` that is no other key: to Hydra it is one, whatever quotes are around it."""
    names = _REFERENCE.findall(value)
    other = next((name for name in names if ":" not in name and _NUMBER.sub("N", name) not in known), None)
    if other is None and len(names) == value.count("${"):
        return
    what = f"${{{other}}} stands for the value of a key, and there is none" if other is not None else "it has a lone ${"
    raise ConfigError(f"{key}={_shorten(value)}: {what}, so rename what it names.")


def check_text(key: str, value: object) -> None:
    """Refuse a text of the user's that would be read as a setting: another key's value, or one that is not given.

    Raises:
        ConfigError: where `key` is of a query or of a text to score, and its value is not taken letter by letter.
    """
    if key not in _VERBATIM or not isinstance(value, str) or not ("${" in value or value == MISSING):
        return
    what = "stands for a value that is not given" if value == MISSING else "holds ${, which stands for another key's"
    file = "texts" if key == "text" else "queries.path" if key in _SHORT.values() else "queries"
    raise ConfigError(f"{key}={_shorten(value)} {what}; write it into a file ({file}=...), where it is taken as it is.")


def _text(value: str, *, sweep: bool, verbatim: bool) -> str:
    """A text's value, quoted so that Hydra takes it as it was typed; in a sweep, each of several."""
    stripped = value.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
    if not verbatim and (value in ("null", "???", "") or quoted or "${" in value or _STRUCTURE.fullmatch(stripped)):
        return value
    if sweep and ("," in value or _SWEEP.fullmatch(stripped)):
        if "'" in value or '"' in value or _SWEEP.fullmatch(stripped):
            return value
        return ",".join(as_typed(part.strip()) for part in value.split(","))
    return as_typed(value)


def as_typed(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def refusal(command: Command, overrides: Sequence[str], error: Exception) -> ConfigError:
    """Hydra's refusal as one sentence: the key, the value, and what the key takes."""
    known = command.all_settings
    text = str(error)
    full_key = re.search(r"full_key: ([\w.\[\]]+)", f"{text}\n{error.__cause__}")
    if full_key:
        key = re.sub(r"\[(\d+)\]", r".\1", full_key[1])
        setting = known.get(_NUMBER.sub("N", key))
        presets = [preset for preset, _, settings in command.preset_settings() for one in settings if one.key == key]
        if presets and "not in '" in str(error.__cause__):
            return ConfigError(f"{key}: this is a key of {' and '.join(presets)}, and not of the chosen preset.")
        if setting is not None:
            value = next((word.partition("=")[2] for word in overrides if word.lstrip("+~").startswith(f"{key}=")), "")
            return ConfigError(f"{key}={_shorten(value)}: give {_article(setting)}.")
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    culprit = next((word for word in overrides if word and word in text), "")
    key, _, value = culprit.lstrip("+~").partition("=")
    if value and (setting := known.get(_NUMBER.sub("N", key))) is not None and not setting.is_text:
        return ConfigError(f"{key}={_shorten(value)}: give {_article(setting)}.")
    said = f"{_shorten(culprit)}: " if culprit and culprit not in first else ""
    return ConfigError(
        f"{said}the settings cannot be read ({_shorten(first)}); infscan {command.name} --help lists them."
    )


def _article(setting: Setting) -> str:
    if setting.choices:
        return f"one of {', '.join(setting.choices)}"
    return f"a {setting.type}" if not setting.type.startswith(("true", "text")) else setting.type


def _listed(options: Sequence[str]) -> str:
    return ", ".join(options) if options else "none"


def _shorten(value: object) -> str:
    """A value as an error shows it: on one line, its middle left out where it is long."""
    text = redact(repr(value) if isinstance(value, str) and not value.isprintable() else str(value))
    return text if len(text) <= 200 else f"{text[:120]}...{text[-30:]}"
