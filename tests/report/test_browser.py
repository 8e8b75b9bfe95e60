"""report.html in a real browser: every control, hostile documents, no request, accessibility, a large page.

Needs Debian's chromium on the PATH; playwright drives it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infscan.report.write import write_report
from infscan.results.read import read_top
from tests.report.finished import HOSTILE, finish, write_hostile
from tests.steps.runs import text_corpus, text_queries

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
PHONE = {"width": 390, "height": 780}
DESK = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # The extra `browser`, which the fast suite does without.
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    if found is None:
        pytest.fail("chromium is not on the PATH, and the page is tested in it; install it (apt install chromium).")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


class Opened:
    """A page of a file, with all that it asked of the network and all that went wrong in it."""

    def __init__(self, browser: Browser, path: Path, **context: object) -> None:
        self.context = browser.new_context(**context)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        began = time.perf_counter()
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#rows > li")
        self.seconds = time.perf_counter() - began
        self.path = path

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def settled(self) -> None:
        self.page.wait_for_timeout(300)

    def every_row(self) -> int:
        """Scroll until there are no more; how many rows are shown then."""
        self.settled()
        while self.page.locator("#more").is_visible():
            self.page.evaluate("scrollTo(0, document.body.scrollHeight)")
            self.settled()
        return self.count("#rows > li")

    def harmless(self) -> None:
        """Nothing was asked of any network, nothing of a document ran, nothing went wrong."""
        assert [url for url in self.requests if not url.startswith(("file://", "data:"))] == []
        assert self.requests.count(self.path.as_uri()) == 1
        assert self.page.evaluate("window.harmed") is None
        assert self.errors == []


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    long = [("huge", "w" * 1_000_000)]
    write_hostile(folder, [*HOSTILE.items(), *long])
    return Path(write_report([finish(folder).output])[0])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 queries with 100 rows a side at most."""
    folder = tmp_path_factory.mktemp("large")
    text_corpus(folder / "corpus.jsonl", 240)
    queries = text_queries(folder / "many.jsonl", 200)
    config = finish(folder, f"queries.path={queries}", "scan.top_k=100", "scan.check_sequences=0")
    assert len(read_top(config.output)) > 20_000
    return Path(write_report([config.output])[0])


def test_hostile_documents_do_nothing_and_every_text_can_be_read(browser: Browser, page_file: Path) -> None:
    with Opened(browser, page_file, viewport=DESK) as opened:
        page = opened.page
        shown = ""
        for side in ("#proponent", "#opponent"):
            page.locator(side).click()
            opened.every_row()
            for toggle in page.locator("#rows > li button.open").all():
                toggle.click()
            shown += page.locator("#rows").inner_text()
        assert "</script><script>window.harmed = 1</script>" in shown
        assert "onerror='window.harmed = 2'" in shown
        # Marks that turn or hide text are spelt out.
        assert "⟨202E⟩" in shown
        assert "⟨0001⟩" in shown
        assert opened.count("#rows img") == opened.count("#rows script") == opened.count("#rows b") == 0
        opened.harmless()


def test_every_control_does_what_it_says(browser: Browser, page_file: Path) -> None:
    with Opened(browser, page_file, viewport=DESK) as opened:
        page = opened.page
        assert opened.count("#queries button") == 2
        first = opened.text("#asked")
        page.locator("#queries button").nth(1).click()
        opened.settled()
        assert opened.text("#asked") != first
        assert page.locator("#queries button").nth(1).get_attribute("aria-current") == "true"
        assert "query=two" in page.url
        page.locator("#opponent").click()
        opened.settled()
        assert page.locator("#opponent").get_attribute("aria-pressed") == "true"
        assert opened.text("#rows .score").startswith("−")
        page.locator("#proponent").click()
        opened.settled()
        assert opened.text("#rows .score").startswith("+")
        page.fill("#find-query", "wine")
        opened.settled()
        assert opened.count("#queries button") == 1
        page.fill("#find-query", "")
        page.fill("#find-row", "zzzz no such text")
        opened.settled()
        assert opened.count("#rows > li") == 0
        page.fill("#find-row", "")
        before = opened.every_row()
        page.locator("#colour").uncheck()
        assert "plain" in (page.locator("#rows").get_attribute("class") or "")
        page.locator("#colour").check()
        page.locator("#hubs").check()
        opened.settled()
        assert opened.count("#rows .mark:has-text('hub')") == 0
        page.locator("#hubs").uncheck()
        page.locator("#group").uncheck()
        assert opened.every_row() > before
        page.locator("#group").check()
        opened.settled()
        toggle = page.locator("#rows > li button.open").first
        toggle.click()
        assert toggle.get_attribute("aria-expanded") == "true"
        opened.page.locator("#rows .whole").first.focus()
        page.keyboard.press("ArrowRight")
        assert "of the score" in opened.text("#rows .said")
        toggle.click()
        assert toggle.get_attribute("aria-expanded") == "false"
        themes = set()
        for _ in range(3):
            page.locator("#theme").click()
            themes.add(opened.text("#theme"))
        assert len(themes) == 3
        page.locator("#keys").click()
        assert page.locator("#help").is_visible()
        page.locator("#close-help").click()
        assert not page.locator("#help").is_visible()
        page.locator(".about summary").click()
        assert "EK-FAC" in opened.text(".about details")
        opened.harmless()


def test_the_keyboard_alone_goes_everywhere(browser: Browser, page_file: Path) -> None:
    with Opened(browser, page_file, viewport=DESK) as opened:
        page = opened.page
        page.keyboard.press("n")
        opened.settled()
        assert "query=two" in page.url
        page.keyboard.press("p")
        opened.settled()
        assert "query=one" in page.url
        page.keyboard.press("j")
        page.keyboard.press("j")
        rank = page.evaluate("document.activeElement.dataset.rank")
        page.keyboard.press("e")
        assert page.locator(f"#rows > li[data-rank='{rank}'] button.open").get_attribute("aria-expanded") == "true"
        page.keyboard.press("k")
        assert int(page.evaluate("document.activeElement.dataset.rank")) < int(rank)
        page.keyboard.press("o")
        opened.settled()
        assert page.locator("#opponent").get_attribute("aria-pressed") == "true"
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "find-row"
        page.keyboard.press("Escape")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("q")
        assert page.evaluate("document.activeElement.id") == "find-query"
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("?")
        assert page.locator("#help").is_visible()
        opened.harmless()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing(browser: Browser, page_file: Path, scheme: str, size: dict[str, int]) -> None:
    with Opened(browser, page_file, viewport=size, color_scheme=scheme) as opened:
        from axe_playwright_python.sync_playwright import Axe

        opened.page.locator("#rows > li button.open").first.click()
        found = Axe().run(opened.page)
        said = [(each["id"], [node["target"] for node in each["nodes"]][:3]) for each in found.response["violations"]]
        assert said == []


def test_a_phone_sees_all_of_it_without_scrolling_sideways(browser: Browser, page_file: Path) -> None:
    with Opened(browser, page_file, viewport=PHONE, has_touch=True, is_mobile=True) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert not page.locator("#side").is_visible()
        page.locator("#menu").click()
        assert page.locator("#side").is_visible()
        page.locator("#rows > li button.open").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        opened.harmless()


def test_a_link_opens_what_it_names(browser: Browser, page_file: Path) -> None:
    with Opened(browser, page_file, viewport=DESK) as opened:
        opened.page.goto(f"{page_file.as_uri()}#run=run&query=two&side=opponent")
        opened.page.reload()
        opened.page.wait_for_selector("#rows > li")
        assert opened.page.locator("#opponent").get_attribute("aria-pressed") == "true"
        assert opened.text("#query-id") == "two"


def test_a_large_page_opens_at_once_and_holds_a_page_of_rows_at_a_time(browser: Browser, large: Path) -> None:
    with Opened(browser, large, viewport=DESK) as opened:
        page = opened.page
        index = json.loads(page.locator("#index").text_content() or "")
        assert len(index["runs"][0]["queries"]) == 200
        print(f"{large.stat().st_size / 2**20:.1f} MiB, rows after {opened.seconds:.2f} s")
        assert opened.count("#rows > li") <= 20
        frames = page.evaluate(
            """async () => {
              const gaps = [];
              let last = performance.now();
              for (let step = 0; step < 60; step += 1) {
                window.scrollBy({ top: 200, behavior: "instant" });
                await new Promise(requestAnimationFrame);
                const now = performance.now();
                gaps.push(now - last);
                last = now;
              }
              return gaps.sort((a, b) => a - b);
            }"""
        )
        print(f"frames while scrolling: median {frames[30]:.0f} ms, longest {frames[-1]:.0f} ms")
        assert opened.count("#rows > li") > 10
        opened.harmless()
