"""Confidence estimators: compute the probability that an exit chooses the same token as the full model.

There are two kinds. `ConfidenceHead`, the estimator of the original CascadeExit, reads the adapted hidden state.
`SketchConfidence` reads a few numbers. Some of them describe the exit's softmax over a short list of frequent tokens.
This list is called the sketch. The other numbers tell how well the copied token of n-gram lookup fits. An estimator
does not need the exit's projection onto the whole vocabulary. Only the exit that is taken computes this projection.

Letters: N rows, D hidden size, K tokens of the sketch.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

FACTS_ALONE, FACTS_AFTER = 5, 12        # inputs of a sketch estimator, without and with the exit before


class ConfidenceHead(nn.Module):
    """The estimator of the original CascadeExit, an MLP in fp32: outputs of the adapter (..., D) -> logits (...,).

    The sigmoid of a logit is the probability that the exit and the full model choose the same token.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = nn.functional.silu(self.inner(hidden.to(self.inner.weight.dtype)))
        return self.outer(inner).squeeze(-1).float()

    def chance(self, hidden: Tensor) -> Tensor:
        """Compute the probability that the exit chooses the full model's token: adapter outputs (..., D) -> (...,)."""
        return self(hidden).sigmoid()


class SketchConfidence(nn.Module):
    """An estimator that reads the numbers of `softmax_facts` and returns logits (...,).

    The sigmoid of a logit is the probability that the exit and the full model choose the same token. The input is
    (..., 5), or (..., 12) if the previous exit ran for the same token. The 7 additional numbers describe the previous
    exit, and compare it with this exit: if two exits agree, they are right more often.
    """

    def __init__(self, width: int):
        super().__init__()
        self.alone, self.after = (nn.Sequential(nn.Linear(n, width), nn.SiLU(), nn.Linear(width, 1))
                                  for n in (FACTS_ALONE, FACTS_AFTER))

    def forward(self, facts: Tensor) -> Tensor:
        return (self.alone if facts.shape[-1] == FACTS_ALONE else self.after)(facts).squeeze(-1)


def read_copies(copied: Sequence[tuple[int, int]], places: Mapping[int, int]) -> list[tuple[int, float]]:
    """Convert the results of n-gram lookup to inputs of a `SketchConfidence` estimator.

    The sketch is the list of frequent tokens whose probabilities the estimator reads. Returns a pair for each copied
    token: its index in the sketch, or -1 if the sketch does not have it; and log(1 + length of the match).

    Args:
        copied: pairs of token and match length, as from `Lookup.copied`.
        places: {token id: index in the sketch}, as `ExitBank.sketch_places`.
    """
    return [(places.get(token, -1), math.log1p(length)) for token, length in copied]


def softmax_facts(project: Callable[[Tensor], Tensor], hidden: Tensor, copied: Tensor,
                  before: Tensor | None = None) -> Tensor:
    """Compute the inputs of `SketchConfidence` for an exit: (..., 5), or (..., 12) if the previous exit ran, too.

    The sketch is a list of K frequent tokens, and p is a probability in the softmax over them. Columns, in this order:
    - Three numbers of this exit: log p of the likeliest token, log p of the second, entropy in nats.
    - Only if the previous exit ran, seven numbers: the same three numbers of the previous exit; 1 if both exits have
      the same likeliest token, else 0; the previous exit's log p of this exit's likeliest token; this exit's log p of
      the previous exit's likeliest token; the cosine of the adapted rows of both exits. The two log p before the cosine
      are clamped: values below -15 become -15.
    - Two numbers of n-gram lookup: log(1 + match length) if the copied token is this exit's likeliest token, else 0;
      then log(1 + match length) if it is not, else 0.

    Args:
        project: function that projects rows (..., D) onto the tokens of the sketch (..., K).
        hidden: adapted rows of this exit (..., D).
        copied: result of `read_copies` as a tensor (..., 2).
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
    """Compute log probabilities and three numbers that describe them, from logits (..., K).

    Returns two tensors: the log probabilities (..., K), and (..., 3) with log p of the likeliest token, log p of the
    second, and the entropy in nats.
    """
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    return log_p, torch.cat([log_p.topk(2, dim=-1).values, entropy], dim=-1)
