"""Runner: all decoding for the page, its evaluation and its endpoints, in this process or in a worker that has the GPU.

On ZeroGPU a Space has a GPU only while a decorated function runs, and that function runs in a forked process. So one
generator function computes everything (`Runner._compute`); the page's process never does. What goes in and comes out
can be pickled: tasks in; batches of events and an `Inspection` of each text out. On every other machine the same
generator runs in the page's own process.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.events import TokenEvent
from cascadeexit.inspection import Inspection, inspecting
from cascadeexit.library import Library
from cascadeexit.race import race
from cascadeexit.sides import FULL

BATCH_SECONDS = 0.02            # least time between two batches: a third of a frame, and the longest wait after Stop
PROGRESS_SECONDS = 0.25         # least time between two reports of progress
START_SECONDS = 10              # until a new worker has the weights on the GPU
TOKEN_SECONDS = 0.02            # a token, until a run of the model was measured
MARGIN = 2                      # a worker is ended after its duration, so ask for more than the last run took

Compute = Callable[..., Iterator["Batch"]]


class RunFailed(RuntimeError):
    """Error of a run that failed outside of our code, for example because a worker died or a quota is used up.

    The message is for the visitor: plain text, to be escaped where markup is read.
    """

    def __init__(self, title: str, message: str):
        super().__init__(message)
        self.title = title


class Check(StrEnum):
    """What is read after a race, of each text with exits."""

    NOTHING = "nothing"
    CHOICES = "choices"             # what the full model would have chosen at each position
    INSPECTION = "inspection"       # that, and the candidates of every exit


@dataclass(frozen=True)
class Task:
    """Work for one side: what to decode, and what is there to be checked."""

    ids: Sequence[int]                          # of the prompt
    config: DecodeConfig | None = None          # None: nothing is decoded
    events: Sequence[TokenEvent] = ()           # written before: decoding goes on after their tokens

    @property
    def read_ids(self) -> list[int]:
        """Tokens that are read before the first one is decoded."""
        return [*self.ids, *(e.token_id for e in self.events if e.final)]


@dataclass(frozen=True)
class Batch:
    """Consecutive events of a race, as (side, event); or, after the last of them, what was found by reading again."""

    events: Sequence[tuple[str, TokenEvent]] = ()
    over: bool = False                          # with the last events
    progress: float | None = None               # share of the texts that was read again
    choices: Mapping[str, Sequence[int]] = field(default_factory=dict)          # of the full model, by side
    inspections: Mapping[str, Inspection] = field(default_factory=dict)         # by side


class Runner:
    """Runs the models of a library.

    Args:
        on_gpu: makes the function that runs in a worker with a GPU, from the generator function that computes and a
            function that gives the seconds it needs, both of the same arguments. Default: it runs in this process.
    """

    def __init__(self, library: Library, on_gpu: Callable[[Compute, Callable[..., int]], Compute] | None = None):
        self.library = library
        self._call = on_gpu(self._compute, self.seconds) if on_gpu else self._compute
        self._token_seconds: dict[str, float] = {}      # of the latest run of each model

    def race(self, label: str, tasks: Mapping[str, Task], check: Check = Check.NOTHING) -> Iterator[Batch]:
        """Race sides against each other and check their texts; yields batches of events, then progress and results.

        Closing the iterator ends all runs. The model must be ready (`Library.ready`).

        Args:
            tasks: by side. Those without a config are only checked.
            check: what to read of the texts with exits: of all sides but `FULL`.

        Raises ValueError for runs that cannot work, before the first batch, and RunFailed from the iterator.
        """
        engine, _ = self.library.get(label)
        tasks = {side: replace(task, ids=list(map(int, task.ids))) for side, task in tasks.items()}
        for task in tasks.values():
            if task.config:
                engine.check(task.read_ids, task.config)
        return self._measured(label, self._call(label, tasks, check))

    def seconds(self, label: str, tasks: Mapping[str, Task], check: Check = Check.NOTHING) -> int:
        """Estimate the GPU time in seconds for a race with these arguments, from its length and the latest speed."""
        tokens = sum(task.config.max_new_tokens if task.config else len(task.events) for task in tasks.values())
        return math.ceil(START_SECONDS + MARGIN * tokens * self._token_seconds.get(label, TOKEN_SECONDS))

    def _measured(self, label: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches unchanged. After the race, store the time that a token took, for `seconds`."""
        clocks, tokens = {}, 0
        try:
            for batch in batches:
                for side, event in batch.events:
                    clocks[side] = event.seconds
                    tokens += event.final
                yield batch
        finally:
            batches.close()
        if tokens:
            self._token_seconds[label] = sum(clocks.values()) / tokens

    def _compute(self, label: str, tasks: dict[str, Task], check: Check) -> Iterator[Batch]:
        """Decode, and yield the batches of a race. All computation happens here; it may run in a forked process."""
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


def events_of(batches: Iterator[Batch]) -> Iterator[tuple[str, TokenEvent]]:
    """Yield the events of a race. When they end, `batches` goes on with what the check finds."""
    for batch in batches:
        yield from batch.events
        if batch.over:
            return


def _inspected(engine: Engine, tasks: dict[str, Task], texts: dict[str, list[TokenEvent]]) -> Iterator[Batch]:
    """Inspect texts with exits, by side; yields progress, and last the inspections."""
    inspections, next_progress = {}, time.monotonic() + PROGRESS_SECONDS
    for side, events in texts.items():
        for found in inspecting(engine, tasks[side].ids, events):
            if isinstance(found, Inspection):
                inspections[side] = found
            elif time.monotonic() >= next_progress:
                next_progress = time.monotonic() + PROGRESS_SECONDS
                yield Batch(progress=(len(inspections) + found) / len(texts))
    yield Batch(inspections=inspections, choices={side: found.full_choices for side, found in inspections.items()})
