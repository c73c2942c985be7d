"""Choose the words on which an exit is trained: the most frequent ones, and a random sample of the others.

A word is an entry of the vocabulary, which a token id names.
"""

import math

import torch
from torch import Tensor


def frequent_tokens(choices: Tensor, vocab_size: int, always: frozenset[int]) -> Tensor:
    """Sort all token ids by how often the full model chose them, the most frequent first. Returns (vocab_size,).

    Args:
        choices: the full model's choices, as token ids (n,).
        always: token ids that come first, however often they were chosen.
    """
    counts = torch.bincount(choices, minlength=vocab_size).double()
    counts[list(always)] = math.inf
    # Among tokens never chosen the lower id goes first: byte-pair ids are ordered by frequency of their merges.
    return torch.argsort(counts, descending=True, stable=True)


class SampledHead:
    """A part of the frozen vocabulary head: the rows of some fixed words, and a random sample of the other rows.

    A word is an entry of the vocabulary. Letters: V size of the vocabulary, K fixed words, D hidden size.

    Args:
        weight: the whole vocabulary head (V, D).
        ids: token ids of the fixed words (K,); None = all words.
        tail: number of other words that `sample` adds.

    Attributes:
        own: rows of the fixed words (K, D).
        local: for each token id, its index among the fixed words (V,). -1 for other words.
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
        """Return the rows of the fixed words and of a random sample of the other words, (K + tail, D).

        Also returns a number for each row (K + tail,), which the caller adds to the logits. It is 0 for fixed words,
        and log(1 / probability of being sampled) for the others. With these numbers, the expected sum of exp(logit)
        equals the sum over the whole vocabulary.

        Args:
            seed: decides which words are sampled.
        """
        added = self.own.new_zeros(len(self.own) + self._tail, dtype=torch.float32)
        if not self._tail:
            return self.own, added
        picked = torch.randperm(len(self._rest), generator=torch.Generator().manual_seed(seed))[:self._tail]
        added[len(self.own):] = math.log(len(self._rest) / self._tail)
        return torch.cat([self.own, self.full[self._rest[picked.to(self._rest.device)]]]), added
