"""Fixtures: the app around a tiny random model, in this process on a free port, and pages of it in Chromium."""

import os
from urllib.parse import urlparse

import pytest

from tests.browser.server import CHROMIUM_ARGS, find_chromium, serve
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer

TOUR_SEEN = "try { localStorage.setItem('cascadeexit.tour', 'done') } catch { }"      # blocked before the first page
SEED = 39           # its tiny model writes every hostile token and uses every exit within 200 tokens


def _unavailable(reason: str) -> None:
    """Skip on a developer's machine, fail in CI."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = find_chromium()
    if path is None:
        _unavailable("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Function that opens a page. Requests to other machines, errors and dialogs fail the test at its end.

    tour: True opens it as a first visitor sees it, with the steps of `assets/page/tour.js`.
    script: JavaScript that runs before the page's own.
    """
    contexts, complaints = [], []

    def check(route):
        host = urlparse(route.request.url).hostname
        if host in ("127.0.0.1", "localhost"):
            return route.continue_()
        complaints.append(f"request to {route.request.url}")
        return route.abort()

    def open_(url: str, width: int = 1280, height: int = 900, tour: bool = False, script: str = "", **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.add_init_script(f"{'' if tour else TOUR_SEEN}; {script}")
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.route("**/*", check)
        page.on("console", lambda m: complaints.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(f"page error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        page.wait_for_selector(".ce-legend")
        page.wait_for_selector("#ce-open")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def tiny():
    """(engine, tokenizer) behind the page; a test may slow the engine down."""
    return tiny_engine(seed=SEED), tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_url(tiny):
    with serve(*tiny) as url:
        yield url


@pytest.fixture
def page(open_page, tiny_url):
    return open_page(tiny_url)
