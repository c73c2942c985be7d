"""Page: what the controls of the page do. Plain values in and out; app.py turns them into updates of components."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cascadeexit import evaluation, prompts, record
from cascadeexit.calibration import Calibration
from cascadeexit.hub import ModelUnavailable
from cascadeexit.kept import KeptRun, Latest
from cascadeexit.report import Progress, Report, measured_curve
from cascadeexit.runner import Batch, Check, RunFailed, Runner, Task, events_of
from cascadeexit.settings import DISABLED, Settings
from cascadeexit.sides import CASCADE, FULL
from cascadeexit.spread import REPEATS, TOKENS, speedups
from cascadeexit.stream import (
    TokenStream,
    error_line,
    frames,
    model_line,
    replay_line,
    status_line,
)

log = logging.getLogger("cascadeexit.page")
ASSETS = Path(__file__).parents[1] / "assets"
KEPT_RUNS, KEPT_REPORTS = 50, 20
STOP_SECONDS = 60.0         # longest wait until a stopped run has ended: one chunk of its prompt
CHECKING = "Checking quality…"
GONE = "The server no longer keeps this run. Run it again."
UNAVAILABLE = (ValueError, ModelUnavailable, FileNotFoundError)     # errors whose message is for the visitor
FIGURE_SECONDS = 3.0        # least time between two figures of a running evaluation
YIELD_SECONDS = 0.2         # least time between two moments at which a running evaluation can be cancelled


@dataclass(frozen=True)
class Notice:
    """A message that pops up over the page: plain text, to be escaped where markup is read."""

    title: str
    message: str


@dataclass(frozen=True)
class Frame:
    """Changes of the page at one moment of a run; None leaves a part as it is."""

    stream: str | None = None       # value of the token view (`cascadeexit.stream`)
    run: str | None = None          # id of the run that begins, which `analyse` and `fork` ask for
    notice: Notice | None = None


@dataclass(frozen=True)
class PromptSource:
    """Source of an evaluation's prompts: an uploaded file, else pasted lines, else bundled kinds."""

    kinds: Sequence[str] = ()
    each: int | None = None         # bundled prompts of each kind
    pasted: str | None = None
    file: str | None = None

    def read(self) -> list[prompts.Prompt]:
        """The prompts. Raises ValueError with a message for the visitor."""
        if self.file:
            return prompts.read_prompts(Path(self.file))
        if (self.pasted or "").strip():
            return prompts.read_prompts(self.pasted)
        if not self.kinds:
            raise ValueError("Choose at least one kind of prompts, paste some, or upload a file.")
        return prompts.bundled_prompts(self.kinds, int(self.each or 1))


class Page:
    """Handlers of one page. They share the models and the latest runs."""

    def __init__(self, runner: Runner):
        self.library, self._runner = runner.library, runner
        self._runs: Latest[KeptRun] = Latest(KEPT_RUNS)
        self._reports: Latest[Report] = Latest(KEPT_REPORTS)

    def respond(self, settings: Settings) -> Iterator[Frame]:
        """Race the sides of these settings, check the texts with exits, and keep the run."""
        try:
            if not (settings.prompt or "").strip():
                raise ValueError("Please write a prompt first.")
            for line in self._load(settings.model):
                yield Frame(model_line(self.library.shapes[settings.model], settings.model) + status_line(line))
            engine, tokenizer = self.library.get(settings.model)
            sides = settings.sides(self.library.shapes[settings.model])
            ids = prompts.visitor_token_ids(tokenizer, settings.prompt, settings.chat)
            contest = self._runner.race(settings.model, {side.name: Task(ids, side.config) for side in sides},
                                        Check.INSPECTION)
        except UNAVAILABLE as error:
            yield Frame(error_line(str(error)), notice=Notice("Not started", str(error)))
            return
        kept = self._runs.add(KeptRun(settings.model, tokenizer,
                                      TokenStream(engine, tokenizer, sides, ids, settings.record())))
        with kept.growing():
            if engine.notice:
                kept.stream.status(engine.notice)
            yield Frame(kept.stream.text, kept.stream.run,
                        notice=Notice("Slower than usual", engine.notice) if engine.notice else None)
            yield from _grown(kept, contest, engine.notice)

    def analyse(self, run) -> Iterator[Frame]:
        """Check the texts of a run that was stopped, as `respond` does at the end, and keep it with its cards and maps.

        Nothing happens for a run that is not kept, has no text, or was stopped while its texts were checked. The
        argument may be any JSON.
        """
        kept = self._runs.get(run)
        yield Frame()
        if kept is None:
            return
        try:
            with kept.growing(wait=STOP_SECONDS):
                kept.stream.stop()
                tasks = kept.unchecked()
                if tasks:
                    yield from self._loading(kept)
                    yield from _grown(kept, self._runner.race(kept.label, tasks, Check.INSPECTION))
        except UNAVAILABLE as error:
            yield Frame(notice=Notice("Not checked", str(error)))

    def fork(self, run, side, at, token_id) -> Iterator[Frame]:
        """Continue a side of a finished run with another token at one position, as a new side of that run.

        Only the new side is decoded, with the settings of the other; then its text is checked. The arguments may be any
        JSON.
        """
        kept = self._runs.get(run)
        try:
            if kept is None:
                raise ValueError(GONE)
            with kept.growing():
                fork, task = kept.fork(side, at, token_id)
                yield from self._loading(kept)
                contest = self._runner.race(kept.label, {fork.name: task}, Check.INSPECTION)
                kept.stream.fork(fork, side, task.events[0])
                yield Frame(kept.stream.text)
                yield from _grown(kept, contest)
        except UNAVAILABLE as error:
            yield Frame(notice=Notice("Not continued", str(error)))

    def measure(self, run) -> Iterator[Frame]:
        """Race the first side of a finished run against the full model again, briefly, and write how the speed varies.

        The argument may be any JSON.
        """
        kept = self._runs.get(run)
        try:
            if kept is None:
                raise ValueError(GONE)
            with kept.growing():
                yield from self._loading(kept)
                stream, found, next_yield = kept.stream, [], 0.0
                tasks = {name: Task(stream.prompt_ids, stream.sides[name].side.config) for name in (CASCADE, FULL)}
                for speedup in speedups(self._runner, kept.label, tasks):
                    if speedup is not None:
                        found.append(speedup)
                        stream.status(f"Measuring the speed again: {len(found)} of {REPEATS} done…")
                        yield Frame(stream.text)
                    elif time.monotonic() >= next_yield:
                        next_yield = time.monotonic() + YIELD_SECONDS
                        yield Frame()
                stream.spread(CASCADE, found, TOKENS)
                yield Frame(stream.text)
        except (*UNAVAILABLE, RunFailed) as error:
            yield Frame(error_line(str(error)), notice=Notice("Not measured", str(error)))

    def evaluate(self, source: PromptSource, settings: Settings) -> Iterator[Progress]:
        """Race each of many prompts; yields a report that grows. `cancelled` ends it."""
        try:
            chosen = source.read()
            config, _ = settings.decode_configs(self.library.shapes[settings.model].num_exits)
            report = self._reports.add(Report(settings.model, config, len(chosen),
                                              measured_curve(self.library.fingerprint(settings.model))))
            yield Progress(report=report.id)
            for line in self._load(settings.model):
                yield Progress(line)
            _, tokenizer = self.library.get(settings.model)
            running = evaluation.evaluate(
                self._runner, settings.model, partial(prompts.visitor_token_ids, tokenizer, chat=settings.chat), chosen,
                config, partial(tokenizer.decode, skip_special_tokens=True), pauses=True)
        except (ValueError, OSError, ModelUnavailable) as error:
            yield Progress(str(error), "error", report="")
            return
        began = next_figure = next_yield = time.monotonic()
        yield report.begun()
        for result in running:
            now = time.monotonic()
            if result is None:              # in the middle of a prompt: a run can only be cancelled where it yields
                if now >= next_yield:
                    next_yield = now + YIELD_SECONDS
                    yield Progress()
                continue
            report.results.append(result)
            left = (now - began) / len(report.results) * (report.total - len(report.results))
            drawn = report.done or now >= next_figure
            if drawn:
                next_figure = now + FIGURE_SECONDS
            yield report.progress(left, drawn)

    def cancelled(self, report: str) -> Progress:
        """Show what a cancelled evaluation had finished. No change where none was running."""
        found = self._reports.get(report)
        return found.cancelled() if found and not found.done else Progress()

    def idle(self, label: str) -> Frame:
        """Return the page as it is before a run of this model."""
        return Frame(model_line(self.library.shapes[label], label))

    # The browser calls the next two, so their arguments may be any JSON.

    def token_card(self, run, side, i) -> dict | None:
        """Candidates of the token at position i of a side, for its card; None for a text that was not checked."""
        kept = self._runs.get(run)
        return kept.card(side, i) if kept else None

    def layer_map(self, run, side, start, count) -> dict | None:
        """Choices of every exit at `count` positions of a side from `start`; None for a text that was not checked."""
        kept = self._runs.get(run)
        return kept.map(side, start, count) if kept else None

    def _load(self, label: str) -> Iterator[str]:
        """Make the model ready; yields progress to show."""
        if not self.library.ready(label):
            yield from self.library.load(label)

    def _loading(self, kept: KeptRun) -> Iterator[Frame]:
        """Make the model of a kept run ready; yields progress."""
        for line in self._load(kept.label):
            kept.stream.status(line)
            yield Frame(kept.stream.text)


def _grown(kept: KeptRun, contest: Iterator[Batch], notice: str = "") -> Iterator[Frame]:
    """Write the events of a race and then what the check of the texts finds; yields the run as it grows.

    notice: status at the end.
    """
    stream = kept.stream
    try:
        for text in frames(stream, events_of(contest)):
            yield Frame(text)
        stream.close_text()
        kept.checking = True
        stream.status(CHECKING)
        yield Frame(stream.text)
        for batch in contest:
            if batch.progress is not None:
                stream.status(f"{CHECKING} {batch.progress:.0%}")
                yield Frame(stream.text)
            for name, inspection in batch.inspections.items():
                kept.inspected(name, inspection)
        kept.checking = False
        if notice:
            stream.status(notice)
        yield Frame(stream.text)
    except RunFailed as error:
        log.warning("a run broke off: %s", error)
        stream.fail(str(error))
        yield Frame(stream.text, notice=Notice(error.title, str(error)))
    except Exception:
        log.exception("a run failed")
        stream.fail("Something went wrong while the model was running. The server's log has the details.")
        yield Frame(stream.text)
    finally:
        contest.close()                                             # also when the visitor stops or leaves


def replayed(path: str | Path) -> str:
    """Read a recorded run as a stream that the token view plays. Raises ValueError for any other file."""
    return replay_line() + record.load(Path(path).read_bytes())


def replay_upload(path: str) -> Frame:
    """Replay an uploaded run. Any other file gives a message and no other change."""
    try:
        return Frame(replayed(path))
    except ValueError as error:
        return Frame(error_line(f"This file cannot be replayed: {error}"), notice=Notice("Not a saved run", str(error)))


def retried(seed, temperature) -> tuple[int, Notice | None]:
    """Seed of a run that is made again, and a notice where the text cannot become another one."""
    if temperature:
        return int(seed or 0) + 1, None
    return int(seed or 0), Notice("The same text again", "At temperature 0 the model always takes the likeliest token. "
                                  "Set a temperature above 0, such as 0.7, for another text.")


# -- the quality slider ---------------------------------------------------------------------------------------------


def threshold_for(percent: float, calibration: Calibration) -> float:
    """Loosest threshold that is certified to keep this agreement; `DISABLED` when no measured threshold does."""
    threshold = calibration.threshold(1 - percent / 100)
    return DISABLED if threshold is None else threshold


def percent_at(threshold: float, calibration: Calibration) -> int:
    """Agreement in percent that is certified at this threshold, by the next looser measured one; 0 without one."""
    at_most = [point.at_most for point in calibration.points if point.threshold <= threshold]
    return math.floor(round(100 * (1 - at_most[0]), 9)) if at_most else 0


def quality_stops(calibration: Calibration) -> list[int]:
    """Positions of the quality slider, in percent and ascending, at which it changes the thresholds.

    The first and the last are the range of the slider. Below the first, the loosest measured threshold stays in force.
    Above the last, no threshold is certified: only the mode verified keeps such an agreement. A position between two
    stops has the threshold of the upper one, so `percent_at(threshold_for(percent))` moves a slider to its stop.
    """
    return sorted({percent_at(point.threshold, calibration) for point in calibration.points})
