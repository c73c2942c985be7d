"""TorchHead: a vocabulary head in PyTorch.

Letters: N rows, D hidden size, K words.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cascadeexit.backends.base import Choice
from cascadeexit.backends.torch.linear import PackedLinear, frozen_linear
from cascadeexit.backends.torch.recording import Recorded
from cascadeexit.exits.confidence import softmax_facts


class TorchHead:
    """Computes logits of K words (entries of the vocabulary) from rows (..., D).

    `base.VocabHead` describes the methods.

    Args:
        weight: (K, D).
        bias: (K,); None if the head has no bias.
        row_multiple: pad the number of rows to a multiple of this, so that a row's logits do not depend on other rows.
        recorded_rows: run passes of up to this many rows as CUDA graphs; 0 records nothing.
        owned: True if the weight is not shared with another head.
        packed: pack the weight if oneDNN can do this; see `linear.py`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, row_multiple: int = 1, recorded_rows: int = 0,
                 owned: bool = True, packed: bool = True):
        self._device, self._bias = weight.device, bias
        self._shape = dict(row_multiple=row_multiple, recorded_rows=recorded_rows, packed=packed)
        # The only reference to the weight: a packed one is not in memory twice.
        self._linear = frozen_linear(weight.detach(), bias, packed=packed)
        self._project: Callable[[Tensor], Tensor] = (
            Recorded(self._linear, recorded_rows) if recorded_rows else self._linear)
        self.words, self.nbytes = len(weight), weight.nbytes
        self.owned_bytes = self.nbytes if owned or isinstance(self._linear, PackedLinear) else 0

    @property
    def weight(self) -> Tensor:
        return self._linear.weight.detach()

    def logits(self, rows: Tensor) -> Tensor:
        """Compute the logits of all K words of this head: rows (..., N, D) -> (..., N, K)."""
        n = rows.shape[-2]
        missing = -n % self._shape["row_multiple"]
        rows = rows.to(self._device)
        return self._project(F.pad(rows, (0, 0, 0, missing)) if missing else rows)[..., :n, :]

    def argmax(self, rows: Tensor) -> list[int]:
        """Return the index of the largest logit of each row (..., D), as a list. Of equal logits, the first counts."""
        return argmax(self.logits(rows).flatten(0, -2))

    def choices(self, rows: Tensor) -> list[Choice]:
        """Return a `Choice` for each row (..., D): the index of the row's largest logit, and all logits of the row."""
        logits = self.logits(rows).flatten(0, -2)
        return [Choice(token, row.__getitem__) for token, row in zip(argmax(logits), logits)]

    def likeliest(self, rows: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Find the k largest logits of each row (..., D), largest first.

        Returns their probabilities and their indices, (..., min(k, K)) each. The probabilities come from the softmax
        over all K logits at this temperature.
        """
        logits = self.logits(rows).float() / temperature
        probs, numbers = logits.softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
        return probs, numbers

    def softmax_facts(self, rows: Tensor, copied: Tensor, before: Tensor | None = None) -> Tensor:
        """Compute the inputs of a `SketchConfidence` estimator from adapter outputs (..., D).

        `exits.confidence.softmax_facts` describes the arguments. Returns (..., 5) without `before`, and (..., 12) with
        `before`.
        """
        return softmax_facts(self._linear, rows, copied, before)        # the whole estimator may be recorded

    def first(self, words: int) -> "TorchHead":
        """Make a head of only this head's first `words` tokens, 1 to K.

        The new head copies a packed weight, and shares any other weight.
        """
        if words == self.words:
            return self
        return TorchHead(self.weight[:words], None if self._bias is None else self._bias[:words], owned=False,
                         **self._shape)


def argmax(logits: Tensor) -> list[int]:
    """Return the index of the largest logit in each row (N, K). If several are equal, return the first."""
    # On a CPU, numpy's argmax over a vocabulary is ten times as fast as PyTorch's.
    on_cpu = logits.device.type == "cpu" and logits.dtype == torch.float32
    return (logits.numpy() if on_cpu else logits).argmax(-1).tolist()
