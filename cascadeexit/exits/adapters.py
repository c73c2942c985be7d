"""Adapters: small networks that turn a hidden state of some layer into a state that the frozen head can read.

An adapter does not depend on the vocabulary. There are two kinds. `swiglu`, the kind of the original CascadeExit, reads
the hidden state at its layer. `carry` also reads the carried state, the hidden state that produced the newest token.
Decoding has computed the carried state anyway, and it contains what deep layers found one token before.

Letters: D hidden size.
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class Adapter(Protocol):
    """Interface that each kind of adapter has. An adapter is an nn.Module, made from (hidden_size, width, norm_eps).

    It turns the hidden state at an exit's layer into a state that a vocabulary head can read. `width` is the number of
    outputs of its layers `gate` and `down`.
    """

    reads_carried: bool
    """True if the adapter reads the carried state. Training then whitens the inputs and fits `linear` by regression."""
    linear: nn.Linear | None
    """The adapter's linear part, which maps 2 D numbers to D. None if this part is the identity on the hidden state."""
    norm: nn.RMSNorm
    """The norm that is applied last. The head reads its output."""

    def __call__(self, h: Tensor, carried: Tensor) -> Tensor:
        """Adapt hidden states h, each with its own carried state: (..., D), (..., D) -> (..., D)."""

    def rescale(self, factor: float) -> None:
        """Adapt the weights to hidden states that are multiplied by `factor`. Works in place.

        Afterwards, the adapter returns for `factor * h` what it returned for `h` before the call. Only adapters with
        `reads_carried` False have this method.
        """


class ExitAdapter(nn.Module):
    """The adapter of the original CascadeExit: norm(h + up(silu(gate h) * down h)), (..., D) -> (..., D).

    A new adapter is untrained and returns norm(h).
    """

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
        """Adapt hidden states h: (..., D) -> (..., D). The carried state is not read."""
        return self.norm(h + self.up(nn.functional.silu(self.gate(h)) * self.down(h)))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Adapt the weights to hidden states that are multiplied by `factor`. Works in place.

        Afterwards, `forward(factor * h, carried)` returns what `forward(h, carried)` returned before the call: the sum
        before the norm becomes `factor` times as large, and the norm removes this factor.
        """
        for linear, change in ((self.gate, 1 / factor), (self.down, 1 / factor), (self.up, factor)):
            linear.weight.mul_(change)


class CarryAdapter(nn.Module):
    """An adapter that reads x = [h, carried], the hidden state and the carried state side by side.

    Formula: norm(linear x + up(silu(gate x) * down x)). Shapes: h (..., D), carried (..., D) -> (..., D). A new adapter
    is untrained and returns norm(h). If the exit's token is taken, the output is the next carried state. EAGLE (Li et
    al. 2024) also passes a deep layer's state on to the next token. This adapter combines such a state (`carried`) with
    h, the newest token's state at the layer of the exit.
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
        """Adapt hidden states h, each with its own carried state: (..., D), (..., D) -> (..., D)."""
        x = torch.cat([h, carried], dim=-1)
        return self.norm(self.linear(x) + self.up(nn.functional.silu(self.gate(x)) * self.down(x)))


ADAPTERS: dict[str, type[Adapter]] = {"swiglu": ExitAdapter, "carry": CarryAdapter}


class Drafter(nn.Module):
    """The network that drafts tokens. It is a `carry` adapter before the first layer that also reads a context.

    The context is computed from hidden states at E exits, all except the one before the first layer. These states are
    taken at the position that produced the newest confirmed token, and are concatenated (..., E D). All drafts of a
    pass use the same context. `drafter.context(states)` computes it: (..., E D) -> (..., D). EAGLE-3 (Li et al. 2025)
    found that states of several depths tell more about later tokens than the last state alone.

    Args:
        states: E, the number of exits whose states form the context.
    """

    def __init__(self, hidden_size: int, width: int, states: int, norm_eps: float):
        super().__init__()
        self.adapter = CarryAdapter(hidden_size, width, norm_eps)
        self.context = nn.Linear(states * hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.context.weight)

    def forward(self, h: Tensor, carried: Tensor, context: Tensor) -> Tensor:
        """Adapt token embeddings: (..., D) -> (..., D).

        Args:
            h: token embeddings (..., D).
            carried: the carried state of each token (..., D).
            context: output of `self.context` (..., D).
        """
        return self.adapter(h, carried + context)
