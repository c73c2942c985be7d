"""Reading a run closely, in headless Chromium: the token card, differences, worst moments and forks."""

import csv
import io
import random
import re

import pytest

import app
from cascadeexit.config import DecodeConfig
from cascadeexit.prompts import visitor_token_ids
from tests.browser.driving import open_tab, run_to_end
from tests.browser.reading import FINAL, SKY, shown_ids
from tests.browser.stage import Stage, finished_run, handlers_of
from tests.browser.test_access import violations

pytestmark = pytest.mark.browser
THRESHOLDS = (0.6, 0.72, 0.83, 0.92, 0.96, 0.98)
PHONE = dict(width=360, height=740)
DESKTOP = dict(width=1280, height=800)
SIDES = ("cascade", "full")
RUN = dict(prompt=SKY, max_new_tokens=60, thresholds=THRESHOLDS)
BOX = "node => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; }"


def token(page, i: int, side: str = "cascade"):
    return page.locator(f".ce-text[data-side={side}] {FINAL}[data-i='{i}']")


def box(locator) -> list[float]:
    return locator.evaluate(BOX)


def overlap(a: list[float], b: list[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.fixture(scope="module")
def handlers(tiny):
    return handlers_of(*tiny)


@pytest.fixture(scope="module")
def fast(handlers) -> str:
    """The stream of a run of the cascade."""
    return finished_run(handlers, RUN)


@pytest.fixture
def stage(chromium, handlers):
    """Function that opens a stage: a page of the token view without gradio. Errors fail the test at its end."""
    contexts, errors = [], []

    def open_(stream="", size=DESKTOP, theme="light", **options) -> Stage:
        context = chromium.new_context(viewport=size, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        opened = Stage(page, handlers, theme)
        if stream:
            opened.show(stream)
        return opened

    yield open_
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def done(stage, fast):
    """A page at the end of a run of the cascade."""
    return stage(fast).page


@pytest.fixture(scope="module")
def checked(handlers) -> str:
    """The stream of a run in exact mode."""
    return finished_run(handlers, RUN | dict(mode="verified", exit_choice=0))


@pytest.fixture
def edits(stage, fast):
    """A page with a run whose text with exits is the full model's with edits.

    Tokens 10 and 11 are others, tokens 25 to 27 are missing, and two more stand before token 40.
    """
    opened = stage(fast)
    records = opened.records()
    whole = [r for r in records if r["type"] == "token" and r["side"] == "full"]
    assert len(whole) == 60
    texts = [*whole[:10], whole[50], whole[51], *whole[12:25], *whole[28:40], whole[3], whole[4], *whole[40:]]
    ours = [dict(r, side="cascade", i=i, exit=i % 4, conf=[0.5] * 3) for i, r in enumerate(texts)]
    stats = [next(r for r in reversed(records) if r["type"] == "stats" and r["side"] == side) for side in SIDES]
    end = dict(next(r for r in records if r["type"] == "end"), differs=[10, 11], moments=[
        dict(i=11, said="b", full=" quite", p_said=0.05, p_full=0.32, id=5),
        dict(i=10, said="a", full="c", p_said=0.1, p_full=0.2, id=6)])
    stats = [dict(r, done=True) for r in stats]
    opened.show_records([records[0], dict(records[1], run="edited"), *ours, *whole, *stats, end])
    return opened.page


# -- the card -----------------------------------------------------------------------------------------------


def test_the_card_opens_when_the_pointer_rests_and_a_click_pins_it(done):
    card = done.locator(".ce-card")
    rested = token(done, 3).evaluate("""node => new Promise(opened => {
        const card = document.querySelector('.ce-card'), start = performance.now();
        const look = () => card.hidden || opened(performance.now() - start);
        new MutationObserver(look).observe(card, { attributes: true });
        node.dispatchEvent(new PointerEvent('pointerover', { bubbles: true, pointerType: 'mouse' }));
    })""")
    assert rested >= 140
    assert not card.evaluate("node => node.classList.contains('pinned')")
    second = box(token(done, 4))
    done.mouse.move(second[0] + 2, second[1] + 8)
    done.mouse.move(4, 4)
    card.wait_for(state="hidden")
    token(done, 3).click()
    card.wait_for()
    done.mouse.move(second[0] + 2, second[1] + 8)
    done.wait_for_timeout(400)
    assert done.locator(".ce-card-place").inner_text().startswith("token 4 ·"), "a pinned card moved"
    done.get_by_role("button", name="Close this card").click()
    assert card.is_hidden()
    token(done, 3).click()
    done.keyboard.press("Escape")
    assert card.is_hidden()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_card_covers_no_token_and_stays_on_the_screen(stage, fast, size):
    page = stage(fast, size).page
    card = page.locator(".ce-card")
    for i in (0, 5, 17, 40, len(shown_ids(page, "cascade")) - 1):
        node = token(page, i)
        node.scroll_into_view_if_needed()
        node.click(position={"x": 1, "y": 5})
        page.wait_for_selector(".ce-candidate")
        page.wait_for_timeout(100)
        left, top, right, bottom = here = box(card)
        assert left >= 0 and top >= 0 and right <= size["width"] and bottom <= size["height"], (i, here)
        assert not overlap(here, box(node)), (i, here, box(node))
        close = page.get_by_role("button", name="Close this card")
        assert close.is_visible()
        close.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_the_card_explains_both_percentages_and_draws_the_lens(done):
    token(done, 20).click()
    done.wait_for_selector(".ce-candidate")
    heads = done.locator(".ce-readings thead th").all_inner_texts()
    assert heads == ["Who", "Chance that this exit is right",
                     "Likeliest tokens in this row, and the probability of each"]
    assert re.search(r"\d+%", done.locator(".ce-chance").first.inner_text())
    rows = done.locator(".ce-readings tbody tr").count()
    labels = done.locator(".ce-lens text").all_text_contents()
    assert {"0%", "50%", "100%", "exit", "full"} <= {*labels}
    assert done.locator(".ce-lens-dot.ours").count() <= rows == 4
    assert done.locator(".ce-lens").get_attribute("aria-label").startswith("Probability of “")


def test_the_card_says_which_exits_the_run_did_not_need(done):
    first = token(done, 0)
    exits = done.eval_on_selector_all(f".ce-text[data-side=cascade] {FINAL}", "all => all.map(t => t.className)")
    first = next(i for i, name in enumerate(exits) if " e0" in name)
    token(done, first).click()
    done.wait_for_selector(".ce-candidate")
    chances = done.locator(".ce-chance").all_inner_texts()
    assert "needs" in chances[0]
    assert all(re.fullmatch(r"\d+%, computed afterwards", words) for words in chances[1:3])
    assert "the run did not need this exit" in done.locator(".ce-readings caption").inner_text()


def test_the_keyboard_opens_the_card_and_reaches_its_buttons(done):
    done.locator(".ce-text[data-side=cascade]").focus()
    done.keyboard.press("ArrowRight")
    done.keyboard.press("ArrowRight")
    done.wait_for_selector(".ce-candidate")
    assert done.locator(".ce-card-place").inner_text().startswith("token 2 ·")
    done.keyboard.press("Enter")
    assert done.evaluate("document.activeElement.getAttribute('aria-label')") == "Close this card"
    done.keyboard.press("Escape")
    assert done.locator(".ce-card").is_hidden()
    assert done.evaluate("document.activeElement.dataset.side") == "cascade"


def test_cards_of_exact_mode_do_not_contradict_themselves(stage, checked):
    page, seen = stage(checked).page, set()
    for i in range(len(shown_ids(page, "cascade"))):
        token(page, i).evaluate("node => node.click()")
        words = page.locator(".ce-story").inner_text()
        parts = [text for text in page.locator(".ce-part").all_inner_texts()]
        if "had drafted" in words:
            kind = "correction"
            row = page.locator("tr", has=page.locator(".ce-part", has_text="drafted “"))
            assert "comput" not in row.locator(".ce-chance").inner_text()
        elif "copied from earlier" in words or words.startswith("It was copied"):
            kind = "copied"
        elif " drafted it" in words:
            kind = "accepted"
            assert "drafted it" in parts
        else:
            kind = "free"
            assert "There was no draft for this place" in words
        seen.add(kind)
        assert "read 0%" not in page.locator(".ce-card-facts").inner_text()
    assert {"correction", "accepted"} <= seen


def test_the_card_of_a_recorded_run_says_what_is_known(stage, fast):
    page = stage('{"type":"replay"}\n' + fast, reduced_motion="reduce").page
    page.wait_for_selector(".ce-recorded:visible")
    token(page, 7).click()
    assert re.match(r"(Exit \d wrote it|No exit was confident)", page.locator(".ce-story").inner_text())
    caption = page.locator(".ce-readings caption").inner_text()
    assert "This recorded run does not have the other choices" in caption and "Press Run" in caption
    assert page.locator(".ce-fork").count() == 0
    token(page, 7, "full").click()
    assert page.locator(".ce-fork").is_disabled() and "Press Run" in page.locator(".ce-fork-row").inner_text()
    page.keyboard.press("Escape")
    open_tab(page, "Worst moments")
    assert page.get_by_role("button", name="Try").first.is_disabled()
    assert "A recorded run cannot be continued. Press Run" in page.locator(".ce-moments-words").inner_text()
    open_tab(page, "Layers")
    words = page.locator(".ce-tabpanel-layers").inner_text()
    assert words.startswith("A recorded run has no table of layers. Press Run") and len(words.splitlines()) == 1


# -- differences ----------------------------------------------------------------------------------------------


def align(page, a: list[int], b: list[int]) -> list[dict]:
    return page.evaluate("([a, b]) => alignIds(a, b)", [a, b])


def test_alignment_covers_both_texts_and_finds_what_is_equal(chromium):
    page = chromium.new_page()
    script = (app.ASSETS / "page/align.js").read_text(encoding="utf-8")
    page.add_script_tag(content="const feature = () => 0;\n" + script)
    dice = random.Random(5)
    for _ in range(60):
        a = [dice.randrange(30) for _ in range(dice.randrange(60))]
        b = [t for t in a if dice.random() > 0.1]
        for _ in range(dice.randrange(4)):
            b[dice.randrange(len(b) + 1):0] = [dice.randrange(100, 110)]
        blocks = align(page, a, b)
        assert [k for x in blocks for k in range(x["a0"], x["a1"])] == list(range(len(a)))
        assert [k for x in blocks for k in range(x["b0"], x["b1"])] == list(range(len(b)))
        assert all(a[x["a0"]:x["a1"]] == b[x["b0"]:x["b1"]] for x in blocks if x["same"])
        assert all(x["same"] != y["same"] for x, y in zip(blocks, blocks[1:]))
    shared = [dice.randrange(1000) for _ in range(500)]
    a, b = [1, 2, *shared[:200], 3, *shared[200:]], [*shared[:200], 7, 8, 9, *shared[200:], 4]
    assert sum(x["a1"] - x["a0"] for x in align(page, a, b) if x["same"]) == 500
    assert [x["same"] for x in align(page, a, b)] == [False, True, False, True, False]
    a, b = ([dice.randrange(300) for _ in range(1024)] for _ in range(2))
    assert page.evaluate("([a, b]) => { const t = performance.now(); alignIds(a, b); return performance.now() - t; }",
                         [a, b]) < 1000
    page.close()


def unmarked(page, side: str) -> list[int]:
    return page.eval_on_selector_all(f".ce-text[data-side={side}] {FINAL}:not(.swapped, .alone)",
                                     "all => all.map(t => +t.dataset.id)")


def test_differences_are_marked_and_the_rest_can_be_folded(edits):
    page = edits
    ours = shown_ids(page, "cascade")
    assert page.locator(".t.swapped, .t.alone").count() == 0
    page.get_by_role("button", name="Differences", exact=True).click()
    assert unmarked(page, "cascade") == unmarked(page, "full")
    marks = page.eval_on_selector_all(".ce-text .t.swapped, .ce-text .t.alone", """all => all.map(t =>
        [t.closest('.ce-text').dataset.side, t.classList.contains('alone'), +t.dataset.i])""")
    assert marks == [*[["cascade", False, i] for i in (10, 11)], *[["cascade", True, i] for i in (37, 38)],
                     *[["full", False, i] for i in (10, 11)], *[["full", True, i] for i in (25, 26, 27)]]
    assert token(page, 10).evaluate("t => getComputedStyle(t).borderTopWidth") == "2px"
    place = page.locator(".ce-tile", has_text="Same position").locator(".ce-value").inner_text()
    words = page.locator(".ce-compare-words").inner_text()
    assert words == f"3 stretches differ · 92% of the tokens are equal when lined up, {place} at the same position"
    assert page.locator(".t.split").evaluate_all("all => all.map(t => +t.dataset.i)") == [10, 10]
    visible = f".ce-text[data-side=cascade] {FINAL}:visible"
    page.get_by_label("Only differences").check()
    folds = page.locator(".ce-text[data-side=cascade] .ce-fold")
    hidden = [int(re.search(r"\d+", text)[0]) for text in folds.all_inner_texts()]
    assert hidden == [7, 7, 6, 17] and page.locator(visible).count() == len(ours) - sum(hidden)
    folds.nth(3).click()
    assert page.locator(visible).count() == len(ours) - 20
    page.locator(".ce-text[data-side=cascade]").focus()
    page.keyboard.press("Home")
    assert page.locator(".ce-card-place").inner_text().startswith("token 1 ·"), "a folded token was not shown"
    page.get_by_label("Only differences").uncheck()
    assert page.locator(visible).count() == len(ours) and folds.count() == 0
    page.get_by_role("button", name="Differences", exact=True).click()
    assert page.locator(".ce-compare").is_hidden()
    assert token(page, 10).evaluate("t => getComputedStyle(t).borderTopWidth") == "0px"


@pytest.mark.parametrize("size", [DESKTOP, dict(width=1024, height=700), PHONE], ids=["desktop", "small", "phone"])
def test_the_first_difference_comes_into_view_in_both_texts(edits, size):
    edits.set_viewport_size(size)
    edits.evaluate("document.querySelectorAll('.ce-text').forEach(x => { x.scrollTop = 9e9; })")
    edits.get_by_role("button", name="Show the first difference").click()
    card = edits.locator(".ce-card")
    assert card.is_visible() == (size is not PHONE), "no room for it on a phone"
    if size is not PHONE:
        edits.wait_for_function("document.querySelector('.ce-card-body')")
        edits.wait_for_timeout(300)             # its table has come, and it has its place
    strip = box(edits.locator(".ce-strip"))
    for side in SIDES:
        text, split = (box(edits.locator(f".ce-text[data-side={side}]{rest}")) for rest in ("", " .split"))
        assert text[1] <= split[1] and split[3] <= text[3]
        assert strip[3] <= split[1] and split[3] <= size["height"], "not on the screen"
        assert size is PHONE or not overlap(box(card), split), "covered by the card"


def test_texts_scroll_together_by_their_alignment(edits):
    page, tops = edits, """() => ['cascade', 'full'].map(side => {
        const box = document.querySelector(`.ce-text[data-side=${side}]`), edge = box.getBoundingClientRect().top + 4;
        return +[...box.querySelectorAll('.t')].find(t => t.getBoundingClientRect().bottom > edge).dataset.i; })"""
    page.evaluate("""document.querySelectorAll('.ce-text').forEach(x => {
        x.style.height = '60px'; x.style.width = '150px'; })""")
    page.get_by_role("button", name="Differences", exact=True).click()
    page.evaluate("document.querySelectorAll('.ce-text').forEach(x => { x.scrollTop = 0; })")
    page.wait_for_timeout(100)
    left, right = (page.locator(f".ce-text[data-side={side}]") for side in SIDES)
    left.hover()
    page.mouse.wheel(0, 200)
    page.wait_for_function("document.querySelector('.ce-text[data-side=full]').scrollTop > 0")
    page.wait_for_timeout(200)
    ours, theirs = page.evaluate(tops)
    wanted = ours if ours < 25 else ours + 3 if ours < 37 else ours + 1
    assert abs(theirs - wanted) <= 6 and ours > 5, (ours, theirs)
    page.mouse.wheel(0, -2000)
    page.wait_for_function("document.querySelector('.ce-text[data-side=full]').scrollTop === 0")
    page.get_by_label("Scroll together").uncheck()
    left.hover()
    page.mouse.wheel(0, 100)
    page.wait_for_function("document.querySelector('.ce-text[data-side=cascade]').scrollTop > 50")
    page.wait_for_timeout(200)
    assert right.evaluate("x => x.scrollTop") == 0


# -- worst moments --------------------------------------------------------------------------------------------


def test_worst_moments_are_stepped_through_with_keys_and_clicks(done):
    open_tab(done, "Worst moments")
    rows = done.locator(".ce-moment")
    assert rows.count() > 2
    done.locator(".ce-text[data-side=cascade]").focus()
    for key, place in (("n", 0), ("n", 1), ("p", 0)):
        done.keyboard.press(key)
        assert rows.nth(place).get_attribute("aria-current") == "true"
        number = re.search(r"token (\d+)", rows.nth(place).inner_text())[1]
        assert done.locator(".ce-card-place").inner_text().startswith(f"token {number} ·")
        text, chosen = box(done.locator(".ce-text[data-side=cascade]")), box(done.locator(".t.chosen"))
        assert text[1] <= chosen[1] and chosen[3] <= text[3]
    done.keyboard.press("Escape")
    rows.nth(2).click()
    assert done.locator(".ce-card").is_visible()
    done.fill("#ce-prompt textarea", "")
    done.locator("#ce-prompt textarea").press("n")
    assert done.input_value("#ce-prompt textarea") == "n"
    assert rows.nth(2).get_attribute("aria-current") == "true", "a letter typed into the prompt moved on"


def test_moments_say_what_was_said_and_what_the_full_model_would_choose(edits):
    open_tab(edits, "Worst moments")
    assert edits.locator(".ce-moment").count() == 2
    first = edits.locator(".ce-moment").first.inner_text()
    assert "wrote b 5%" in first and "full model: quite 32%" in first and "token 12" in first and "exit 4" not in first
    edits.locator(".ce-moment").first.click()
    words = edits.locator(".ce-story").inner_text()
    assert "The full model would choose “quite” (probability 32%) and gives this token 5%." in words


def test_a_tried_moment_keeps_its_place_and_says_whether_it_mattered(stage):
    opened = stage()
    opened.run(**RUN)
    page = opened.page
    open_tab(page, "Worst moments")
    rows = page.locator(".ce-moments li")
    columns = ".ce-moment > :not(.ce-moment-context)"
    before = page.locator(columns).all_inner_texts()
    page.locator(".ce-moment").nth(2).click()
    page.keyboard.press("Escape")
    rows.nth(2).get_by_role("button", name="Try").click()
    page.wait_for_selector(".ce-text[data-side=fork1] .forked")
    page.wait_for_selector(".ce-status.done")
    assert page.locator(columns).all_inner_texts() == before, "the main run alone, in the same order"
    assert page.locator(".ce-moment").nth(2).get_attribute("aria-current") == "true"
    verdict = re.fullmatch(r"(hardly mattered|changed (part of )?the text), (\d+%) of the rest is equal",
                           rows.nth(2).locator(".ce-moment-verdict").inner_text())
    aside = page.locator(".ce-forked .ce-aside").inner_text()
    assert f"it {verdict[1]}." in aside and verdict[3] in aside
    rows.nth(2).get_by_role("button", name="Show Fork 1").click()
    assert page.locator(".ce-panel").count() == 3, "no second fork of the same choice"
    choice = page.get_by_label("Text whose worst moments")
    assert choice.locator("option").all_inner_texts()[1] == "Fork 1"
    choice.select_option("fork1")
    listed = page.locator(".ce-moment-place").all_inner_texts()
    start = page.locator(".ce-text[data-side=fork1] .kept").count()
    assert all(int(place.split()[1]) > start + 1 for place in listed)
    choice.select_option("cascade")
    assert page.locator(columns).all_inner_texts() == before


def test_an_exact_run_has_no_worst_moments(stage, checked):
    page = stage(checked).page
    open_tab(page, "Worst moments")
    assert page.locator(".ce-moments-words").inner_text().startswith("Nothing to list: the full model checked")


# -- forks ----------------------------------------------------------------------------------------------------


def test_a_fork_continues_from_the_chosen_token_beside_the_first_text(stage, tiny):
    opened, (engine, tokenizer) = stage(), tiny
    opened.run(**RUN)
    done = opened.page
    before = shown_ids(done, "cascade")
    token(done, 20).click()
    done.locator("button.ce-candidate").first.click()
    done.locator(".ce-fork").click()
    done.wait_for_selector(".ce-text[data-side=fork1] .forked")
    done.wait_for_selector(".ce-status.done")
    ids = shown_ids(done, "fork1")
    assert ids[:20] == before[:20] and ids[20] != before[20]
    config = DecodeConfig(mode="cascade", max_new_tokens=60 - 21, thresholds=THRESHOLDS[:engine.num_exits])
    prompt = visitor_token_ids(tokenizer, SKY, chat=True)
    assert ids[21:] == engine.run([*prompt, *ids[:21]], config).token_ids
    assert shown_ids(done, "cascade") == before
    assert done.locator(".ce-text[data-side=fork1] .kept").count() == 20
    assert done.locator(".forked").evaluate("t => getComputedStyle(t).textDecorationLine") == "underline"
    assert "of what follows is the same as in" in done.locator(".ce-forked .ce-aside").inner_text()
    panels = [box(panel) for panel in done.locator(".ce-panel").all()]
    assert len(panels) == 3 and panels[0][2] <= panels[1][0] and panels[1][2] <= panels[2][0]
    done.get_by_role("button", name="Close Fork 1").click()
    assert done.locator(".ce-panel").count() == 2
    assert shown_ids(done, "cascade") == before


def test_the_full_text_goes_on_with_the_settings_of_the_first_one(stage, tiny):
    opened, (engine, tokenizer) = stage(), tiny
    opened.run(**RUN)
    page = opened.page
    before = shown_ids(page, "full")
    token(page, 20, "full").click()
    page.get_by_role("button", name="Continue from here with the settings of “Custom thresholds”").click()
    page.wait_for_selector(".ce-text[data-side=fork1] .forked")
    page.wait_for_selector(".ce-status.done")
    ids = shown_ids(page, "fork1")
    config = DecodeConfig(mode="cascade", max_new_tokens=60 - 21, thresholds=THRESHOLDS[:engine.num_exits])
    prompt = visitor_token_ids(tokenizer, SKY, chat=True)
    assert ids[:21] == before[:21]
    assert ids[21:] == engine.run([*prompt, *ids[:21]], config).token_ids != before[21:]
    assert shown_ids(page, "full") == before
    assert page.locator(".ce-forked .ce-aside").inner_text().startswith(
        "The full model’s text up to token 21, then the settings of “Custom thresholds”: it ")
    for i, words in ((5, "This token is the same as in “Full model”. The full model wrote it"),
                     (20, "The full model’s text ends with this token."), (21, "")):
        token(page, i, "fork1").click()
        page.wait_for_selector(".ce-candidate")
        assert page.locator(".ce-story").inner_text().startswith(words), i
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Differences", exact=True).click()
    page.get_by_label("Text to compare").select_option("fork1")
    page.get_by_role("button", name="Show the first difference").click()
    first = next(i for i, (a, b) in enumerate(zip(ids, before)) if a != b)
    assert page.locator(".t.chosen").get_attribute("data-i") == str(first)


def saved(page, button: str, folder) -> str:
    open_tab(page, "Save")
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    download.value.save_as(folder / download.value.suggested_filename)
    return (folder / download.value.suggested_filename).read_text(encoding="utf-8")


def table(page, folder) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(saved(page, "Save tokens", folder), newline=""))]


def test_the_table_judges_a_fork_by_its_own_text(stage, tiny, tmp_path):
    opened, (engine, tokenizer) = stage(), tiny
    opened.run(**RUN)
    page = opened.page
    token(page, 20).click()
    page.locator("button.ce-candidate").first.click()
    page.locator(".ce-fork").click()
    page.wait_for_selector(".ce-text[data-side=fork1] .forked")
    page.wait_for_selector(".ce-status.done")
    rows, prompt = table(page, tmp_path), visitor_token_ids(tokenizer, SKY, chat=True)
    for side in ("cascade", "fork1"):
        own = [row for row in rows if row["side"] == side]
        ids = [int(row["token"]) for row in own]
        assert [row["number"] for row in own] == [str(i + 1) for i in range(len(own))]
        choices = engine.full_choices(prompt, ids)
        for row, choice in zip(own, choices):
            if row["agrees"]:
                assert row["agrees"] == ("yes" if int(row["token"]) == choice else "no"), row
            if row["full_choice"]:
                assert int(row["full_choice"]) == choice, row
        assert {"yes", "no"} <= {row["agrees"] for row in own[21:]}
        marks = page.locator(f".ce-text[data-side={side}] {FINAL}.differs")
        marked = [int(i) for i in marks.evaluate_all("all => all.map(t => t.dataset.i)")]
        assert marked == [i for i, row in enumerate(own) if row["agrees"] == "no" and (side, i) != ("fork1", 20)]


def test_files_hold_the_whole_run_while_the_player_is_paused(stage, fast, tmp_path):
    page = stage(fast).page
    whole = [saved(page, name, tmp_path) for name in ("Save tokens", "Save picture (SVG)", "Save trace", "Save run")]
    page.evaluate("""() => { const range = document.querySelector('.ce-player input'); range.value = 0.4;
        range.dispatchEvent(new Event('input', {bubbles: true})); }""")
    page.wait_for_timeout(300)
    shown = len(shown_ids(page, "cascade"))
    assert 0 < shown < 60
    paused = [saved(page, name, tmp_path) for name in ("Save tokens", "Save picture (SVG)", "Save trace", "Save run")]
    assert paused == whole and len(shown_ids(page, "cascade")) == shown
    assert page.locator(".ce-status").inner_text() == "Paused"


@pytest.mark.parametrize("mode", ["cascade", "verified"])
def test_numbers_of_a_paused_run_are_those_of_its_text(stage, fast, checked, mode):
    page = stage(fast if mode == "cascade" else checked).page
    end = page.locator(".ce-legend").inner_text()
    for share in (0.3, 0.7, 0.5):
        page.evaluate("""share => { const range = document.querySelector('.ce-player input'); range.value = share;
            range.dispatchEvent(new Event('input', {bubbles: true})); }""", share)
        page.wait_for_timeout(300)
        ids = {side: shown_ids(page, side) for side in SIDES}
        for side in SIDES:
            facts = page.locator(".ce-panel", has=page.locator(f".ce-text[data-side={side}]")).locator(".ce-facts")
            assert f" {len(ids[side])} tokens" in facts.inner_text()
        counts = page.locator(".ce-count").evaluate_all("all => all.map(c => parseInt(c.title))")
        assert sum(counts) == len(ids["cascade"]) < 60
        n = min(len(ids[side]) for side in SIDES)
        same = sum(a == b for a, b in zip(*(ids[side] for side in SIDES)))
        assert f"{100 * same / n + 1e-9:.0f}%" in page.locator(".ce-tile", has_text="Same position").inner_text()
        if mode == "verified":
            assert re.search(r"per check · \d+ tokens · \d+ ms per check", page.locator(".ce-facts").first.inner_text())
            accepted = page.locator(f".ce-text[data-side=cascade] {FINAL}:not(.ef)").count()
            tile = page.locator(".ce-tile", has_text="Agreement").inner_text()
            assert re.search(rf"\b{accepted} of \d+ drafts accepted", tile), tile
    token(page, 3).click()
    page.wait_for_selector(".ce-card-lens svg")                # the run is over, so its cards are known
    page.keyboard.press("Escape")
    open_tab(page, "Layers")
    assert "when a live run is over" not in page.locator(".ce-map-bar").inner_text()
    page.evaluate("""() => { const range = document.querySelector('.ce-player input'); range.value = 1;
        range.dispatchEvent(new Event('input', {bubbles: true})); }""")
    page.wait_for_timeout(300)
    assert page.locator(".ce-legend").inner_text() == end


def test_at_most_three_forks_are_shown(stage):
    opened = stage()
    opened.run(**RUN)
    done = opened.page
    for number in (1, 2, 3):
        token(done, 10 * number).click()
        done.locator(".ce-fork").click()
        done.wait_for_selector(f".ce-text[data-side=fork{number}] .forked")
        done.wait_for_selector(".ce-status.done")
    panels = done.locator(".ce-panels")
    assert panels.evaluate("node => node.scrollWidth > node.clientWidth")
    style = panels.evaluate("node => getComputedStyle(node, '::-webkit-scrollbar').height")
    assert style == "10px", "a scroll bar that is always seen"
    token(done, 5).click()
    done.wait_for_selector(".ce-fork")
    assert done.locator(".ce-fork").is_disabled()
    assert "Close one of the 3 continued texts first." in done.locator(".ce-fork-row").inner_text()


# -- several texts, themes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_three_texts_fit_beside_each_other_and_have_routing_bars(stage, size):
    opened = stage(size=size)
    opened.run(**RUN, beside="Careful")
    page = opened.page
    page.wait_for_selector(".ce-text[data-side=second] .t")
    panels = [box(panel) for panel in page.locator(".ce-panel").all()]
    assert len(panels) == 3 and all(p[0] >= 0 and p[2] <= size["width"] for p in panels)
    assert not any(overlap(a, b) for a, b in zip(panels, panels[1:]))
    for side in ("cascade", "second"):
        bar = page.locator(".ce-panel", has=page.locator(f".ce-text[data-side={side}]")).locator(".ce-mini")
        assert bar.is_visible() and re.search(r"\d+%", bar.get_attribute("aria-label"))
        assert bar.evaluate("bar => bar.getBoundingClientRect().height") >= 5
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_code_is_written_in_a_font_of_fixed_width(stage, fast):
    opened = stage(fast)
    records = opened.records()
    lines = ["Like", " so", ":", "\n", "\n", "```", "python", "\n", "def", " f", "(", "):", "\n   ", " return", " 1",
             "\n", "```", "\n", "Done", "."]
    text = [dict(type="token", side="cascade", i=i, id=i, status="emitted", text=t, exit=3, t=i / 100, conf=[None] * 3)
            for i, t in enumerate(lines)]
    opened.show_records([records[0], dict(records[1], run="code"), *text])
    fonts = [token(opened.page, i).evaluate("t => getComputedStyle(t).fontFamily") for i in range(len(text))]
    assert [i for i, font in enumerate(fonts) if "monospace" in font] == list(range(5, 18))
    # The same text in exact mode: drafted in advance, once rejected, and then accepted.
    drafted = []
    for n in range(0, len(text), 7):
        wrong = dict(text[n], id=99, text="\n", status="draft")
        drafted += [wrong, dict(type="token", side="cascade", i=n, id=99, status="rejected"),
                    *(dict(t, status="draft") for t in text[n:n + 7]),
                    *(dict(t, status="accepted") for t in text[n:n + 7])]
    opened.show_records([records[0], dict(records[1], run="exact", mode="verified"), *drafted,
                         *(dict(t, side="full") for t in text)])
    for side in SIDES:
        shown = [token(opened.page, i, side).evaluate("t => getComputedStyle(t).fontFamily") for i in range(len(text))]
        assert shown == fonts, side


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_axe_finds_nothing_in_cards_differences_moments_and_forks(stage, theme):
    opened = stage(theme=theme)
    opened.run(**RUN)
    page = opened.page
    token(page, 20).click()
    page.wait_for_selector(".ce-fork")
    assert violations(page, ["#view"]) == [], "card"
    page.locator(".ce-fork").click()
    page.wait_for_selector(".ce-text[data-side=fork1] .forked")
    page.wait_for_selector(".ce-status.done")
    open_tab(page, "Worst moments")
    assert violations(page, ["#view"]) == [], "fork and worst moments"
    page.get_by_role("button", name="Differences", exact=True).click()
    page.get_by_label("Only differences").check()
    assert violations(page, ["#view"]) == [], "differences"


# -- in the app ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_visitor_forks_a_text_in_the_app(open_page, tiny_url, size):
    page = open_page(tiny_url, **size)
    run_to_end(page)
    token(page, 20).click()
    page.wait_for_selector(".ce-candidate")
    left, top, right, bottom = here = box(page.locator(".ce-card"))
    assert left >= 0 and top >= 0 and right <= size["width"] and bottom <= size["height"]
    assert not overlap(here, box(token(page, 20)))
    before = shown_ids(page, "cascade")
    page.locator(".ce-fork").click()
    page.wait_for_selector(".ce-text[data-side=fork1] .forked")
    page.wait_for_selector(".ce-status.done")
    ids = shown_ids(page, "fork1")
    assert ids[:20] == before[:20] and ids[20] != before[20] and shown_ids(page, "cascade") == before
