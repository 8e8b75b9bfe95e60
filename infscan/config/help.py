"""What `--help` prints: the commands, and every key that a command reads with its meaning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from textwrap import fill

from infscan.config.commands import Command, commands
from infscan.config.settings import Setting, settings_of

OPTIONS = "--help, --cfg job (print the settings), -m (a sweep) and --config-dir (a folder of your own presets)"
_WIDTH = 100


def overview() -> str:
    """`infscan --help`."""
    width = max(map(len, commands()))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in commands().items()]
    return "\n".join(
        [
            "infscan: which pretraining sequences most raised the probability of this completion?",
            "",
            "usage: infscan <command> [key=value ...]",
            "",
            *lines,
            "",
            "infscan <command> --help lists every key with its meaning.",
            "To begin: infscan scan model=demo corpus=demo queries=demo",
        ]
    )


def help_of(command: Command) -> str:
    """`infscan <command> --help`: what it does, examples, presets, and every key that it reads with its meaning."""
    width = max(60, min(_WIDTH, _terminal_width()))
    positional = "".join(f" [{key}]" for key in command.positional)
    lines = [fill(command.summary, width), "", f"usage: infscan {command.name}{positional} [key=value ...]", ""]
    lines += [f"  infscan {command.name} {example}" for example in command.examples]
    groups = {group: command.options(group) for group in (*command.groups, *command.variants)}
    if any(groups.values()):
        lines += ["", "Presets:"]
        lines += [
            fill(", ".join(options), width, initial_indent=f"  {group}=", subsequent_indent="    ")
            for group, options in groups.items()
            if options
        ]
    lines += ["", "Keys (default):"]
    read = [one for one in settings_of(command.kind) if not command.shows or one.key.startswith(command.shows)]
    lines += _described(shown_settings(read), width)
    for preset, meaning, settings in command.preset_settings():
        lines += ["", fill(f"With {preset}: {meaning}", width, subsequent_indent="  "), *_described(settings, width)]
    lines += ["", f"Options: {OPTIONS}."]
    return "\n".join(lines)


def _described(settings: Iterable[Setting], width: int) -> Iterator[str]:
    for setting in settings:
        yield f"  {setting.key}  {_type_and_default(setting)}"
        # Keys, files and anchors stay whole.
        yield fill(setting.meaning, width, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)


def shown_settings(settings: Iterable[Setting]) -> Iterator[Setting]:
    """The same settings; those of a group that is inherited key by key are one."""
    folded: set[str] = set()
    for setting in settings:
        group = _inherited_group(setting.key)
        if group is None:
            yield setting
        elif group not in folded:
            folded.add(group)
            yield _folded(group)


# Groups that are inherited key by key: from which, and what is not.
_SAMPLE = ", except for the sample (max_sequences, sample): factors are of the whole corpus"
_PLACE = "; where it is stored is given for every stage but the first"
_INHERITED = {
    "stages.N.factors.corpus": ("stages.N.corpus", _SAMPLE),
    "stages.N.factors": ("factors", _PLACE),
    "stages.N.corpus": ("corpus", _PLACE),
    "factors.corpus": ("corpus", _SAMPLE),
}


def _inherited_group(key: str) -> str | None:
    return next((group for group in _INHERITED if key.startswith(f"{group}.")), None)


def _folded(group: str) -> Setting:
    outer, exception = _INHERITED[group]
    meaning = f"Every key of {outer}; one that is not given is {outer}'s{exception}."
    return Setting(key=f"{group}.*", type="", default="inherited", meaning=meaning)


def _type_and_default(setting: Setting) -> str:
    return f"({setting.default})" if not setting.type else f"{setting.type} ({setting.default})"


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return _WIDTH
