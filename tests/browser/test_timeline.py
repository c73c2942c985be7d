"""The timeline, the player and the draft tree in headless Chromium, on runs made by hand."""

import json

import pytest
from playwright.sync_api import expect

import app
from cascadeexit.stream import colours
from tests.browser.handmade import EXACT, THREE, TWO, handmade_run
from tests.browser.server import serve
from tests.browser.test_access import violations

pytestmark = pytest.mark.browser
DONE = "This recorded run is over."
CASCADE = ".ce-text[data-side=cascade] .t"


@pytest.fixture
def replay(open_page, tiny_url, tmp_path):
    """Function that opens a page, replays a run on it (at once to its end without `moving`), and opens the timeline."""
    def open_(run: str, theme: str = "light", width: int = 1280, moving: bool = False):
        motion = "no-preference" if moving else "reduce"
        page = open_page(f"{tiny_url}?__theme={theme}", width, 800, reduced_motion=motion)
        file = tmp_path / "run.json"
        file.write_text(json.dumps(dict(format=1, records=records(run))))
        page.set_input_files("input[type=file]", file)
        page.wait_for_selector(".ce-recorded:visible")
        if not moving:
            page.wait_for_selector(".ce-status.done")
        page.click("#ce-tab-time")
        page.wait_for_selector(".ce-time-lane")
        page.locator(".ce-time-plot").scroll_into_view_if_needed()
        return page
    return open_


def records(run: str) -> list[dict]:
    return [json.loads(line) for line in run.splitlines()][1:]


def tokens(run: str, side: str) -> list[dict]:
    return [r for r in records(run) if r["type"] == "token" and r["side"] == side]


def length(run: str) -> float:
    return max(r.get("t", 0) for r in records(run))


def middle(run: str, side: str, i: int) -> float:
    """Middle of the pass that wrote token i of a side without drafts, as a share of the whole run."""
    written = tokens(run, side)
    return (written[i - 1]["t"] + written[i]["t"]) / 2 / length(run)


def lane_y(page, lane: int) -> float:
    """A place just above the foot of a lane, in pixels below the top of the timeline."""
    top = page.locator(".ce-time-plot").bounding_box()["y"]
    box = page.locator(".ce-time-later").nth(lane).evaluate("""node => { node.hidden = false;
        const box = node.getBoundingClientRect(); node.hidden = true; return box.bottom; }""")
    return box - top - 3


def pixel(page, share: float, y: float) -> tuple[int, ...]:
    seen = page.locator(".ce-time-plot canvas").evaluate("""(canvas, [share, y]) => {
        const scale = canvas.width / canvas.clientWidth;
        return [...canvas.getContext('2d').getImageData(share * canvas.width, y * scale, 1, 1).data]; }""", [share, y])
    return tuple(seen[:3])


def colour(page, node) -> tuple[int, ...]:
    """Background of a node, without the filter of the dark theme."""
    words = page.locator(node).first.evaluate("node => getComputedStyle(node).backgroundColor")
    return tuple(int(n) for n in words[words.index("(") + 1:-1].split(",")[:3])


def point(page, share: float, lane: int) -> tuple[float, float]:
    box = page.locator(".ce-time-plot").bounding_box()
    return box["x"] + share * box["width"], box["y"] + lane_y(page, lane)


def seek(page, share: float) -> None:
    page.locator(".ce-player input").evaluate("(range, share) => { range.value = share;"
                                             " range.dispatchEvent(new Event('input')); }", share)
    page.wait_for_timeout(400)


def status(page) -> str:
    return page.locator(".ce-status").first.inner_text()


@pytest.mark.parametrize("theme, width", [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)])
def test_each_pass_is_a_block_in_the_colour_of_its_exit(replay, theme, width):
    run = handmade_run(TWO, 40)
    page = replay(run, theme, width)
    assert page.locator(".ce-tab").all_inner_texts()[1] == "Timeline"
    lanes = page.locator(".ce-time-lane")
    assert [lanes.nth(k).inner_text().split("\n")[0].split()[0] for k in range(2)] == ["Fast", "Full"]
    assert "40 passes" in lanes.first.inner_text() and lanes.first.is_visible()
    y = lane_y(page, 0)
    for exit in (1, 2):
        i = next(r["i"] for r in tokens(run, "cascade") if r["exit"] == exit and r["i"] > 0 and r["ran"][1][2] == 1)
        assert pixel(page, middle(run, "cascade", i), y) == colour(page, f"{CASCADE}.e{exit}")
    assert pixel(page, middle(run, "full", 5), lane_y(page, 1)) != (0, 0, 0), "blocks of the full model are drawn"
    assert pixel(page, 0.995, lane_y(page, 0)) == (0, 0, 0), "nothing after the end of the faster side"
    ticks = page.locator(".ce-time-tick:visible").all_inner_texts()
    assert ticks[0] == "0" and ticks[1].endswith((" s", " ms"))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".ce-time-plot").focus()
    page.keyboard.press("End")
    pane, plot = page.locator(".ce-pass").bounding_box(), page.locator(".ce-time-plot").bounding_box()
    assert pane["y"] >= plot["y"] + plot["height"] if width == 360 else pane["x"] >= plot["x"] + plot["width"]


def test_a_token_lights_its_pass_and_a_pass_its_tokens(replay):
    run = handmade_run(TWO, 40)
    page = replay(run)
    light, plot = page.locator(".ce-time-light"), page.locator(".ce-time-plot").bounding_box()
    page.locator(CASCADE).nth(9).hover()
    expect(light).to_be_visible()
    box = light.bounding_box()
    assert box["x"] < plot["x"] + middle(run, "cascade", 9) * plot["width"] < box["x"] + box["width"]
    page.mouse.move(*point(page, middle(run, "full", 7), 1))
    assert page.eval_on_selector_all(
        ".t.lit", "all => all.map(t => [t.closest('.ce-text').dataset.side, t.dataset.i])") == [["full", "7"]]
    tip = page.locator(".ce-time-tip")
    assert tip.is_visible() and "Token 8" in tip.inner_text() and "all 30 layers" in tip.inner_text()
    page.mouse.move(5, 5)
    expect(light).to_be_hidden()
    assert page.locator(".t.lit").count() == 0 and tip.is_hidden()


def test_the_keyboard_links_text_and_timeline(replay):
    page = replay(handmade_run(TWO, 40))
    page.locator(".ce-text[data-side=cascade]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".ce-time-mark")).to_be_visible()
    assert "Token 2" in page.locator(".ce-pass").inner_text()
    page.keyboard.press("Escape")
    page.locator(".ce-time-plot").focus()
    page.keyboard.press("ArrowRight")
    assert page.eval_on_selector_all(".t.lit", "all => all.map(t => t.dataset.i)") == ["2"]
    page.keyboard.press("ArrowDown")
    assert page.eval_on_selector_all(".t.lit", "all => all.map(t => t.closest('.ce-text').dataset.side)") == ["full"]
    page.keyboard.press("Enter")
    expect(page.locator(".ce-status").first).to_have_text("Paused")
    page.keyboard.press("Escape")
    expect(page.locator(".ce-time-mark")).to_be_hidden()
    assert page.locator(".ce-pass").is_hidden() and page.locator(".t.lit").count() == 0


def test_a_click_opens_the_pass_and_its_title_the_token(replay):
    run = handmade_run(TWO, 40)
    page = replay(run)
    card, pane = page.locator(".ce-card"), page.locator(".ce-pass")
    page.mouse.click(*point(page, middle(run, "cascade", 20), 0))
    expect(pane).to_be_visible()
    assert card.is_hidden() and page.locator(".t.lit").get_attribute("data-i") == "20"
    pane.get_by_role("button", name="Token 21").click()
    expect(card).to_be_visible()
    assert page.locator(".t.chosen").get_attribute("data-i") == "20"
    assert status(page) == DONE, "the run stays at its end"
    page.keyboard.press("Escape")
    assert card.is_hidden() and pane.is_visible(), "Escape closes the top layer only"
    page.keyboard.press("Escape")
    assert pane.is_hidden() and page.locator(".ce-time-mark").is_hidden()
    page.mouse.click(*point(page, middle(run, "cascade", 20), 0))
    page.locator(".ce-pass").get_by_role("button", name="Go to this moment").click()
    expect(page.locator(".ce-status").first).to_have_text("Paused")
    assert page.locator(CASCADE).count() == 21 and page.locator(CASCADE + ".lit").get_attribute("data-i") == "20"


def test_zoom_and_pan_by_wheel_drag_and_keys(replay):
    run = handmade_run(TWO, 60)
    page = replay(run)
    ticks, fit = page.locator(".ce-time-tick:visible"), page.get_by_role("button", name="Show the whole run")
    whole = ticks.all_inner_texts()
    assert fit.is_disabled()
    page.mouse.move(*point(page, 0.5, 0))
    for _ in range(8):
        page.mouse.wheel(0, -300)
    expect(fit).to_be_enabled()
    expect(ticks.first).to_contain_text("ms")
    before = ticks.all_inner_texts()
    page.mouse.down()
    page.mouse.move(200, page.locator(".ce-time-plot").bounding_box()["y"] + 40, steps=4)
    page.mouse.up()
    page.wait_for_timeout(100)
    assert ticks.all_inner_texts() != before, "dragged"
    assert page.locator(".ce-pass").is_hidden(), "a drag is not a click"
    page.keyboard.press("Tab")
    page.locator(".ce-time-plot").focus()
    page.keyboard.press("f")
    expect(fit).to_be_disabled()
    assert ticks.all_inner_texts() == whole
    seek(page, 0.2)
    page.locator(".ce-time-plot").focus()
    cursor = page.locator(".ce-time-cursor").bounding_box()["x"]
    page.keyboard.press("+")
    expect(fit).to_be_enabled()
    assert page.locator(".ce-time-cursor").bounding_box()["x"] == pytest.approx(cursor, abs=2), "zoomed at the cursor"
    page.keyboard.press("-")
    expect(fit).to_be_disabled()


def test_play_pause_step_and_speed(replay):
    run = handmade_run(TWO, 600)
    page = replay(run, moving=True)
    expect(page.locator(".ce-status").first).to_have_text("Playing a recorded run")
    page.locator(".ce-player").get_by_role("button", name="Pause").click()
    page.wait_for_selector(".ce-status.paused")
    assert page.locator(".ce-player option").all_inner_texts() == ["1/4×", "1/2×", "1×", "2×", "4×"]
    seek(page, 0.5)
    assert status(page) == "Paused" and page.locator("#ce-run").is_visible()
    expected = sum(r["t"] <= 0.5 * length(run) for r in tokens(run, "full"))
    assert page.locator(".ce-text[data-side=full] .t").count() == expected
    before = page.locator(".ce-clock").inner_text()
    page.get_by_role("button", name="One pass forward").click()
    page.get_by_role("button", name="One pass forward").click()
    page.wait_for_timeout(400)
    after = page.locator(".ce-text .t").count()
    assert page.locator(".ce-clock").inner_text() > before
    page.get_by_role("button", name="One pass back").click()
    page.wait_for_timeout(400)
    assert 1 <= after - page.locator(".ce-text .t").count() <= 2, "one pass, or two that end together"
    page.locator(".ce-player select").select_option("4")
    page.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_selector(".ce-status.done")
    assert status(page) == DONE and page.locator(".ce-text[data-side=full] .t").count() == 600


def test_the_cursor_is_dragged_in_both_directions(replay):
    run = handmade_run(TWO, 60)
    page = replay(run)
    plot, full = page.locator(".ce-time-plot").bounding_box(), page.locator(".ce-text[data-side=full] .t:not(.ahead)")
    cursor, y = page.locator(".ce-time-cursor"), plot["y"] + 8
    page.mouse.move(plot["x"] + plot["width"] - 2, y)
    page.mouse.down()
    for share in (0.8, 0.3, 0.6):
        page.mouse.move(plot["x"] + share * plot["width"], y, steps=6)
        page.wait_for_timeout(60)
        assert cursor.bounding_box()["x"] + 5.5 == pytest.approx(plot["x"] + share * plot["width"], abs=4)
        expected = sum(r["t"] <= share * length(run) for r in tokens(run, "full"))
        assert abs(full.count() - expected) <= 1, "while the pointer is down"
    page.mouse.up()
    page.wait_for_timeout(400)
    assert abs(page.locator(".ce-text[data-side=full] .t").count() - expected) <= 1
    assert page.locator(".t.ahead").count() == 0
    assert page.locator(".ce-time-later:visible").count() == 2, "what comes later is pale"
    assert status(page) == "Paused"


def test_space_plays_in_the_view_and_writes_in_the_prompt(replay):
    page = replay(handmade_run(TWO, 60))
    page.locator(".ce-text[data-side=full]").focus()
    page.keyboard.press("Space")
    expect(page.locator(".ce-status").first).to_have_text("Playing a recorded run")
    page.keyboard.press("Space")
    expect(page.locator(".ce-status").first).to_have_text("Paused")
    assert page.evaluate("document.activeElement.dataset.side") == "full", "the focus stays in the text"
    page.locator("#ce-prompt textarea").focus()
    page.keyboard.press("End")
    page.keyboard.press("Space")
    assert page.locator("#ce-prompt textarea").input_value().endswith(" ") and status(page) == "Paused"


def test_layers_in_time_show_what_ran_and_what_caught_up(replay):
    run = handmade_run(TWO, 40)
    page = replay(run)
    page.get_by_role("button", name="By layer").click()
    rows = page.locator(".ce-time-row:visible").all_inner_texts()
    assert [row for row in rows[:5] if row] == ["layers 1–9", "layers 10–17", "layers 18–24", "layers 25–30"]
    late = next(r for r in tokens(run, "cascade") if any(n > 2 for _, _, n in r["ran"]))
    page.locator(CASCADE).nth(late["i"]).click()
    first, _, many = next(span for span in late["ran"] if span[2] > 2)
    words = page.locator(".ce-pass").inner_text()
    assert f"ran for {many} positions at once" in words and f"caught up on {many} positions" in words
    assert f"layers {(1, 1, 10, 18, 25)[first]}–" in words
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").click()
    mark = page.locator(".ce-time-mark").bounding_box()
    canvas = page.locator(".ce-time-plot canvas")
    seen = canvas.evaluate("""(canvas, [left, right]) => {
        const scale = canvas.width / canvas.clientWidth, seen = new Set();
        for (let x = left; x < right; x++) for (let y = 40; y < 90; y += 2) {
            const [r, g, b, a] = canvas.getContext('2d').getImageData(x * scale, y * scale, 1, 1).data;
            if (a === 255) seen.add([r, g, b].join());
        } return [...seen]; }""", [mark["x"] - canvas.bounding_box()["x"],
                                   mark["x"] + mark["width"] - canvas.bounding_box()["x"]])
    assert len(seen) >= 2, "the exit's colour, and the colour of catching up"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_draft_tree_shows_probabilities_and_the_accepted_path(replay, theme):
    run = handmade_run(EXACT, 60)
    page = replay(run, theme)
    trees = [r for r in records(run) if r["type"] == "tree"]
    tree = next(r for r in trees if sum(d[5] for d in r["drafts"]) >= 2 and len(r["drafts"]) == 7)
    page.locator(CASCADE + ":not(.rejected)").nth(tree["i"]).click()
    pane, accepted = page.locator(".ce-pass"), [d for d in tree["drafts"] if d[5]]
    assert f"{len(accepted)} of 7 drafts accepted" in pane.inner_text()
    pills = pane.locator(".ce-pill")
    assert pills.count() == 9, "the token before, seven drafts, the full model's own token"
    shown = [d[1].replace(" ", "␣").replace("\n", "↵") for d in accepted]
    assert pane.locator(".ce-pill.accepted text").all_text_contents() == shown
    percentages = sorted(f"{100 * d[3] + 1e-9:.0f}%" for d in tree["drafts"])
    assert sorted(pane.locator(".ce-edge-p").all_text_contents())[:7] == percentages
    path = [pane.locator(f".ce-pill.{kind} rect").first.bounding_box() for kind in ("root", "accepted", "own")]
    assert len({round(box["y"]) for box in path}) == 1, "the accepted path is one straight line"
    assert path[0]["x"] < path[1]["x"] < path[2]["x"]
    widths = pane.locator(".ce-edge.accepted").evaluate_all(
        "all => all.map(e => parseFloat(getComputedStyle(e).strokeWidth))")
    assert widths == pytest.approx([0.8 + 4 * d[3] for d in accepted], abs=0.02)
    lit = page.eval_on_selector_all(".t.lit", "all => all.length")
    assert lit == len(accepted) + 1


def test_tokens_of_the_tree_open_their_cards(replay):
    run = handmade_run(EXACT, 60)
    page = replay(run)
    tree = next(r for r in records(run) if r["type"] == "tree" and r["i"] and sum(d[5] for d in r["drafts"]) >= 2)
    wrote = f"accepted · wrote {1 + sum(d[5] for d in tree['drafts'])} tokens"
    page.locator(".ce-time-plot").focus()
    while wrote not in page.locator(".ce-pass").inner_text():
        page.keyboard.press("ArrowRight")
    buttons = page.locator(".ce-tree .ce-pill[role=button]")
    lit = page.eval_on_selector_all(".t.lit", "all => all.map(t => t.dataset.i)")
    assert buttons.count() == len(lit), "what the pass wrote; rejected drafts are no tokens of the text"
    assert page.locator(".ce-card").is_hidden(), "nothing covers the tree"
    buttons.nth(0).focus()
    page.keyboard.press("Enter")
    assert page.locator(".t.chosen").get_attribute("data-i") in lit
    page.keyboard.press("Escape")
    buttons.last.click()
    assert page.locator(".t.chosen").get_attribute("data-i") in lit
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.locator(".ce-pass").is_hidden()


def test_the_legend_has_the_colours_of_all_exits(replay):
    page = replay(handmade_run(EXACT, 40))
    swatch = page.locator(".ce-time-swatch").first.evaluate("node => getComputedStyle(node).backgroundImage")
    for exit in (0, 1, 2, 3):
        red, green, blue = (int(colours(4)[exit][k:k + 2], 16) for k in (1, 3, 5))
        assert f"rgb({red}, {green}, {blue})" in swatch
    rejected = page.locator(".ce-time-swatch.hollow").evaluate("node => getComputedStyle(node).backgroundColor")
    assert rejected.endswith("0.22)"), "pale, as rejected drafts are drawn"


def test_the_exit_before_all_layers_has_one_name(replay):
    run = handmade_run(TWO, 30)
    page = replay(run)
    assert page.locator(".ce-key").first.inner_text().split("\n")[:2] == ["exit 1", "before layer 1"]
    page.locator(CASCADE).nth(next(r["i"] for r in tokens(run, "cascade") if r["exit"] == 0 and r["i"])).click()
    assert page.locator(".ce-story").inner_text().startswith("Exit 1 wrote it before layer 1 of 30.")
    assert "Exit 1, before layer 1" in page.locator(".ce-pass").inner_text()
    page.keyboard.press("Escape")
    page.locator(".ce-caption .ce-term").first.hover()
    assert "before the first layer, or after some" in page.locator(".ce-caption .ce-tip").first.inner_text()


def test_old_files_show_their_times_and_exits(replay):
    run = handmade_run(TWO, 30, spans=False)
    page = replay(run)
    y, i = lane_y(page, 0), next(r["i"] for r in tokens(run, "cascade") if r["exit"] == 2 and r["i"])
    assert pixel(page, middle(run, "cascade", i), y) == colour(page, f"{CASCADE}.e2")
    page.locator(CASCADE).nth(i).click()
    assert "Exit 3, after layer 17" in page.locator(".ce-pass").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="By layer").click()
    assert page.locator(".ce-time-row:visible").count() >= 8
    page = replay(handmade_run(EXACT, 30, spans=False))
    page.locator(CASCADE + ":not(.rejected)").nth(1).click()
    assert "accepted" in page.locator(".ce-pass").inner_text()


def test_three_sides_have_three_lanes(replay):
    page = replay(handmade_run(THREE, 30))
    words = page.locator(".ce-time-lane").all_inner_texts()
    assert len(words) == 3 and "Fast" in words[0] and "Exact" in words[1] and "Full model" in words[2]


def test_a_fork_has_a_lane_with_its_own_clock(replay):
    run = handmade_run(TWO, 40, fork=10)
    page = replay(run)
    lanes = page.locator(".ce-time-lane").all_inner_texts()
    names = [words.split("\n")[0].split(" pass")[0].rstrip("0123456789 ") for words in lanes]
    assert names == ["Fast", "Fast, your token", "Full model"]
    assert page.locator(".ce-text[data-side=fork1] .t").count() == 40
    page.locator(".ce-text[data-side=fork1] .t").nth(10).click()
    assert "Your choice" in page.locator(".ce-pass").inner_text()
    page.locator(".ce-text[data-side=fork1] .t").nth(15).click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Go to this moment").click()
    page.wait_for_selector(".ce-status.paused")
    assert page.locator(".ce-text[data-side=fork1] .t").count() == 16, "ten of the other text, and six of the fork"
    assert page.locator(".ce-text[data-side=full] .t").count() == 40, "what came before the fork is complete"
    seek(page, 0.1)
    assert page.locator(".ce-text[data-side=fork1]").count() == 0
    seek(page, 1)
    assert page.locator(".ce-text[data-side=fork1] .t").count() == 40 and status(page) == DONE


def test_long_runs_stay_smooth(replay):
    page = replay(handmade_run(TWO, 1024))
    cdp = page.context.new_cdp_session(page)
    cdp.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        return next(m["value"] for m in cdp.send("Performance.getMetrics")["metrics"] if m["name"] == "TaskDuration")

    range_ = "const range = document.querySelector('.ce-player input');"
    wheel = "document.querySelector('.ce-time-plot')"
    for what, step in {
        "drag back": f"{range_} range.value = 1 - n / 100; range.dispatchEvent(new Event('input'));",
        "zoom": f"{wheel}.dispatchEvent(new WheelEvent('wheel', "
                "{ deltaY: n < 20 ? -80 : 80, clientX: 500, cancelable: true }));",
    }.items():
        before = busy()
        page.evaluate(f"async () => {{ for (let n = 0; n < 40; n++) {{ {step}"
                      " await new Promise(requestAnimationFrame); } }")
        assert (busy() - before) / 40 < 0.1, f"{what}: seconds of work in a frame; about 0.015 on an idle machine"
    page.wait_for_timeout(800)
    assert status(page) == "Paused" and 500 < page.locator(".ce-text[data-side=full] .t").count() < 800


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_on_the_timeline(replay, theme):
    page = replay(handmade_run(THREE, 40), theme)
    place = ("#ce-view",)
    page.locator(".ce-text[data-side=second] .t:not(.rejected)").nth(12).click()
    page.wait_for_selector(".ce-tree")
    page.keyboard.press("Escape")
    assert violations(page, place) == [], "a pass with its tree"
    page.get_by_role("button", name="By layer").click()
    page.locator(CASCADE).nth(5).click()
    page.keyboard.press("Escape")
    seek(page, 0.5)
    assert violations(page, place) == [], "layers, paused in the middle"


def test_the_recorded_run_plays_until_the_first_run(open_page, tiny, monkeypatch):
    monkeypatch.setattr(app, "_has_recorded_run", lambda library: True)
    monkeypatch.setattr(app, "replayed", lambda path: handmade_run(TWO, 600))
    with serve(*tiny) as url:
        page = open_page(url)
        expect(page.locator(".ce-status").first).to_have_text("Playing a recorded run")
        assert page.locator("#ce-run").is_visible() and page.locator("#ce-stop").is_hidden()
        assert page.locator(".ce-recorded").inner_text() == "recorded run, CPU, 2 threads, 2026-11-29"
        page.locator(".ce-player select").select_option("4")
        page.wait_for_selector(".ce-status.done")
        assert status(page) == DONE
        page.click("#ce-run")
        page.wait_for_function("document.querySelector('.ce-status').textContent === 'Done.'", timeout=120_000)
        assert page.locator(".ce-recorded").is_hidden()
        page.click("#ce-tab-time")
        assert "200 passes" in page.locator(".ce-time-lane").last.inner_text()
        seek(page, 0.5)
        assert status(page) == "Paused" and page.locator("#ce-run").is_visible(), "a live run is looked through"
        assert 0 < page.locator(".ce-text[data-side=full] .t").count() < 200
        page.locator(".ce-player select").select_option("0.25")
        seek(page, 0)
        page.locator(".ce-text[data-side=full]").focus()
        page.keyboard.press("Space")
        expect(page.locator(".ce-status").first).to_have_text("Playing this run again")
        page.click("#ce-run")
        page.wait_for_function("document.querySelector('.ce-status').textContent === 'Done.'", timeout=120_000)
        assert page.locator(".ce-text[data-side=full] .t").count() == 200, "a new run ends the playing"
