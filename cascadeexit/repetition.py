"""Repetition: does a text end in a loop? Small models fall into loops, which are easy to agree on and fast to write."""

from collections.abc import Sequence
from typing import NamedTuple

LEAST_REPEATED = 24         # tokens that repeat those before them
LEAST_COPIES = 2.25         # of the repeated passage, the first included
LONGEST_PERIOD = 256
_AFTER = 2                  # tokens that may follow a loop: a closing mark and end of sequence


class Loop(NamedTuple):
    """End of a text in which one passage is written again and again."""

    start: int              # position of the first copy
    period: int             # tokens of one copy
    share: float            # share of the text's tokens that only repeat the copy before them, in (0, 1)


def find_loop(token_ids: Sequence[int]) -> Loop | None:
    """Find the loop that a text ends in; None for a text that ends without one.

    A text ends in a loop when its last tokens equal those one period earlier, 24 of them or more, and a third copy of
    the passage has begun (2.25 copies). Reasons for this rule, from greedy texts of the bundled model:

    - Exact equality leaves lists with counters, code with similar lines and tables alone. The price: a loop whose
      copies are numbered is not found.
    - Copies must follow each other directly. The refrain of a poem does not: verses stand between.
    - Two copies alone may be intended: a chorus sung twice, an example repeated. Three whole copies are too many to ask
      for, since a text that is cut off at 200 tokens ends within the third copy of a long sentence.
    - 24 tokens spare short patterns: a row of eight emoji (3 tokens each), a line drawn with dashes, "Row, row, row".

    At most two tokens after the loop are ignored, such as a full stop and the end-of-sequence token. The shortest
    period is returned. The time grows with the number of tokens times the longest period, 256.
    """
    for end in range(len(token_ids), max(0, len(token_ids) - _AFTER - 1), -1):
        for period in range(1, min(LONGEST_PERIOD, int(end / LEAST_COPIES)) + 1):
            repeated = _repeated(token_ids, end, period)
            if repeated >= max(LEAST_REPEATED, (LEAST_COPIES - 1) * period):
                return Loop(end - repeated - period, period, repeated / len(token_ids))
    return None


def _repeated(token_ids: Sequence[int], end: int, period: int) -> int:
    """Count the tokens before `end`, without a gap, that equal the token one period earlier."""
    first = end
    while first > period and token_ids[first - 1] == token_ids[first - 1 - period]:
        first -= 1
    return end - first
