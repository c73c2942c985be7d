"""Lookup: what followed where the text said the same before. Drafts for free, and a second opinion on an exit's choice.

When the newest tokens stood in the text already, prompt included, what followed them is a guess at what follows now
(prompt lookup: Saxena 2023). How often such guesses were right so far in this text says how sure to be of the next.
"""

from collections.abc import Sequence
from typing import NamedTuple

_LENGTHS = (5, 3, 2, 1)                 # tokens that must match, longest first
_PRIOR = {5: 0.8, 3: 0.6, 2: 0.4, 1: 0.15}      # chance of being right before anything was seen
LONGEST_MATCH = _LENGTHS[0]
FARTHEST = 32                           # tokens
NOTHING_COPIED = -1, 0
_PRIOR_WEIGHT = 4                       # in guesses


class Guess(NamedTuple):
    token: int
    chance: float                       # that it is right
    matched: int                        # tokens before it that stood in the text before


class Lookup:
    """Index of one text. Knows token ids only."""

    def __init__(self, tokens: Sequence[int]):
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}        # tokens -> position of what followed them last
        self._right = {n: _PRIOR[n] * _PRIOR_WEIGHT for n in _LENGTHS}
        self._tried = dict.fromkeys(_LENGTHS, _PRIOR_WEIGHT)
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: Sequence[int]) -> None:
        """More of the text is final."""
        for token in tokens:
            for n in _LENGTHS:
                if len(self._text) >= n:
                    self._after[tuple(self._text[-n:])] = len(self._text)
            self._text.append(token)

    def guess(self, text: Sequence[int]) -> Guess | None:
        """What may follow this text."""
        for n in _LENGTHS:
            at = self._after.get(tuple(text[-n:])) if len(text) >= n else None
            if at is not None:
                return Guess(self._text[at], self._right[n] / self._tried[n], n)
        return None

    def copied(self, text: Sequence[int]) -> tuple[int, int]:
        """What followed this text's newest tokens when they stood here last, and how many those are.

        `NOTHING_COPIED` when they did not. Only the newest tokens of `text` matter, `FARTHEST` of them, at which
        counting ends.
        """
        guess = self.guess(text)
        if guess is None:
            return NOTHING_COPIED
        at, length = self._after[tuple(text[-guess.matched:])], guess.matched
        most = min(FARTHEST, at, len(text))
        while length < most and self._text[at - 1 - length] == text[-1 - length]:
            length += 1
        return guess.token, length

    def judged(self, matched: int, right: bool) -> None:
        """A guess that matched so many tokens was right or wrong."""
        self._tried[matched] += 1
        self._right[matched] += right
