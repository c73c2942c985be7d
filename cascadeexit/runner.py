"""Runner: does all decoding for the page, its evaluation and its endpoints, in this process or in a worker with a GPU.

A race decodes the texts of one run in turns, on one device. Races wait for each other: two of them never use a device
at the same time, also if one is for the page and the other for a program.

On ZeroGPU, a Space has a GPU only while a decorated function runs, and this function runs in a forked process.
Therefore one generator function does all computing (`Runner._compute`). It takes tasks, and it yields batches of events
and an `Inspection` of each text. All of these can be pickled, so they can pass between processes. On every other
machine, the same generator function runs in the page's own process.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch

from cascadeexit.backends.memory import give_back
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.events import TokenEvent
from cascadeexit.inspection import Inspection, inspecting
from cascadeexit.library import Library
from cascadeexit.model import token_ids
from cascadeexit.race import race
from cascadeexit.scoring import Scores, scoring
from cascadeexit.sides import FULL
from cascadeexit.turns import Turns

log = logging.getLogger(__name__)
BATCH_SECONDS = 0.02            # least time between two batches: a third of a frame, and the longest wait after Stop
PROGRESS_SECONDS = 0.25         # least time between two reports of progress
START_SECONDS = 10              # until a new worker has the weights on the GPU
TOKEN_SECONDS = 0.02            # estimated time of a token before any run of the model was measured
MARGIN = 2                      # a worker is ended after its duration, so ask for more than the last run took
WAITING = "Waiting for another run to end…"

Compute = Callable[..., Iterator["Batch"]]


class RunFailed(RuntimeError):
    """Raised if a run fails outside of our code, for example because a worker died or a quota is used up.

    The message is for the visitor. It is plain text; escape it before it is shown as HTML.
    """

    def __init__(self, title: str, message: str):
        super().__init__(message)
        self.title = title


class Check(StrEnum):
    """Selects what `Runner.race` computes about each text after all decoding has ended."""

    NOTHING = "nothing"
    CHOICES = "choices"             # what the full model would have chosen at each position
    INSPECTION = "inspection"       # the same, and the likeliest tokens of every exit
    SCORES = "scores"               # how likely the full model finds each token


@dataclass(frozen=True)
class Task:
    """The work for one side of a race. A side is one of the texts of a run.

    A task has the token ids of the prompt, the config for decoding, and the events of tokens that were written before.
    """

    ids: Sequence[int]                          # of the prompt
    config: DecodeConfig | None = None          # None: nothing is decoded
    events: Sequence[TokenEvent] = ()           # written before: decoding goes on after their tokens
    whole: bool = False                         # True: `Check.SCORES` also scores the prompt, except its first token

    @property
    def read_ids(self) -> list[int]:
        """Token ids that are read before the first new token is decoded: the prompt, and the tokens written before."""
        return [*self.ids, *(e.token_id for e in self.events if e.final)]


@dataclass(frozen=True)
class Batch:
    """One message from a running race.

    A side is one of the texts of the run. The first batches hold events in the order of time, as (name of the side,
    event). If texts are checked, later batches hold the progress of this check, and the last batch holds its results.
    A race that waits for another one yields empty batches, so that it can be cancelled.
    """

    events: Sequence[tuple[str, TokenEvent]] = ()
    over: bool = False                          # True in the batch with the last events
    progress: float | None = None               # share of the texts that was read again
    choices: Mapping[str, Sequence[int]] = field(default_factory=dict)          # of the full model, by side
    inspections: Mapping[str, Inspection] = field(default_factory=dict)         # by side
    scores: Mapping[str, Scores] = field(default_factory=dict)                  # by side


class Runner:
    """Decodes with the models of a library.

    Args:
        on_gpu: function that moves decoding to a worker with a GPU; None decodes in this process. It gets a generator
            function that decodes, and a function with the same parameters that estimates the seconds of a call. It
            returns a generator function that decodes in the worker.
        at_once: number of races that may run at the same time. More than one only if each has a GPU of its own.
    """

    def __init__(self, library: Library, on_gpu: Callable[[Compute, Callable[..., int]], Compute] | None = None,
                 at_once: int = 1):
        self.library, self._turns = library, Turns(at_once)
        self._call = on_gpu(self._compute, self.seconds) if on_gpu else self._compute
        self._token_seconds: dict[str, float] = {}      # of the latest run of each model

    def load(self, label: str) -> Iterator[str]:
        """If the model with this label is not in memory, load it as soon as no race runs.

        Yields lines of text about the progress. Raises the errors of `Library.load`.
        """
        if self.library.ready(label):
            return
        with self._turns.join() as turn:
            while not turn.wait():
                yield WAITING
            yield from self.library.load(label)

    def race(self, label: str, tasks: Mapping[str, Task], check: Check = Check.NOTHING) -> Iterator[Batch]:
        """Decode all tasks in a race, then check their texts. Yields batches of events, then batches of the check.

        The race begins when all races that were asked for before it have ended. Closing the iterator ends all runs. The
        model must be in memory (`Library.ready`).

        Args:
            label: name of the model in the library.
            tasks: {name of a side (one of the texts of the run): its task}. A task without a config is not decoded, but
                its text is checked.
            check: what to compute after the race about the text of each side except `FULL`.

        Raises ValueError at the call if the engine cannot do a task. The iterator raises RunFailed if a run breaks off.
        """
        engine, _ = self.library.get(label)
        tasks = {side: replace(task, ids=token_ids(task.ids)) for side, task in tasks.items()}
        for task in tasks.values():
            if task.config:
                engine.check(task.read_ids, task.config)
        return self._in_turn(self._measured(label, self._call(label, tasks, check)))

    def seconds(self, label: str, tasks: Mapping[str, Task], check: Check = Check.NOTHING) -> int:
        """Estimate the GPU time in whole seconds for a race; `race` explains the arguments.

        The estimate uses the largest number of new tokens, and the time per token of the latest race with this model.
        """
        tokens = sum(task.config.max_new_tokens if task.config else len(task.events) for task in tasks.values())
        return math.ceil(START_SECONDS + MARGIN * tokens * self._token_seconds.get(label, TOKEN_SECONDS))

    def _in_turn(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield empty batches while other races run, then the batches of this race."""
        with self._turns.join() as turn, closing(batches):
            while not turn.wait():
                yield Batch()
            yield from batches

    def _measured(self, label: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of a race unchanged, and store the time per token afterwards, for `seconds`.

        Raises RunFailed if the device has too little memory. The memory of the race is then free again.
        """
        clocks, tokens, out_of_memory = {}, 0, False
        try:
            for batch in batches:
                for side, event in batch.events:
                    clocks[side] = event.seconds
                    tokens += event.final
                yield batch
        except torch.OutOfMemoryError as error:
            log.warning("a run needed more memory than there is: %s", str(error))
            out_of_memory = True
        finally:
            batches.close()
        if out_of_memory:               # out here, since the error and its traceback hold what the run allocated
            del batches
            gc.collect()
            give_back()
            raise RunFailed("Out of memory", "The device has too little free memory for this run. Ask for a shorter "
                            "text, or try again when other runs have ended.")
        if tokens:
            self._token_seconds[label] = sum(clocks.values()) / tokens

    def _compute(self, label: str, tasks: dict[str, Task], check: Check) -> Iterator[Batch]:
        """Decode all tasks and check their texts. Yields the batches that `race` yields.

        All computing happens here. This function may run in a forked process.
        """
        engine, _ = self.library.get(label)
        contest = race({side: engine.generate(task.read_ids, task.config)
                        for side, task in tasks.items() if task.config})
        texts: dict[str, list[TokenEvent]] = {side: [*task.events] for side, task in tasks.items() if side != FULL}
        waiting: list[tuple[str, TokenEvent]] = []
        next_batch = 0.0
        try:
            for side, event in contest:
                waiting.append((side, event))
                if side in texts:
                    texts[side].append(event)
                if time.monotonic() >= next_batch:
                    next_batch = time.monotonic() + BATCH_SECONDS
                    yield Batch(waiting)
                    waiting = []
        finally:
            contest.close()
        yield Batch(waiting, over=True)
        if check is Check.INSPECTION:
            yield from _inspected(engine, tasks, texts)
        elif check is Check.CHOICES:
            yield Batch(choices={side: engine.full_choices(tasks[side].ids, [e.token_id for e in events if e.final])
                                 for side, events in texts.items()})
        elif check is Check.SCORES:
            yield from _scored(engine, tasks, texts)


def events_of(batches: Iterator[Batch]) -> Iterator[tuple[str, TokenEvent]]:
    """Yield the events of a race as (name of the side, event), and stop after the last event.

    batches: result of `Runner.race`. After the last event, it still yields the results of the check.
    """
    for batch in batches:
        yield from batch.events
        if batch.over:
            return


def _inspected(engine: Engine, tasks: dict[str, Task], texts: dict[str, list[TokenEvent]]) -> Iterator[Batch]:
    """Inspect each of these texts. Yields batches with the progress, and at last one batch with all inspections.

    texts: {name of the side: events of its text}.
    """
    found = yield from _results({side: inspecting(engine, tasks[side].ids, events) for side, events in texts.items()})
    yield Batch(inspections=found, choices={side: inspection.full_choices for side, inspection in found.items()})


def _scored(engine: Engine, tasks: dict[str, Task], texts: dict[str, list[TokenEvent]]) -> Iterator[Batch]:
    """Score each of these texts. Yields batches with the progress, and at last one batch with all scores.

    texts: {name of the side: events of its text}.
    """
    checks = {}
    for side, events in texts.items():
        ids = tasks[side].ids
        written = [*ids, *(e.token_id for e in events if e.final)]
        checks[side] = scoring(engine, written, 1 if tasks[side].whole else len(ids))
    yield Batch(scores=(yield from _results(checks)))


def _results(checks: dict[str, Iterator]) -> Generator[Batch, None, dict]:
    """Run the checks of several texts. Yields batches with the progress. Returns {name of the side: result}.

    checks: {name of the side: iterator that yields the share of the text that was read, and at last the result}.
    """
    results, next_progress = {}, time.monotonic() + PROGRESS_SECONDS
    for side, check in checks.items():
        for found in check:
            if isinstance(found, (Inspection, Scores)):
                results[side] = found
            elif time.monotonic() >= next_progress:
                next_progress = time.monotonic() + PROGRESS_SECONDS
                yield Batch(progress=(len(results) + found) / len(checks))
    return results
