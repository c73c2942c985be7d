"""The page in headless Chromium: a visitor sees exactly what the engine writes, as text, while it is written."""

import csv
import json
import time
from pathlib import Path
from urllib.parse import parse_qsl, urlparse

import pytest
from playwright.sync_api import expect

import app
from cascadeexit import hub
from cascadeexit.calibration import Calibration, Point
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.library import Library
from cascadeexit.model import SegmentedModel
from cascadeexit.prompts import visitor_token_ids
from cascadeexit.race import race
from cascadeexit.settings import DEFAULT_THRESHOLD, PRESETS, thresholds_at
from cascadeexit.shape import Shape
from cascadeexit.sides import Side
from cascadeexit.stream import FORMAT, TokenStream, frames, model_line, stopped
from cascadeexit.wire import expand, write_line
from tests.browser.conftest import SEED
from tests.browser.driving import (
    choose_exact,
    choose_exit,
    close_settings,
    open_settings,
    open_tab,
    run_to_end,
    set_number,
)
from tests.browser.reading import FINAL, SKY, shown_ids
from tests.browser.server import serve, serve_library
from tests.tiny_models import tiny_base, tiny_engine
from tests.tiny_text import HOSTILE, tiny_tokenizer

pytestmark = pytest.mark.browser
APP_JS = app.page_script()


def shown_text(page, side: str) -> str:
    return "".join(page.eval_on_selector_all(f".ce-text[data-side={side}] {FINAL}",
                                             "all => all.map(t => t.textContent)"))


def colours_seen(page) -> set[str]:
    return set(page.eval_on_selector_all(f".ce-text[data-side=cascade] {FINAL}",
                                         "all => all.map(t => getComputedStyle(t).backgroundColor)"))


def sliders(engine, threshold: float) -> list[float]:
    """Values of the page's threshold sliders for this threshold of the first exit."""
    return thresholds_at(threshold, Shape.of(engine))[:engine.num_exits]


def expected(tiny, mode: str, prompt: str = SKY) -> list[int]:
    engine, tokenizer = tiny
    config = DecodeConfig(mode=mode, max_new_tokens=200, thresholds=sliders(engine, DEFAULT_THRESHOLD))
    return engine.run(visitor_token_ids(tokenizer, prompt, chat=True), config).token_ids


@pytest.fixture
def slow(tiny, monkeypatch):
    """Make every event take a while, so that a test can act in the middle of a run."""
    fast = tiny[0].generate

    def generate(ids, config):
        for event in fast(ids, config):
            time.sleep(0.02)
            yield event
    monkeypatch.setattr(tiny[0], "generate", generate)


def test_both_sides_show_what_the_engine_writes(page, tiny):
    run_to_end(page)
    for mode, side in (("cascade", "cascade"), ("full", "full")):
        ids = expected(tiny, mode)
        assert shown_ids(page, side) == ids
        assert shown_text(page, side) == tiny[1].decode(ids, skip_special_tokens=False)
    assert len(colours_seen(page)) >= 3
    shares = [float(text.rstrip("%") or 0) for text in page.locator(".ce-count").all_inner_texts()]
    assert 98 <= sum(shares) <= 102, "rounded shares of all tokens"
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
    assert "tokens/s" in page.locator(".ce-facts").first.inner_text(), "no live speed"


def test_model_output_is_text_and_never_markup(page, tiny):
    run_to_end(page)
    text = shown_text(page, "cascade") + shown_text(page, "full")
    for hostile in HOSTILE[:5]:
        assert hostile in text
    page.locator(".ce-text[data-side=cascade] .t", has_text="<img").first.click()
    page.wait_for_selector(".ce-candidate")
    assert "<img␣src=x␣onerror=alert(1)>" in page.locator(".ce-card-text").inner_text()
    page.keyboard.press("Escape")
    open_tab(page, "Layers")
    page.wait_for_selector(".ce-map-table td")
    assert page.locator(".ce img, .ce script").count() == 0


def test_a_hostile_prompt_is_answered_like_any_other(page, tiny):
    prompt = "".join(HOSTILE) + "\ud83d"                        # and half of an emoji
    page.evaluate("""text => { const box = document.querySelector('#ce-prompt textarea');
        box.value = text; box.dispatchEvent(new Event('input', {bubbles: true})); }""", prompt)
    run_to_end(page)
    assert shown_ids(page, "full") == expected(tiny, "full", prompt)


def test_exact_mode_proves_that_it_is_identical(page, tiny):
    choose_exact(page)
    run_to_end(page)
    assert shown_ids(page, "cascade") == shown_ids(page, "full") == expected(tiny, "full")
    assert page.locator(".ce-badge").inner_text().startswith("✓ Identical to the full model")
    assert page.locator(".ce-text .draft").count() == 0
    rejected = page.locator(".ce-text .rejected")
    assert rejected.count() > 0 and not rejected.first.is_visible()
    page.get_by_role("button", name="Show rejected").click()
    assert rejected.first.is_visible()


def test_a_correction_is_marked_where_an_exit_had_drafted_another_token(page, tiny):
    choose_exact(page)
    choose_exit(page, "Always exit 1")
    run_to_end(page)
    assert shown_ids(page, "cascade") == expected(tiny, "full")
    assert 0 < page.locator(".ce-text[data-side=cascade] .ef.correction").count() <= page.locator(".rejected").count()


def test_exact_mode_with_a_tolerance_shows_what_the_engine_writes_and_claims_no_identity(page, tiny):
    choose_exact(page)
    choose_exit(page, "Always exit 1")
    open_settings(page)
    set_number(page, "number input for Tolerance", 0.9)
    close_settings(page)
    run_to_end(page)
    engine, tokenizer = tiny
    config = DecodeConfig(mode="verified", max_new_tokens=200, tolerance=0.9, thresholds=(0, None, None))
    ids = engine.run(visitor_token_ids(tokenizer, SKY, chat=True), config).token_ids
    assert shown_ids(page, "cascade") == ids != expected(tiny, "full")
    assert page.locator(".ce-badge").is_hidden()
    assert page.get_by_text("checks every draft, with tolerance 0.9").is_visible()


def test_fast_mode_claims_no_identity(page):
    run_to_end(page)
    assert page.locator(".ce-badge").is_hidden()


def test_stop_keeps_the_text(page, slow):
    page.click("#ce-run")
    page.wait_for_function("document.querySelectorAll('.ce-text .t').length > 20")
    page.click("#ce-stop")
    page.wait_for_selector(".ce-status.stopped")
    before = shown_ids(page, "cascade"), shown_ids(page, "full")
    assert all(before)
    page.wait_for_selector(".ce-status.done")
    assert page.locator(".ce-status").first.inner_text() == "Stopped. The text so far is kept and was checked."
    after = shown_ids(page, "cascade"), shown_ids(page, "full")
    # The server may have been some tokens ahead of the page.
    assert all(ids[:len(shown)] == shown and len(ids) < 200 for ids, shown in zip(after, before))
    agreement = page.locator(".ce-tile", has_text="Agreement").locator(".ce-value").inner_text()
    assert agreement.endswith("%"), "known after Stop, too"


def test_a_run_after_a_stop_starts_anew(page, slow, tiny, monkeypatch):
    page.click("#ce-run")
    page.wait_for_selector(".ce-text .t")
    page.click("#ce-stop")
    page.wait_for_selector(".ce-status.stopped")
    monkeypatch.undo()
    page.wait_for_timeout(500)        # gradio ignores clicks until the cancellation is done
    run_to_end(page)
    assert shown_ids(page, "full") == expected(tiny, "full")


def test_clear_stops_and_empties_the_page(page, slow):
    page.click("#ce-run")
    page.wait_for_selector(".ce-text .t")
    open_settings(page)
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
    page.fill("#ce-prompt textarea", "sky " * 300)
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.error")
    assert "1024" in page.locator(".ce-status").inner_text()


def test_untrained_exits_are_labelled(page):
    assert page.get_by_text("untrained exits").is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(open_page, tiny_url, theme):
    page = open_page(f"{tiny_url}?__theme={theme}", width=360, height=780)
    run_to_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_on_a_phone_a_card_leaves_its_token_in_sight(open_page, tiny_url):
    page = open_page(tiny_url, width=360, height=780, has_touch=True)
    run_to_end(page)
    tokens = page.locator(f".ce-text[data-side=cascade] {FINAL}")
    # One that no line break cuts in two: the middle of its box is then on it.
    whole = tokens.evaluate_all("""all => all.findIndex((t, i) => i >= 120 && t.getClientRects().length === 1
        && t.innerText.trim() && t.getBoundingClientRect().width > 8)""")
    assert whole >= 0
    tokens.nth(whole).tap()
    page.wait_for_selector(".ce-candidate")
    # Tapping may scroll the token to the very edge, where a fraction of a pixel is above it.
    page.wait_for_function("""() => { const at = document.querySelector('.t.chosen').getBoundingClientRect(),
        card = document.querySelector('.ce-card').getBoundingClientRect();
        return at.top > -1 && at.bottom <= card.top && card.bottom <= innerHeight && card.right <= innerWidth; }""")


# -- looking closer -----------------------------------------------------------------------------------------

def test_a_card_shows_everything_about_a_token(page, tiny):
    run_to_end(page)
    tokens = page.locator(f".ce-text[data-side=cascade] {FINAL}")
    tokens.nth(5).click()
    card = page.locator(".ce-card")
    page.wait_for_function("document.querySelectorAll('.ce-card .ce-candidate').length >= 14")
    ids = expected(tiny, "cascade")
    assert f"{ids[5]} · bytes" in card.inner_text()
    assert "% of the weights that the full model reads" in card.inner_text()
    rows = card.locator("tbody tr")
    assert rows.count() == 4 and all("%" in rows.nth(s).inner_text() for s in range(4))
    page.keyboard.press("ArrowRight")
    assert f"{ids[6]} · bytes" in card.inner_text()
    page.keyboard.press("Home")
    assert f"{ids[0]} · bytes" in card.inner_text()
    page.keyboard.press("Escape")
    assert card.is_hidden()
    tokens.nth(9).hover()
    card.wait_for()
    assert f"{ids[9]} · bytes" in card.inner_text()


def test_a_key_of_the_legend_highlights_its_tokens(page):
    run_to_end(page)
    assert len(colours_seen(page)) >= 3
    key = page.locator(".ce-key").nth(1)
    key.click()
    assert key.get_attribute("aria-pressed") == "true" and len(colours_seen(page)) == 2
    key.click()
    assert key.get_attribute("aria-pressed") == "false" and len(colours_seen(page)) >= 3


def test_a_digit_does_what_its_key_of_the_legend_does(page):
    page.fill("#ce-prompt textarea", "")
    page.locator("#ce-prompt textarea").press_sequentially("2 words")
    assert page.locator(".ce-key[aria-pressed=true]").count() == 0, "digits of a prompt are digits"
    run_to_end(page)
    page.locator(".ce-text[data-side=cascade]").focus()
    page.keyboard.press("2")
    assert page.locator(".ce-key").nth(1).get_attribute("aria-pressed") == "true" and len(colours_seen(page)) == 2
    page.keyboard.press("4")
    assert page.locator(".ce-key[aria-pressed=true]").all_inner_texts()[0].startswith("full")
    page.keyboard.press("4")
    assert page.locator(".ce-key[aria-pressed=true]").count() == 0


def test_a_button_leads_to_the_first_difference(page):
    assert page.get_by_role("button", name="Show the first difference").count() == 0
    run_to_end(page)
    page.eval_on_selector_all(".ce-text", "all => all.forEach(box => box.scrollTop = box.scrollHeight)")
    page.get_by_role("button", name="Show the first difference").click()
    inside = page.eval_on_selector_all(".ce-text", """all => all.map(box => { const b = box.getBoundingClientRect(),
        t = box.querySelector('.split').getBoundingClientRect(); return t.top >= b.top && t.bottom <= b.bottom; })""")
    assert inside == [True, True]
    assert page.locator(".t.chosen.split").count() == 1 and page.locator(".ce-card").is_visible()
    page.wait_for_selector(".ce-candidate")
    covered = page.eval_on_selector_all(".t.split", """all => all.map(t => { const b = t.getBoundingClientRect(),
        card = document.querySelector('.ce-card').getBoundingClientRect();
        return b.left < card.right && card.left < b.right && b.top < card.bottom && card.top < b.bottom; })""")
    assert covered == [False, False]


def test_what_the_full_model_would_not_choose_is_marked(page, tiny):
    run_to_end(page)
    engine, tokenizer = tiny
    ours = expected(tiny, "cascade")
    choices = engine.full_choices(visitor_token_ids(tokenizer, SKY, chat=True), ours)
    marked = page.eval_on_selector_all(f".ce-text[data-side=cascade] {FINAL}", """all =>
        all.flatMap((t, i) => t.classList.contains('differs') ? [i] : [])""")
    assert marked == [i for i, (a, b) in enumerate(zip(ours, choices)) if a != b] != []


def test_the_layer_map_shows_what_each_exit_would_have_written(page, tiny):
    open_tab(page, "Layers")
    assert page.locator(".ce-tabpanel-layers").inner_text().startswith("Press Run: when the run is over, this table")
    run_to_end(page)
    page.wait_for_selector(".ce-map-table td")
    assert page.locator(".ce-map-table tr").count() == 4 and page.locator(".ce-map-table td").count() == 4 * 48
    assert page.locator(".ce-map-table td.left").count() == 48, "one exit writes each token"
    page.get_by_role("button", name="later").click()
    shown = f"tokens 49 to 96 of {len(expected(tiny, 'cascade'))}"
    page.wait_for_function("shown => document.querySelector('.ce-map-bar').textContent.includes(shown)", arg=shown)


def thresholds_shown(page) -> list[str]:
    return page.eval_on_selector_all("#ce-settings input[aria-label*='Exit']:not([type=range])",
                                     "all => all.filter(x => x.offsetParent).map(x => x.value)")


def test_an_exit_that_always_writes_colours_every_token(page):
    choose_exit(page, "Always exit 2")
    run_to_end(page)
    assert len(colours_seen(page)) == 1
    assert page.locator(".ce-count").nth(1).inner_text() == "100%"


def test_a_disabled_exit_writes_nothing(page):
    choose_exit(page, "Disable exit 2")
    run_to_end(page)
    assert page.locator(".ce-count").nth(1).inner_text() == "0%"


def test_a_preset_sets_every_threshold_even_when_settings_are_closed(page, tiny):
    with page.expect_response("**/run/predict*"):       # the thresholds have arrived
        page.get_by_label("Fast", exact=True).check()
    page.wait_for_timeout(500)                          # until the page has put them into its closed sliders
    run_to_end(page)
    engine, tokenizer = tiny
    fast = sliders(engine, PRESETS["Fast"])
    config = DecodeConfig(max_new_tokens=200, thresholds=fast)
    assert shown_ids(page, "cascade") == engine.run(visitor_token_ids(tokenizer, SKY, chat=True), config).token_ids
    open_settings(page)
    assert thresholds_shown(page) == [f"{t:g}" for t in fast]
    slider = page.get_by_label("number input for Exit 2")
    slider.fill("0.4")
    slider.press("Tab")
    page.wait_for_function("!document.querySelector('#ce-preset input:checked')")


# -- keeping and sharing ------------------------------------------------------------------------------------

def saved(page, button: str, path: Path) -> Path:
    open_tab(page, "Save")
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    download.value.save_as(path)
    return path


def test_a_saved_run_is_replayed(page, open_page, tiny_url, tmp_path):
    run_to_end(page)
    shown = shown_ids(page, "cascade"), shown_ids(page, "full")
    file = saved(page, "Save run", tmp_path / "run.json")
    assert json.loads(file.read_text())["format"] == FORMAT
    other = open_page(tiny_url)
    other.set_input_files("#ce-links input[type=file], input[type=file]", file)
    other.wait_for_selector(".ce-status.done")
    assert (shown_ids(other, "cascade"), shown_ids(other, "full")) == shown
    assert other.locator(".ce-recorded").is_visible()
    other.click("#ce-run")
    other.wait_for_selector(".ce-recorded", state="hidden")
    other.wait_for_selector(".ce-status.done")
    assert shown_ids(other, "full") == shown[1], "a live run after a replay"


def test_a_file_that_is_not_a_run_gets_a_message(page, tmp_path):
    run_to_end(page)
    before = shown_ids(page, "cascade")
    (tmp_path / "other.json").write_text('{"format": 1, "records": [1, 2]}')
    page.set_input_files("input[type=file]", tmp_path / "other.json")
    page.wait_for_selector(".ce-status.error")
    assert "entry 0 should be an object, got 1" in page.locator(".ce-status").inner_text()
    assert shown_ids(page, "cascade") == before


def test_tokens_are_saved_as_a_table(page, tmp_path):
    run_to_end(page)
    with saved(page, "Save tokens", tmp_path / "tokens.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["token"]) for r in rows if r["side"] == "cascade"] == shown_ids(page, "cascade")
    assert not any(r["text"].startswith(("=", "+", "-", "@")) for r in rows)


def test_the_quality_slider_sets_certified_thresholds(open_page):
    engine = tiny_engine(seed=SEED)
    engine.bank.calibration = Calibration("", 40, 64, 0.1, (Point(0.9, 0.01, 0.05, 0.9), Point(0.5, 0.1, 0.2, 0.5)))
    with serve(engine, tiny_tokenizer()) as url:
        page = open_page(url)
        slider = page.locator("#ce-quality")
        open_settings(page)
        assert "prompts like the 40 that were tested" in slider.inner_text()
        number = slider.locator("input[type=number]")
        assert number.input_value() == "80", "certified at the default threshold"
        assert [number.get_attribute(end) for end in ("min", "max")] == ["80", "95"], "what is certified"
        for wanted, threshold in ((95, 0.9), (80, 0.5), (81, 0.9)):
            set_number(page, "number input for Wanted agreement, %", wanted)
            for s, at in enumerate(sliders(engine, threshold)):
                box = page.get_by_label(f"number input for Exit {s + 1}").and_(page.locator("input[type=number]"))
                expect(box).to_have_value(f"{at:g}")


def test_the_last_of_several_quick_slider_moves_counts(open_page):
    engine = tiny_engine(seed=SEED)
    engine.bank.calibration = Calibration("", 40, 64, 0.1, (Point(0.9, 0.01, 0.05, 0.9), Point(0.5, 0.1, 0.2, 0.5)))
    with serve(engine, tiny_tokenizer()) as url:
        page = open_page(url)
        open_settings(page)
        first = page.get_by_label("number input for Exit 1").and_(page.locator("input[type=number]"))
        for moves, at in (((80, 95, 80, 81), "0.9"), ((95, 81, 95, 80), "0.5")):
            for wanted in moves:            # without waiting for the answer to the one before
                set_number(page, "number input for Wanted agreement, %", wanted)
            expect(first).to_have_value(at)


def link_of(page) -> dict[str, str]:
    open_settings(page)
    page.click("#ce-link")
    page.wait_for_function("location.search.includes('model=')")
    close_settings(page)
    return dict(parse_qsl(urlparse(page.url).query))


def test_a_link_restores_every_setting(page, open_page):
    page.fill("#ce-prompt textarea", "a & b = c? <b>é😀")
    choose_exact(page)
    choose_exit(page, "Disable exit 3")
    open_settings(page)
    page.get_by_label("Chat", exact=True).uncheck()
    for label, value in (("number input for Maximum length", 77), ("number input for Draft length", 3),
                         ("number input for Tolerance", 0.3), ("number input for Temperature", 0.5),
                         ("number input for Top-p", 0.9), ("Seed", 12), ("number input for Exit 1", 0.55),
                         ("number input for Exit 2", 0.65)):
        set_number(page, label, value)
    page.wait_for_timeout(300)
    link = link_of(page)
    assert link == dict(p="a & b = c? <b>é😀", mode="verified", chat="false", n="77", drafts="3", tol="0.3", temp="0.5",
                        top_p="0.9", seed="12", exit="-4", t="0.55,0.65,0.95,0.8,0.8,0.8", model="llama-untied")
    other = open_page(page.url)
    other.wait_for_function("document.querySelector('#ce-prompt textarea').value.startsWith('a & b')")
    other.evaluate("history.replaceState(null, '', '/')")
    assert link_of(other) == link
    assert other.locator("#ce-preset input:checked").count() == 0, "no preset has these thresholds"


def test_a_link_shows_the_preset_that_it_holds(open_page, tiny, tiny_url):
    careful = sliders(tiny[0], PRESETS["Careful"])
    page = open_page(f"{tiny_url}?t={','.join(map(str, careful))}")
    page.wait_for_function("document.querySelector('#ce-preset input:checked + *, #ce-preset .selected')"
                           ".textContent.includes('Careful')")


def test_a_link_with_wrong_values_changes_nothing(open_page, tiny_url):
    page = open_page(f"{tiny_url}?mode=warp&n=many&temp=1e999&t=a,b&exit=77&model=other&seed=nan")
    page.wait_for_timeout(500)
    assert page.get_by_label("Early exits: may change").is_checked()
    run_to_end(page)


# -- the script by itself --------------------------------------------------------------------------

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
    """Tokens and status that a fresh token view shows after a list of values."""
    return lambda *values: page.evaluate(DRAW, [APP_JS, values])


@pytest.fixture
def recorded(tiny) -> list[str]:
    """The values of a verified run, each longer than the one before."""
    engine, tokenizer = tiny
    config = DecodeConfig(mode="verified", max_new_tokens=40, thresholds=0.5)
    ids = visitor_token_ids(tokenizer, "sky", chat=True)
    stream = TokenStream(engine, tokenizer, [Side("cascade", "", config), Side("full", "", config)], ids)
    values = [stream.text, *frames(stream, race({
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


def test_half_characters_of_a_record_are_replaced(draw, recorded):
    """JSON can hold half a character, a page cannot: it shows a replacement character instead."""
    values = recorded[-1].splitlines()
    first = next(n for n, line in enumerate(values) if expand(line).get("side") == "full" and "text" in expand(line))
    values[first] = write_line(**expand(values[first]) | {"text": "\ud83d\u202e"}).strip()
    tokens, _ = draw("\n".join(values) + "\n")
    assert [text[1:] for _, _, text in tokens].count("\u202e") == 1 and len(tokens) == len(draw(recorded[-1])[0])


def test_a_frame_after_stop_or_clear_is_ignored(draw, recorded, tiny):
    for end in (stopped(recorded[1]), model_line(Shape.of(tiny[0]))):
        assert draw(*recorded[:2], end, recorded[2], recorded[-1]) == draw(*recorded[:2], end)


class Two(Library):
    """Two tiny models, both in memory."""

    def __init__(self, engines: dict):
        super().__init__(())
        self.shapes = {label: Shape(label, *shape_of(engine)) for label, engine in engines.items()}
        self._engines = engines

    def ready(self, label):
        return True

    def get(self, label, progress=None):
        return self._engines[label], tiny_tokenizer()

    def _bank(self, label):
        return self._engines[label].bank


def shape_of(engine) -> tuple:
    return engine.model.num_layers, engine.model.exit_layers, engine.bank.config.trained


def test_a_visitor_changes_the_model_and_a_link_remembers_it(open_page):
    one = tiny_engine(seed=SEED)
    model = SegmentedModel(tiny_base("qwen3"), (3,), name="qwen3")
    two = Engine(model, ExitBank.untrained(model))
    with serve_library(Two({"one": one, "two": two})) as url:
        page = open_page(url)
        open_settings(page)
        page.get_by_label("Model", exact=True).click()
        page.get_by_role("option", name="two").click()
        page.wait_for_function("document.querySelectorAll('li:not([hidden]) > .ce-key').length === 2")
        assert page.locator(".ce-model").inner_text() == "two"
        choose_exit(page, "Always exit 1")
        link = link_of(page)
        run_to_end(page)
        assert shown_ids(page, "full") == expected((two, tiny_tokenizer()), "full")
        assert page.locator(".ce-count").nth(0).inner_text() == "100%"
        other = open_page(page.url)
        other.wait_for_function("document.querySelectorAll('li:not([hidden]) > .ce-key').length === 2")
        other.wait_for_function("document.querySelector('#ce-model-menu input').value === 'two'")
        other.evaluate("history.replaceState(null, '', '/')")
        assert link_of(other) == link


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
