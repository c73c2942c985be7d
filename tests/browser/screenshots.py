"""Pictures of the page for the README, taken from the bundled model.

    python -m tests.browser.screenshots --out assets/screenshots
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from cascadeexit import hub
from tests.browser.server import CHROMIUM_ARGS, find_chromium, serve


@dataclass(frozen=True)
class Shot:
    """One picture: how the page is opened and what is done before it is taken."""

    name: str
    theme: str = "light"
    width: int = 1280
    height: int = 1340
    mode: str = "Cascade"
    prompt: str = "Explain why the sky is blue."
    figures: bool = False           # the finished run's charts, instead of the page from its top


SHOTS = (Shot("light"), Shot("dark", theme="dark"), Shot("verified", mode="Verified"),
         Shot("phone", width=390, height=1500), Shot("figures", figures=True))


def take(browser: Browser, url: str, shot: Shot, folder: Path) -> Path:
    page = browser.new_page(viewport={"width": shot.width, "height": shot.height}, device_scale_factor=1.5)
    page.set_default_timeout(300_000)
    page.goto(f"{url}?__theme={shot.theme}")
    page.get_by_label(f"{shot.mode}:").check()
    page.fill("#ce-prompt textarea", shot.prompt)
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.done")
    page.wait_for_function("document.querySelectorAll('#ce-figures .main-svg').length >= 3")
    page.wait_for_timeout(1000)                                 # animations come to rest
    page.eval_on_selector_all(".ce-text", "all => all.forEach(box => box.scrollTop = 0)")
    path = folder / f"{shot.name}.png"
    if shot.figures:
        page.locator("#ce-figures").screenshot(path=path)
    else:
        page.screenshot(path=path)
    page.close()
    return path


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
