"""docs/configuration.md, made of the settings' own meanings: `python -m infscan.config.reference >
docs/configuration.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from infscan.config.commands import Command, commands
from infscan.config.help import shown_settings
from infscan.config.schema import Config
from infscan.config.settings import Setting, settings_of

_HEAD = """\
# Configuration

Every key of every command, with its type, its default and its meaning. This page is generated from the classes in
`infscan/config/`; `infscan <command> --help` prints the part that a command reads, and `infscan <command> ... --cfg
job` the values that a command line comes to.

- **Setting a key**: `scan.top_k=10`. A text is taken as it is typed (`output=2024_01_02`, `corpus.path=lang=en/`);
  `null` is no value; lists are `[a,b]`; below a text by label, a key is any name of your own
  (`corpus.paths.web=...`).
- **Presets**: `model=demo` takes the file `conf/model/demo.yaml`. `--config-dir DIR` adds a folder of presets of your
  own.
- **Inheritance**: a key that is not given in `factors.corpus`, `stages.N.corpus` or `stages.N.factors` is the outer
  group's.
  Two things are not inherited: which sample is scanned (`max_sequences`, `sample`) says nothing about what factors
  are fitted on, and every stage but the first has a place of its own.
- **Sweeps**: `infscan scan -m model=a,b scan.rank=8,32` runs every combination, each in a folder of its own below
  `output`.
- **From Python**: `infscan.scan("model=demo", output="runs/demo", scan={"top_k": 10})`, or with an `infscan.Config`.
"""


def markdown() -> str:
    """The whole page."""
    run = {setting.key: setting for setting in settings_of(Config)}
    parts = [_HEAD, *_groups(run.values())]
    for command in commands().values():
        parts += _command(command, run)
    return "\n".join(parts).rstrip() + "\n"


def _groups(settings: Iterable[Setting]) -> Iterator[str]:
    """A section for each group of a run's settings; what is inherited key by key is one row."""
    by_group: dict[str, list[Setting]] = {}
    for setting in shown_settings(settings):
        group = setting.key.partition(".")[0] if "." in setting.key else "the run"
        by_group.setdefault("stages" if group == "stages" or setting.key == "stages" else group, []).append(setting)
    for group, mine in by_group.items():
        yield f"## {group}\n"
        yield from _table(mine)


def _command(command: Command, run: dict[str, Setting]) -> Iterator[str]:
    yield f"## infscan {command.name}\n"
    yield f"{command.summary}\n"
    if command.is_run:
        reads = "every group above" if not command.shows else ", ".join(f"`{key.rstrip('.')}`" for key in command.shows)
        yield f"Reads {reads}.\n"
    for group, options in ((group, command.options(group)) for group in (*command.groups, *command.variants)):
        if options and not (command.is_run and command.name != "scan" and group not in command.variants):
            yield f"Presets `{group}=`: {', '.join(f'`{option}`' for option in options)}.\n"
    own = [setting for setting in settings_of(command.kind) if run.get(setting.key) != setting]
    if own:
        yield from _table(shown_settings(own))
    for preset, meaning, settings in command.preset_settings():
        yield f"`{preset}`: {meaning}\n"
        if settings:
            yield from _table(settings)


def _table(settings: Iterable[Setting]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for setting in settings:
        row = (f"`{setting.key}`", setting.type.replace("|", "or"), f"`{setting.default}`", setting.meaning)
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
    yield ""


if __name__ == "__main__":
    print(markdown(), end="")
