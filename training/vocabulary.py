"""The words an exit is trained on: the most frequent ones, and a random sample that represents the others."""

import math

import torch
from torch import Tensor


def frequent_tokens(choices: Tensor, vocab_size: int, always: frozenset[int]) -> Tensor:
    """Sort all token ids by how often the full model chose them, most frequent first (V,).

    Args:
        choices: the full model's choices (n,).
        always: tokens that come first whatever their frequency.
    """
    counts = torch.bincount(choices, minlength=vocab_size).double()
    counts[list(always)] = math.inf
    # Among tokens never chosen the lower id goes first: byte-pair ids are ordered by frequency of their merges.
    return torch.argsort(counts, descending=True, stable=True)


class SampledHead:
    """Rows of the frozen vocabulary head: an exit's own words, and at each step a sample of the remaining ones.

    Args:
        weight: the whole head (V, D).
        ids: token ids of the own words (K,); None = all.
        tail: how many of the remaining words `sample` draws.

    Attributes:
        own: rows of the own words (K, D).
        local: position of each token id among the own words (V,), -1 if it is not one of them.
    """

    def __init__(self, weight: Tensor, ids: Tensor | None, tail: int):
        self.full, self.ids = weight, ids
        self.own = weight if ids is None else weight[ids]
        vocab = torch.arange(len(weight), device=weight.device)
        self.local = vocab.clone()
        self._rest, self._tail = vocab[:0], 0
        if ids is not None:
            self.local.fill_(-1)[ids] = torch.arange(len(ids), device=weight.device)
            self._rest = vocab[self.local < 0]
            self._tail = min(tail, len(self._rest))

    def sample(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return rows (K + tail, D) and the numbers to add to their logits (K + tail,).

        Own words get 0, sampled words get log(1 / probability of being sampled). So the expected sum of exponentials
        equals the sum over the whole vocabulary.
        """
        added = self.own.new_zeros(len(self.own) + self._tail, dtype=torch.float32)
        if not self._tail:
            return self.own, added
        picked = torch.randperm(len(self._rest), generator=torch.Generator().manual_seed(seed))[:self._tail]
        added[len(self.own):] = math.log(len(self._rest) / self._tail)
        return torch.cat([self.own, self.full[self._rest[picked.to(self._rest.device)]]]), added
