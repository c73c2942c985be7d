"""Carry: state that a text passes from token to token: the carried state, and an index of n-grams.

The carried state is the hidden state that produced the newest token, ready for the head: an exit's adapted state where
that exit's token was kept, else the full model's state after its final norm. Decoding, inspection and training all
follow this one rule.

Letters: T tokens, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeexit.backends.base import Rows
from cascadeexit.lookup import Lookup


class Carry:
    """The carried state and the confirmed text of one run.

    Attributes:
        state: the carried state (1, D).
    """

    def __init__(self, state: Rows):
        self.state = state
        self._confirmed = Lookup(())

    @classmethod
    def after_prompt(cls, model, passed: Sequence[Rows]) -> "Carry":
        """Start after a prompt was read up to its newest token.

        Args:
            model: a `SegmentedModel`.
            passed: the rows after each segment, (1, N, D); [] for a prompt of one token, after which the state is zero.
        """
        if not passed:
            return cls(torch.zeros(1, model.hidden_size, dtype=model.dtype, device=model.device))
        return cls(model.layers.norm(passed[-1][:, -1]))

    def follow(self, exit: int, hidden: Sequence[Rows], top: Rows) -> None:
        """Carry on the state that produced a token.

        Args:
            exit: number of the exit that produced it; any other number, also `COPIED`, means the full model.
            hidden: adapted states of all exits (1, D).
            top: the full model's state after its final norm (1, D).
        """
        self.state = hidden[exit] if 0 <= exit < len(hidden) else top

    def copied(self, text: Sequence[int], confirmed: int) -> tuple[int, int]:
        """Return the token that an n-gram copy predicts after `text`, and the length of the match.

        Only confirmed text is copied from: an exit must not agree with its own drafts.

        Args:
            text: all tokens so far, drafts included.
            confirmed: how many of them, the first ones, are final.
        """
        self._confirmed.extend(text[len(self._confirmed):confirmed])
        return self._confirmed.copied(text)


def carried_states(top: Tensor) -> Tensor:
    """Carried states of a text that the full model wrote: for each token the state of the position before it.

    (T, D) -> (T, D), zero for the first token.
    """
    return torch.cat([torch.zeros_like(top[:1]), top[:-1]])
