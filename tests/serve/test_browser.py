"""The server's page in a real browser: ask, watch first rows become exact ones, follow the permalink; nothing runs.

Needs Debian's chromium on the PATH; playwright drives it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infscan.serve.run import TOKEN, serving
from tests.serve.served import serve_job, text_index

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
HOSTILE = "</script><img src=x onerror='window.harmed = 1'> the river"


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


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_index(tmp_path_factory.mktemp("served"))


def opened(browser: Browser, uri: str) -> tuple[Page, list[str], list[str]]:
    """A page, what it asked of the network, and what went wrong in it."""
    page, requests, errors = browser.new_page(), list[str](), list[str]()
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(uri)
    return page, requests, errors


def ask(page: Page, prompt: str, completion: str) -> None:
    page.fill("#prompt", prompt)
    page.fill("#completion", completion)
    page.click("#send")
    page.wait_for_selector("#answer[data-state=done]", timeout=120_000)


def test_a_question_is_answered_on_the_page(browser: Browser, index: Path) -> None:
    with serving(serve_job(index)) as server:
        page, requests, errors = opened(browser, server.uri)
        page.locator("#facts", has_text="33 sequences").wait_for()
        ask(page, HOSTILE, " runs of the stone")
        assert page.locator("#rows > li").count() == 5
        assert "exact ones after" in page.inner_text("#state")
        report = page.frame_locator("#report")
        report.locator("#rows > li").first.wait_for(timeout=60_000)
        assert "onerror" in report.locator("#asked").inner_text()
        # The permalink, in a window of its own; and the page again, from its address alone.
        link = page.locator("#links a").get_attribute("href")
        assert link is not None
        alone, _, _ = opened(browser, f"{server.uri}{link[1:]}")
        alone.wait_for_selector("#rows > li")
        again, _, _ = opened(browser, page.url)
        again.wait_for_selector("#answer[data-state=done]")
        assert again.locator("#rows > li").all_inner_texts() == page.locator("#rows > li").all_inner_texts()
        for one in (page, alone, again):
            assert one.evaluate("window.harmed") is None
        assert all(url.startswith((server.uri, "data:")) for url in requests)
        assert errors == []


def test_what_is_wrong_is_said_on_the_page(browser: Browser, index: Path) -> None:
    with serving(serve_job(index)) as server:
        page, _, _ = opened(browser, server.uri)
        page.fill("#prompt", "river " * 500)
        page.fill("#completion", " stone")
        page.click("#send")
        page.locator("#state", has_text="longer than the model").wait_for()
        assert page.locator("#answer").is_hidden()


def test_a_token_opens_the_page(browser: Browser, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "a long enough secret")
    with serving(serve_job(index)) as server:
        page, _, _ = opened(browser, server.uri)
        page.wait_for_selector("#login:not([hidden])")
        page.fill("#token", "a long enough secret")
        page.click("#login button")
        page.locator("#facts", has_text="33 sequences").wait_for()
        ask(page, "the river", " runs of the stone")
        page.frame_locator("#report").locator("#rows > li").first.wait_for(timeout=60_000)
