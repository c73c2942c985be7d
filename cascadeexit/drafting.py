"""Drafting: sources that propose tokens without the full model.

A draft source proposes the next tokens of a text. There are two kinds. `ExitDrafts` runs one exit after another for
each token. Its tokens are drafts in verified mode, and final in cascade mode. `DraftTree` (tree.py) proposes a whole
tree of drafts at once. The decoding loop uses both kinds only through the interface `DraftSource`.

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
    depth: int = 0                                  # number of drafts between it and the newest token
    probability: float = 0.0                        # probability, by the exit's softmax, of following the parent
    matched: int = 0                                # COPIED: length of the n-gram match
    chance: float | None = None                     # estimated probability of being accepted if its parent is


class DraftSource(Protocol):
    """Interface of a draft source. It proposes next tokens of a text in each round of the decoding loop."""

    confidences: tuple[float | None, ...]
    """Valid after `draft`: the confidence of each exit for the token that follows the last draft. None for an exit that
    did not run at this position."""

    def draft(self, stairs: Staircase, carry: Carry, meter: Meter) -> Iterator[list[Draft]]:
        """Propose tokens that follow the newest token of the text. Yields a list of drafts for each step of drafting.

        The parent of a draft is the draft that it follows in the text. A parent always comes before its children. The
        tokens of a list are appended to `stairs.tokens` before the list is yielded.

        Args:
            stairs: the tokens of the text, and what each segment has computed.
            carry: the carried state and the n-grams of the run.
            meter: counts the bytes of weights that are read.
        """

    def judged(self, drafts: Sequence[Draft], path: Sequence[int], confirmed: Sequence[int],
               passed: Sequence[Rows]) -> None:
        """Tell the source which drafts the verification pass accepted.

        Args:
            drafts: all drafts of this round.
            path: indices of the accepted drafts in `drafts`, in the order of the text.
            confirmed: all tokens that became final in this round, in order.
            passed: for each segment, the rows (hidden states) that the verification pass had after this segment,
                (1, N, D) each.
        """


class ExitDrafts:
    """Draft source that runs one exit after another for each token, from the shallowest, until one is confident enough.

    Args:
        exits: the exits, ready to run on the model's backend.
        thresholds: for each exit, the confidence from which it is taken; None for an exit that is disabled.
        choose: function that returns the token that an exit chooses. Its arguments are the number of the exit and the
            hidden state after the adapter of the exit (1, D).
        ended: function that returns True if the text is complete. Its arguments are the length of the text in tokens
            and the newest token.
        limit: largest number of drafts in a round; None in cascade mode, where these tokens are final and not drafts.
    """

    def __init__(self, exits: ExitRuntime, thresholds: Sequence[float | None], choose: Callable[[int, Rows], int],
                 ended: Callable[[int, int], bool], limit: int | None):
        self._exits, self._thresholds, self._choose = exits, thresholds, choose
        self._ended, self._limit = ended, limit
        self.confidences = self._unasked = (None,) * len(thresholds)

    def draft(self, stairs: Staircase, carry: Carry, meter: Meter) -> Iterator[list[Draft]]:
        """Propose one token after another; see `DraftSource.draft`.

        Drafting stops if no exit is confident enough, if the number of drafts reaches its limit, or if the text is
        complete.
        """
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
        """Run exits for the newest token, from the shallowest, until one exit is confident enough.

        Returns the number of that exit. Its adapted state becomes the carried state. Returns None if no exit is
        confident enough.

        confirmed: number of tokens of the text that are final.
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
    """Return True if exit s should run.

    An exit should not run if it is disabled, or if the exit that ran before it had a confidence (`last`) more than 0.3
    below this exit's threshold. The deepest exit runs even after a low `last`.

    Args:
        s: number of the exit; for len(thresholds), the result is False.
        thresholds: for each exit, the confidence from which it is taken; None for an exit that is disabled.
        last: confidence of the exit that ran before exit s for the same token; None if no exit has run.
    """
    if s == len(thresholds) or thresholds[s] is None:
        return False
    return last is None or s == len(thresholds) - 1 or last >= thresholds[s] - _MAX_GAIN


def next_exit(s: int, thresholds: Sequence[float | None], last: float | None) -> int:
    """Return the number of the first exit, counted from exit s on, that should run (`worth_running`).

    Returns len(thresholds), which is not the number of an exit, if no further exit should run.
    """
    return next((t for t in range(s, len(thresholds)) if worth_running(t, thresholds, last)), len(thresholds))
