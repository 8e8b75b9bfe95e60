"""What a shell types: `infscan <command> [key=value ...]`. `python jobs/<command>.py` is the same thing.

Settings are read, checked and composed before anything heavy is imported: help and a slip take a second.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from infscan.config.arguments import SWEEP_FLAGS, as_typed, is_sweep, read_arguments
from infscan.config.commands import Command, command_of, commands, compose, register, settle
from infscan.config.help import OPTIONS, help_of, overview
from infscan.errors import ConfigError, InfscanError

_HELP = ("-h", "--help")
_SHOW_SETTINGS = "--cfg=job"


def main(name: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Run a command; `name` is given by jobs/<name>.py, else it is the first word.

    An error that a user can fix ends the process with one sentence and status 2, a signal with 128 + its number.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _never_fail_to_print()
    if arguments is None:
        _heed_signals()
        # As it ends, Python would look for garbage among all that torch and transformers left: a second, for nothing.
        atexit.register(gc.freeze)
    with exit_on_user_error():
        if name is None:
            if not words or words[0] in _HELP:
                print(overview())
                return
            if words[0] == "--version":
                from importlib.metadata import version

                print(version("infscan"))
                return
            name = _named(words.pop(0))
        run_job(command_of(name), words)


def _never_fail_to_print() -> None:
    """Let a terminal or file that is not UTF-8 show `?` for what it cannot: a finished run does not fail over it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _named(word: str) -> str:
    """A command's name, as it was typed or as it was probably meant."""
    from difflib import get_close_matches

    if word in commands():
        return word
    close = get_close_matches(word, commands(), 1)
    hint = f"did you mean infscan {close[0]}?" if close else f"there are {', '.join(commands())}."
    raise ConfigError(f"{word}: there is no such command; {hint}")


_ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "its terminal was closed"}
# The signals that this process was ended by: Ray raises an interruption of its own in place of a handler's.
_received: list[signal.Signals] = []


def _end(number: int, _frame: object) -> None:
    """End the command as an interruption does: what is open is closed, and the lease is given back."""
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


def _heed_signals() -> None:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, unless whoever started it has them ignored (nohup)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with a user's error as one sentence and status 2, without a traceback; with 130 if
    interrupted."""
    try:
        yield
    except InfscanError as error:
        _complain(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        number = _received[-1] if _received else signal.SIGINT
        print(f"{_ENDED[number]}; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + number) from None
    except BrokenPipeError:
        # A reader such as `head` has seen enough; what Python flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _complain(message: str) -> None:
    from rich.text import Text

    from infscan.telemetry import console, shown

    console().print(Text(f"error: {shown(message)}", style="bold red"))


def run_job(command: Command, words: Sequence[str]) -> None:
    """Run one command with its words: help, its settings, a single run, or a sweep.

    Raises:
        InfscanError: for whatever a user can fix.
    """
    if any(word in _HELP for word in words):
        print(help_of(command))
        return
    # Hydra echoes INFO logs; botocore's line on where credentials were found is none of its business.
    for library in ("botocore", "aiobotocore"):
        logging.getLogger(library).setLevel(logging.WARNING)
    overrides = read_arguments(command, words)
    if _SHOW_SETTINGS in overrides:
        print(settings_yaml(command, [word for word in overrides if "=" in word and not word.startswith("-")]))
    elif is_sweep(overrides):
        _sweep(command, overrides)
    elif any(word.startswith("-") for word in overrides):
        word = next(word for word in overrides if word.startswith("-"))
        raise ConfigError(f"{word}: there is no such option; there are {OPTIONS}.")
    else:
        result = command.function(_settled(command, compose(command, overrides)))
        result.show()
        if code := getattr(result, "exit_code", 0):
            raise SystemExit(code)


def _settled(command: Command, cfg: Any, cell: str | None = None) -> Any:
    """Composed settings as checked ones, of files that were looked at."""
    settings = settle(command, cfg, cell)
    if command.is_run:
        from infscan.steps.early import check_files

        check_files(settings)
    return settings


def settings_yaml(command: Command, overrides: Sequence[str]) -> str:
    """The settings that a command comes to, inherited ones filled in, as YAML; mandatory ones may be open."""
    from omegaconf import OmegaConf

    from infscan.config.compose import inherited

    cfg = compose(command, overrides)
    return OmegaConf.to_yaml(inherited(cfg) if command.is_run else cfg).rstrip()


class _Sweep:
    """The cells of this process's command line, and how many of them failed."""

    cells = 0
    failed = 0


def _sweep(command: Command, overrides: list[str]) -> None:
    """Every cell of a sweep, by Hydra's launcher; one that fails ends itself, the others go on."""
    import hydra

    from infscan.config.sweep import SWEPT, key_of, sweep_cells, swept_keys

    cells = sweep_cells(overrides)
    # What cannot be composed is refused before the first cell starts.
    settings = [compose(command, [word for word in cell if not word.startswith("hydra")]) for cell in cells]
    _Sweep.cells, _Sweep.failed = len(cells), 0
    swept = ",".join(swept_keys(cells))
    words = [word for word in overrides if word not in SWEEP_FLAGS]
    if not any(key_of(word) == "hydra.sweep.dir" for word in words):
        output = settings[0].get("output") if command.is_run and settings else None
        words.append(f"hydra.sweep.dir={_record_folder(output)}")
    before = sys.argv
    sys.argv = [f"infscan {command.name}", "--multirun", *words, f"+hydra.job.env_set.{SWEPT}='{swept}'"]
    try:
        hydra.main(version_base=None, config_path=command.folder, config_name=register(command))(_cell)()
    finally:
        sys.argv = before
    if _Sweep.failed:
        _complain(f"{_Sweep.failed} of {_Sweep.cells} cells failed; the same command runs them again, and no other.")
        raise SystemExit(2)


def _record_folder(output: str | None) -> str:
    """Where Hydra keeps what was asked of a sweep: below a local output, else below this folder; quoted for Hydra.

    Raises:
        StorageError: where nothing may be written there.
    """
    from datetime import datetime

    from infscan.storage import Store

    local = output is not None and "://" not in output
    folder = Store(str(output) if local else ".") / ".multirun" / f"{datetime.now():%Y-%m-%dT%H-%M-%S}"
    folder.check_writable()
    return as_typed(folder.uri)


def _cell(cfg: Any) -> None:
    """One cell, in this process or in one of a launcher's."""
    from hydra.core.hydra_config import HydraConfig

    from infscan.config.sweep import this_cell
    from infscan.storage import Store

    command = command_of(HydraConfig.get().job.name)
    try:
        name, earlier = this_cell()
        config = _settled(command, cfg, name)
        if command.is_run:
            # A sweep that infscan 0.1 began goes on in the folders that it named.
            old = config.output.removesuffix(name) + earlier
            if name != earlier and Store(old).exists("config.yaml"):
                config = settle(command, cfg, earlier)
        command.function(config).show()
    except InfscanError as error:
        _complain(str(error))
        if not _Sweep.cells:
            # A process of a launcher's own: its end is how the launcher learns of it.
            raise
        _Sweep.failed += 1
