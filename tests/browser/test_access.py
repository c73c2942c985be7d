"""Accessibility: axe finds no violation in any state, the keyboard is enough, text of any direction is readable."""

import pytest

from tests.browser.driving import close_settings, open_settings, open_tab

axe = pytest.importorskip("axe_playwright_python.sync_playwright")
pytestmark = pytest.mark.browser
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]}


ONE = ("#ce-view", "#ce-title", "#ce-bar", "#ce-choices")
MANY = ("#ce-title", "#ce-many")


def violations(page, places=ONE) -> list[str]:
    """Violations in our own components; gradio's pop-up messages are not ours."""
    found = []
    for place in places:
        for rule in axe.Axe().run(page, context=place, options=RULES).response["violations"]:
            found += [f"{rule['id']} {node['target']}: {node['failureSummary']}" for node in rule["nodes"]]
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_any_state(open_page, tiny_url, theme):
    page = open_page(f"{tiny_url}?__theme={theme}")
    page.wait_for_timeout(500)
    assert violations(page) == [], "idle"
    open_settings(page)
    assert violations(page, (*ONE, "#ce-settings")) == [], "settings open"
    close_settings(page)
    page.click("#ce-run")
    page.wait_for_selector(".ce-text .t")
    assert violations(page) == [], "streaming"
    page.wait_for_selector(".ce-status.done")
    page.locator(".ce-text[data-side=cascade] .t").nth(4).click()
    page.wait_for_selector(".ce-candidate")
    assert violations(page) == [], "card open"
    page.keyboard.press("Escape")
    open_tab(page, "Layers")
    page.wait_for_selector(".ce-map-table td")
    page.locator(".ce-key").nth(1).click()
    assert violations(page) == [], "layer map, one exit alone"
    page.fill("#ce-prompt textarea", " ")
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.error")
    assert violations(page) == [], "error"


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_axe_finds_nothing_on_the_many_prompts_tab(open_page, tiny_url, theme):
    page = open_page(f"{tiny_url}?__theme={theme}")
    page.get_by_role("tab", name="Many prompts").click()
    page.wait_for_selector("#ce-evaluate")
    page.wait_for_timeout(500)
    assert violations(page, MANY) == [], "idle"
    page.fill("#ce-pasted textarea", "hi there\n" + "sky " * 300)
    page.click("#ce-evaluate")
    page.wait_for_selector("#ce-many-status .ce-status.done")
    page.wait_for_selector("#ce-chart .main-svg")
    assert violations(page, MANY) == [], "done, with a failure in the table"
    page.fill("#ce-pasted textarea", '{"prompt": 5}')
    page.click("#ce-evaluate")
    page.wait_for_selector("#ce-many-status .ce-status.error")
    assert violations(page, MANY) == [], "error"


def test_the_keyboard_alone_is_enough(page):
    page.locator("#ce-prompt textarea").focus()
    for _ in range(25):
        if page.evaluate("document.activeElement.id") == "ce-run":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".ce-status.done")
    page.locator(".ce-text[data-side=cascade]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".ce-card").is_visible() and page.locator(".t.chosen").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".ce-card").is_hidden()


def test_a_screen_reader_hears_the_state_and_not_every_token(page):
    live = page.eval_on_selector_all("#ce-view [aria-live], #ce-view [role=status]", "all => all.map(x => x.className)")
    assert sorted(name.split()[0] for name in live) == ["ce-status"]      # and, once open, the card's sentences
    assert page.locator(".ce-text[role=status], .ce-text [aria-live]").count() == 0


def test_right_to_left_text_reads_right_to_left(page):
    direction = page.evaluate("""() => { const box = document.querySelector('.ce-text');
        const token = document.createElement('span'); token.className = 't ef'; token.textContent = 'שלום עולם';
        box.append(token); return getComputedStyle(box).direction; }""")
    assert direction == "rtl"


def test_reduced_motion_replays_at_once(open_page, tiny_url, tiny, tmp_path):
    page = open_page(tiny_url, reduced_motion="reduce")
    assert page.evaluate("matchMedia('(prefers-reduced-motion: reduce)').matches")
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.done")
    open_tab(page, "Save")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save run").click()
    download.value.save_as(tmp_path / "run.json")
    open_settings(page)
    page.click("#ce-clear")
    page.set_input_files("input[type=file]", tmp_path / "run.json")
    page.wait_for_selector(".ce-recorded:visible")
    assert page.locator(".ce-text[data-side=full] .t").count() == 200
