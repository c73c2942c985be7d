"""The page in headless Chromium: what the engine says is what a visitor sees: as text, live, nothing else."""

import time
from pathlib import Path

import pytest

import app
from cascadeexit import hub, views
from cascadeexit.engine import DecodeConfig
from cascadeexit.race import race
from tests.browser.server import serve
from tests.browser.tiny_text import HOSTILE

pytestmark = pytest.mark.browser
FINAL = ".t:not(.draft):not(.rejected)"
APP_JS = Path(app.ASSETS / "app.js").read_text(encoding="utf-8")


def shown_ids(page, side: str) -> list[int]:
    return page.eval_on_selector_all(f".ce-text[data-side={side}] {FINAL}",
                                     "all => all.map(t => +t.dataset.id)")


def shown_text(page, side: str) -> str:
    return "".join(page.eval_on_selector_all(f".ce-text[data-side={side}] {FINAL}",
                                             "all => all.map(t => t.textContent)"))


def colours_seen(page) -> set[str]:
    return set(page.eval_on_selector_all(f".ce-text[data-side=cascade] {FINAL}",
                                         "all => all.map(t => getComputedStyle(t).backgroundColor)"))


def run_to_end(page) -> None:
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.done")


def expected(tiny, mode: str, prompt: str = app.EXAMPLES[0]) -> list[int]:
    engine, tokenizer = tiny
    config = DecodeConfig(mode=mode, max_new_tokens=200, thresholds=0.7)
    return engine.run(app.prompt_ids(tokenizer, prompt, chat=True), config).token_ids


@pytest.fixture
def slow(tiny, monkeypatch):
    """Make every event take a while, so that a test can act in the middle of a run."""
    fast = tiny[0].generate

    def generate(ids, config):
        for event in fast(ids, config):
            time.sleep(0.02)
            yield event
    monkeypatch.setattr(tiny[0], "generate", generate)


def test_both_sides_show_what_the_engine_says(page, tiny):
    run_to_end(page)
    for mode, side in (("cascade", "cascade"), ("full", "full")):
        ids = expected(tiny, mode)
        assert shown_ids(page, side) == ids
        assert shown_text(page, side) == tiny[1].decode(ids, skip_special_tokens=False)
    assert len(colours_seen(page)) >= 3
    counts = [int(text.split(" · ")[0]) for text in page.locator(".ce-count").all_inner_texts()]
    assert sum(counts) == len(expected(tiny, "cascade"))
    assert page.locator(".ce-tile", has_text="Agreement").locator(".ce-value").inner_text().endswith("%")


def test_text_streams_while_the_model_runs(page, slow):
    page.click("#ce-run")
    page.wait_for_selector(".ce-text[data-side=cascade] .t")
    counts = []
    for _ in range(8):
        counts.append([len(shown_ids(page, side)) for side in ("cascade", "full")])
        page.wait_for_timeout(200)
    for side in zip(*counts):
        assert len(set(side)) >= 4, f"tokens came in lumps: {counts}"
    assert page.locator(".ce-facts b").first.inner_text() != "–", "no live speed"
    assert page.locator("polyline").first.get_attribute("points")


def test_numbers_and_charts_stay_after_a_run(page):
    run_to_end(page)
    page.wait_for_selector("#ce-figures .js-plotly-plot .main-svg")
    page.wait_for_function("document.querySelectorAll('#ce-figures .js-plotly-plot').length === 3")
    titles = page.locator("#ce-figures .gtitle").all_text_contents()
    assert titles == ["Where the tokens left the model", "How long each token took",
                      "How sure the exits were"]
    nodes = page.evaluate("""() => document.evaluate('count(//*[contains(@class, "ce-text")]//node())',
                             document, null, XPathResult.NUMBER_TYPE).numberValue""")
    assert nodes <= 4 * sum(len(shown_ids(page, side)) for side in ("cascade", "full"))


def test_model_output_is_text_and_never_markup(page, tiny):
    run_to_end(page)
    text = shown_text(page, "cascade") + shown_text(page, "full")
    for hostile in HOSTILE[:5]:
        assert hostile in text
    assert page.locator(".ce img, .ce script").count() == 0


def test_a_hostile_prompt_is_answered_like_any_other(page, tiny):
    prompt = "".join(HOSTILE) + "\ud83d"                        # and half of an emoji
    page.evaluate("""text => { const box = document.querySelector('#ce-prompt textarea');
        box.value = text; box.dispatchEvent(new Event('input', {bubbles: true})); }""", prompt)
    run_to_end(page)
    assert shown_ids(page, "full") == expected(tiny, "full", prompt)


def test_verified_mode_proves_that_it_is_identical(page, tiny):
    page.get_by_label("Verified: exact").check()
    run_to_end(page)
    assert shown_ids(page, "cascade") == shown_ids(page, "full") == expected(tiny, "full")
    assert page.locator(".ce-badge").inner_text().startswith("✓ Identical to the full model")
    assert page.locator(".ce-text .draft").count() == 0
    rejected = page.locator(".ce-text .rejected")
    assert rejected.count() > 0 and not rejected.first.is_visible()
    page.get_by_role("button", name="rejected guess").click()
    assert rejected.first.is_visible()


def test_cascade_mode_claims_no_identity(page):
    run_to_end(page)
    assert page.locator(".ce-badge").is_hidden()


def test_stop_keeps_the_text(page, slow):
    page.click("#ce-run")
    page.wait_for_function("document.querySelectorAll('.ce-text .t').length > 20")
    page.click("#ce-stop")
    page.wait_for_selector(".ce-status.stopped")
    before = shown_ids(page, "cascade"), shown_ids(page, "full")
    assert all(before)
    page.wait_for_timeout(600)
    assert (shown_ids(page, "cascade"), shown_ids(page, "full")) == before
    assert len(before[0]) < 200


def test_a_run_after_a_stop_starts_anew(page, slow, tiny, monkeypatch):
    page.click("#ce-run")
    page.wait_for_selector(".ce-text .t")
    page.click("#ce-stop")
    page.wait_for_selector(".ce-status.stopped")
    monkeypatch.undo()
    page.wait_for_timeout(500)        # gradio takes no click before it knows of the cancellation
    run_to_end(page)
    assert shown_ids(page, "full") == expected(tiny, "full")


def test_clear_stops_and_empties_the_page(page, slow):
    page.click("#ce-run")
    page.wait_for_selector(".ce-text .t")
    page.click("#ce-clear")
    page.wait_for_function("document.querySelectorAll('.ce-text .t').length === 0")
    page.wait_for_timeout(400)
    assert page.locator(".ce-text .t").count() == 0
    assert page.locator("#ce-prompt textarea").input_value() == ""


def test_an_empty_prompt_gives_a_message_and_keeps_the_last_text(page):
    run_to_end(page)
    before = shown_ids(page, "cascade")
    page.fill("#ce-prompt textarea", "   ")
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.error")
    assert page.locator(".ce-status").inner_text() == "Please write a prompt first."
    assert shown_ids(page, "cascade") == before
    assert "Traceback" not in page.content()


def test_a_prompt_that_does_not_fit_says_so(page):
    page.fill("#ce-prompt textarea", "sky " * 200)
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.error")
    assert "512" in page.locator(".ce-status").inner_text()


def test_untrained_exits_are_labelled(page):
    assert page.get_by_text("untrained exits").is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(open_page, tiny_url, theme):
    page = open_page(f"{tiny_url}?__theme={theme}", width=360, height=780)
    run_to_end(page)
    page.wait_for_selector("#ce-figures .js-plotly-plot .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


# -- the script alone, fed by hand --------------------------------------------------------------------------

DRAW = """([code, values]) => {
    const element = document.createElement('div'); element.innerHTML = "<div class='ce'></div>";
    document.body.replaceChildren(element);
    const props = {value: values[0]}; let redraw;
    new Function('element', 'props', 'watch', code)(element, props, (_, callback) => redraw = callback);
    for (const value of values) { props.value = value; redraw(); }
    const tokens = [...element.querySelectorAll(".ce-text .t")];
    return [tokens.map(t => [t.className, t.dataset.id, t.textContent]),
            element.querySelector(".ce-status").textContent]; }"""


@pytest.fixture
def draw(page):
    """What a fresh token view shows after a row of values: (tokens, status)."""
    return lambda *values: page.evaluate(DRAW, [APP_JS, values])


@pytest.fixture
def recorded(tiny) -> list[str]:
    """The values of a verified run, each longer than the one before."""
    engine, tokenizer = tiny
    config = DecodeConfig(mode="verified", max_new_tokens=40, thresholds=0.5)
    ids = app.prompt_ids(tokenizer, "sky", chat=True)
    stream = views.TokenStream(engine, tokenizer, config, len(ids))
    values = [stream.text, *views.frames(stream, race({
        "cascade": engine.generate(ids, config),
        "full": engine.generate(ids, DecodeConfig(mode="full", max_new_tokens=40))}))]
    stream.close_text()
    return [*values, stream.text]


def test_any_cut_of_the_stream_draws_the_same_page(draw, recorded):
    """Frames may be skipped, repeated or come in one piece: the value only grows."""
    whole = recorded[-1]
    torn = [whole[:n] for n in range(1, len(whole), 997)]
    at_once = draw(whole)
    assert any("rejected" in t[0] for t in at_once[0]) and len(at_once[0]) > 40
    for values in (recorded, [*torn, whole, whole], [recorded[0], torn[-1], torn[5], whole]):
        assert draw(*values) == at_once


def test_a_frame_that_comes_after_stop_or_clear_is_too_late(draw, recorded, tiny):
    for end in (views.stopped(recorded[1]), views.model_line(tiny[0])):
        assert draw(*recorded[:2], end, recorded[2], recorded[-1]) == draw(*recorded[:2], end)


@pytest.mark.bundled
def test_the_bundled_model_explains_the_sky_in_three_colours(open_page):
    engine, tokenizer = hub.load()
    with serve(engine, tokenizer) as url:
        page = open_page(url)
        page.set_default_timeout(180_000)
        page.fill("#ce-prompt textarea", "Explain why the sky is blue.")
        run_to_end(page)
        assert len(colours_seen(page)) >= 3
        assert "sky" in shown_text(page, "full")
