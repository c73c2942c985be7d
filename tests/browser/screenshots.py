"""Take the screenshots of the README with the bundled model, and record the run that plays while a model loads.

    python -m tests.browser.screenshots --out assets/screenshots
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from cascadeexit import hub
from tests.browser.conftest import TOUR_SEEN
from tests.browser.server import CHROMIUM_ARGS, find_chromium, serve

TRACE = Path("assets/traces/sky.json")


@dataclass(frozen=True)
class Shot:
    """One screenshot: how the page is opened, and what is done before it is taken."""

    name: str
    theme: str = "light"
    width: int = 1280
    height: int = 1330
    mode: str = "cascade"
    prompt: str = "Explain why the sky is blue."
    then: Callable[[Page], str | None] = lambda page: None
    """Called when the run is over; returns the selector of the part to show, None for the whole view."""


def open_card(page: Page) -> None:
    page.locator(".ce-text[data-side=cascade] .t.e0").nth(4).click()
    page.wait_for_selector(".ce-candidate")


def open_map(page: Page) -> str:
    page.click(".ce-map summary")
    page.wait_for_selector(".ce-map-table td")
    return ".ce-map"


def open_charts(page: Page) -> str:
    page.get_by_role("tab", name="Charts").click()
    return ".ce-dock"


def evaluate(page: Page) -> None:
    page.get_by_role("tab", name="Many prompts").click()
    page.click("#ce-evaluate")
    page.wait_for_selector("#ce-many-status .ce-status.done")
    page.wait_for_selector("#ce-chart .main-svg")


SHOTS = (Shot("light"), Shot("dark", theme="dark"), Shot("verified", mode="verified"),
         Shot("phone", width=390, height=1500), Shot("figures", then=open_charts),
         Shot("card", then=open_card), Shot("map", then=open_map), Shot("many", then=evaluate))


def take(browser: Browser, url: str, shot: Shot, folder: Path) -> Path:
    page = browser.new_page(viewport={"width": shot.width, "height": shot.height}, device_scale_factor=1.5)
    page.set_default_timeout(600_000)
    page.add_init_script(TOUR_SEEN)
    page.goto(f"{url}?__theme={shot.theme}")
    page.get_by_label(f"({shot.mode})").check()
    page.fill("#ce-prompt textarea", shot.prompt)
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.done")
    if shot.name == "light":
        keep_trace(page)
    page.eval_on_selector_all(".ce-text", "all => { scrollTo(0, 0); all.forEach(box => box.scrollTop = 0); }")
    part = shot.then(page)
    page.wait_for_timeout(1000)                                 # animations end
    path = folder / f"{shot.name}.png"
    (page.locator(part) if part else page).screenshot(path=path)
    page.close()
    return path


def keep_trace(page: Page) -> None:
    """Save the run that plays while the model loads."""
    page.get_by_role("tab", name="Save").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save run").click()
    download.value.save_as(TRACE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("assets/screenshots"), help="folder (%(default)s)")
    parser.add_argument("--only", nargs="*", choices=[s.name for s in SHOTS], help="default: all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    engine, tokenizer = hub.load(progress=print)
    with sync_playwright() as playwright, serve(engine, tokenizer) as url:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGS)
        for shot in SHOTS:
            if not args.only or shot.name in args.only:
                print(take(browser, url, shot, args.out))
        browser.close()


if __name__ == "__main__":
    main()
