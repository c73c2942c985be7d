"""Sampler: chooses tokens from logits, and judges drafts so that the text stays the full model's own text."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeexit.backends.base import Choice


class Sampler:
    """Chooses the tokens of one run, and judges its drafts.

    Temperature 0 is greedy. Above 0, tokens are sampled with this temperature and nucleus sampling (top-p), from one
    random generator with a seed.

    Args:
        device: device of the logits.
        tolerance: only if greedy; a draft is also accepted if its probability by the full model is at least (1 -
            tolerance) times the probability of the full model's own choice.
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
        """Sample a token from one row of logits, and return its id. Only for a temperature above 0.

        Args:
            logits: (V,) for all tokens, or (K,) for the K tokens of a trimmed head.
            ids: for a trimmed head, ids[k] is the token id of logit k; ids beyond the first K are ignored. None for all
                tokens.
        """
        return int(torch.multinomial(self.distribution(logits, ids), 1, generator=self.generator))

    def judge(self, drafts: Sequence[int], row: Tensor | Choice) -> int:
        """Return the token that becomes final at a position. This is the full model's own choice.

        The full model chooses as if there were no drafts, so the text is the full model's own text, even if tokens are
        sampled. There is one exception, only for greedy runs with a tolerance: if the choice is not among the drafts
        and the likeliest draft is likely enough, this draft is returned.

        Args:
            drafts: token ids of the drafts at this position; may be empty.
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
        """Compute the probabilities (V,) from which `choose` samples, from the same arguments.

        Tokens that top-p excludes, and tokens that a trimmed head does not have, get the probability 0.
        """
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
