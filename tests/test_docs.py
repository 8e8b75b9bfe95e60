"""The documentation holds: links, files and keys that pages name exist, commands compose, quoted sentences are real."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from infscan.config.arguments import is_sweep, read_arguments
from infscan.config.commands import command_of, commands, compose
from infscan.config.sweep import sweep_cells

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "infscan" / "demo" / "README.md"])
# What a user copies; the changelog also quotes settings of versions before.
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]
FILE = re.compile(r"`((?:tests|docker|jobs|conf|infscan|infscan_studies|docs)/[\w./-]*\w/?)`")
KEY = re.compile(r"`\+?([a-z]+(?:\.\w+)+)(?==|`|\.\*`)")
COMMAND = re.compile(
    r"(?:^|\s)(?:\S*bin/)?(?:infscan (?P<name>\w+)|python \S*jobs/(?P<job>\w+)\.py|\S*docker/slurm\.sh)(?P<words> .*)?$"
)
NAMED = pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def texts() -> list[str]:
    """Every string of the packages' code, with `...` in place of a formatted value."""
    found = []
    for path in (path for package in ROOT.glob("infscan*/") for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted_sentences() -> list[str]:
    """The first column of the tables of docs/troubleshooting.md."""
    return re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("sentence", quoted_sentences())
def test_a_sentence_of_the_troubleshooting_page_is_in_the_code(sentence: str) -> None:
    pattern = re.compile(".*".join(re.escape(part) for part in sentence.split("...")), re.DOTALL)
    assert any(pattern.search(text) for text in texts())


def blocks(page: Path) -> list[str]:
    return re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose(page)):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    if page in GUIDES:
        for path in FILE.findall(prose(page)):
            assert (ROOT / path).exists(), path


def test_the_readme_links_to_every_page() -> None:
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text())}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} <= linked


@NAMED
def test_no_line_of_prose_is_longer_than_150_characters(page: Path) -> None:
    """Rows of tables, and what a terminal printed, are as long as they are; so is the generated page of settings."""
    if page.name != "configuration.md":
        assert [line for line in prose(page).splitlines() if len(line) > 150 and not line.startswith("|")] == []


def known_keys() -> set[str]:
    return {key for command in commands().values() for key in command.all_settings}


@NAMED
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    """`scan.top_k`, `stages.1.corpus.path=...`, `corpus.*`; the same form also names files and modules."""
    keys = known_keys()
    groups = {key.partition(".")[0] for key in keys if "." in key}
    for name in KEY.findall(prose(page)):
        is_file = name.endswith((".json", ".jsonl", ".gz", ".py", ".md", ".yaml", ".parquet"))
        is_module = (ROOT / "infscan" / f"{name.replace('.', '/')}.py").exists()
        if is_file or is_module or name.partition(".")[0] not in groups:
            continue
        key = re.sub(r"^stages\.\d+", "stages.N", name)
        # A key of an inherited group is the outer group's; the last part of an open one is a label of the user's own.
        inherited = re.sub(r"^(?:stages\.N\.)?(?:factors\.)?(?=(?:corpus|factors)\.)", "", key)
        is_known = {key, inherited, key.rpartition(".")[0]} & keys
        assert is_known or any(known.startswith(f"{key}.") for known in keys), name


def command_lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command of infscan that a page shows, as its name and words; `...` stands for what a reader fills in."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall(r"`(infscan \w[^`]*|python jobs/[^`]*)`", prose(page))]
    for line in lines:
        found = COMMAND.search(line)
        if not found or re.match(r" *#", line):
            continue
        text = re.split(r"\s[|>;]\s?|;", found["words"] or "")[0]
        # A command within another one's quotes ends with its closing quote.
        words = shlex.split(text.rstrip("'") if text.count("'") % 2 else text, comments=True)
        yield (
            found["name"] or found["job"] or "scan",
            [word for word in words if word != "..." and not word.endswith("=...")],
        )


@pytest.mark.parametrize(
    "page", [page for page in GUIDES if page.name != "configuration.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_command_that_a_page_shows_composes(page: Path) -> None:
    """The generated page of settings is left out: its commands are schemes (`model=a,b`)."""
    for name, words in command_lines(page):
        command = command_of(name)
        overrides = read_arguments(command, words)
        cells = sweep_cells(overrides) if is_sweep(overrides) else [overrides]
        assert cells, words
        for cell in cells:
            compose(command, [word for word in cell if not word.startswith(("-", "hydra", "+hydra"))])
