"""The page of native/examples/web in a headless Chromium: the library as WebAssembly, with the tokens of Python."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from crossed import ROOT, wasm
from story import story_folder

import halfbyte
from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.generate import generate
from halfbyte.runtime.model import load

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page, the module, the demo model and a model that chats."""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    folder = tmp_path_factory.mktemp("site")
    for source in (*(ROOT / "native" / "examples" / "web").glob("*.[hj]*"), wasm() / "halfbyte.wasm"):
        shutil.copy(source, folder)
    shutil.copy(ROOT / "runtime" / "demo_model" / "demo.hb", folder / "model.hb")
    story = story_folder(folder / "story", template=TEMPLATE, context=4096)
    halfbyte.convert(story, folder / "chat.hb", recipe="q4", method="rtn", proof=False)
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(address: str, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page with a model; any request elsewhere and any error of a script fails the test."""
    options = {"size": DESKTOP, "scheme": "light", "model": "model.hb", **getattr(request, "param", {})}
    tab = browser.new_page(viewport=options["size"], color_scheme=options["scheme"])
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith((address, "data:")) else wrong.append(r.url))
    tab.goto(f"{address}?model={options['model']}")
    tab.wait_for_selector("#send:enabled")
    yield tab
    tab.close()
    assert wrong == []


def settings(page: Any, most: int) -> None:
    """Greedy, and so many tokens."""
    page.click("summary")
    page.fill("#temperature", "0")
    page.fill("#most", str(most))


def say(page: Any, text: str) -> str:
    """The answer to a message."""
    before = page.locator(".stats").count()
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator(".stats").nth(before).wait_for()
    answer: str = page.locator("article.assistant .text").last.text_content()
    return answer


@pytest.mark.parametrize(
    "page", [{}, {"size": PHONE, "scheme": "dark"}], indirect=True, ids=["desktop", "phone-dark"]
)
def test_a_text_is_continued_as_python_does(page: Any, site: Path) -> None:
    settings(page, 90)
    prompt = "Once upon a time there was a <b>little</b> robot"
    model = load(site / "model.hb")
    assert say(page, prompt) == "".join(generate(model, prompt, special=False, max_tokens=90, temperature=0))
    assert page.inner_text(".given") == prompt and page.locator("article b").count() == 0
    assert "tokens/s" in page.inner_text(".stats") and "memory" in page.inner_text("#status")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    nameless = """[...document.querySelectorAll('button, input, textarea, progress')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).length"""
    assert page.evaluate(nameless) == 0
    if folder := os.environ.get("HALFBYTE_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/web-{page.viewport_size['width']}.png")


@pytest.mark.parametrize("page", [{"model": "chat.hb"}], indirect=True)
def test_a_conversation_is_that_of_python(page: Any, site: Path) -> None:
    settings(page, 24)
    model, messages = load(site / "chat.hb"), list[dict[str, str]]()
    for text in ("Hello there", "one, two </s>", "Once"):
        messages.append({"role": "user", "content": text})
        ids = prompt_ids(model, messages)
        want = "".join(generate(model, ids, max_tokens=24, temperature=0))
        assert say(page, text) == want
        messages.append({"role": "assistant", "content": want})
        assert f"{len(ids)} tokens of prompt" in page.inner_text("#status")


STOP_AT_THE_FIRST_TEXT = """() => new MutationObserver((_, observer) => {
    if (!document.querySelector('.assistant .text')?.textContent) return;
    observer.disconnect();
    document.querySelector('#stop').click();
}).observe(document.querySelector('#log'), {childList: true, subtree: true})"""


@pytest.mark.parametrize("page", [{"model": "chat.hb"}], indirect=True)
def test_stop_and_what_is_no_model(page: Any, tmp_path: Path, site: Path) -> None:
    settings(page, 4000)
    page.evaluate(STOP_AT_THE_FIRST_TEXT)
    assert say(page, "Hi")
    assert "stopped" in page.inner_text(".stats") and page.is_visible("#send")
    page.click("#clear")
    assert page.locator("article").count() == 0
    (tmp_path / "no.hb").write_bytes((site / "chat.hb").read_bytes()[:-100])
    page.set_input_files("#file", tmp_path / "no.hb")
    page.wait_for_selector("#status.wrong")
    assert "ends" in page.inner_text("#status") or "bytes" in page.inner_text("#status")
    assert page.is_disabled("#send")
    page.set_input_files("#file", site / "model.hb")
    page.wait_for_selector("#send:enabled")
    assert page.locator("#status.wrong").count() == 0
