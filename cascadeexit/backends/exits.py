"""Exits: base class of the backends' exit runtimes.

`Exits` makes the vocabulary heads of the exits and counts bytes. Each backend's subclass adds the computation.
"""

import torch
from torch import Tensor, nn

from cascadeexit.backends.base import Rows, VocabHead
from cascadeexit.exits.bank import ExitBank
from cascadeexit.exits.config import WORD_BLOCK


class Exits:
    """Makes the vocabulary heads of a bank's exits on one backend, and counts the bytes of weights that exits read.

    A subclass adds the methods of `base.ExitRuntime` that run adapters, estimators and the drafter. The bank may have a
    trimmed head, a head for only the most frequent tokens. Then the heads of the exits and of the drafter are parts of
    the trimmed head: the first rows of its weight. The head of `SketchConfidence` estimators is also such a part if its
    tokens are the first tokens of the trimmed head.

    Args:
        bank: the trained exits of the model.
        backend: a `base.Backend`. It makes the vocabulary heads.
    """

    drafter_bits = None         # bits that are read for each weight of a drafter; None: those of its dtype

    def __init__(self, bank: ExitBank, backend):
        c = bank.config
        weight = backend.head.weight          # read once: some backends compute it on each access
        self._bank, self._device = bank, weight.device
        self._ids = None if bank.head_ids is None else bank.head_ids.tolist()
        self._whole = backend.head
        if bank.head_ids is not None:       # rounded weights are as good here, and halve the bytes to read
            self._whole = backend.vocab_head(weight[bank.head_ids], rounded=True)
        parts = {n: self._whole.first(n) for n in dict.fromkeys((*map(c.words, range(len(c.layers))), c.draft_words))}
        self._heads: list[VocabHead] = [parts[c.words(s)] for s in range(len(c.layers))]
        self._draft_head: VocabHead = parts[c.draft_words]
        self._sketch = self._sketch_head(backend, weight)
        self._places = bank.sketch_places
        own = {id(head): head for head in (self._whole, *parts.values()) if head is not backend.head}
        if self._sketch:
            own[id(self._sketch)] = self._sketch
        self.memory_bytes = sum(head.owned_bytes for head in own.values()) + sum(p.nbytes for p in bank.parameters())
        self.full_head = backend.head
        self._count()

    def _sketch_head(self, backend, weight: Tensor) -> VocabHead | None:
        """Return the vocabulary head that `SketchConfidence` estimators read; None if the bank has none of them.

        If the estimators' words are the first words of the trimmed head, the result is a part of the trimmed head; see
        `VocabHead.first`.
        """
        ids, words = self._bank.sketch_ids, self._bank.head_ids
        if ids is None:
            return None
        if words is not None and len(ids) % WORD_BLOCK == 0 and torch.equal(words[:len(ids)], ids):
            return self._whole.first(len(ids))
        return backend.vocab_head(weight[ids], rounded=True)

    def logits(self, s: int, hidden: Rows) -> Tensor:
        """Compute the logits of exit s from outputs of its adapter; see `ExitRuntime.logits`."""
        return self._heads[s].logits(hidden)

    def choice(self, s: int, hidden: Rows) -> int:
        """Return the token id that exit s finds likeliest, from one output `hidden` (1, D) of its adapter."""
        best, = self._heads[s].argmax(hidden)
        return best if self._ids is None else self._ids[best]

    # -- bytes ----------------------------------------------------------------------------------------------------

    def head_bytes(self, s: int) -> int:
        """Return how many bytes of weights the vocabulary head of exit s reads in one pass."""
        return self._heads[s].nbytes

    def try_bytes(self, s: int) -> int:
        """Return how many bytes of weights one try of exit s reads: its adapter and its confidence for one row."""
        return self._try_bytes[s]

    def _count(self) -> None:
        """Count the bytes of weights that one try of each exit, one draft step and one drafter context read.

        The counts are stored: counting the bytes of a module takes as long as a small kernel.
        """
        bank, drafter, estimators = self._bank, self._bank.drafter, self._bank.confidence_heads
        adapters = [_bytes(adapter) for adapter in bank.adapters]
        sketch = self._sketch.nbytes if self._sketch else 0
        self._try_bytes = [read + (self.head_bytes(s) if estimators is None else sketch + _bytes(estimators[s]))
                           for s, read in enumerate(adapters)]
        adapter = self._drafter_bytes(drafter.adapter) if drafter else adapters[0]
        self.draft_bytes = adapter + self._draft_head.nbytes
        self.context_bytes = self._drafter_bytes(drafter.context) if drafter else 0

    def _drafter_bytes(self, part: nn.Module) -> int:
        bits = self.drafter_bits
        return sum(p.nbytes if bits is None else p.numel() * bits // 8 for p in part.parameters())


def _bytes(part: nn.Module) -> int:
    return sum(p.nbytes for p in part.parameters())
