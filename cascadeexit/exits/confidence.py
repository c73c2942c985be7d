"""Confidence estimators: compute the probability that an exit's choice equals the full model's.

There are two kinds. `ConfidenceHead`, the published one, reads the adapted hidden state. `SketchConfidence` reads facts
of the exit's softmax over a few frequent words, and the n-gram copy. Neither needs the exit's whole vocabulary
projection, so only the exit that is taken computes it.

Letters: N rows, D hidden size, K words of the head that a sketch reads.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

FACTS_ALONE, FACTS_AFTER = 5, 12        # inputs of a sketch estimator, without and with the exit before


class ConfidenceHead(nn.Module):
    """The published estimator, an MLP: adapted hidden states (..., D) -> logits (...,). Always in fp32."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = nn.functional.silu(self.inner(hidden.to(self.inner.weight.dtype)))
        return self.outer(inner).squeeze(-1).float()

    def chance(self, hidden: Tensor) -> Tensor:
        """Compute the probability that this exit's choice equals the full model's: (..., D) -> (...,)."""
        return self(hidden).sigmoid()


class SketchConfidence(nn.Module):
    """An estimator that reads `softmax_facts`: (..., 5), or (..., 12) with the previous exit -> logits (...,).

    If the previous exit ran for the same token, its numbers are inputs, too: exits that agree are right more often.
    """

    def __init__(self, width: int):
        super().__init__()
        self.alone, self.after = (nn.Sequential(nn.Linear(n, width), nn.SiLU(), nn.Linear(width, 1))
                                  for n in (FACTS_ALONE, FACTS_AFTER))

    def forward(self, facts: Tensor) -> Tensor:
        return (self.alone if facts.shape[-1] == FACTS_ALONE else self.after)(facts).squeeze(-1)


def read_copies(copied: Sequence[tuple[int, int]], places: Mapping[int, int]) -> list[tuple[int, float]]:
    """Turn n-gram copies into estimator inputs: the word's place in the sketch and log(1 + length of the match).

    Args:
        copied: tokens and lengths, as from `Lookup.copied`.
        places: {token id: place in the sketch}; other tokens get -1.
    """
    return [(places.get(token, -1), math.log1p(length)) for token, length in copied]


def softmax_facts(project: Callable[[Tensor], Tensor], hidden: Tensor, copied: Tensor,
                  before: Tensor | None = None) -> Tensor:
    """Compute the inputs of `SketchConfidence` from an exit's softmax: (..., 5), or (..., 12) with the previous exit.

    Columns:
    - log p of the likeliest word, log p of the second, entropy in nats
    - only with the previous exit, seven more: these three numbers of that exit; 1 if both exits have the same likeliest
      word, else 0; log p of this exit's word in that exit, and of that exit's word in this exit, at least -15; the
      cosine of the two rows
    - the match length of the copy, as log(1 + length), if the likeliest word is the copied one, else 0; the same number
      if it is another word, else 0

    Args:
        project: the head of the sketch, rows (..., D) -> logits (..., K).
        hidden: adapted rows of this exit (..., D).
        copied: n-gram copies from `read_copies`, (..., 2).
        before: adapted rows of the previous exit (..., D); None if it did not run.
    """
    log_p, mine = _of_softmax(project(hidden))
    best, (word, length) = log_p.argmax(-1, keepdim=True), copied.split(1, dim=-1)
    copy = torch.cat([length * (best == word), length * (best != word)], dim=-1)
    if before is None:
        return torch.cat([mine, copy], dim=-1)
    other, theirs = _of_softmax(project(before))
    their_best = other.argmax(-1, keepdim=True)
    cosine = nn.functional.cosine_similarity(hidden.float(), before.float(), dim=-1)[..., None]
    return torch.cat([mine, theirs, (best == their_best).float(), other.gather(-1, best).clamp(min=-15),
                      log_p.gather(-1, their_best).clamp(min=-15), cosine, copy], dim=-1)


def _of_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log probabilities (..., K); and log p of the two likeliest words and the entropy in nats (..., 3)."""
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    return log_p, torch.cat([log_p.topk(2, dim=-1).values, entropy], dim=-1)
