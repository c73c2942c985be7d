"""Adapters: small networks that turn a hidden state of some layer into one that the frozen head can read.

An adapter does not depend on the vocabulary. `swiglu`, the published kind, reads the hidden state at its layer. `carry`
also reads the carried state: the hidden state of the full model or exit that produced the newest token. Decoding has
computed that state anyway, and it holds what deep layers found one token before.

Letters: D hidden size.
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class Adapter(Protocol):
    """Interface of a kind of adapter: an nn.Module that is made from (hidden_size, width, norm_eps)."""

    reads_carried: bool
    """True if the adapter reads the carried state. Training then whitens inputs and fits `linear` by regression."""
    linear: nn.Linear | None
    """The linear part, (2 D) -> (D); None if it is the identity on the hidden state."""
    norm: nn.RMSNorm
    """The norm of the output. The head reads the normed output."""

    def __call__(self, h: Tensor, carried: Tensor) -> Tensor:
        """Adapt hidden rows h, each with its carried state: (..., D), (..., D) -> (..., D)."""

    def rescale(self, h: float) -> None:
        """Scale the weights to suit rows that were multiplied by `h`: the output stays the same.

        Only for adapters without `reads_carried`.
        """


class ExitAdapter(nn.Module):
    """The published adapter: norm(h + up(silu(gate h) * down h)), (..., D) -> (..., D)."""

    reads_carried = False
    linear = None

    def __init__(self, hidden_size: int, width: int, norm_eps: float):
        super().__init__()
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        # Identity at the start: training begins at the logit lens, and weight decay pulls towards it, not to zero.
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, carried: Tensor) -> Tensor:
        """Adapt hidden rows h; the carried state is not read."""
        return self.norm(h + self.up(nn.functional.silu(self.gate(h)) * self.down(h)))

    @torch.no_grad()
    def rescale(self, h: float) -> None:
        """Scale the weights to suit rows that were multiplied by `h`: the output stays the same.

        The norm cancels the scale that remains.
        """
        for weight, factor in ((self.gate, 1 / h), (self.down, 1 / h), (self.up, h)):
            weight.weight.mul_(factor)


class CarryAdapter(nn.Module):
    """An adapter that reads x = [h, carried]: norm(linear x + up(silu(gate x) * down x)).

    Shapes: h (..., D), carried (..., D) -> (..., D). The carried state has the same form as the output: the head can
    read it. EAGLE (Li et al. 2024) passes on the last deep state, too; here it is combined with h, the newest token's
    state at the exit's layer.
    """

    reads_carried = True

    def __init__(self, hidden_size: int, width: int, norm_eps: float):
        super().__init__()
        self.linear = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(2 * hidden_size, width, bias=False)
        self.down = nn.Linear(2 * hidden_size, width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        nn.init.zeros_(self.up.weight)                                          # the logit lens at the start
        self.linear.weight.data.copy_(torch.eye(hidden_size, 2 * hidden_size))

    def forward(self, h: Tensor, carried: Tensor) -> Tensor:
        """Adapt hidden rows h, each with its carried state."""
        x = torch.cat([h, carried], dim=-1)
        return self.norm(self.linear(x) + self.up(nn.functional.silu(self.gate(x)) * self.down(x)))


ADAPTERS: dict[str, type[Adapter]] = {"swiglu": ExitAdapter, "carry": CarryAdapter}


class Drafter(nn.Module):
    """The network that drafts chains of tokens: a `carry` adapter before the first layer that also reads a context.

    The context comes from the states of the newest confirmed token at the E other exits, side by side (..., E D). All
    drafts of a pass use the same context. EAGLE-3 (Li et al. 2025) found that several depths tell more about later
    tokens than the last depth alone.

    Args:
        states: E, the number of exits whose states form the context.
    """

    def __init__(self, hidden_size: int, width: int, states: int, norm_eps: float):
        super().__init__()
        self.adapter = CarryAdapter(hidden_size, width, norm_eps)
        self.context = nn.Linear(states * hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.context.weight)

    def forward(self, h: Tensor, carried: Tensor, context: Tensor) -> Tensor:
        """Adapt embeddings h with carried states and the output of `self.context`: (..., D) each -> (..., D)."""
        return self.adapter(h, carried + context)
