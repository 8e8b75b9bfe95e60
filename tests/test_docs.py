"""What the documentation quotes is there: error sentences in the code, files and keys that pages name."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from infscan.config.schema import ClusterConfig, ZeroConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@cache
def texts() -> list[str]:
    """Every string of the package's code, with `...` where a value is put in."""
    found = []
    for path in (ROOT / "infscan").rglob("*.py"):
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_or_names_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:tests|docker|jobs|conf|infscan|docs)/[\w./-]*\w/?)`", text):
        assert (ROOT / path).exists(), path


def test_every_key_of_the_cluster_page_exists() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    cluster = set(re.findall(r"\bcluster\.([a-z_]+)\b(?!\.md)", text)) - {"md", "yaml"}
    assert cluster <= {*vars(ClusterConfig())}
    assert set(re.findall(r"\bmodel\.zero\.([a-z_]+)", text)) <= {*vars(ZeroConfig())}
