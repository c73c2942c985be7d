"""Sampler: how a token is chosen from logits, and how a draft is judged so that the outcome stays the full model's."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeexit.kernels import Choice


def argmax(logits: Tensor) -> list[int]:
    """The likeliest of each row (N, V), the first of equal ones."""
    # numpy looks through a vocabulary ten times as fast as torch on a CPU.
    best = (logits.numpy() if logits.device.type == "cpu" and logits.dtype == torch.float32 else logits).argmax(-1)
    return best.tolist()


class Sampler:
    """Greedy at temperature 0; else temperature and nucleus (top-p) sampling from one seeded generator."""

    def __init__(self, temperature: float, top_p: float, seed: int, vocab_size: int, device: torch.device,
                 tolerance: float = 0.0):
        self.temperature, self.top_p, self.vocab_size = temperature, top_p, vocab_size
        self._slack = -math.log1p(-tolerance)               # a draft's logit may be this much below the best
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits: Tensor, ids: Tensor | None = None) -> int:
        """One row of logits -> a token.

        Args:
            logits: (V,), or (K,) over a trimmed head.
            ids: the token ids of a trimmed head, at least K.
        """
        if self.greedy:
            best, = argmax(logits[None])
            return best if ids is None else int(ids[best])
        return int(torch.multinomial(self.distribution(logits, ids), 1, generator=self.generator))

    @property
    def exact(self) -> bool:
        """No draft stands but what the full model says: of its row only the choice matters."""
        return not self._slack

    def judge(self, drafts: Sequence[int], row: Tensor | Choice | int) -> int:
        """The token that stands where these are drafted: one of them, or what the full model says instead.

        The full model chooses as if nobody had drafted, so the outcome is its own, token by token for a seed. Greedy
        with a tolerance, the best of the drafts stands when it is likely enough.

        Args:
            row: the full model's logits (V,); where greedy, the likeliest token, with others' logits where not `exact`.
        """
        token = row if isinstance(row, int) else row.token if isinstance(row, Choice) else self.choose(row)
        if self._slack and drafts and token not in drafts:
            best = max(drafts, key=lambda draft: float(row[draft]))
            if float(row[token] - row[best]) <= self._slack:
                return best
        return token

    def distribution(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Probabilities (V,) after temperature and top-p: fp32 logits (V,), or (K,) over the first K of `ids`."""
        probs = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked, order = probs.sort(descending=True)
            # A token stays when the mass before it is still short of top_p: the first one always stays.
            mass = ranked.double().cumsum(0)                # fp32 sums on a GPU vary from call to call
            ranked[mass - ranked >= self.top_p] = 0
            probs = torch.zeros_like(probs).scatter_(0, order, ranked / ranked.sum())
        if ids is None:
            return probs
        return torch.zeros(self.vocab_size, device=probs.device).scatter_(0, ids[:len(probs)], probs)
