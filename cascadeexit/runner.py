"""Runner: all decoding for the page, its evaluation and its endpoints, in this process or in a worker that has the GPU.

On ZeroGPU a Space has a GPU only while a decorated function runs, and that function runs in a forked process. So one
generator function computes everything (`Runner._compute`); the page's process never does. What goes in and comes out
can be pickled: token ids and configs in, batches of events and an `Inspection` out. On every other machine the same
generator runs in the page's own process.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from cascadeexit.backends.memory import give_back
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.events import TokenEvent
from cascadeexit.inspection import Inspection, inspect
from cascadeexit.library import Library
from cascadeexit.race import race
from cascadeexit.stream import CASCADE, FULL

log = logging.getLogger(__name__)
BATCH_SECONDS = 0.02            # least time between two batches: a third of a frame, and the longest wait after Stop
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


@dataclass(frozen=True)
class Batch:
    """Consecutive events of a race, as (side, event). A last batch without events has the results of `_read_again`."""

    events: Sequence[tuple[str, TokenEvent]] = ()
    over: bool = False                          # with the last events
    choices: Sequence[int] | None = None        # the full model's at each position of the text with exits
    inspection: Inspection | None = None        # of the text with exits


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

    def race(self, label: str, ids: Sequence[int], config: DecodeConfig, full: DecodeConfig | None = None,
             inspected: bool = False) -> Iterator[Batch]:
        """Race a run with exits, side `CASCADE`, against the full model's, side `FULL`; yields batches of events.

        Closing the iterator ends both runs. The model must be ready (`Library.ready`).

        Args:
            full: config of the full model's run; None runs only the side with exits.
            inspected: end with an `Inspection`. Else a race of greedy runs ends with the full model's choices alone.

        Raises ValueError for runs that cannot work, before the first batch, and RunFailed from the iterator.
        """
        engine, _ = self.library.get(label)
        ids = list(map(int, ids))
        for wanted in filter(None, (config, full)):
            engine.check(ids, wanted)
        return self._measured(label, self._call(label, ids, config, full, inspected))

    def seconds(self, label: str, ids: Sequence[int], config: DecodeConfig, full: DecodeConfig | None = None,
                inspected: bool = False) -> int:
        """Estimate the GPU time in seconds for a race with these arguments, from its length and the latest speed."""
        tokens = config.max_new_tokens + (full.max_new_tokens if full else 0)
        return math.ceil(START_SECONDS + MARGIN * tokens * self._token_seconds.get(label, TOKEN_SECONDS))

    def _measured(self, label: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches unchanged. After the race, store the time that a token took, for `seconds`.

        Raises RunFailed where a device has too little memory. What the run held is free by then.
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

    def _compute(self, label: str, ids: list[int], config: DecodeConfig, full: DecodeConfig | None,
                 inspected: bool) -> Iterator[Batch]:
        """Decode, and yield the batches of a race. All computation happens here; it may run in a forked process."""
        engine, _ = self.library.get(label)
        contest = race({CASCADE: engine.generate(ids, config)} | ({FULL: engine.generate(ids, full)} if full else {}))
        written: list[TokenEvent] = []
        waiting: list[tuple[str, TokenEvent]] = []
        next_batch = 0.0
        try:
            for side, event in contest:
                waiting.append((side, event))
                if side == CASCADE:
                    written.append(event)
                if time.monotonic() >= next_batch:
                    next_batch = time.monotonic() + BATCH_SECONDS
                    yield Batch(waiting)
                    waiting = []
        finally:
            contest.close()
        yield Batch(waiting, over=True)
        yield _read_again(engine, ids, written, inspected, choices=full is not None and config.temperature == 0)


def events_of(batches: Iterator[Batch]) -> Iterator[tuple[str, TokenEvent]]:
    """Yield the events of a race. When they end, `next(batches)` returns the last batch, which `_read_again` made."""
    for batch in batches:
        yield from batch.events
        if batch.over:
            return


def _read_again(engine: Engine, ids: list[int], written: list[TokenEvent], inspected: bool, choices: bool) -> Batch:
    """Pass the text of the run with exits through the full model again. Returns the last batch of a race."""
    if inspected:
        inspection = inspect(engine, ids, written)
        return Batch(choices=inspection.full_choices, inspection=inspection)
    return Batch(choices=engine.full_choices(ids, [e.token_id for e in written if e.final]) if choices else None)
