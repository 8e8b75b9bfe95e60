"""What a shell types: help has every key, a slip is answered by what was meant, and nothing heavy is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import infscan.api
import infscan.steps.early
from infscan import cli
from infscan.api import settings_of_call
from infscan.config.arguments import read_arguments
from infscan.config.commands import CONF, commands, compose, settle
from infscan.config.help import help_of, overview
from infscan.config.jobs import AskJob, StatusJob
from infscan.config.reference import markdown
from infscan.config.schema import Config
from infscan.errors import ConfigError
from infscan.results.status import Driver, Status

ROOT = Path(__file__).parent.parent


def said(capfd: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """The one sentence that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        cli.main(None, words)
    assert ended.value.code == status
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["scan", "scan.topk=3"], "scan.topk: there is no such key; did you mean scan.top_k?"),
        (["scan", "corpus.sequence_lenght=3"], "did you mean corpus.sequence_length?"),
        (["scan", "top_k=3"], "did you mean scan.top_k?"),
        (["scan", "+scan.top=5"], "scan.top: there is no such key; did you mean scan.top_k?"),
        (["scan", "stages.1.modle=x"], "did you mean stages.1.model?"),
        (["scan", "model=model"], "say model.path=model"),
        (["scan", "queries=queries.jsonl"], "say queries.path=queries.jsonl"),
        (["scan", "model=demmo"], "did you mean model=demo?"),
        (["scan", "model.dtype=float16"], "model.dtype=float16: give one of auto, float32, bfloat16, float64."),
        (["scan", "scan.top_k=many"], "scan.top_k=many: give a whole number."),
        (["scan", "scan.trace=yes"], "did you mean cluster.trace?"),
        (["scan", "corpus.bos=maybe"], "corpus.bos=maybe: give true or false."),
        (["scan", "scan=5"], "scan=5: there is no such preset; presets are exact."),
        (["scan", "factors.corpus=x"], "this is a group of keys, which takes no value"),
        (["scan", "somewhere"], "somewhere: settings are written key=value"),
        (["scan", "--depth=3"], "--depth=3: there is no such option"),
        (["scan", "model=demo"], "corpus.path, queries.path: no value given"),
        (["sacn", "model=demo"], "did you mean infscan scan?"),
        (["explain", "run=x", "rows=0"], "rows=0: explain at least one row"),
        (["status"], "run: no value given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_is_answered_with_what_was_meant(
    words: list[str], answer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert answer in said(capfd, *words)


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_has_every_key_with_its_meaning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(None, [name, "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    command = commands()[name]
    shown = [one for one in command.all_settings.values() if not command.shows or one.key.startswith(command.shows)]
    assert shown
    for setting in shown:
        assert setting.meaning, f"{setting.key} has no meaning at its field"
        if ".N." not in setting.key and not setting.key.startswith("factors.corpus."):
            assert f" {setting.key} {setting.type}" in text
            assert setting.meaning in text
    assert all(example in text for example in command.examples)


def test_every_command_has_a_job_and_is_in_the_overview() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert jobs == set(commands())
    for name in jobs:
        assert (ROOT / "jobs" / f"{name}.py").read_text().endswith(f'    main("{name}")\n')
        assert f"  {name} " in overview()


def test_the_configuration_page_is_made_of_the_same_source() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), (
        "run python -m infscan.config.reference > docs/configuration.md"
    )


def test_every_preset_sets_something() -> None:
    import yaml

    files = list(CONF.rglob("*.yaml"))
    assert len(files) > 20
    for path in files:
        assert yaml.safe_load(path.read_text()), path


@pytest.mark.parametrize("words", [["--help"], ["scan", "--help"], ["scan", "scan.topk=3"], ["scan", "model=model"]])
def test_neither_help_nor_a_slip_imports_anything_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom infscan.cli import main\n"
        f"try: main(None, {words!r})\nexcept SystemExit: pass\n"
        "print({'torch', 'ray', 'transformers', 'pyarrow', 'numpy', 'deepspeed', 'hydra'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def config_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> Config:
    """The settings that a command line comes to."""
    found: list[Config] = []
    monkeypatch.setattr(infscan.api, "run_scan", lambda config: found.append(config) or Nothing())
    monkeypatch.setattr(infscan.steps.early, "check_files", lambda config: None)
    cli.main(None, ["scan", "model.path=m", "corpus.path=c", *words])
    return found[0]


class Nothing:
    """A result that shows nothing."""

    def show(self) -> None:
        pass


@pytest.mark.parametrize("text", ["2024_01_02", "0.10", "1e3", "a,b", "lang=en", "é~#", "x (1)", "it's", "true"])
def test_a_text_is_what_was_typed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = config_of(monkeypatch, f"prompt={text}", f"completion= {text}", f"output=runs/{text}")
    assert (found.queries.prompt, found.queries.completion) == (text, f" {text}")
    assert found.output.endswith(f"/runs/{text}")


def test_a_regular_expression_and_several_corpora_are_taken_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    regex = r"^(a|b)\.[0-9]+\.mlp$"
    found = config_of(monkeypatch, "prompt=a", "completion=b", f"model.tracked={regex}")
    assert found.model.tracked == regex
    words = ["scan", "model.path=m", "prompt=a", "completion=b", "+corpus.paths.web=2024_01", "output=o"]
    kept: list[Config] = []
    monkeypatch.setattr(infscan.api, "run_scan", lambda config: kept.append(config) or Nothing())
    monkeypatch.setattr(infscan.steps.early, "check_files", lambda config: None)
    cli.main(None, words)
    assert kept[0].corpus.paths["web"].endswith("/2024_01")


@pytest.mark.parametrize("text", ["[a-z]+", "[0-5]x", "法国　首都", "a\u200db", "a\u00a0b"])
def test_what_only_looks_like_a_list_or_a_control_character_is_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        config_of(monkeypatch, "prompt=", f"completion={text}", f"corpus.text_field={text}").corpus.text_field == text
    )


@pytest.mark.parametrize("words", [["queries=demo", "queries=null"], ["queries=null"]])
def test_null_takes_a_preset_away(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = config_of(monkeypatch, *words, "prompt=a", "completion=b")
    assert (found.queries.path, found.queries.prompt) == ("", "a")
    assert config_of(monkeypatch, "prompt=a", "completion=b", "cluster=local").cluster == found.cluster


@pytest.mark.parametrize("path", ["runs/lang=en/x", "/runs/a,b", "~/runs/x[1]"])
def test_a_path_without_a_key_may_look_like_one(path: str) -> None:
    command = commands()["report"]
    assert read_arguments(command, [path]) == read_arguments(command, [f"run={path}"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("output=runs/${x}", "output=runs/${x}: ${x} stands for the value of a key, and there is none"),
        ("prompt=echo ${HOME", "queries.prompt=echo ${HOME holds ${, which stands for another key's; write it into a"),
        ("prompt=in ${output}", "queries.prompt=in ${output} holds ${, which stands for another key's; write it into"),
        ("prompt=???", "queries.prompt=??? stands for a value that is not given; write it into a file (queries.path"),
        ("scan.top_k=1,000", "scan.top_k=1,000: give a whole number."),
        ("corpus.text_field=a\x1bb", "holds a control character"),
    ],
)
def test_what_hydra_would_read_otherwise_is_refused_by_key(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(None, ["scan", "model=demo", "corpus=demo", "completion= b", word])
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", ["null", "'a'", '"a"', "[a, b]", "{a: b}", "a,b", "1e5", " a ", "\\", "it's\n"])
@pytest.mark.parametrize(("job", "key"), [("ask", "prompt"), ("ask", "completion"), ("explain", "text")])
def test_a_question_is_taken_letter_by_letter(job: str, key: str, text: str) -> None:
    command = commands()[job]
    words = read_arguments(command, ["x", f"{key}={text}"])
    assert getattr(settle(command, compose(command, words)), key) == text


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${output}", "${", "\\${output}", "???"])
def test_a_question_never_stands_for_something_else(text: str) -> None:
    """From Python too, where texts may come from anybody: a prompt must not bring the environment's values with it."""
    with pytest.raises(ConfigError, match=r"prompt=.* stands for .*; write it into a file \(queries=\.\.\.\)"):
        settings_of_call("ask", (), {"index": "x", "prompt": text, "completion": "b"})
    with pytest.raises(ConfigError, match=r"write it into a file \(queries=\.\.\.\)"):
        settings_of_call("ask", (AskJob(index="x", prompt=text),), {})
    with pytest.raises(ConfigError, match=r"write it into a file \(queries.path=\.\.\.\)"):
        settings_of_call("scan", ("model=demo", "corpus=demo"), {"queries": {"prompt": text, "completion": "b"}})
    with pytest.raises(ConfigError, match=r"write it into a file \(texts=\.\.\.\)"):
        read_arguments(commands()["explain"], [f"text={text}"])


def test_settings_are_printed_with_what_is_inherited(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(None, ["scan", "model=demo", "corpus=demo", "corpus.bos=true", "--cfg", "job"])
    text = capsys.readouterr().out
    assert text.count("bos: true") == 2
    assert "path: infscan://demo/model" in text


def test_presets_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("dtype: bfloat16\n")
    found = config_of(monkeypatch, "--config-dir", str(tmp_path), "model=mine", "prompt=a", "completion=b")
    assert (found.model.dtype.value, found.model.path) == ("bfloat16", "m")


def test_status_takes_words_and_options_and_ends_with_the_state(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[StatusJob] = []

    def run(job: StatusJob) -> infscan.api.StatusResult:
        seen.append(job)
        status = Status(job.run, "scan", driver=Driver(killed=True, pid=1, host="vm", since="now", lease_s=60.0))
        return infscan.api.StatusResult(job.run, {job.run: status}, is_sweep=False, json=job.json)

    monkeypatch.setattr(infscan.api, "run_status", run)
    with pytest.raises(SystemExit) as ended:
        cli.main(None, ["status", "runs/demo", "--json", "--top", "5"])
    assert ended.value.code == 3
    assert (seen[0].run, seen[0].json, seen[0].top) == ("runs/demo", True, 5)
    assert '"killed": true' in capsys.readouterr().out
    assert "infscan status [run]" in help_of(commands()["status"])
