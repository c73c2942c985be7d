"""Payoff: measures at load which exits, which drafter and which drafts save time with this model on this machine.

What does not pay is switched off, so that no mode is slower than `full`. The texts of `full` and `verified` never
depend on it. A measurement takes about a second: one token of the full model, verification passes of several rows, one
question to each exit, and one call of the drafter. Untrained exits never pay, because no token of theirs can be
trusted; so for them the decision does not depend on the clock. For trained ones, `MARGIN` keeps the decision the same
from load to load unless a cost is close to what it saves.
"""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cascadeexit.backends.base import Rows
from cascadeexit.carry import Carry
from cascadeexit.engine import Engine
from cascadeexit.lookup import NOTHING_COPIED
from cascadeexit.selfcheck import prompt_ids
from cascadeexit.shape import Shape, exit_name
from cascadeexit.staircase import Staircase

SECONDS = 0.8               # for all timings together; each is made at least twice
REPEATS = 7                 # the fastest of so many counts, since other work on the machine can only add time
ROWS = (4, 8)               # rows of the verification passes that are timed; the time of 2 rows is too near that of 1
DEAR_ROW = 0.35             # a row of a pass that costs more than this share of a one-row pass makes drafts fewer
TAKEN = 0.25                # assumed share of its questions after which a trained exit is taken
HIT_RATE = 0.5              # assumed share of the drafter's calls that give an accepted draft, as in `tree.py`
MARGIN = 1.5                # a cost may exceed its estimate or its gain by this factor before anything is switched off

# Minutes for training the shipped exits with 2,000,000 tokens on 2 CPU cores (AMD EPYC), from LOG.md of 2026-11-26 and
# 2026-11-27: 375 tokens/s for writing the text, 60 minutes for the exits after layers 9, 17, 24, and 47 for the exit
# before the first layer. Another model needs time in proportion to its weights.
TRAINING_MINUTES = 2_000_000 / 375 / 60 + 60 + 47
TRAINED_BYTES = 269e6       # weights of the model for which this was measured


@dataclass(frozen=True)
class ExitTime:
    """Time in seconds that asking an exit once takes, and that a token saves if the exit is taken."""

    asked: float
    saved: float

    def pays(self, taken: float) -> bool:
        """Return True if the exit saves time when it is taken for this share of its questions."""
        return self.asked <= taken * self.saved * MARGIN


@dataclass(frozen=True)
class Payoff:
    """Times that were measured at load, and what follows from them."""

    shape: Shape
    model: str                      # as it was given to `hub.load`
    seconds: float                  # that the measurement took
    token_seconds: float            # one token of `full`, prefill excluded
    exits: tuple[ExitTime, ...]     # of each exit
    draft_seconds: float | None     # one call of the drafter; None if nothing drafts but n-gram lookup
    row_share: float                # time of one more row in a verification pass, in units of a one-row pass
    row_factor: float               # factor for the backend's `row_cost`: above 1 where rows are dear
    training_minutes: float         # estimated time for training exits of this model on 2 CPU cores

    @property
    def paying(self) -> tuple[bool, ...]:
        """For each exit, True if mode `cascade` saves time by asking it."""
        return tuple(self.shape.trained and exit.pays(TAKEN) for exit in self.exits)

    @property
    def drafter_pays(self) -> bool:
        """True if a call of the drafter can save time in mode `verified`."""
        return (self.shape.trained and self.draft_seconds is not None
                and self.draft_seconds <= HIT_RATE * self.token_seconds * MARGIN)

    def sentences(self) -> list[str]:
        """Return sentences for users about what is switched off. [] if everything pays."""
        if not self.shape.trained:
            return [f"Early exits are switched off: they are not trained for this model, so they would only cost time. "
                    f"Exact mode with n-gram drafts stays on. Train exits first: {self.command()} (about "
                    f"{_duration(self.training_minutes)} on 2 CPU cores, less on a GPU)."]
        found = [f"{exit_name(s, self.shape)} is switched off on this machine: asking it takes {_ms(exit.asked)} and "
                 f"saves {_ms(exit.saved)} when it is taken."
                 for s, exit in enumerate(self.exits) if not self.paying[s]]
        if self.draft_seconds is not None and not self.drafter_pays:
            found.append(f"The drafter is switched off on this machine: a call takes {_ms(self.draft_seconds)}, and a "
                         f"token of the full model takes {_ms(self.token_seconds)}.")
        return found

    def command(self) -> str:
        """Return the shell command that trains exits for this model."""
        return f"MODEL={shlex.quote(self.model)} OUT=runs/{self.shape.name} training/run.sh"


@torch.inference_mode()
def measure(engine: Engine, model: str) -> Payoff:
    """Measure an engine and return the result. The caller stores it in `Engine.payoff`.

    model: name of the model as it was given to `hub.load`, for the command that trains exits.
    """
    began, work = time.perf_counter(), _Work(engine)
    clock = _Clock(engine.model.backend.synchronize, began + SECONDS)
    token = clock.time(lambda: work.verify(1))
    head = clock.time(lambda: work.verdict(work.top))
    row = max((clock.time(lambda n=n: work.verify(n)) / token - 1) / (n - 1) for n in ROWS)
    factor = max(1.0, row / engine.model.layers.row_cost(1)) if row > DEAR_ROW else 1.0
    times = []
    for s, depth in enumerate(engine.exit_depths):
        asked, choice = clock.time(lambda s=s: work.ask(s)), clock.time(lambda s=s: work.choose(s))
        # A token that leaves early runs through the skipped layers later, as one more row of another pass.
        times.append(ExitTime(asked, (token - head) * (1 - depth) * (1 - min(max(row, 0.0), 1.0)) + head - choice))
    drafts = clock.time(work.draft) if engine.model.exit_layers[:1] == (0,) else None
    minutes = TRAINING_MINUTES * engine.model.weight_bytes / TRAINED_BYTES
    return Payoff(Shape.of(engine), model, time.perf_counter() - began, token, tuple(times), drafts, row, factor,
                  minutes)


class _Work:
    """The pieces of work that are timed. They run on random tokens, always the same ones."""

    def __init__(self, engine: Engine):
        self._model, self._exits, self._ids = engine.model, engine.exits, prompt_ids(engine.model.vocab_size)
        self._stairs = Staircase(engine.model, engine.capacity(2 * len(self._ids)))
        self._after = self._stairs.prefill(self._ids)               # after each segment, (1, N, D) each
        self._carried = Carry.after_prompt(engine.model, self._after).state
        self.top = self._after[-1][:, -1:]
        self._hidden = [self._exits.hidden(s, rows[:, -1], self._carried) for s, rows in enumerate(self._after[:-1])]

    def verify(self, rows: int) -> None:
        """Run a pass of the full model over so many more tokens, and forget them again."""
        start = len(self._stairs.tokens)
        self._stairs.tokens += self._ids[:rows]
        self.verdict(self._stairs.run(range(self._model.num_segments))[-1])
        self._stairs.cache.truncate(start)
        del self._stairs.tokens[start:]

    def verdict(self, rows: Rows) -> None:
        self._exits.full_head.choices(self._model.layers.norm(rows))

    def ask(self, s: int) -> None:
        hidden = self._exits.hidden(s, self._after[s][:, -1], self._carried)
        self._exits.confidence(s, hidden, [NOTHING_COPIED])

    def choose(self, s: int) -> None:
        self._exits.choice(s, self._hidden[s])

    def draft(self) -> None:
        context = self._exits.context(self._after[1:-1], self._after[0].shape[1] - 1)
        self._exits.drafts(self._ids[-1:], [self._carried], 2, 1.0, context)


class _Clock:
    """Times pieces of work until a moment at which the measurement should end.

    Args:
        synchronize: waits until the device has finished all work.
        end: this moment, as `time.perf_counter` counts.
    """

    def __init__(self, synchronize: Callable[[], None], end: float):
        self._synchronize, self._end = synchronize, end

    def time(self, work: Callable[[], None]) -> float:
        """Return the seconds that a piece of work takes at best. It runs once before, because a first run is slow."""
        work()
        found = [self._once(work)]
        while len(found) < REPEATS and time.perf_counter() < self._end:
            found.append(self._once(work))
        return min(found)

    def _once(self, work: Callable[[], None]) -> float:
        self._synchronize()
        began = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - began


def _ms(seconds: float) -> str:
    return f"{1000 * max(seconds, 0):.1f} ms"


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
