"""Repetition: finds out whether a text ends in a loop.

Small models fall into loops. The tokens of a loop are easy to predict, so a loop makes agreement and speed look better
than they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

LEAST_REPEATED = 24         # tokens that repeat those before them
LEAST_COPIES = 2.25         # of the repeated passage, the first included
LONGEST_PERIOD = 256
_AFTER = 2                  # tokens that may follow a loop: a closing mark and end of sequence


class Loop(NamedTuple):
    """A loop: the end of a text, in which one passage is written again and again."""

    start: int              # position of the first copy
    period: int             # tokens of one copy
    share: float            # share of the text's tokens that only repeat the copy before them, in (0, 1)


def find_loop(token_ids: Sequence[int]) -> Loop | None:
    """Find the loop in which a text ends. Returns None if the text does not end in a loop.

    The period of a loop is the length of the repeated passage in tokens, at most 256. A text ends in a loop if
    two things are true. First, the passage stands at the end at least 2.25 times in a row, without any change. Second,
    each of the last 24 tokens equals the token one period before it.

    Reasons for this rule, from greedy texts of the bundled model:

    - Exact equality: lists with counters, code with similar lines and tables do not count as loops. A loop whose copies
      are numbered is not found, either.
    - In a row: the refrain of a poem does not count, because verses stand between its copies.
    - 2.25 times: two copies may be intended, such as a chorus that is sung twice. Three whole copies would be too many,
      because a text that is cut off at 200 tokens can end within the third copy of a long sentence.
    - 24 tokens: short patterns do not count, such as eight emoji in a row (3 tokens each) or a line of dashes.

    Up to two tokens after the loop are ignored, such as a full stop and the end-of-sequence token. If several periods
    fit, the shortest is returned. The time is proportional to the number of tokens times 256.
    """
    for end in range(len(token_ids), max(0, len(token_ids) - _AFTER - 1), -1):
        for period in range(1, min(LONGEST_PERIOD, int(end / LEAST_COPIES)) + 1):
            repeated = _repeated(token_ids, end, period)
            if repeated >= max(LEAST_REPEATED, (LEAST_COPIES - 1) * period):
                return Loop(end - repeated - period, period, repeated / len(token_ids))
    return None


def _repeated(token_ids: Sequence[int], end: int, period: int) -> int:
    """Count the tokens directly before index `end`, without a gap, that equal the token one period earlier."""
    first = end
    while first > period and token_ids[first - 1] == token_ids[first - 1 - period]:
        first -= 1
    return end - first
