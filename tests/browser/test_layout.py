"""The layout of the page: results stand in the first screen, and nothing moves while the page loads."""

import pytest

import app
from tests.browser.driving import open_settings
from tests.browser.server import serve

pytestmark = pytest.mark.browser

WATCH = """window.shifts = []; new PerformanceObserver(list => list.getEntries().forEach(entry => window.shifts.push(
    [entry.value, entry.sources.map(source => source.node && (source.node.id || source.node.className))])))
    .observe({type: 'layout-shift', buffered: true});"""
SCREENS = {"desktop": (1280, 800), "phone": (360, 740)}


@pytest.fixture(params=SCREENS)
def size(request) -> tuple[int, int]:
    return SCREENS[request.param]


@pytest.fixture(scope="module")
def url(tiny):
    """Address of a page that plays the recorded run, as a first visitor sees it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_has_recorded_run", lambda library: True)
        with serve(*tiny) as address:
            yield address


def box(page, selector: str) -> dict[str, float]:
    return page.locator(selector).first.bounding_box()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_moves_while_the_page_loads(open_page, url, size, theme):
    """Cumulative layout shift, as browsers define it; they call less than 0.1 good."""
    page = open_page(url, *size, color_scheme=theme, script=WATCH)
    page.wait_for_selector(".ce-text .t")               # the recorded run has begun to play
    page.wait_for_timeout(1500)
    shifts = page.evaluate("window.shifts")
    assert sum(value for value, _ in shifts) < 0.1, max(shifts)


def test_run_texts_and_charts_are_in_one_screen(open_page, url):
    width, height = SCREENS["desktop"]
    page = open_page(url, width, height)
    page.wait_for_selector(".ce-text .t")
    run, strip, charts = (box(page, selector) for selector in ("#ce-run", ".ce-legend", ".ce-plots"))
    assert run["y"] + run["height"] < strip["y"] + strip["height"] <= box(page, ".ce-text")["y"]
    for side in ("cascade", "full"):
        assert box(page, f".ce-text[data-side={side}]")["y"] <= 300
    assert charts["y"] + charts["height"] <= height


def test_a_phone_shows_run_and_then_numbers_before_texts(open_page, url):
    width, height = SCREENS["phone"]
    page = open_page(url, width, height)
    page.wait_for_selector(".ce-text .t")
    run, strip, text = (box(page, selector) for selector in ("#ce-run", ".ce-legend", ".ce-text"))
    assert run["width"] > 0.9 * width and page.get_by_role("tab", name="Many prompts").is_visible()
    assert run["y"] + run["height"] <= height and strip["y"] + strip["height"] <= text["y"]


def test_every_setting_has_the_width_of_the_drawer(open_page, url, size):
    page = open_page(url, *size)
    open_settings(page)
    drawer = box(page, "#ce-settings")
    parts = page.locator("#ce-settings :is(.block, label, input):visible").evaluate_all(
        """all => all.filter(node => node.getBoundingClientRect().width > 1).map(node => {
            const box = node.getBoundingClientRect(), text = node.querySelector('.label-text, span');
            return [node.innerText, box.left, box.right, text ? text.scrollWidth - text.clientWidth : 0]; })""")
    assert len(parts) > 20
    for words, left, right, hidden in parts:
        assert drawer["x"] <= left and right <= drawer["x"] + drawer["width"], words
        assert hidden <= 1, words
    blocks = page.locator("#ce-settings .form > .block:visible").evaluate_all(
        "all => all.map(node => node.clientWidth)")
    assert min(blocks) >= 0.85 * min(400, size[0]), "one column"


def test_the_row_of_examples_says_that_it_goes_on(open_page, url, size):
    page = open_page(url, *size)
    row, more = page.locator("#ce-examples .gallery[data-fade]"), page.get_by_role("button", name="More")
    names = [*app.EXAMPLES]
    last = row.get_by_role("button", name=names[-1])

    def seen(example) -> bool:
        left, width = (example.bounding_box()[k] for k in ("x", "width"))
        frame = row.bounding_box()
        return left >= frame["x"] - 1 and left + width <= frame["x"] + frame["width"] + 1

    more.wait_for()
    assert row.locator("button").count() == len(names) and not seen(last)
    mask = "row => getComputedStyle(row).maskImage"
    assert "gradient" in row.evaluate(mask), "a fade where it is cut"
    more.focus()
    for _ in names:
        if seen(last):
            break
        page.keyboard.press("Enter")
        page.wait_for_timeout(600)              # it scrolls smoothly
    assert seen(last) and row.evaluate(mask) == "none"
    page.keyboard.press("Enter")
    page.wait_for_timeout(600)
    assert seen(row.locator("button").first) and not seen(last), "and back"
