"""Visitors: measure how the page handles many visitors at the same time, and how long a model takes to start.

    python -m training.visitors --visitors 20 --out assets/results/visitors.json

Every visitor is a thread that sends one of the project's prompts to the same `Page`. All visitors start at the same
moment. The result has the seconds to the first token and to the end of a run (median and worst), the errors, and the
memory before and after. It also has the start-up time and two parts of it: the self-check (a comparison of the backend
with the `torch` backend) and the recording of CUDA graphs. The exit status is 1 if a run failed.
"""

import argparse
import gc
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from cascadeexit.config import CASCADE_THRESHOLD, Mode
from cascadeexit.library import Library, Offer
from cascadeexit.machine import resident_bytes
from cascadeexit.page import Page
from cascadeexit.prompts import bundled_prompts
from cascadeexit.runner import Batch, Runner
from cascadeexit.settings import Settings, thresholds_at
from training.benchmark import record_seconds
from training.command import run_command
from training.json_files import save_json
from training.options import add_dtype, add_model_and_exits, command_parser
from training.provenance import provenance

LABEL = "model"


@dataclass
class Visit:
    """Result of one visitor's run.

    Attributes:
        first_token_seconds: time from sending the prompt to the first token of any text. None if there was no token.
        seconds: time from sending the prompt to the end of the run.
        tokens: number of new tokens of both texts: the text with exits, and the full model's text.
        error: message of the error; "" if nothing failed.
    """

    first_token_seconds: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    error: str = ""


class WatchedRunner(Runner):
    """A runner that also records the first-token time, the number of tokens and the error of each visitor.

    Before a thread calls `race`, it must set `visits.current` to a new `Visit`, which gets these values, and
    `visits.started` to the `time.perf_counter()` at which the prompt was sent.
    """

    visits = threading.local()

    def race(self, *args, **options) -> Iterator[Batch]:
        return self._watched(super().race(*args, **options), self.visits.current, self.visits.started)

    def _watched(self, batches: Iterator[Batch], visit: Visit, started: float) -> Iterator[Batch]:
        try:
            for batch in batches:
                if batch.events and visit.first_token_seconds is None:
                    visit.first_token_seconds = time.perf_counter() - started
                visit.tokens += sum(event.final for _, event in batch.events)
                yield batch
        except Exception as error:          # the page shows it; the result has to name it
            visit.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            batches.close()


def visit(page: Page, number: int, tokens: int) -> Visit:
    """Send one visitor's prompt to the page, and wait for the end of the run. Returns the visitor's result.

    Args:
        page: a page whose runner is a `WatchedRunner`.
        number: number of the visitor. It decides the prompt and the mode: `cascade` if even, `verified` if odd.
        tokens: new tokens of each text, at most.
    """
    prompts = bundled_prompts()
    settings = Settings(model=LABEL, prompt=prompts[number % len(prompts)].text, max_new_tokens=tokens,
                        mode=(Mode.CASCADE, Mode.VERIFIED)[number % 2],
                        thresholds=tuple(thresholds_at(CASCADE_THRESHOLD, page.library.shapes[LABEL])))
    seen, started = Visit(), time.perf_counter()
    WatchedRunner.visits.current, WatchedRunner.visits.started = seen, started
    for frame in page.respond(settings):
        if frame.notice and not seen.error and '"type":"error"' in (frame.stream or ""):
            seen.error = frame.notice.message
    seen.seconds = time.perf_counter() - started
    if not seen.tokens and not seen.error:
        seen.error = "no token was written"
    return seen


def memory_bytes() -> int | None:
    """Return the memory that this process uses, in bytes: GPU memory if there is a GPU, else main memory.

    Returns None if the system does not report this number.
    """
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()


def measure(args: argparse.Namespace) -> dict:
    """Load a model, and measure runs of many visitors at the same time. A thread of this process plays each visitor.

    Args:
        args: `model`, `exits`, `dtype`, `visitors` and `tokens` are used, with the meaning of the command's options.

    Returns a dict that can be saved as JSON. Times are in seconds, memory is in bytes:
    - `provenance`, `model`, `dtype`, `device`, `backend`, `notice`, `visitors`, `tokens`: what was measured.
    - `start_seconds`: time for loading the model. `record_seconds` and `self_check_seconds` are the parts of it for
      recording CUDA graphs and for the self-check; None if there was no such part.
    - `first_token_seconds`, `seconds`: {"median": ..., "worst": ...} over the visitors, as in `Visit`.
    - `written`: number of new tokens of all runs. `errors`: messages of the runs that failed.
    - `memory_before`, `memory_after`: `memory_bytes` before and after all runs. `peak_bytes`: highest use of GPU
      memory; None without a GPU.
    """
    library, started = Library([Offer(LABEL, args.model, args.exits)], dtype=args.dtype), time.perf_counter()
    engine, _ = library.get(LABEL)
    start_seconds = time.perf_counter() - started
    page, before = Page(WatchedRunner(library, at_once=args.visitors)), memory_bytes()
    with ThreadPoolExecutor(args.visitors) as pool:
        visits = list(pool.map(lambda number: visit(page, number, args.tokens), range(args.visitors)))
    firsts = [v.first_token_seconds for v in visits if v.first_token_seconds is not None]
    totals = [v.seconds for v in visits]
    return {"provenance": provenance(0), "model": engine.model.name, "dtype": args.dtype,
            "device": str(engine.model.device), "backend": engine.model.backend.name, "notice": engine.notice,
            "start_seconds": start_seconds, "record_seconds": record_seconds(engine),
            "self_check_seconds": engine.self_check.seconds if engine.self_check else None,
            "visitors": args.visitors, "tokens": args.tokens, "written": sum(v.tokens for v in visits),
            "errors": [v.error for v in visits if v.error],
            "first_token_seconds": {"median": median(firsts), "worst": max(firsts)} if firsts else None,
            "seconds": {"median": median(totals), "worst": max(totals)},
            "memory_before": before, "memory_after": memory_bytes(),
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}


def parse_args() -> argparse.Namespace:
    p = command_parser(__doc__)
    add_model_and_exits(p)
    add_dtype(p)
    p.add_argument("--visitors", type=int, default=20, help="number of visitors, who all run a prompt at the same time")
    p.add_argument("--tokens", type=int, default=64, help="new tokens of each text, at most")
    p.add_argument("--out", type=Path, help="also write the JSON to this file")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    result = measure(args)
    if args.out:
        save_json(args.out, result)
    print(json.dumps(result))
    if result["errors"]:
        raise SystemExit(f"visitors: {len(result['errors'])} of {args.visitors} runs failed: {result['errors'][0]}")


if __name__ == "__main__":
    run_command(main)
