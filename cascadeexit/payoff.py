"""Payoff: measures at load which exits, which drafter and which drafts save time with this model on this machine.

Exits and drafts that do not save time are switched off, so that no mode is slower than `full`. This never changes the
texts of `full` and `verified`. A measurement takes about a second. It times one token of the full model, verification
passes of several rows, one run of each exit's adapter and estimator, and one call of the drafter. Untrained exits are
always switched off, because their tokens cannot be trusted. For trained exits, `MARGIN` keeps the decision the same
from load to load, unless a cost is close to the largest cost that still pays.
"""

import math
import shlex
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from cascadeexit.backends.base import Rows
from cascadeexit.carry import Carry
from cascadeexit.engine import Engine
from cascadeexit.lookup import NOTHING_COPIED
from cascadeexit.selfcheck import prompt_ids
from cascadeexit.shape import Shape, exit_name
from cascadeexit.staircase import Staircase

SECONDS = 0.8               # for all turns together
ATTEMPTS = 3
LEAST_TURNS, MOST_TURNS = 3, 12
SHORT, MOST_RUNS = 0.004, 10        # a piece runs again in the same turn until it took so many seconds, or so often
ROWS = (4, 8)               # rows of the verification passes that are timed; the time of 2 rows is too near that of 1
DEAR_ROW = 0.5              # a row of a pass that costs more than this share of a one-row pass makes drafts fewer
TAKEN = 0.25                # assumed share of its questions after which a trained exit is taken
HIT_RATE = 0.5              # assumed share of the drafter's calls that give an accepted draft, as in `tree.py`
MARGIN = 2                  # a cost may exceed its estimate or its gain by this factor before anything is switched off

TOKEN, HEAD, ASK, DRAFT = "token", "head", "ask", "draft"       # pieces of work; some have a number beside it

QUICK_MINUTES, QUICK_GPU_MINUTES = 15, 5        # that `training.quick` takes, on a CPU and on a GPU


@dataclass(frozen=True)
class ExitTime:
    """Times of one exit, in seconds. Asking an exit means to run its adapter and its confidence estimator.

    `asked` is the time for asking the exit once. `saved` is the time that a token saves if the exit is taken.
    """

    asked: float
    saved: float

    def pays(self, taken: float) -> bool:
        """Return True if asking the exit saves time.

        taken: share of the tokens, in [0, 1], for which the exit is taken after it was asked.
        """
        return self.asked <= taken * self.saved * MARGIN


@dataclass(frozen=True)
class Payoff:
    """Result of `measure`: times on this machine, and the decision which exits and drafts save time.

    The times are in seconds. `paying` and `drafter_pays` have the decisions, and `sentences` explains them to users.
    """

    shape: Shape
    model: str                      # as it was given to `hub.load`
    seconds: float                  # that the measurement took
    token_seconds: float            # one token of `full`, prefill excluded
    exits: tuple[ExitTime, ...]     # of each exit
    draft_seconds: float | None     # one call of the drafter; None if nothing drafts but n-gram lookup
    row_share: float                # time of one more row in a verification pass, in units of a one-row pass
    row_factor: float               # factor for the backend's `row_cost`: above 1 where rows are dear

    @property
    def paying(self) -> tuple[bool, ...]:
        """For each exit, True if mode `cascade` saves time by running it."""
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
                    f"{QUICK_MINUTES} minutes on a CPU, {QUICK_GPU_MINUTES} on a GPU)."]
        found = [f"{exit_name(s, self.shape)} is switched off on this machine: running it takes {_ms(exit.asked)} for "
                 f"each token, and only a token that it writes saves time ({_ms(exit.saved)})."
                 for s, exit in enumerate(self.exits) if not self.paying[s]]
        if self.draft_seconds is not None and not self.drafter_pays:
            found.append(f"The drafter is switched off on this machine: a call of it takes {_ms(self.draft_seconds)}. "
                         f"That is too long, because a token of the full model takes {_ms(self.token_seconds)}.")
        return found

    def command(self) -> str:
        """Return the shell command that trains exits for this model."""
        return f"python -m training.quick --model {shlex.quote(self.model)}"


@torch.inference_mode()
def measure(engine: Engine, model: str) -> Payoff:
    """Measure which exits and drafts save time with this engine, for about a second. Returns the result.

    The engine does not change; the caller stores the result in `Engine.payoff`.

    If a trained exit or drafter seems not to pay, everything is measured again, because other work on the machine may
    have disturbed the measurement. Of at most `ATTEMPTS` results, the one that switches off the fewest parts counts.

    model: name of the model as it was given to `hub.load`, for the command that trains exits.
    """
    results = [_measured(engine, model)]
    while engine.bank.config.trained and results[-1].sentences() and len(results) < ATTEMPTS:
        results.append(_measured(engine, model))
    return min(results, key=lambda result: len(result.sentences()))


def _measured(engine: Engine, model: str) -> Payoff:
    """Measure once; see `measure`."""
    began, work, exits = time.perf_counter(), _Work(engine), range(engine.num_exits)
    pieces = {TOKEN: partial(work.verify, 1), HEAD: partial(work.verdict, work.top)}
    pieces |= {(TOKEN, rows): partial(work.verify, rows) for rows in ROWS}
    pieces |= {(ASK, s): partial(work.ask, s) for s in exits} | {(HEAD, s): partial(work.choose, s) for s in exits}
    if engine.model.exit_layers[:1] == (0,):
        pieces[DRAFT] = work.draft
    took = _fastest(pieces, engine.model.backend.synchronize, began + SECONDS)
    token, head = took[TOKEN], took[HEAD]
    row = max((took[TOKEN, rows] / token - 1) / (rows - 1) for rows in ROWS)
    factor = max(1.0, row / engine.model.layers.row_cost(1)) if row > DEAR_ROW else 1.0
    # A token that leaves early runs through the skipped layers later, as one more row of another pass.
    skipped = (token - head) * (1 - min(max(row, 0.0), 1.0))
    times = tuple(ExitTime(took[ASK, s], skipped * (1 - depth) + head - took[HEAD, s])
                  for s, depth in enumerate(engine.exit_depths))
    return Payoff(Shape.of(engine), model, time.perf_counter() - began, token, times, took.get(DRAFT), row, factor)


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
        """Run a pass of the full model over `rows` more tokens, and then remove them from the sequence."""
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


def _fastest(pieces: Mapping[Hashable, Callable[[], None]], synchronize: Callable[[], None],
             end: float) -> dict[Hashable, float]:
    """Time pieces of work in turns. Returns for each piece the seconds that its fastest run took.

    Pieces take turns, so that other work on the machine slows down all of them alike. A short piece runs several times
    in each turn, because one interruption lasts many times as long as the piece. The first turn does one-time work and
    is not timed.

    Args:
        pieces: {name of the piece: function}.
        synchronize: waits until the device has finished all work.
        end: time of `time.perf_counter`, in seconds, after which no turn begins. `LEAST_TURNS` turns are always timed.
    """
    took = dict.fromkeys(pieces, math.inf)
    for turn in range(1 + MOST_TURNS):
        if turn > LEAST_TURNS and time.perf_counter() > end:
            break
        for name, work in pieces.items():
            runs = [_seconds(work, synchronize)]
            while turn and sum(runs) < SHORT and len(runs) < MOST_RUNS:
                runs.append(_seconds(work, synchronize))
            took[name] = min(took[name], *runs) if turn else math.inf
    return took


def _seconds(work: Callable[[], None], synchronize: Callable[[], None]) -> float:
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def _ms(seconds: float) -> str:
    return f"{1000 * max(seconds, 0):.1f} ms"
