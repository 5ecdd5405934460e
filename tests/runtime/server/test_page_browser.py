"""The web page in a headless Chromium: what a person does with it, at desktop and phone width, light and dark."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running

from halfbyte.runtime.model import Model

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
DONE = "article.assistant:last-of-type:not(.running) .stats:not(:empty)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(
    browser: Any, start: Callable[..., Running], demo: Model, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """The page of a server of the story model; any request elsewhere and any error of a script fails the test."""
    options = getattr(request, "param", {})
    server = start(demo, **options.get("server", {}))
    tab = browser.new_page(viewport=options.get("size", DESKTOP), color_scheme=options.get("scheme", "light"))
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on(
        "request", lambda r: None if r.url.startswith((server.url, "blob:", "data:")) else wrong.append(r.url)
    )
    tab.goto(server.url)
    yield tab
    tab.close()
    assert wrong == []


def say(page: Any, text: str) -> None:
    """Type a message and send it by the keyboard."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def set_tokens(page: Any, count: int) -> None:
    """max_tokens in the settings."""
    page.click("#open-settings")
    page.fill("#max_tokens", str(count))
    page.click("#settings button[type=submit]")


@pytest.mark.parametrize(
    "page", [{}, {"size": PHONE, "scheme": "dark"}], indirect=True, ids=["desktop", "phone-dark"]
)
def test_a_conversation(page: Any, tmp_path: Path) -> None:
    set_tokens(page, 60)
    say(page, "Once upon a time there was a <img src=x onerror=alert(1)> dog")
    page.wait_for_selector(DONE)
    answer = page.inner_text("article.assistant .text")
    assert len(answer) > 40 and page.locator("article img").count() == 0
    assert re.match(r"[\d.]+ tokens/s · \d+ tokens · [\d.]+ s to the first", page.inner_text(".stats"))
    assert "memory" in page.inner_text("#stats")
    assert page.locator(".error").count() == 0
    if " 60 tokens " in page.inner_text(".stats"):  # that is a limit, not a fault
        assert "reached max tokens" in page.inner_text("article.assistant .note")
    say(page, "And then")
    page.wait_for_selector("article:nth-of-type(4)")
    page.wait_for_selector(DONE)
    rest = page.evaluate(
        "(s => s.scrollHeight - s.scrollTop - s.clientHeight)(document.querySelector('#scroll'))"
    )
    assert rest < 2  # at its end
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    page.reload()
    assert page.locator("article").count() == 4 and page.inner_text("article.assistant .text") == answer
    if folder := os.environ.get("HALFBYTE_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{page.viewport_size['width']}.png")


def test_stop_edit_and_regenerate(page: Any) -> None:
    set_tokens(page, 4000)
    say(page, "Once upon a time")
    page.wait_for_selector("article.assistant .text:not(:empty)")
    page.press("body", "Escape")
    page.wait_for_selector("#send:visible")
    stopped = page.inner_text("article.assistant .text")
    assert stopped and page.locator(".error").count() == 0
    set_tokens(page, 20)
    page.click("[data-action=regenerate]")
    page.wait_for_selector(DONE)
    assert page.locator("article").count() == 2
    page.hover("article.user")
    page.click("[data-action=edit]")
    page.fill("article.user textarea", "The little cat")
    page.press("article.user textarea", "Enter")
    page.wait_for_selector(DONE)
    assert page.inner_text("article.user .body") == "The little cat" and page.locator("article").count() == 2
    page.click("#toast button")  # undo
    assert page.inner_text("article.user .body") == "Once upon a time"


def test_conversations(page: Any) -> None:
    set_tokens(page, 5)
    say(page, "First")
    page.wait_for_selector(DONE)
    page.press("body", "Alt+n")
    assert page.locator("article").count() == 0
    say(page, "Second")
    page.wait_for_selector(DONE)
    names = page.locator("#conversations .open")
    assert names.all_inner_texts() == ["Second", "First"]
    names.nth(1).click()
    assert page.inner_text("article.user .body") == "First"
    page.click("#conversations li:nth-child(2) button:nth-child(2)")
    page.fill("#conversations input", "Renamed")
    page.press("#conversations input", "Enter")
    assert "Renamed" in names.all_inner_texts()
    page.click("#conversations li:has-text('Second') button:nth-child(3)")
    assert names.all_inner_texts() == ["Renamed"]
    page.click("#toast button")
    assert sorted(names.all_inner_texts()) == ["Renamed", "Second"]


def test_a_conversation_outgrows_the_context(page: Any) -> None:
    """The oldest turns are left out and it is said; what found no answer is not sent again."""
    set_tokens(page, 3)
    sent: list[list[str]] = []
    page.on(
        "request", lambda r: r.post_data and sent.append([m["content"] for m in r.post_data_json["messages"]])
    )
    for text in ("First", "Once there was a dog. " * 400, "dog " * 300, "cat " * 300):
        count = page.locator("article").count()
        say(page, text)
        page.wait_for_selector(f"article.assistant:nth-of-type({count + 2}):not(.running)")
        page.wait_for_selector("#send:visible")
    errors = page.locator(".error").all_inner_texts()
    assert len(errors) == 1 and "context" in errors[0]
    assert "the first 4 messages were left out" in page.locator(".note").last.inner_text()
    third, fourth = ([len(t) for t in messages] for messages in (sent[-4], sent[-1]))
    assert len(third) == 3 and len(fourth) == 1  # First, its answer, dogs; and cats alone


@pytest.mark.parametrize("page", [{"server": {"key": "secret"}}], indirect=True)
def test_the_key_is_asked_for(page: Any) -> None:
    page.wait_for_selector("#key-dialog[open]")
    page.click("#key-cancel")
    say(page, "Once")  # without it
    page.wait_for_selector("article .error")
    assert "API key" in page.inner_text("article .error")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector("#model:not(:empty)")
    set_tokens(page, 5)
    say(page, "Once")
    page.wait_for_selector(DONE)
    assert page.locator("article:last-of-type .error").count() == 0


@pytest.mark.parametrize("page", [{"size": PHONE}], indirect=True)
def test_everything_has_a_name_and_the_drawer_works(page: Any) -> None:
    nameless = """[...document.querySelectorAll('button, input, textarea, select, dialog, nav, section')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length
            || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.click("#menu")
    assert page.get_attribute("#menu", "aria-expanded") == "true"
    assert page.evaluate("document.activeElement.id") == "new"
    page.press("body", "Escape")
    assert page.get_attribute("#menu", "aria-expanded") == "false"
    for theme in ("light", "dark", "system"):
        page.click("#theme")
        assert page.get_attribute("#theme", "aria-label") == f"Theme: {theme}"
