"""Measure how smoothly the page draws a long run in headless Chromium, with the bundled model.

    python -m tests.browser.frames --out frames.json

The machine should do nothing else meanwhile: the model, the server and the browser share its cores. The times between
two frames are taken from the click on Run until the run is over. A screen with 60 Hz wants 16.7 ms.
"""

import argparse
import math
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from cascadeexit import hub
from tests.browser.conftest import TOUR_SEEN
from tests.browser.driving import choose_exact, close_settings, open_settings, run_to_end, set_number
from tests.browser.reading import shown_ids
from tests.browser.server import CHROMIUM_ARGS, find_chromium, serve
from training.json_files import save_json
from training.provenance import provenance

PROMPT = "Write a long story about a girl and her garden."
PATIENCE = 900_000              # milliseconds
# Notes the time between two frames from the click on Run on, and the longest task.
WATCH = """() => {
    window.intervals = []; window.longest = 0;
    new PerformanceObserver(list => list.getEntries().forEach(e =>
        window.longest = Math.max(window.longest, e.duration))).observe({type: 'longtask'});
    const run = document.querySelector('#ce-run');
    run.addEventListener('click', () => {
        let last = performance.now();
        const frame = now => {
            window.intervals.push(now - last);
            last = now;
            if (!document.querySelector('.ce-status.done')) requestAnimationFrame(frame);
        };
        requestAnimationFrame(now => { last = now; requestAnimationFrame(frame); });
    }, {once: true});
}"""


def measure(browser: Browser, url: str, args: argparse.Namespace) -> dict:
    """Run the prompt once on a fresh page. Returns what was measured; times are in milliseconds."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(PATIENCE)
    page.add_init_script(TOUR_SEEN)
    streamed = count_bytes(page)
    page.goto(url)
    page.wait_for_selector("#ce-open")
    if args.exact:
        choose_exact(page)
    open_settings(page)
    set_number(page, "number input for Maximum length", args.tokens)
    close_settings(page)
    page.fill("#ce-prompt textarea", args.prompt)
    page.wait_for_timeout(500)
    page.evaluate(WATCH)
    streamed.clear()
    run_to_end(page)
    intervals = page.evaluate("window.intervals")
    result = {"tokens": {side: len(shown_ids(page, side)) for side in ("cascade", "full")}, "frames": len(intervals),
              "p50": quantile(intervals, 0.5), "p95": quantile(intervals, 0.95), "max": round(max(intervals), 1),
              "longest_task": round(page.evaluate("window.longest"), 1), "bytes": sum(streamed)}
    page.close()
    return result


def count_bytes(page: Page) -> list[int]:
    """Return a list that receives the size of each piece of data that the page is sent."""
    sizes, session = [], page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.on("Network.dataReceived", lambda event: sizes.append(event["dataLength"]))
    return sizes


def quantile(values: list[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    return round(sorted(values)[math.ceil(share * len(values)) - 1], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--tokens", type=int, default=1000, help="largest number of tokens of each text (%(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)s")
    parser.add_argument("--exact", action="store_true", help="run in Exact mode (default: early exits)")
    args = parser.parse_args()
    engine, tokenizer = hub.load(progress=print)
    with sync_playwright() as playwright, serve(engine, tokenizer) as url:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGS)
        made = provenance(0)
        made["versions"]["chromium"] = browser.version
        result = measure(browser, url, args)
        browser.close()
    tokens = result["tokens"]
    print(f"{tokens['cascade']} and {tokens['full']} tokens, {result['frames']} frames: p50 {result['p50']} ms, "
          f"p95 {result['p95']} ms, max {result['max']} ms between two; longest task {result['longest_task']} ms; "
          f"{result['bytes']:,} bytes streamed")
    save_json(args.out, {"provenance": made, "prompt": args.prompt, "mode": "verified" if args.exact else "cascade"}
              | result)


if __name__ == "__main__":
    main()
