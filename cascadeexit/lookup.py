"""Lookup: copies tokens from earlier in the text by n-grams. Copies serve as drafts.

If the newest tokens also occur earlier in the text (prompt included), the token that followed them there is copied
(prompt lookup: Saxena 2023). Confidence estimators also read copies. The probability that a copy is right is estimated
from earlier copies in this text after n-grams of the same length: it is the share of these copies that were accepted.
"""

from collections.abc import Sequence
from typing import NamedTuple

_LENGTHS = (5, 3, 2, 1)                 # lengths of n-grams that are looked up, longest first
_PRIOR = {5: 0.8, 3: 0.6, 2: 0.4, 1: 0.15}      # probability of being right before anything was seen
_PRIOR_WEIGHT = 4                       # weight of `_PRIOR`, as a number of copies
LONGEST_MATCH = _LENGTHS[0]
MAX_MATCH = 32                           # longest match that is counted, in tokens
NOTHING_COPIED = -1, 0


class Copy(NamedTuple):
    """A token that n-gram lookup copies from earlier in the text."""

    token: int
    chance: float                       # probability that it is right
    matched: int                        # length of the n-gram


class Lookup:
    """Index of the n-grams of one text. The text is a sequence of token ids."""

    def __init__(self, tokens: Sequence[int]):
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}        # n-gram -> position of the token that followed it last
        self._right = {n: _PRIOR[n] * _PRIOR_WEIGHT for n in _LENGTHS}
        self._tried = dict.fromkeys(_LENGTHS, _PRIOR_WEIGHT)
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the indexed text. Only final tokens may be added, never drafts that may still be rejected.

        tokens: the new token ids. They follow directly after the tokens that were added before.
        """
        for token in tokens:
            for n in _LENGTHS:
                if len(self._text) >= n:
                    self._after[tuple(self._text[-n:])] = len(self._text)
            self._text.append(token)

    def find(self, text: Sequence[int]) -> Copy | None:
        """Find a token that may follow this text. Returns None if no n-gram at the end of the text is in the index.

        If the index has several of these n-grams, the token that followed the longest one is returned.
        """
        for n in _LENGTHS:
            at = self._after.get(tuple(text[-n:])) if len(text) >= n else None
            if at is not None:
                return Copy(self._text[at], self._right[n] / self._tried[n], n)
        return None

    def copied(self, text: Sequence[int]) -> tuple[int, int]:
        """Find the token that `find` copies for this text, and the full length of the match.

        Returns the token and the length. The length is the number of tokens directly before the copied token that equal
        the newest tokens of `text`, at most `MAX_MATCH`. Returns `NOTHING_COPIED` if `find` copies no token.
        """
        copy = self.find(text)
        if copy is None:
            return NOTHING_COPIED
        at, length = self._after[tuple(text[-copy.matched:])], copy.matched
        most = min(MAX_MATCH, at, len(text))
        while length < most and self._text[at - 1 - length] == text[-1 - length]:
            length += 1
        return copy.token, length

    def judged(self, matched: int, right: bool) -> None:
        """Record that a copy after an n-gram of `matched` tokens was accepted (`right`) or rejected."""
        self._tried[matched] += 1
        self._right[matched] += right
