"""GpuHead: a vocabulary head with Triton kernels.

Letters: N rows, D hidden size, K words.
"""

import torch
from torch import Tensor

from cascadeexit.backends.base import Choice
from cascadeexit.backends.gpu import kernels
from cascadeexit.backends.gpu.launches import Counts, input_block, launch, tiles
from cascadeexit.backends.gpu.recording import AskedTop, Hidden, tensor_of
from cascadeexit.exits.confidence import softmax_facts

_WORDS, _BLOCKS = 64, 1024      # words of one program, and blocks of words in one step of the argmax


class GpuHead:
    """Computes fp32 logits of K words (entries of the vocabulary) from rows (..., D).

    `base.VocabHead` describes the methods.

    Args:
        weight: (K, D).
        bias: (K,); None if the head has no bias.
        counts: the `Counts` of the model's device.
        owned: True if the weight is not shared with another head or the model.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, counts: Counts, owned: bool = True):
        self._weight, self._bias, self._counts = weight.detach(), bias, counts
        self.words, self.nbytes = len(weight), weight.nbytes
        self.owned_bytes = self.nbytes if owned else 0
        self.in_top = False                 # True if recordings that end with the last segment include this head

    @property
    def weight(self) -> Tensor:
        return self._weight

    def logits(self, rows: Hidden) -> Tensor:
        """Compute fp32 logits: rows (..., D) -> (..., K)."""
        return self.launch(self._ready(rows))[0].view(*rows.shape[:-1], -1)

    def argmax(self, rows: Hidden) -> list[int]:
        return self._asked(rows)[1]

    def choices(self, rows: Hidden) -> list[Choice]:
        logits, tokens = self._asked(rows)
        return [Choice(token, row.__getitem__) for token, row in zip(tokens, logits)]

    def _asked(self, rows: Hidden) -> tuple[Tensor, list[int]]:
        """Compute the logits of all rows (N, K). Returns them, and a list with the index of each row's largest logit.

        If the rows come from a postponed pass, one recording may run this pass and the head together.
        """
        if self.in_top and isinstance(rows, AskedTop) and (answer := rows.ask()):
            return answer
        logits, words = self.launch(self._ready(rows))
        return logits, words.tolist()

    def likeliest(self, rows: Hidden, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.logits(rows) / temperature
        return logits.softmax(-1).topk(min(k, self.words), dim=-1)

    def softmax_facts(self, rows: Tensor, copied: Tensor, before: Tensor | None = None) -> Tensor:
        return softmax_facts(self.logits, rows, copied, before)

    def first(self, words: int) -> "GpuHead":
        """Make a head of only this head's first `words` tokens, 1 to K. It shares this head's memory."""
        if words == self.words:
            return self
        bias = None if self._bias is None else self._bias[:words]
        return GpuHead(self._weight[:words], bias, counts=self._counts, owned=False)

    def launch(self, rows: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Launch the projection and the argmax on contiguous rows (N, D).

        Returns fp32 logits (N, K), and the index of the largest logit of each row (N,). This does not wait for the GPU.

        count: how many of the first rows to compute, as a tensor (1,) in device memory; None for all rows.
        """
        n, d = rows.shape
        blocks, count = -(-self.words // _WORDS), self._counts(n) if count is None else count
        logits = torch.empty(n, self.words, dtype=torch.float32, device=rows.device)
        best, tokens = (torch.empty(size, dtype=torch.int32, device=rows.device) for size in ((n, blocks), (n,)))
        launch(kernels.head_logits, (tiles(n), blocks), rows, self._weight, self._bias, logits, best, count, d,
               self.words, BIAS=self._bias is not None, BLOCK_V=_WORDS, BLOCK=input_block(d, 128), num_warps=4,
               num_stages=4)
        launch(kernels.argmax, (n,), logits, best, tokens, count, self.words, blocks, BLOCK=_BLOCKS, num_warps=4)
        return logits, tokens

    def _ready(self, rows: Hidden) -> Tensor:
        rows = tensor_of(rows)
        return rows.reshape(-1, rows.shape[-1]).to(self._weight.dtype).contiguous()
