"""Carry: holds what a run passes on from token to token: the carried state, and an index of n-grams.

The carried state is the hidden state that produced the newest token, in the form that the head reads. If an exit
produced the token, the carried state is that exit's adapted state. Otherwise it is the full model's state after the
final norm. Decoding, inspection and training all follow this rule.

Letters: N rows in a pass, T tokens, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeexit.backends.base import Rows
from cascadeexit.lookup import Lookup


class Carry:
    """The carried state of one run, and an n-gram index of the tokens that are final.

    Attributes:
        state: the carried state (1, D).
    """

    def __init__(self, state: Rows):
        self.state = state
        self._confirmed = Lookup(())

    @classmethod
    def after_prompt(cls, model, passed: Sequence[Rows]) -> "Carry":
        """Make the `Carry` with which decoding begins.

        At this moment the prompt has been prefilled, except its last token.

        Args:
            model: a `SegmentedModel`.
            passed: for each segment, the rows (hidden states) that the prefill had after this segment, (1, N, D) each.
                For a prompt of one token the list is [], and the carried state is zero.
        """
        if not passed:
            return cls(torch.zeros(1, model.hidden_size, dtype=model.dtype, device=model.device))
        return cls(model.layers.norm(passed[-1][:, -1]))

    def follow(self, exit: int, hidden: Sequence[Rows], top: Rows) -> None:
        """Set the carried state to the state that produced a token.

        Args:
            exit: number of the exit that produced the token. Any other number, such as `COPIED`, means the full model.
            hidden: adapted state of each exit, (1, D) each.
            top: the full model's state after its final norm (1, D).
        """
        self.state = hidden[exit] if 0 <= exit < len(hidden) else top

    def copied(self, text: Sequence[int], confirmed: int) -> tuple[int, int]:
        """Find the token that n-gram lookup predicts after `text`. Returns the token and the length of the match.

        The length is in tokens. Returns `lookup.NOTHING_COPIED` if there is no match. Only tokens that are final are
        copied, so that an exit cannot agree with its own drafts.

        Args:
            text: all tokens so far, drafts included.
            confirmed: number of tokens, counted from the start of `text`, that are final.
        """
        self._confirmed.extend(text[len(self._confirmed):confirmed])
        return self._confirmed.copied(text)


def carried_states(top: Tensor) -> Tensor:
    """Compute the carried state of each token of a text that the full model wrote: (T, D) -> (T, D).

    The full model's state at a position produces the token at the next position. So each token gets the state of the
    position before it, and the first token gets zeros.

    top: the full model's state at each position, after the final norm.
    """
    return torch.cat([torch.zeros_like(top[:1]), top[:-1]])
