"""The page on a simulated ZeroGPU (`tests/zerogpu.py`): runs happen in workers, and all that is kept is in the page."""

import os
import re
import signal

import pytest
from playwright.sync_api import expect

from tests.browser.driving import close_settings, open_settings, open_tab, run_to_end
from tests.browser.reading import shown_ids
from tests.zerogpu import LONG

pytestmark = pytest.mark.browser


@pytest.fixture
def begin(open_page, zerogpu):
    """Function that opens a page, starts a run of at most so many tokens and waits for the first one."""
    def begin(tokens: int):
        page = open_page(f"{zerogpu.url}?n={tokens}")
        open_settings(page)
        expect(length_of(page)).to_have_value(str(tokens))
        close_settings(page)
        page.click("#ce-run")
        page.wait_for_selector(".ce-text[data-side=cascade] .t")
        return page
    return begin


def length_of(page):
    return page.get_by_label("number input for Maximum length, tokens").and_(page.locator("input[type=number]"))


def run_again(page) -> None:
    """Make a short run on the same page, to its end."""
    open_settings(page)
    length_of(page).fill("24")
    length_of(page).press("Tab")
    page.wait_for_timeout(500)
    close_settings(page)
    run_to_end(page)


def workers(zerogpu) -> list[int]:
    """Process of each run so far, in order."""
    return [int(pid) for pid in re.findall(r"generate \w+ in (\d+)", zerogpu.printed)]


def test_both_sides_stream_and_the_finished_run_is_kept(begin):
    page = begin(LONG)
    counts = []
    for _ in range(6):
        counts.append([len(shown_ids(page, side)) for side in ("cascade", "full")])
        page.wait_for_timeout(200)
    for side in zip(*counts):
        assert len(set(side)) >= 3, f"tokens came in lumps: {counts}"
    page.wait_for_selector(".ce-status.done")
    page.locator(".ce-text[data-side=cascade] .t").nth(4).click()
    page.wait_for_selector(".ce-candidate")
    page.keyboard.press("Escape")               # the card lies over the tabs
    open_tab(page, "Layers")
    page.wait_for_selector(".ce-map-table td")


def test_stop_ends_the_run_in_the_worker_and_the_next_run_works(begin, zerogpu):
    ended = len(zerogpu.api.ended)
    page = begin(900)
    page.click("#ce-stop")
    page.wait_for_selector(".ce-status.stopped")
    for _ in range(50):
        if len(zerogpu.api.ended) > ended:
            break
        page.wait_for_timeout(100)
    # The check of what was written follows, and may have given a GPU back, too.
    assert zerogpu.api.ended[ended:ended + 1] == [False], "the worker gave its GPU back within 5 s"
    kept = len(shown_ids(page, "full"))
    assert kept < 300
    run_again(page)


def test_two_visitors_stream_at_once(begin, zerogpu):
    pages = [begin(LONG) for _ in range(2)]
    assert all(page.locator(".ce-status.done").count() == 0 for page in pages), "both run now"
    for page in pages:
        page.wait_for_selector(".ce-status.done")
    for side in ("cascade", "full"):
        first, second = (shown_ids(page, side) for page in pages)
        assert len(first) == len(second) and first == second
    assert len(set(workers(zerogpu)[-4:])) == 2


def test_a_worker_that_dies_leaves_the_text_so_far_and_a_message(begin, zerogpu):
    page = begin(900)
    os.kill(workers(zerogpu)[-1], signal.SIGKILL)
    page.wait_for_selector(".ce-status.error")
    assert "ended early" in page.locator(".ce-status").inner_text()
    page.locator(".toast-body", has_text="ended early").wait_for()
    assert shown_ids(page, "cascade")
    run_again(page)
