"""Page: the functions behind the controls of the page. app.py turns their results into updates of components."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from cascadeexit import evaluation, prompts, record
from cascadeexit.calibration import Calibration
from cascadeexit.config import Mode
from cascadeexit.engine import Engine
from cascadeexit.folders import assets_folder
from cascadeexit.hub import ModelUnavailable
from cascadeexit.kept import KeptRun, Latest
from cascadeexit.report import Progress, Report, measured_curve
from cascadeexit.runner import WAITING, Batch, Check, RunFailed, Runner, Task, events_of
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
from cascadeexit.values import as_whole, whole

log = logging.getLogger("cascadeexit.page")
ASSETS = assets_folder()
KEPT_RUNS, KEPT_REPORTS = 50, 20
STOP_SECONDS = 60.0         # longest wait until a stopped run has ended: one chunk of its prompt
CHECKING = "Checking quality…"
GONE = "The server no longer keeps this run. Run it again."
UNAVAILABLE = (ValueError, ModelUnavailable, FileNotFoundError)     # errors whose message is for the visitor
FIGURE_SECONDS = 3.0        # least time between two figures of a running evaluation
YIELD_SECONDS = 0.2         # least time between two moments at which a running evaluation can be cancelled


@dataclass(frozen=True)
class Notice:
    """A message that pops up over the page. It is plain text. Escape it before it is shown as HTML."""

    title: str
    message: str


@dataclass(frozen=True)
class Frame:
    """A change of the page during a run. A field that is None leaves its part of the page unchanged."""

    stream: str | None = None       # value of the token view (`cascadeexit.stream`)
    run: str | None = None          # id of the run that begins, an argument of `analyse` and `fork`
    notice: Notice | None = None


@dataclass(frozen=True)
class PromptSource:
    """Tells where the prompts of an evaluation come from: a file, pasted lines, or kinds of bundled prompts.

    If there is a file, only the file is used. Otherwise pasted lines are used if there are any.
    """

    kinds: Sequence[str] = ()
    each: int | None = None         # number of bundled prompts of each kind
    pasted: str | None = None
    file: str | None = None

    def read(self) -> list[prompts.Prompt]:
        """Read and return the prompts. Raises ValueError with a message for the visitor."""
        if self.file:
            return prompts.read_prompts(Path(self.file))
        if (self.pasted or "").strip():
            return prompts.read_prompts(self.pasted)
        if not self.kinds:
            raise ValueError("Choose at least one kind of prompt, paste prompts, or upload a file.")
        each = whole("the number of prompts of each kind", as_whole(self.each or 1), 1, prompts.MAX_PROMPTS)
        return prompts.bundled_prompts(self.kinds, each)


class Page:
    """The functions behind the controls of one page. They share the models, the newest runs and evaluations."""

    def __init__(self, runner: Runner):
        self.library, self._runner = runner.library, runner
        self._runs: Latest[KeptRun] = Latest(KEPT_RUNS)
        self._reports: Latest[Report] = Latest(KEPT_REPORTS)

    def respond(self, settings: Settings) -> Iterator[Frame]:
        """Decode a visitor's prompt once for each panel, check the texts that exits wrote, and keep the run.

        The check compares each token with the full model's choice after the same text. Yields the changes of the page.
        """
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
            notice = _notice(engine, sides[0].config.mode)
            if notice:
                kept.stream.status(notice.message)
            yield Frame(kept.stream.text, kept.stream.run, notice=notice)
            yield from _grown(kept, contest, notice.message if notice else "")

    def analyse(self, run) -> Iterator[Frame]:
        """Check the texts of a run that the visitor stopped, as `respond` does at the end of a run.

        Yields the changes of the page. Nothing is checked if the run is not kept, has no text, or was stopped while its
        texts were checked.

        run: id of the run; it may be any JSON.
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
        """Continue one text of a finished run after replacing one of its tokens. Yields the changes of the page.

        A side is one of the texts of a run. The continuation becomes a new side of the run. It is decoded with the
        settings of the side that it continues, or of the first side if it continues the full model's text. Then its
        text is checked. The arguments may be any JSON.

        Args:
            run: id of the run.
            side: name of the side to continue.
            at: position of the token to replace.
            token_id: the token to put there.
        """
        kept = self._runs.get(run)
        try:
            if kept is None:
                raise ValueError(GONE)
            with kept.growing():
                fork, task = kept.fork(side, at, token_id)
                yield from self._loading(kept)
                contest = self._runner.race(kept.label, {fork.name: task}, Check.INSPECTION)
                kept.stream.fork(fork, side, task.events[-1])
                yield Frame(kept.stream.text)
                yield from _grown(kept, contest)
        except UNAVAILABLE as error:
            yield Frame(notice=Notice("Not continued", str(error)))

    def measure(self, run) -> Iterator[Frame]:
        """Measure how much the speed-up of a finished run varies. Yields the changes of the page.

        The beginnings of two texts are decoded again, several times: the text in the first panel, and the full model's
        text. The speed-ups are written to the run's stream.

        run: id of the run; it may be any JSON.
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
        """Decode many prompts with exits and with the full model. Yields the changes of the evaluation tab.

        The caller cancels the evaluation by closing this generator. `cancelled` then shows what was finished.
        """
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
        """Show the results that an evaluation had when it was cancelled. Returns the change of the evaluation tab.

        Nothing changes if no such evaluation was running.

        report: id of the evaluation's report.
        """
        found = self._reports.get(report)
        return found.cancelled() if found and not found.done else Progress()

    def idle(self, label: str) -> Frame:
        """Show the page as it is before any run. Returns the change of the page.

        label: name of the chosen model.
        """
        return Frame(model_line(self.library.shapes[label], label))

    # The browser calls the next two, so their arguments may be any JSON.

    def token_card(self, run, side, i) -> dict | None:
        """Return the likeliest tokens of each exit and of the full model at one position of a text.

        `Inspection.card` describes the dict. Returns None if the text was not checked, or if the run is no longer kept.

        Args:
            run: id of the run.
            side: name of the side (one of the texts of the run).
            i: the position.
        """
        kept = self._runs.get(run)
        return kept.card(side, i) if kept else None

    def layer_map(self, run, side, start, count) -> dict | None:
        """Return the likeliest token of each exit and of the full model at each position in a part of a text.

        `Inspection.map` describes the dict. Returns None if the text was not checked, or if the run is no longer kept.

        Args:
            run: id of the run.
            side: name of the side (one of the texts of the run).
            start: first position.
            count: number of positions.
        """
        kept = self._runs.get(run)
        return kept.map(side, start, count) if kept else None

    def _load(self, label: str) -> Iterator[str]:
        """Load the model with this label if it is not in memory. Yields lines of text about the progress."""
        yield from self._runner.load(label)

    def _loading(self, kept: KeptRun) -> Iterator[Frame]:
        """Load the model of a kept run if it is not in memory. Yields changes of the page that show the progress."""
        for line in self._load(kept.label):
            kept.stream.status(line)
            yield Frame(kept.stream.text)


def _notice(engine: Engine, mode: Mode) -> Notice | None:
    """Make the notice for a run in this mode: why it is slow, or what is switched off. None if neither is true."""
    if engine.notice:
        return Notice("Slower than usual", engine.notice)
    off = engine.payoff.sentences() if engine.payoff and mode is Mode.CASCADE else []
    return Notice("Switched off", " ".join(off)) if off else None


def _grown(kept: KeptRun, contest: Iterator[Batch], notice: str = "") -> Iterator[Frame]:
    """Write the events of a race to a run's stream, and then what the check of its texts finds.

    Yields the changes of the page.

    Args:
        contest: the batches of the race, from `Runner.race`.
        notice: text to show as the status at the end; "" for none.
    """
    stream = kept.stream
    try:
        first = next(contest)
        if first == Batch():
            stream.status(WAITING)
            yield Frame(stream.text)
        while first == Batch():                                     # another race runs
            yield Frame()
            first = next(contest)
        for text in frames(stream, events_of(chain([first], contest))):
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
    """Read a recorded run from a file. Returns a stream that the page plays at the speed of the recording.

    Raises ValueError for any other file.
    """
    return replay_line() + record.load(Path(path).read_bytes())


def replay_upload(path: str) -> Frame:
    """Read an uploaded run and play it. For any other file, show a message. Returns the change of the page."""
    try:
        return Frame(replayed(path))
    except ValueError as error:
        return Frame(error_line(f"This file cannot be replayed: {error}"), notice=Notice("Not a saved run", str(error)))


def retried(seed, temperature) -> tuple[int, Notice | None]:
    """Return the seed for another run of the same prompt, and a notice or None.

    Above temperature 0, returns `seed` + 1, so that the text can differ. At temperature 0, returns the same seed, and
    the notice tells the visitor that the text will be the same.
    """
    if temperature:
        return int(seed or 0) + 1, None
    return int(seed or 0), Notice("The same text again", "At temperature 0 the model always takes the likeliest token. "
                                  "Set a temperature above 0, such as 0.7, for another text.")


# -- the quality slider ---------------------------------------------------------------------------------------------


def threshold_for(percent: float, calibration: Calibration) -> float:
    """Return the lowest measured threshold that is certified to reach this agreement with the full model.

    Returns `DISABLED` if no measured threshold reaches it.

    percent: the agreement, 0 to 100.
    """
    threshold = calibration.threshold(1 - percent / 100)
    return DISABLED if threshold is None else threshold


def percent_at(threshold: float, calibration: Calibration) -> int:
    """Return the agreement with the full model, in whole percent, that is certified at this threshold.

    Only some thresholds were measured. The result is the agreement at the highest measured threshold that is not above
    `threshold`. Returns 0 if all measured thresholds are above `threshold`.
    """
    at_most = [point.at_most for point in calibration.points if point.threshold <= threshold]
    return math.floor(round(100 * (1 - at_most[0]), 9)) if at_most else 0


def quality_stops(calibration: Calibration) -> list[int]:
    """Return the positions of the quality slider at which the thresholds change, in percent, ascending.

    The first and the last position are the ends of the slider. Below the first position, the lowest measured threshold
    would still be used. Above the last one, no threshold is certified, and only the mode verified reaches such an
    agreement. Between two positions, the slider has the threshold of the higher one.
    `percent_at(threshold_for(percent))` is this higher position.
    """
    return sorted({percent_at(point.threshold, calibration) for point in calibration.points})
