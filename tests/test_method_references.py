"""What code and pages say of the method points to a heading of docs/method.md, or names its paper in full."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHOD = ROOT / "docs" / "method.md"
SOURCES = [
    path
    for folder in ("infscan", "jobs", "benchmarks", "conf", "tests", "docs", "docker")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".yaml", ".ipynb"} and path != Path(__file__).resolve()
] + [*ROOT.glob("*.md")]
# docs/method.md#ek-fac, or from another page method.md#ek-fac; a step of a section stands behind it: "..., step 4".
REFERENCE = re.compile(r"\bmethod\.md#([\w-]*)")
STEP = re.compile(r"\bmethod\.md#ek-fac, steps? (\d)(?: and (\d))?")
# Pages and papers by names that only those who wrote the code can look up.
PRIVATE = re.compile(r"\b(?:METHOD|DESIGN|G23|B25)\b|\bguarantees? \d")
# What must stay as it is: others link to these.
ANCHORS = [
    "notation",
    "glossary",
    "losses",
    "influence",
    "ek-fac",
    "automatic-damping",
    "iterated-inverse",
    "query-batching",
    "multi-stage",
    "what-a-search-missed",
    "margins",
    "self-influence",
    "tf-idf",
    "ground-truths",
    "studies",
    "costs",
    "references",
]


def anchors() -> list[str]:
    """Of the page's headings of the second and lower levels, as GitHub makes them."""
    headings = re.findall(r"^##+ (.+)$", METHOD.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def steps() -> list[str]:
    """Numbers of EK-FAC's steps."""
    section = METHOD.read_text().split("\n## EK-FAC\n")[1].split("\n## ")[0]
    return re.findall(r"^(\d)\. ", section, re.MULTILINE)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_sections_keep_their_anchors() -> None:
    assert anchors() == ANCHORS


def test_every_reference_points_to_a_section_that_exists() -> None:
    known, numbers = set(anchors()), set(steps())
    for path in SOURCES:
        text = path.read_text()
        for anchor in REFERENCE.findall(text):
            assert anchor in known, f"{named(path)}: docs/method.md has no #{anchor}"
        for pair in STEP.findall(text):
            assert {number for number in pair if number} <= numbers, f"{named(path)}: EK-FAC has no step {pair}"


def test_links_within_the_page_point_to_its_sections() -> None:
    assert set(re.findall(r"\]\(#([^)]*)\)", METHOD.read_text())) <= set(anchors())


@pytest.mark.parametrize("folder", ["infscan", "jobs", "benchmarks", "conf", "docs", "tests"])
def test_nothing_refers_to_what_a_reader_does_not_have(folder: str) -> None:
    """A paper is 'Grosse et al. 2023' or 'Bao et al. 2025', a definition `docs/method.md#...`, a mechanism
    docs/design.md."""
    found = [
        f"{named(path)}:{number}: {line.strip()}"
        for path in SOURCES
        if path.is_relative_to(ROOT / folder)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if PRIVATE.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_paper_that_the_page_cites_is_among_its_references() -> None:
    """A name with a year in the text ("Bae et al. 2022", "Koh and Liang 2017") has an entry that begins with it."""
    body, references = METHOD.read_text().split("\n## References\n")
    cited = set(re.findall(r"(De Lathauwer|[A-Z][a-z]+)(?: et al\.| and [A-Z][a-z]+)\s(\d{4})", body))
    assert cited
    for name, year in sorted(cited):
        assert re.search(rf"(?:^- |\. ){name}\b.*? {year}\.", references, re.MULTILINE), f"{name} {year}"
    for name, year in re.findall(r"^- (De Lathauwer|\w+)\b.*? (\d{4})\.", references, re.MULTILINE):
        assert name in body, f"{name} {year} is not cited"
