"""Budgets of the page: no token lost in long or hidden runs, few updates, no long task, visitors in turn."""

import time

import pytest

from cascadeexit.engine import DecodeConfig
from tests.browser.test_page import FINAL, SKY, shown_ids

pytestmark = pytest.mark.browser

WATCH = """() => {
    window.updates = 0; window.longest = 0; window.first = null;
    new PerformanceObserver(list => list.getEntries().forEach(e =>
        window.longest = Math.max(window.longest, e.duration))).observe({type: 'longtask'});
    new MutationObserver(() => {
        if (window.first === null && document.querySelector('.ce-text .t')) window.first = Date.now();
        window.updates++;
    }).observe(document.querySelector('.ce-panels'), {subtree: true, childList: true});
}"""


def paced(tiny, monkeypatch, seconds: float) -> list[float]:
    """An engine that takes its time; returns the list that gets the moment of each event."""
    fast, moments = tiny[0].generate, []

    def generate(ids, config):
        for event in fast(ids, config):
            time.sleep(seconds)
            moments.append(time.time())
            yield event
    monkeypatch.setattr(tiny[0], "generate", generate)
    return moments


def tokens(page, n: int) -> None:
    page.click("#ce-more button")
    page.get_by_label("number input for Most new tokens").fill(str(n))
    page.keyboard.press("Tab")


def ids_of(tiny, n: int, mode: str) -> list[int]:
    import app
    engine, tokenizer = tiny
    return engine.run(app.prompt_ids(tokenizer, SKY, chat=True),
                      DecodeConfig(mode=mode, max_new_tokens=n, thresholds=0.7)).token_ids


def test_a_long_run_loses_no_token_and_stays_light(page, tiny, monkeypatch):
    tokens(page, 400)
    moments = paced(tiny, monkeypatch, 0.004)
    page.evaluate(WATCH)
    began = time.time()
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.done")
    took = time.time() - began
    monkeypatch.undo()
    for side in ("cascade", "full"):
        assert shown_ids(page, side) == ids_of(tiny, 400, side)
    assert page.evaluate("window.longest") <= 200
    assert page.evaluate("window.updates") <= 15 * took + 5
    assert page.evaluate("window.first") / 1000 - moments[0] <= 0.25
    nodes = page.evaluate("""() => document.evaluate('count(//*[contains(@class, "ce-text")]//node())', document, null,
        XPathResult.NUMBER_TYPE).numberValue""")
    assert nodes <= 4 * 800


def test_a_hidden_tab_misses_nothing(page, tiny):
    page.evaluate("""() => { Object.defineProperty(document, 'hidden', {get: () => true});
        Object.defineProperty(document, 'visibilityState', {get: () => 'hidden'});
        document.dispatchEvent(new Event('visibilitychange')); }""")
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.done")
    assert shown_ids(page, "cascade") == ids_of(tiny, 200, "cascade")


def test_two_visitors_take_turns_and_do_not_disturb_each_other(open_page, tiny_url, tiny, monkeypatch):
    one, two = open_page(tiny_url), open_page(tiny_url)
    paced(tiny, monkeypatch, 0.005)
    one.click("#ce-run")
    one.wait_for_selector(".ce-text .t")
    two.click("#ce-run")
    two.wait_for_function("/queue: 1/.test(document.querySelector('#ce-queue').textContent)")
    assert two.locator(f".ce-text {FINAL}").count() == 0, "one job at a time"
    one.wait_for_selector(".ce-status.done")
    two.wait_for_selector(".ce-status.done")
    monkeypatch.undo()
    for page in (one, two):
        assert shown_ids(page, "full") == ids_of(tiny, 200, "full")


def test_stopping_and_leaving_free_the_model(open_page, tiny_url, tiny, monkeypatch):
    one, two, three = (open_page(tiny_url) for _ in range(3))
    paced(tiny, monkeypatch, 0.02)
    one.click("#ce-run")
    one.wait_for_selector(".ce-text .t")
    two.click("#ce-run")
    three.click("#ce-run")
    one.close()                                 # leaves: its run ends
    two.wait_for_selector(".ce-text .t")
    two.click("#ce-stop")
    two.wait_for_selector(".ce-status.stopped")
    monkeypatch.undo()
    three.wait_for_selector(".ce-status.done")
    assert shown_ids(three, "full") == ids_of(tiny, 200, "full")
