"""Drafting: sources that propose tokens without the full model.

A draft source proposes the next tokens of a text. `ExitDrafts` runs one exit after another for each token; its tokens
are drafts in verified mode and final in cascade mode. `DraftTree` (tree.py) proposes a whole tree at once. The decoding
loop uses both only through the interface `DraftSource`.

Letters: N rows in a pass, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cascadeexit.backends.base import ExitRuntime, Rows
from cascadeexit.carry import Carry
from cascadeexit.costs import Meter
from cascadeexit.staircase import Staircase

_MAX_GAIN = 0.3             # measured: an exit's confidence is seldom more than this above that of the exit before


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
    """Interface of a draft source, which proposes the next tokens of a text in each round."""

    confidences: tuple[float | None, ...]
    """Confidence of each exit in the token after the last proposal; None for an exit that did not run."""

    def draft(self, stairs: Staircase, carry: Carry, meter: Meter) -> Iterator[list[Draft]]:
        """Propose tokens after the newest one. Yields lists of drafts: those in one list were made together.

        Parents come before their children. Tokens are appended to `stairs.tokens` before their drafts are yielded.
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
        thresholds: for each exit, the confidence from which it is taken; None if it is disabled.
        choose: returns the token of exit s for an adapted row (1, D).
        ended: returns True if a text of this length, with this newest token, is complete.
        limit: largest number of drafts in a round; None if the exits' tokens are final.
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
        """Run the newest token through exits until one is confident enough. Its state becomes the carried state.

        Returns that exit's number, or None if no exit is confident enough.

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
    """Return True if exit s should run after an exit with the confidence `last`; None means that no exit has run.

    An exit is skipped if `last` is far below its threshold. Only the deepest exit always runs, unless it is disabled.
    """
    if s == len(thresholds) or thresholds[s] is None:
        return False
    return last is None or s == len(thresholds) - 1 or last >= thresholds[s] - _MAX_GAIN


def next_exit(s: int, thresholds: Sequence[float | None], last: float | None) -> int:
    """Return the number of the first exit, from s on, that should run; the number of exits if there is none."""
    return next((t for t in range(s, len(thresholds)) if worth_running(t, thresholds, last)), len(thresholds))
