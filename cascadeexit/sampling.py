"""Sampler: how a token is chosen from logits, and how a draft is judged so that the outcome stays the full model's."""

import math

import torch
from torch import Tensor


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

    def choose(self, logits: Tensor, ids: Tensor | None = None) -> tuple[int, Tensor | None]:
        """One row of logits -> a token, and the distribution it was drawn from (None when greedy).

        Args:
            logits: (V,), or (K,) over a trimmed head.
            ids: the K token ids of a trimmed head.
        """
        if self.greedy:
            best = logits.argmax()
            return int(best if ids is None else ids[best]), None
        probs = self.distribution(logits, ids)
        return self._draw(probs), probs

    def judge(self, draft: int, drafted_from: Tensor | None, logits: Tensor) -> tuple[bool, int]:
        """Is this draft what the full model says? Returns (accepted, the token that stands here).

        Greedy: the argmax decides, or within the tolerance the draft. Sampling: accept with probability min(1, p/q),
        else draw from the positive part of p - q, so that accepted and corrected tokens together follow p exactly
        (Leviathan et al. 2023).

        Args:
            draft: the drafted token; drafted_from: the distribution q (V,) that it was drawn from.
            logits: the full model's row (V,).
        """
        if self.greedy:
            best = int(logits.argmax())
            stands = best == draft or self._slack > 0 and float(logits[best] - logits[draft]) <= self._slack
            return stands, draft if stands else best
        p = self.distribution(logits)
        if torch.rand((), device=p.device, generator=self.generator) * drafted_from[draft] <= p[draft]:
            return True, draft
        rest = (p - drafted_from).clamp_(min=0)
        return False, self._draw(rest if rest.sum() > 0 else p)

    def certain(self, token: int) -> Tensor:
        """The distribution (V,) of a draft that no chance was involved in."""
        return torch.zeros(self.vocab_size, device=self.generator.device).index_fill_(
            0, torch.tensor([token], device=self.generator.device), 1.0)

    def distribution(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Probabilities (V,) after temperature and top-p: fp32 logits (V,), or (K,) over the tokens `ids`."""
        probs = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked, order = probs.sort(descending=True)
            # A token stays when the mass before it is still short of top_p: the first one always stays.
            ranked[ranked.cumsum(0) - ranked >= self.top_p] = 0
            probs = torch.zeros_like(probs).scatter_(0, order, ranked / ranked.sum())
        if ids is None:
            return probs
        return torch.zeros(self.vocab_size, device=probs.device).scatter_(0, ids, probs)

    def _draw(self, probs: Tensor) -> int:
        return int(torch.multinomial(probs, 1, generator=self.generator))
