"""The page on a simulated ZeroGPU (`tests/zerogpu.py`): runs happen in workers, and all that is kept is in the page."""

import os
import re
import signal

import pytest

from tests.browser.reading import shown_ids
from tests.zerogpu import LONG

pytestmark = pytest.mark.browser


@pytest.fixture
def space_page(open_page, zerogpu):
    return open_page(zerogpu.url)


def begin(page, tokens: int) -> None:
    """Start a run of at most so many tokens, and wait for the first of them."""
    page.get_by_text("Advanced settings").click()
    page.get_by_label("number input for Maximum length, tokens").fill(str(tokens))
    page.keyboard.press("Tab")
    page.click("#ce-run")
    page.wait_for_selector(".ce-text[data-side=cascade] .t")


def workers(zerogpu) -> list[int]:
    """Process of each run so far, in order."""
    return [int(pid) for pid in re.findall(r"generate \w+ in (\d+)", zerogpu.printed)]


def test_both_sides_stream_and_the_finished_run_is_kept(space_page):
    begin(space_page, LONG)
    counts = []
    for _ in range(6):
        counts.append([len(shown_ids(space_page, side)) for side in ("cascade", "full")])
        space_page.wait_for_timeout(200)
    for side in zip(*counts):
        assert len(set(side)) >= 3, f"tokens came in lumps: {counts}"
    space_page.wait_for_selector(".ce-status.done")
    space_page.locator(".ce-text[data-side=cascade] .t").nth(4).click()
    space_page.wait_for_selector(".ce-candidate")
    space_page.click(".ce-map summary")
    space_page.wait_for_selector(".ce-map-table td")
    space_page.get_by_role("button", name="Interactive charts").click()
    space_page.wait_for_function("document.querySelectorAll('#ce-figures .main-svg').length >= 3")


def test_stop_ends_the_run_in_the_worker_and_the_next_run_works(space_page, zerogpu):
    ended = len(zerogpu.api.ended)
    begin(space_page, 1000)
    space_page.click("#ce-stop")
    space_page.wait_for_selector(".ce-status.stopped")
    for _ in range(50):
        if len(zerogpu.api.ended) > ended:
            break
        space_page.wait_for_timeout(100)
    assert zerogpu.api.ended[ended:] == [False], "the worker gave its GPU back within 5 s"
    kept = len(shown_ids(space_page, "full"))
    assert kept < 300
    begin_again(space_page)


def begin_again(page) -> None:
    page.get_by_label("number input for Maximum length, tokens").fill("24")
    page.keyboard.press("Tab")
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.done")


def test_two_visitors_stream_at_once(open_page, zerogpu):
    pages = [open_page(zerogpu.url) for _ in range(2)]
    for page in pages:
        begin(page, LONG)
    assert all(page.locator(".ce-status.done").count() == 0 for page in pages), "both run now"
    for page in pages:
        page.wait_for_selector(".ce-status.done")
    first, second = ([shown_ids(page, side) for side in ("cascade", "full")] for page in pages)
    assert first == second and len(set(workers(zerogpu)[-4:])) == 2


def test_a_worker_that_dies_leaves_the_text_so_far_and_a_message(space_page, zerogpu):
    begin(space_page, 1000)
    os.kill(workers(zerogpu)[-1], signal.SIGKILL)
    space_page.wait_for_selector(".ce-status.error")
    assert "broke off" in space_page.locator(".ce-status").inner_text()
    space_page.wait_for_selector(".toast-title:text('ZeroGPU worker error')")
    assert shown_ids(space_page, "cascade")
    begin_again(space_page)
