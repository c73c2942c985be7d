"""Drafting: where tokens come from before the full model looks at them.

A draft source proposes tokens that follow a text. `ExitDrafts` runs one exit after another for each token; its tokens
are drafts in verified mode and final in cascade mode. `DraftTree` (tree.py) proposes a tree at once. The decoding loop
sees both through `DraftSource` alone.

Letters: N rows in a pass, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cascadeexit.backends.base import ExitRuntime, Rows
from cascadeexit.carry import Carry
from cascadeexit.costs import Meter
from cascadeexit.staircase import Staircase

_MAX_GAIN = 0.3             # an exit's confidence is seldom higher than the last one's by more than this: measured


@dataclass(frozen=True, slots=True)
class Draft:
    """A proposed token. It follows the newest token of the text, or another draft."""

    token: int
    exit: int                                       # number of the exit that drafted it, or COPIED
    confidences: tuple[float | None, ...]           # of each exit, as in a TokenEvent
    parent: int                                     # number of the draft it follows; -1: the newest token
    depth: int = 0                                  # drafts before it on its path
    probability: float = 0.0                        # probability, by the exit's softmax, of following the parent
    matched: int = 0                                # COPIED: length of the n-gram match
    chance: float | None = None                     # estimated probability of being accepted if its parent is


class DraftSource(Protocol):
    """Proposes what follows a text, round after round."""

    confidences: tuple[float | None, ...]
    """Confidence of each exit about the token after the last proposal; None where the exit did not run."""

    def draft(self, stairs: Staircase, carry: Carry, meter: Meter) -> Iterator[list[Draft]]:
        """Propose tokens after the newest one, parents first; those of one moment come together.

        Each is appended to `stairs.tokens` before it is yielded.
        """

    def judged(self, drafts: Sequence[Draft], path: Sequence[int], confirmed: Sequence[int],
               passed: Sequence[Rows]) -> None:
        """Update the source with the verdict of the verification pass.

        Args:
            path: numbers of the accepted drafts, in order.
            confirmed: all tokens that the text gained.
            passed: rows of the verification pass after each segment (1, N, D).
        """


class ExitDrafts:
    """Runs one exit after another for each token, from the shallowest, until one is confident enough.

    Args:
        exits: the runtime of the model's exits.
        thresholds: confidence from which each exit is taken; None where it is disabled.
        choose: the token of exit s for an adapted row (1, D).
        ended: True for a text of this length and newest token that is complete.
        limit: the most drafts of a round; None where the exits' tokens are final.
    """

    def __init__(self, exits: ExitRuntime, thresholds: Sequence[float | None], choose: Callable[[int, Rows], int],
                 ended: Callable[[int, int], bool], limit: int | None):
        self._exits, self._thresholds, self._choose = exits, thresholds, choose
        self._ended, self._limit = ended, limit
        self.confidences = self._unasked = (None,) * len(thresholds)

    def draft(self, stairs: Staircase, carry: Carry, meter: Meter) -> Iterator[list[Draft]]:
        """Propose one token after another, until no exit is confident enough; see `DraftSource.draft`."""
        first, count = len(stairs.tokens), 0
        while count != self._limit and not self._ended(len(stairs.tokens), stairs.tokens[-1]):
            confirmed = len(stairs.tokens) if self._limit is None else first
            s = self._climb(stairs, carry, confirmed, meter)
            if s is None:
                return
            token = self._choose(s, carry.state)
            meter.add(self._exits.head_bytes(s))
            stairs.tokens.append(token)
            yield [Draft(token, s, self.confidences, count - 1, count, chance=self.confidences[s])]
            count += 1
        self.confidences = self._unasked

    def judged(self, drafts: Sequence[Draft], path: Sequence[int], confirmed: Sequence[int],
               passed: Sequence[Rows]) -> None:
        """Do nothing: thresholds do not change during a run."""

    def _climb(self, stairs: Staircase, carry: Carry, confirmed: int, meter: Meter) -> int | None:
        """Take the newest token deeper until an exit is confident enough, and carry that exit's state on.

        Returns the exit's number, or None where no exit is confident enough.

        confirmed: how many tokens of the text are final.
        """
        self.confidences = self._unasked
        first, confidence, before, copied = 0, None, None, None
        while (s := next_exit(first, self._thresholds, confidence)) < len(self._thresholds):
            rows = stairs.run(range(first, s + 1), meter=meter)[-1]                             # (1, N, D)
            copied = copied or carry.copied(stairs.tokens, confirmed)
            hidden = self._exits.hidden(s, rows[:, -1], carry.state)                            # (1, D)
            # Estimators were trained with the numbers of the exit directly before, not of an earlier one.
            confidence, = self._exits.confidence(s, hidden, [copied], before if s == first else None)
            before, first = hidden, s + 1
            meter.add(self._exits.try_bytes(s))
            self.confidences = (*self.confidences[:s], confidence, *self.confidences[s + 1:])
            if confidence >= self._thresholds[s]:
                carry.state = hidden
                return s
        return None


def worth_running(s: int, thresholds: Sequence[float | None], last: float | None) -> bool:
    """True where exit s should run, given the confidence of the last exit that ran (None: no exit has run).

    An exit is skipped if that confidence is far below its threshold. The deepest exit is never skipped.
    """
    if s == len(thresholds) or thresholds[s] is None:
        return False
    return last is None or s == len(thresholds) - 1 or last >= thresholds[s] - _MAX_GAIN


def next_exit(s: int, thresholds: Sequence[float | None], last: float | None) -> int:
    """Return the first exit from s on that should run; the number of exits where there is none."""
    return next((t for t in range(s, len(thresholds)) if worth_running(t, thresholds, last)), len(thresholds))
