"""The commands of the studies: each documents every key, is a job too, and is light until it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infscan.cli import main
from infscan.config.commands import Command, commands
from infscan.config.help import help_of
from infscan.config.settings import settings_of
from infscan_studies.commands import COMMANDS

ROOT = Path(__file__).parents[2]
every_command = pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])


@every_command
def test_a_command_is_found_and_has_a_job(command: Command) -> None:
    assert commands()[command.name] == command
    assert f'main("{command.name}")' in (ROOT / "jobs" / f"{command.name}.py").read_text()


@every_command
def test_every_key_has_its_meaning(command: Command) -> None:
    settings = [*settings_of(command.kind), *(one for _, _, mine in command.preset_settings() for one in mine)]
    assert settings
    assert not [setting.key for setting in settings if not setting.meaning]


def test_a_preset_lists_its_own_keys_with_its_own_defaults() -> None:
    said = help_of(commands()["study"])
    layers, memorisation, side_by_side = (
        said.split(f"With study={name}:")[1].split("With study=")[0]
        for name in ("layers", "memorisation", "side_by_side")
    )
    assert "study.rows  whole number (10)" in layers
    assert "study.resamples" not in memorisation
    assert "study.rows  whole number (3)" in side_by_side


def test_help_and_settings_bring_nothing_heavy() -> None:
    code = (
        "import sys; from infscan.cli import main; main('study', ['--help']); main('validate', ['--help']);"
        "from infscan_studies import config; print([name for name in ('torch', 'ray', 'numpy', 'matplotlib', 'pyarrow')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study", "study=layer", "run=r"], "did you mean study=layers?"),
        (["study", "r", "study=layers", "study.tail=1"], "a key of study=sparsity and study=extrapolation"),
        (["study", "r", "study=models"], "study.runs: no value given"),
        (["validate", "truth=retraining"], "there is no such preset; presets are cg, coverage, pbrf, pbrf_regression"),
        (["validate", "truth=coverage"], "the output of infscan tfidf"),
        (["lds"], "corpus.path: no value given"),
        (["answers"], "runs.multi-stage=runs/answers"),
        (["facts"], "output: no value given"),
    ],
)
def test_a_slip_is_answered_in_a_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments=words)
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_facts_are_written_for_a_scan_and_an_explanation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("facts", [str(tmp_path / "made")])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/made/queries.jsonl: 12 rows",
        f"{tmp_path}/made/texts.jsonl: 192 rows",
    ]
