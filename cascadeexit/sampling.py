"""Sampler: chooses tokens from logits, and judges drafts in such a way that the text stays that of the full model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeexit.backends.base import Choice


class Sampler:
    """Chooses greedily at temperature 0, else by temperature and nucleus (top-p) sampling with one seeded generator.

    Args:
        tolerance: greedy only; a draft is also accepted if the full model gives it at least 1 - tolerance times the
            probability of its own choice.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, vocab_size: int, device: torch.device,
                 tolerance: float = 0.0):
        self.temperature, self.top_p, self.vocab_size = temperature, top_p, vocab_size
        self._slack = -math.log1p(-tolerance)               # a draft's logit may be this much below the best
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits: Tensor, ids: Tensor | None = None) -> int:
        """Sample a token from one row of logits; only at a temperature above 0.

        Args:
            logits: (V,), or (K,) over a trimmed head.
            ids: the token ids of a trimmed head, at least K.
        """
        return int(torch.multinomial(self.distribution(logits, ids), 1, generator=self.generator))

    def judge(self, drafts: Sequence[int], row: Tensor | Choice) -> int:
        """Return the verified token at a position with these drafts: one of them, or the full model's own choice.

        The full model chooses as if there were no drafts, so the text is its own, even if it is sampled. With a
        tolerance (greedy only), the likeliest draft is accepted if it is likely enough.

        Args:
            row: the full model's logits (V,) if tokens are sampled, its `Choice` if greedy.
        """
        if not isinstance(row, Choice):
            return self.choose(row)
        if self._slack and drafts and row.token not in drafts:
            best = max(drafts, key=row.__getitem__)
            if row[row.token] - row[best] <= self._slack:
                return best
        return row.token

    def distribution(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Compute probabilities (V,) after temperature and top-p. The arguments are those of `choose`."""
        probs = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked, order = probs.sort(descending=True)
            # A token is kept if the mass before it is below top_p: the first token always is.
            mass = ranked.double().cumsum(0)                # fp32 sums on a GPU vary from call to call
            ranked[mass - ranked >= self.top_p] = 0
            probs = torch.zeros_like(probs).scatter_(0, order, ranked / ranked.sum())
        if ids is None:
            return probs
        return torch.zeros(self.vocab_size, device=probs.device).scatter_(0, ids[:len(probs)], probs)
