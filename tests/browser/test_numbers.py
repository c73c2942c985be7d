"""Numbers of the page in Chromium: live plots, honest headlines, files and the first visit."""

import base64
import csv
import io
import json
import struct
import xml.etree.ElementTree as ElementTree

import pytest

import app
from cascadeexit import record
from cascadeexit.wire import write_line
from tests.browser.conftest import SEED, TOUR_SEEN
from tests.browser.driving import choose_exact, open_tab
from tests.browser.driving import run_to_end as to_end
from tests.browser.reading import FINAL, shown_ids
from tests.browser.server import serve
from tests.browser.test_access import violations
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer

pytestmark = pytest.mark.browser
SIZES = [("light", 1280, 800), ("dark", 1280, 800), ("light", 360, 740)]
PATIENCE = 120_000          # milliseconds: a machine that does other work as well
SHORT = "?n=100"            # tokens of a run
SVG = "{http://www.w3.org/2000/svg}"


FRAMES = "new Promise(done => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 250))"
SEEK = """value => { const range = document.querySelector('.ce-player input'); range.value = value / 1000 * range.max;
    range.dispatchEvent(new Event('input', {bubbles: true})); }"""


def run_to_end(page) -> None:
    to_end(page)
    page.evaluate(FRAMES)               # until the plots are drawn


@pytest.fixture(scope="module")
def shared(chromium, tiny_url):
    """Function that opens a page for several tests. Errors of its scripts fail the last of them."""
    context, complaints = chromium.new_context(viewport={"width": 1280, "height": 800}), []
    context.add_init_script(TOUR_SEEN)

    def open_():
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(tiny_url + SHORT)
        page.wait_for_selector(".ce-legend")
        page.wait_for_selector("#ce-settings", state="attached")
        return page
    yield open_
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def finished(shared):
    page = shared()
    run_to_end(page)
    return page


@pytest.fixture
def done(finished):
    """A page at 1280 x 800 whose first run is over: its charts, at the end of the run, nothing pointed at."""
    finished.bring_to_front()
    open_tab(finished, "Charts")
    finished.evaluate(f"({SEEK})(1000)")
    finished.mouse.move(5, 5)
    finished.evaluate(FRAMES)
    return finished


@pytest.fixture
def visit(open_page, tiny_url):
    """Function that opens a page whose runs are short."""
    def visit_(theme: str = "light", height: int = 800, **options):
        page = open_page(f"{tiny_url}{SHORT}&__theme={theme}", height=height, **options)
        page.set_default_timeout(PATIENCE)
        return page
    return visit_


@pytest.fixture
def fresh(visit):
    """A page at 1280 x 800 whose first run is over, for tests that run something else in it."""
    page = visit()
    run_to_end(page)
    return page


def box(page, selector: str) -> dict:
    return page.locator(selector).first.bounding_box()


def overlap(a: dict, b: dict) -> bool:
    return (a["x"] < b["x"] + b["width"] and b["x"] < a["x"] + a["width"]
            and a["y"] < b["y"] + b["height"] and b["y"] < a["y"] + a["height"])


PIXELS = """async url => { const image = new Image(); image.src = url; await image.decode();
    const canvas = document.createElement('canvas'); canvas.width = image.width; canvas.height = image.height;
    const pen = canvas.getContext('2d'); pen.drawImage(image, 0, 0);
    const data = pen.getImageData(0, 0, image.width, image.height).data, counts = {};
    for (let k = 0; k < data.length; k += 4) {
        const colour = '#' + [0, 1, 2].map(n => data[k + n].toString(16).padStart(2, '0')).join('').toUpperCase();
        counts[colour] = (counts[colour] || 0) + 1; }
    return counts; }"""


def pixels(page, png: bytes) -> dict[str, int]:
    """How many pixels of a picture have each colour."""
    return page.evaluate(PIXELS, "data:image/png;base64," + base64.b64encode(png).decode())


def exit_colours(page) -> list[str]:
    return page.evaluate("""['--ce-e0', '--ce-e1', '--ce-e2'].map(name =>
        document.querySelector('.ce').style.getPropertyValue(name).toUpperCase())""")


# -- live plots ---------------------------------------------------------------------------------------------


def test_three_plots_stand_side_by_side_in_one_screen(done):
    boxes = [done.locator(".ce-plot:visible").nth(n).bounding_box() for n in range(3)]
    assert done.locator(".ce-plot:visible").count() == 3
    assert len({round(b["y"]) for b in boxes}) == 1 and boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    assert all(b["y"] + b["height"] <= 800 and b["width"] > 350 for b in boxes)
    assert done.locator(".ce-plot:visible .ce-plot-title").all_inner_texts() == [
        "Who wrote the tokens", "Agreement", "Time per token, ms"]
    wanted = dict(routing={"0%", "50%", "100%", "token"}, agreement={"100%", "token"}, times={"0", "token"})
    for plot, ticks in wanted.items():
        axes = done.locator(f".ce-plot-{plot} .ce-axes text").all_text_contents()
        assert ticks <= {*axes} and sum(text.isdigit() for text in axes) >= 4, axes
    inside = done.evaluate("""[...document.querySelectorAll('.ce-plot:not([hidden])')].every(plot => {
        const outer = plot.getBoundingClientRect();
        return [...plot.querySelectorAll('text')].every(text => { const own = text.getBoundingClientRect();
            return own.left >= outer.left - 1 && own.right <= outer.right + 1 && own.bottom <= innerHeight; }); })""")
    assert inside, "no label leaves its plot"


def test_the_share_of_each_exit_is_an_area_in_its_colour(done):
    counts = pixels(done, done.locator(".ce-plot-routing").screenshot())
    shares = [int(text.rstrip("%")) for text in done.locator(".ce-count").all_inner_texts()[:3]]
    for colour, share in zip(exit_colours(done), shares):
        assert share < 3 or counts.get(colour, 0) > 100, (colour, share)


def test_times_have_median_and_p90_of_both_sides(done):
    labels = done.locator(".ce-plot-times .ce-level-label")
    assert sorted(text.split()[0] for text in labels.all_text_contents()) == ["p50", "p50", "p90", "p90"]
    tops = sorted(labels.nth(n).bounding_box()["y"] for n in range(4))
    assert all(b - a >= 11 for a, b in zip(tops, tops[1:])), "labels do not cover each other"
    fact = done.locator(".ce-panel:not(.full) .ce-facts").inner_text()
    median = done.locator(".ce-level-label.ce-of-0", has_text="p50").text_content().split()[1]
    assert abs(float(median) - float(fact.split("median ")[1].split(" ms")[0])) <= 1, "the same number as in the panel"


def test_a_pointer_reads_a_plot_and_lights_the_token(done):
    area = box(done, ".ce-plot-times .ce-plot-area")
    done.mouse.move(area["x"] + area["width"] / 2, area["y"] + 50)
    tip = done.locator(".ce-plot-times .ce-plot-tip")
    assert tip.is_visible() and "ms" in tip.inner_text()
    n = int(tip.inner_text().split()[1])
    lit = done.locator(".t.lit")
    assert lit.count() == 2 and lit.first.get_attribute("data-i") == str(n - 1)
    cursors = done.eval_on_selector_all(".ce-plot:not([hidden]) .ce-cursor",
                                        "all => all.map(line => line.style.display !== 'none')")
    assert cursors == [True] * 3, "all plots show the same token"
    assert done.locator(".ce-plot-tip:visible").count() == 1
    done.mouse.move(5, 5)
    assert lit.count() == 0 and tip.is_hidden()
    done.locator(f".ce-text[data-side=cascade] {FINAL}").nth(20).hover()
    at = done.locator(".ce-plot-routing .ce-plot-area").get_attribute("aria-valuenow")
    assert at == "21", "a token in a text moves the cursor"


def test_the_keyboard_reads_a_plot(done):
    area = done.locator(".ce-plot-routing .ce-plot-area")
    assert area.get_attribute("role") == "slider"
    area.focus()
    done.keyboard.press("End")
    assert area.get_attribute("aria-valuenow") == area.get_attribute("aria-valuemax")
    done.keyboard.press("Home")
    done.keyboard.press("ArrowRight")
    assert area.get_attribute("aria-valuenow") == "2" and done.locator(".t.lit").get_attribute("data-i") == "1"
    assert "Token 2" in area.get_attribute("aria-valuetext") and "%" in area.get_attribute("aria-valuetext")
    shown = done.evaluate("""() => { const box = document.querySelector('.ce-text').getBoundingClientRect(),
        token = document.querySelector('.t.lit').getBoundingClientRect();
        return token.top >= box.top && token.bottom <= box.bottom; }""")
    assert shown, "the text scrolls to the token"
    done.keyboard.press("Escape")
    assert done.locator(".t.lit").count() == 0


def test_plots_follow_the_player(done):
    def width() -> float:
        done.evaluate(FRAMES)
        return done.evaluate("document.querySelector('.ce-plot-routing .ce-band')?.getBBox().width || 0")

    area = done.locator(".ce-plot-routing .ce-plot-area")
    whole, length, widths = width(), area.get_attribute("aria-valuemax"), []
    for moment in range(900, 0, -100):          # in thousandths of the run: nobody knows when it was slow
        done.evaluate(f"({SEEK})({moment})")
        widths.append(width())
    assert widths == sorted(widths, reverse=True) and any(0 < w < 0.9 * whole for w in widths)
    assert area.get_attribute("aria-valuemax") == length, "the axis stays"
    assert done.locator("#ce-run").is_visible(), "a run that is looked at again is not a run in progress"


def test_confidence_takes_the_place_of_agreement(done):
    done.get_by_role("button", name="Confidence", exact=True).click()
    assert done.locator(".ce-plot-confidence").is_visible() and done.locator(".ce-plot-agreement").is_hidden()
    assert done.locator(".ce-plot-confidence .ce-dots").count() >= 2
    assert done.locator(".ce-plot-confidence .ce-crosses").get_attribute("d").count("M") >= 5
    done.locator(".ce-plot-confidence").get_by_role("button", name="Agreement").click()
    assert done.locator(".ce-plot-agreement").is_visible()


@pytest.mark.parametrize("theme, width, height", SIZES)
def test_every_state_is_accessible_and_fits(visit, theme, width, height):
    page = visit(theme, height, width=width)
    run_to_end(page)
    page.locator(".ce-plot-routing .ce-plot-area").focus()
    page.keyboard.press("ArrowRight")
    assert violations(page, ("#ce-view",)) == [], "a plot is read"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width < 768:
        tops = [page.locator(".ce-plot:visible").nth(n).bounding_box() for n in range(3)]
        assert tops[0]["y"] + tops[0]["height"] <= tops[1]["y"] and tops[1]["y"] + tops[1]["height"] <= tops[2]["y"]
    open_tab(page, "Save")
    assert violations(page, ("#ce-view",)) == [], "files"
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# -- hand-made runs: headlines --------------------------------------------------------------------------------

DRAW = """([code, value]) => {
    const element = document.createElement('div'); element.id = 'ce-view'; element.innerHTML = "<div class='ce'></div>";
    document.querySelector('#ce-view').replaceWith(element);
    const props = {value: ''}; let redraw;
    new Function('element', 'props', 'watch', 'server', code)(element, props, (_, callback) => redraw = callback, {});
    window.give = more => { props.value += more; redraw(); };
    window.give(value); }"""
MODEL = dict(format=1, model="tiny", layers=6, exits=[dict(layer=2, depth=0.33), dict(layer=4, depth=0.67)],
             trained=True, colours=["#FFF2A8", "#C3E8A9", "#DDDDDD"])


def begun(mode="cascade", model=MODEL, **run) -> str:
    tolerance = run.get("tolerance", 0)
    title = "With early exits" if mode == "cascade" else f"Checked, tolerance {tolerance}" if tolerance else "Exact"
    side = dict(name="cascade", title=title, mode=mode, thresholds=[0.5, 0.5], tolerance=tolerance)
    sides = [side, side | dict(name="full", title="Full model", mode="full")]
    return write_line("model", **model) + write_line(
        "run", **dict(run="0123456789ab", sides=sides, mode=mode, greedy=True, thresholds=[0.5, 0.5], tolerance=0,
                      prompt_tokens=3, max_new_tokens=40, settings=dict(prompt="Hi"), machine="CPU, 2 threads",
                      date="2026-11-29") | run)


def token(side: str, i: int, exit: int, text: str = "", id: int = 7, **more) -> str:
    return write_line("token", side=side, i=i, id=id, status="emitted", text=text or f" w{i}", exit=exit,
                      t=0.1 + 0.01 * i, conf=[0.9, 0.9], read=0.5, **dict(ms=10.0) | more)


def written(exits, side="cascade") -> str:
    return "".join(token(side, i, exit) for i, exit in enumerate(exits))


def numbers(speedup=2.0, n=30, shares=(0.5, 0.2, 0.3), **stats) -> str:
    lines = "".join(write_line("stats", **dict(
        side=side, seconds=1.0, done=True, tokens=n, routing_share=list(shares), copied_share=0, cost=0.5,
        tokens_per_second=100.0, acceptance=None, tokens_per_verification=None, first_token_seconds=0.1,
        token_seconds_p50=0.01, token_seconds_p90=0.01, token_seconds_p99=0.01) | stats)
                    for side in ("cascade", "full"))
    return lines + write_line("versus", side="cascade", n=n, speedup=speedup, positional=0.5, rolling=0.5,
                              first_divergence=5)


def ended(**end) -> str:
    return write_line("end", **dict(side="cascade", agreement=0.99, positional=0.5, first_divergence=5, sequence=False,
                                    identical=None, differs=[5], moments=[], loops=None) | end)


@pytest.fixture(scope="module")
def stage(shared):
    return shared()


@pytest.fixture
def draw(stage):
    """Function that draws a hand-made run in a token view of its own; `give` of the page's window adds more lines."""
    def draw_(value: str):
        stage.bring_to_front()
        stage.evaluate(DRAW, [app.page_script(), value])
        stage.evaluate(FRAMES)
        return stage
    return draw_


def tile(page, name: str) -> str:
    return page.locator(".ce-tile", has=page.locator("dt", has_text=name)).inner_text()


CUT = """() => [...document.querySelectorAll('.ce-strip *, .ce-panel header *, .ce-facts')].filter(node => {
    const own = node.getBoundingClientRect(), panel = node.closest('.ce-panel'), style = getComputedStyle(node);
    const frame = panel ? panel.getBoundingClientRect() : {left: 0, right: innerWidth};
    return own.width && !node.closest('.ce-share') && style.position !== 'absolute'
        && (own.left < frame.left - 1 || own.right > frame.right + 1
            || style.overflowX !== 'visible' && node.scrollWidth > node.clientWidth + 1); })
    .map(node => node.className + ': ' + node.textContent)"""


def cut_off(page) -> list[str]:
    """Parts of the strip and of the headers of the texts whose words are not wholly to be seen."""
    return page.evaluate(CUT)


LONG_STATS = dict(tokens=1000, tokens_per_second=1234.5, drafted=2345, acceptance=0.4321, tokens_per_verification=2.5)
LONG_RUNS = dict(
    cascade=begun() + written([0] * 30 + [2]) + written([2] * 30, "full") + numbers(0.91, shares=(0.1, 0.0, 0.9))
    + ended(positional=0.1234, first_divergence=123),
    repeats=begun() + written([0] * 30) + written([2] * 30, "full") + numbers() + ended()
    + write_line("spread", side="cascade", speedups=[1.6, 1.4, 1.5], tokens=64),
    loops=begun() + written([0] * 30) + written([2] * 30, "full") + numbers(12.34)
    + ended(loops=dict(start=999, period=4, share=0.6)),
    sampled=begun(greedy=False) + written([0] * 30) + written([2] * 30, "full") + numbers()
    + ended(agreement=None, differs=[]),
    exact=begun("verified") + written([0] * 30) + written([2] * 30, "full") + numbers(**LONG_STATS)
    + ended(identical=True, first_divergence=None, positional=1.0, sequence=True),
    tolerance=begun("verified", tolerance=0.65) + written([0, -1] * 15) + written([2] * 30, "full")
    + numbers(**LONG_STATS) + ended())


@pytest.mark.parametrize("width", [1280, 1024, 360])
def test_no_number_of_the_strip_and_the_headers_is_cut_off(draw, stage, width):
    try:
        stage.set_viewport_size({"width": width, "height": 800})
        for name, run in LONG_RUNS.items():
            page = draw(run)
            assert cut_off(page) == [], name
            page.evaluate("line => give(line)", write_line("error", message="Something went wrong. " * 4))
            assert cut_off(page) == [], name + ", with a long status"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        stage.set_viewport_size({"width": 1280, "height": 800})


def test_agreement_counts_only_what_was_checked(draw):
    page = draw(begun() + written([0, 2, 1, 2, 0, 2]))
    assert page.locator(".ce-plot-agreement .ce-now").inner_text() == "known at the end"
    assert "–" in tile(page, "Agreement")
    page.evaluate("lines => give(lines)", write_line("checked", side="cascade", i=0, ids=[7, 7, 5]))
    assert "75%" in tile(page, "Agreement") and "of 4 tokens checked so far" in tile(page, "Agreement")
    page.evaluate(FRAMES)
    assert page.locator(".ce-plot-agreement .ce-now").inner_text() == "75% of 4 checked so far"
    assert page.locator(".ce-plot-agreement .ce-wrong").get_attribute("d").count("M") == 1
    assert page.locator(".ce-text[data-side=cascade] .differs").count() == 1


def test_agreement_also_counts_the_exits_alone(draw):
    page = draw(begun() + written([0, 2, 1, 2, 0, 2]) + numbers() + ended(agreement=5 / 6, differs=[2]))
    assert "83%" in tile(page, "Agreement") and "exits alone: 67%" in tile(page, "Agreement")
    page = draw(begun() + written([0, 1, 0]) + numbers() + ended(agreement=1.0, differs=[]))
    assert "full model would choose the same" in tile(page, "Agreement")


def test_a_text_that_repeats_itself_takes_the_headline_back(draw):
    page = draw(begun() + written([0] * 30) + written([2] * 30, "full") + numbers(2.4)
                + ended(loops=dict(start=9, period=4, share=0.6)))
    assert page.get_by_text("The text repeats itself from token 10 on").is_visible()
    size = "value => parseFloat(getComputedStyle(value).fontSize)"
    values = page.locator(".ce-value")
    assert values.nth(0).inner_text() == "2.4×" and values.nth(0).evaluate(size) < values.nth(2).evaluate(size)
    assert "high because the text repeats" in tile(page, "Speed")
    assert "easy to predict" in page.locator(".ce-loop").get_attribute("title")


def test_each_text_says_that_it_repeats_itself(draw):
    sides = [dict(name=name, title=name, mode="cascade", thresholds=[0.5, 0.5], tolerance=0)
             for name in ("cascade", "second")]
    run = begun(sides=[*sides, dict(name="full", title="Full model", mode="full", thresholds=None, tolerance=0)])
    page = draw(run + "".join(written([0] * 30, side) for side in ("cascade", "second", "full")) + numbers()
                + ended() + ended(side="second", agreement=0.984, loops=dict(start=9, period=4, share=0.6)))
    flags = page.locator(".ce-panel-loop")
    assert [flag.is_visible() for flag in flags.all()] == [False, True, False]
    assert flags.nth(1).inner_text() == "repeats from token 10 on" and "98%" in flags.nth(1).get_attribute("title")
    facts = page.locator(".ce-facts").all_inner_texts()
    assert "99% agreement" in facts[0] and "agreement" not in facts[1]


def test_the_median_of_the_repeats_is_the_headline(draw):
    page = draw(begun() + written([0] * 30) + written([2] * 30, "full") + numbers(1.8) + ended())
    assert "1.8×" in tile(page, "Speed")
    page.evaluate("line => window.give(line)",
                  write_line("spread", side="cascade", speedups=[1.61, 1.42, 1.46], tokens=64))
    page.evaluate(FRAMES)
    words = tile(page, "Speed")
    assert "1.5×" in words and "1.4 to 1.6× in 3 repeats of the first 64 tokens" in words
    title = page.locator(".ce-tile .ce-note span").first.get_attribute("title")
    assert "The run itself: 1.80×" in title
    assert cut_off(page) == []


def test_sampled_text_has_no_agreement(draw):
    page = draw(begun(greedy=False) + written([0] * 30) + written([2] * 30, "full") + numbers()
                + ended(agreement=None, differs=[]))
    assert "–" in tile(page, "Agreement") and "not measured above temperature 0" in tile(page, "Agreement")
    assert page.locator(".ce-plot-agreement .ce-now").inner_text() == "not measured above temperature 0"
    assert page.locator(".differs").count() == 0


def test_a_tolerance_claims_nothing_without_a_comparison(draw):
    page = draw(begun("verified", tolerance=0.6) + written([0] * 30) + written([2] * 30, "full") + numbers()
                + ended(agreement=0.9))
    words = page.locator("#ce-view").inner_text().lower()
    assert "verified" not in words and "identical to" not in words and "same text, checked" not in words
    assert page.locator(".ce-badge").is_hidden() and "with tolerance 0.6" in words
    assert "Checked, tolerance 0.6" in page.locator(".ce-panel h3").first.inner_text()


@pytest.mark.parametrize("mode, trained, shares, words", [
    ("cascade", False, (0.5, 0.2, 0.3), "untrained"), ("cascade", True, (0.1, 0.0, 0.9), "few tokens stop early"),
    ("cascade", True, (0.5, 0.2, 0.3), "save too little"),
    ("verified", True, (0.5, 0.2, 0.3), "few drafts are right")])
def test_a_slower_run_says_why(draw, mode, trained, shares, words):
    page = draw(begun(mode, MODEL | dict(trained=trained)) + written([0] * 30) + written([2] * 30, "full")
                + numbers(0.91, shares=shares) + ended())
    assert "0.9×" in tile(page, "Speed") and words in tile(page, "Speed")
    assert cut_off(page) == []


def test_the_legend_says_who_drafted_and_that_layers_catch_up(draw):
    page = draw(begun("verified") + written([0] * 5))
    legend = page.locator(".ce-legend").inner_text()
    assert "drafted each token" in legend and "The full model checks every draft." in legend
    assert page.locator(".ce-plot-title").first.inner_text() == "Who drafted the tokens"
    page = draw(begun() + written([0] * 5))
    legend = page.locator(".ce-legend").inner_text()
    assert "wrote each token" in legend and "Skipped layers catch up later." in legend


def test_a_thousand_tokens_stay_cheap_to_draw(draw):
    page = draw(begun(max_new_tokens=1024) + written([i % 3 for i in range(1024)]) + written([2] * 1024, "full"))
    nodes, letters = page.evaluate("""() => { const all = [...document.querySelectorAll('.ce-plots svg *')];
        return [all.length, Math.max(...all.map(node => (node.getAttribute('d') || '').length))]; }""")
    assert nodes < 150 and letters < 60_000


def test_a_text_has_few_nodes(done):
    nodes = done.evaluate("""document.evaluate('count(//*[contains(@class, "ce-text")]//node())', document, null,
        XPathResult.NUMBER_TYPE).numberValue""")
    assert nodes <= 4 * sum(len(shown_ids(done, side)) for side in ("cascade", "full"))


# -- what a visitor asks for ------------------------------------------------------------------------------------


def test_the_same_can_be_run_exactly(fresh):
    offer = fresh.get_by_role("button", name="Now in Exact mode")
    assert offer.is_visible()
    offer.click()
    fresh.wait_for_selector(".ce-badge:visible")
    assert fresh.locator(".ce-badge").inner_text().startswith("✓ Identical to the full model")
    assert shown_ids(fresh, "cascade") == shown_ids(fresh, "full")
    assert fresh.locator("#ce-mode input[value=verified]").is_checked() and offer.is_hidden()


def test_the_speed_is_measured_again(fresh, tmp_path):
    fresh.get_by_role("button", name="Measure again").click()
    fresh.wait_for_function("document.querySelector('.ce-tile .ce-note').textContent.includes('3 repeats')")
    assert "×" in tile(fresh, "Speed") and fresh.locator(".ce-status").inner_text() == "Done."
    assert fresh.locator("#ce-run").is_visible() and fresh.get_by_role("button", name="Measure again").count() == 0
    kept = json.loads(saved(fresh, "Save run", tmp_path).read_text())
    assert len(next(r for r in kept["records"] if r["type"] == "spread")["speedups"]) == 3


def test_a_server_that_is_gone_is_named(chromium):
    serving = serve(tiny_engine(seed=SEED), tiny_tokenizer())
    url = serving.__enter__()
    context = chromium.new_context()
    try:
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector(".ce-legend")
        page.wait_for_selector("#ce-run")
    finally:
        serving.__exit__(None, None, None)
    page.click("#ce-run")
    page.get_by_text("The server does not answer").wait_for(timeout=60_000)
    assert page.locator("#ce-run").is_visible() and page.locator("#ce-stop").is_hidden()
    context.close()


# -- files -------------------------------------------------------------------------------------------------------


def saved(page, button: str, folder):
    open_tab(page, "Save")
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_run_and_tokens_are_files(done, tmp_path):
    assert record.load(saved(done, "Save run", tmp_path).read_bytes())
    text = saved(done, "Save tokens", tmp_path).read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(io.StringIO(text, newline="")) if row["side"] == "cascade"]
    assert [int(row["token"]) for row in rows] == shown_ids(done, "cascade")
    wrong = {i for i, row in enumerate(rows) if row["agrees"] == "no"}
    marked = done.eval_on_selector_all(f".ce-text[data-side=cascade] {FINAL}",
                                       "all => all.flatMap((t, i) => t.classList.contains('differs') ? [i] : [])")
    assert wrong == {*marked} and all(row["full_choice"] == row["token"] for row in rows if row["agrees"] == "yes")


@pytest.mark.parametrize("mode", ["cascade", "verified"])
def test_the_trace_holds_every_pass(visit, tmp_path, mode):
    page = visit()
    if mode == "verified":
        choose_exact(page)
    run_to_end(page)
    trace = json.loads(saved(page, "Save trace", tmp_path).read_text())
    events = trace["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X"} and {e["pid"] for e in events} == {1}
    assert len(trace["otherData"]["date"]) == 10
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(names) == 2 and "Full model" in names.values()
    for tid, side in ((1, "cascade"), (2, "full")):
        slices = [e for e in events if e["ph"] == "X" and e["tid"] == tid and "rows" in e["args"]]
        assert [i for e in slices for i in e["args"]["positions"]] == list(range(len(shown_ids(page, side))))
        ends = [e["ts"] + e["dur"] for e in slices]
        assert all(e["ts"] >= end - 0.01 for e, end in zip(slices[1:], ends)), "slices follow each other"
        assert all({"exits", "rows", "accepted"} <= {*e["args"]} for e in slices)
        if mode == "verified" and side == "cascade":
            assert any(e["args"].get("drafted", 0) > 1 and e["args"]["accepted"] for e in slices)
            assert all(e["args"]["weights_read"] > 0 for e in slices), "each pass reads weights"
            steps = [e for e in events if e["ph"] == "X" and e["tid"] == tid and "rows" not in e["args"]]
            assert {e["name"] for e in steps if e["ts"] == 0} <= {"Read the prompt", "Read the prompt, draft"}
            assert {e["name"] for e in steps if e["ts"] > 0} == {"Draft", "Check"}
            assert all(e["args"].get("ran") for e in steps if e["name"] == "Check")
            assert page.locator(".ce-text .accepted").count() == 0 and len(slices) < len(shown_ids(page, side))


def test_the_picture_is_one_for_a_paper(done, tmp_path):
    file = saved(done, "Save picture (SVG)", tmp_path).read_text(encoding="utf-8")
    picture = ElementTree.fromstring(file)
    assert picture.tag == SVG + "svg" and {node.tag for node in picture.iter()} <= {
        SVG + tag for tag in ("svg", "title", "rect", "text", "line")}, "hostile tokens are text"
    words = [node.text or "" for node in picture.iter(SVG + "text")]
    assert any("<img" in word for word in words) and "llama-untied" in words
    whole = " ".join(words)
    for part in ("Prompt: Explain why the sky is blue.", "Early exits", "× the full model", "agreement", "CPU"):
        assert part in whole, part
    assert words[-1].endswith(" · CascadeExit")
    width = float(picture.get("width"))
    for node in picture.iter(SVG + "text"):
        assert float(node.get("x")) + float(node.get("textLength") or 0) <= width, "wrapped"
    fills = [node.get("fill") for node in picture.iter(SVG + "rect")]
    assert fills[0] == "#ffffff" and {*exit_colours(done)} <= {fill.upper() for fill in fills}


def test_the_picture_is_also_pixels(done, tmp_path):
    png = saved(done, "Save picture (PNG)", tmp_path).read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", png[16:20]) == (2400,)
    counts = pixels(done, png)
    assert counts["#FFFFFF"] > sum(counts.values()) / 3 and counts[exit_colours(done)[0]] > 1000


def test_a_picture_of_characters_that_xml_lacks(draw, tmp_path):
    texts = ["a\0b", "\x1b[31m", "\ud83d", "]]>", "&amp;", "<!--", "\u202etxet", "\ufffe", "x" * 400, "\n\n", "\ttab",
             "  two"]
    page = draw(begun() + "".join(token("cascade", i, 0, text) for i, text in enumerate(texts))
                + written([2] * 3, "full") + numbers() + ended(differs=[3]))
    file = saved(page, "Save picture (SVG)", tmp_path).read_text(encoding="utf-8")
    picture = ElementTree.fromstring(file)
    words = [node.text for node in picture.iter(SVG + "text")]
    assert "a\ufffdb" in words and "]]>" in words and "&amp;" in words and "<!--" in words
    assert sum(word.count("x") for word in words if set(word) == {"x"}) == 400 and "#d4380d" in file
    saved(page, "Save picture (PNG)", tmp_path)


# -- the first visit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme, width, height", SIZES)
def test_a_first_visit_is_led_in_three_steps(visit, theme, width, height):
    page = visit(theme, height, width=width, tour=True)
    page.wait_for_selector(".ce-tour")
    for step in ("1 of 3", "2 of 3", "3 of 3"):
        assert page.locator(".ce-tour-count").inner_text() == step
        if step == "1 of 3":
            places, texts = page.locator(".ce-tour p").inner_text(), [box(page, f".ce-text[data-side={side}]")
                                                                      for side in ("cascade", "full")]
            if texts[0]["x"] < texts[1]["x"]:
                assert "On the left" in places and "On the right" in places
            else:
                assert "In the upper one" in places and "In the lower one" in places and "left" not in places
                assert texts[0]["y"] < texts[1]["y"]
        page.wait_for_timeout(100)
        own, run = box(page, ".ce-tour"), box(page, "#ce-run")
        assert not overlap(own, run), "Run stays free"
        assert own["x"] >= 0 and own["x"] + own["width"] <= width and 0 <= own["y"] <= height - own["height"]
        assert page.locator(".ce-ring").count() == 1
        assert violations(page, (".ce-tour",)) == []
        page.locator(".ce-tour-next").click()
    assert page.locator(".ce-tour").count() == 0 and page.locator(".ce-ring").count() == 0
    page.reload()
    page.wait_for_selector(".ce-legend")
    page.wait_for_timeout(1000)
    assert page.locator(".ce-tour").count() == 0, "dismissed for good"


def test_the_steps_work_by_keyboard_and_do_not_hold_it(visit):
    page = visit(tour=True)
    page.wait_for_selector(".ce-tour")
    assert page.evaluate("document.activeElement === document.body"), "no focus is taken"
    for name in ("Skip", "Next"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == name
    page.keyboard.press("Enter")
    assert page.locator(".ce-tour-count").inner_text() == "2 of 3"
    assert page.evaluate("document.activeElement.textContent") == "Next"
    page.fill("#ce-prompt textarea", "not modal")
    page.locator(".ce-tour-skip").focus()
    page.keyboard.press("Escape")
    assert page.locator(".ce-tour").count() == 0


def test_the_last_step_runs_exact(visit):
    page = visit(tour=True)
    page.wait_for_selector(".ce-tour")
    page.locator(".ce-tour-next").click()
    page.locator(".ce-tour-next").click()
    page.get_by_role("button", name="Try Exact").click()
    page.wait_for_selector(".ce-badge:visible")
    assert page.locator(".ce-tour").count() == 0


def test_blocked_storage_is_no_error(visit):
    page = visit(tour=True)
    page.context.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('blocked'); }})")
    page.reload()
    page.wait_for_selector(".ce-tour")
    page.locator(".ce-tour-skip").click()
    page.wait_for_timeout(800)
    assert page.locator(".ce-tour").count() == 0


def test_who_was_here_before_sees_no_steps(visit):
    page = visit()
    page.wait_for_timeout(1000)
    assert page.locator(".ce-tour").count() == 0
