"""Carry: what a run passes on from token to token, which is the carried state and an index of n-grams.

The carried state is the hidden state that produced the newest token, in the form that the head reads. If an exit
produced the token, it is that exit's adapted state. Else it is the full model's state after the final norm. Decoding,
inspection and training all follow this rule.

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
        """Make the carry for the start of decoding, after the prefill of all prompt tokens except the newest.

        Args:
            model: a `SegmentedModel`.
            passed: rows of the prefill after each segment, (1, N, D) each. [] for a prompt of one token: the state is
                then zero.
        """
        if not passed:
            return cls(torch.zeros(1, model.hidden_size, dtype=model.dtype, device=model.device))
        return cls(model.layers.norm(passed[-1][:, -1]))

    def follow(self, exit: int, hidden: Sequence[Rows], top: Rows) -> None:
        """Set the carried state to the state that produced a token.

        Args:
            exit: number of the exit that produced the token. Any other number, such as `COPIED`, means the full model.
            hidden: adapted states of all exits (1, D).
            top: the full model's state after its final norm (1, D).
        """
        self.state = hidden[exit] if 0 <= exit < len(hidden) else top

    def copied(self, text: Sequence[int], confirmed: int) -> tuple[int, int]:
        """Return the token that an n-gram copy predicts after `text`, and the length of the match.

        Copies come only from confirmed text, so that an exit cannot agree with its own drafts.

        Args:
            text: all tokens so far, drafts included.
            confirmed: number of tokens, from the start, that are final.
        """
        self._confirmed.extend(text[len(self._confirmed):confirmed])
        return self._confirmed.copied(text)


def carried_states(top: Tensor) -> Tensor:
    """Compute the carried states of a text that the full model wrote, from its states: (T, D) -> (T, D).

    Each token gets the state of the position before it. The first token gets zeros.
    """
    return torch.cat([torch.zeros_like(top[:1]), top[:-1]])
