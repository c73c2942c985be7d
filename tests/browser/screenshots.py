"""Take the README's pictures with the bundled model, and record the run that plays until a visitor's first own run.

    python -m tests.browser.screenshots --out assets/screenshots
"""

import argparse
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from cascadeexit import hub
from tests.browser.conftest import TOUR_SEEN
from tests.browser.driving import choose_exact, open_tab, run_to_end
from tests.browser.server import CHROMIUM_ARGS, find_chromium, serve

TRACE = Path("assets/traces/sky.json")
FRAMES, FRAME_MILLISECONDS, LAST_MILLISECONDS = 60, 100, 2500       # of the animated picture


@dataclass(frozen=True)
class Shot:
    """One screenshot: how the page is opened, and what is done before it is taken."""

    name: str
    theme: str = "light"
    width: int = 1280
    height: int = 800
    exact: bool = False
    prompt: str = "Explain why the sky is blue."
    then: Callable[[Page], None] = lambda page: None
    """Called when the run is over."""


def open_card(page: Page) -> None:
    page.locator(".ce-text[data-side=cascade] .t.e0").nth(4).click()
    page.wait_for_selector(".ce-candidate")


def tab(name: str) -> Callable[[Page], None]:
    """Function that opens a tab of the dock."""
    return lambda page: open_tab(page, name)


def evaluate(page: Page) -> None:
    page.get_by_role("tab", name="Many prompts").click()
    page.click("#ce-evaluate")
    page.wait_for_selector("#ce-many-status .ce-status.done")
    page.wait_for_selector("#ce-chart .main-svg")


SHOTS = (Shot("light"), Shot("dark", theme="dark"), Shot("exact", exact=True, then=tab("Timeline")),
         Shot("phone", width=390, height=844), Shot("card", then=open_card), Shot("layers", then=tab("Layers")),
         Shot("moments", then=tab("Worst moments")), Shot("many", height=1330, then=evaluate))


def take(browser: Browser, url: str, shot: Shot, folder: Path, fingerprint: str) -> None:
    """Make the run of a shot and write its picture; the first shot also writes the trace and the animated picture."""
    page = browser.new_page(viewport={"width": shot.width, "height": shot.height}, device_scale_factor=1.5)
    page.set_default_timeout(600_000)
    page.add_init_script(TOUR_SEEN)
    page.goto(f"{url}?__theme={shot.theme}")
    page.add_style_tag(content="* { caret-color: transparent !important; }")
    if shot.exact:
        choose_exact(page)
    page.fill("#ce-prompt textarea", shot.prompt)
    run_to_end(page)
    if shot is SHOTS[0]:
        keep_trace(page, fingerprint)
        animate(page, folder / "run.webp")
    page.eval_on_selector_all(".ce-text", "all => { scrollTo(0, 0); all.forEach(box => box.scrollTop = 0); }")
    shot.then(page)
    page.wait_for_timeout(1000)                                 # animations end
    page.screenshot(path=folder / f"{shot.name}.png")
    page.close()


def keep_trace(page: Page, fingerprint: str) -> None:
    """Save the run that plays on the page until a visitor's first own run, with the fingerprint of its exits."""
    open_tab(page, "Save")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save run").click()
    run = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    next(record for record in run["records"] if record["type"] == "run")["settings"]["exits"] = fingerprint
    TRACE.write_text(json.dumps(run, separators=(",", ":")) + "\n", encoding="utf-8")


def animate(page: Page, path: Path) -> None:
    """Move the scrubber from the begin of the run to its end, and save what the page shows as an animated picture."""
    open_tab(page, "Timeline")
    frames = []
    for n in range(FRAMES + 1):
        page.eval_on_selector(".ce-player input", """(input, value) => { input.value = value;
            input.dispatchEvent(new Event('input', {bubbles: true})); }""", n / FRAMES)
        page.wait_for_timeout(60)
        with Image.open(io.BytesIO(page.screenshot())) as picture:
            frames.append(picture.convert("RGB").resize((1280, 800), Image.Resampling.LANCZOS))
    times = [FRAME_MILLISECONDS] * FRAMES + [LAST_MILLISECONDS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=60, method=4)


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
                take(browser, url, shot, args.out, engine.bank.fingerprint())
                print(args.out / f"{shot.name}.png")
        browser.close()


if __name__ == "__main__":
    main()
