"""CpuHead: a vocabulary projection in C++, in bf16 or rounded to 8 bits.

A screen (`HeadScreen`) halves the bytes that argmax reads.

Letters: N rows, I inputs (the hidden size), K words.
"""

import copy
from collections.abc import Sequence
from ctypes import byref, c_float, c_int32, c_int64
from functools import partial
from math import prod

import torch
from torch import Tensor

from cascadeexit.backends.base import Choice
from cascadeexit.backends.cpu import build
from cascadeexit.backends.cpu.packing import Store, rounded, scale_of
from cascadeexit.backends.cpu.states import Hidden, States, in_bf16
from cascadeexit.backends.cpu.structures import Matrix, Screen
from cascadeexit.exits.confidence import FACTS_AFTER, FACTS_ALONE


class CpuHead:
    """Projects bf16 rows (..., I) onto K words, with fp32 results. `base.VocabHead` describes the methods.

    Args:
        weight: (K, I) in bf16.
        eight_bits: keep weights as 8-bit integers with one factor for each output, and round rows to 16-bit integers
            with one factor for each row. This halves the bytes and the work, but rounds the results.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, eight_bits: bool = False):
        self.shape, self.eight_bits, self.has_bias = tuple(weight.shape), eight_bits, bias is not None
        if eight_bits:
            whole, scale = rounded(weight)
            self._store = Store([whole])
            self.matrix = self._store.matrix_in_8_bits(whole, scale, len(weight), bias)
        else:
            self._store = Store([weight])
            self.matrix = self._store.matrix(weight, bias=bias)
        self._screen: HeadScreen | None = None
        self._shared = False

    @property
    def words(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Return the bytes of weights that one `argmax` call reads.

        With a screen these are the screen's bytes: the few bf16 rows that are also read do not count.
        """
        if self._screen:
            return self._screen.rough.nbytes
        return self.shape[0] * (self.shape[1] + 4 if self.eight_bits else 2 * self.shape[1])

    @property
    def owned_bytes(self) -> int:
        return 0 if self._shared else self.nbytes

    @property
    def weight(self) -> Tensor:
        """Unpack the weight into a new tensor (K, I). Raises ValueError if the weight was rounded to 8 bits."""
        return self.rows(range(self.words)).tensor()[0]

    def logits(self, rows: Hidden) -> Tensor:
        rows = in_bf16(rows)
        out = torch.empty(*rows.shape[:-1], self.words)
        build.library().ce_linear(byref(self.matrix), rows.data_ptr(), out.data_ptr(), prod(rows.shape[:-1]),
                                  torch.get_num_threads())
        return out

    def argmax(self, rows: Hidden) -> list[int]:
        """Find the likeliest word of each row (..., I); of equal ones, the first. With a screen this is faster."""
        rows = in_bf16(rows)
        n = prod(rows.shape[:-1])
        numbers, screen = (c_int32 * n)(), self._screen
        build.library().ce_argmax(byref(self.matrix), screen and byref(screen.structure), rows.data_ptr(), numbers, n,
                                  torch.get_num_threads())
        return numbers[:]

    def choices(self, rows: Hidden) -> list[Choice]:
        return [Choice(token, partial(self.logit, rows, row)) for row, token in enumerate(self.argmax(rows))]

    def logit(self, rows: Hidden, row: int, number: int) -> float:
        """Compute the logit of one word for one of the rows (1, N, I). It is bitwise equal to the value in `logits`."""
        rows, size, of = in_bf16(rows), build.library().ce_block(), self.matrix
        first = number // size * size
        # A matrix that consists of only the block with this output.
        block = Matrix(of.weight + build.library().ce_packed_bytes(first, of.inputs), None,
                       of.bias and of.bias + 4 * first, of.inputs, min(size, of.outputs - first))
        out = (c_float * size)()
        build.library().ce_linear(byref(block), rows.data_ptr() + 2 * row * of.inputs, out, 1, 1)
        return out[number - first]

    def likeliest(self, rows: Hidden, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        rows, k = in_bf16(rows), min(k, self.words)
        probs, numbers = (torch.empty(*rows.shape[:-1], k, dtype=dtype) for dtype in (torch.float32, torch.int32))
        build.library().ce_likeliest(byref(self.matrix), rows.data_ptr(), temperature, k, numbers.data_ptr(),
                                     probs.data_ptr(), prod(rows.shape[:-1]), torch.get_num_threads())
        return probs, numbers

    def softmax_facts(self, rows: Tensor, copied: Tensor, before: Tensor | None = None) -> Tensor:
        rows, copied, before = in_bf16(rows), copied.float().contiguous(), None if before is None else in_bf16(before)
        facts = torch.empty(*rows.shape[:-1], FACTS_ALONE if before is None else FACTS_AFTER)
        build.library().ce_softmax_facts(byref(self.matrix), rows.data_ptr(), copied.data_ptr(),
                                         None if before is None else before.data_ptr(), facts.data_ptr(),
                                         prod(rows.shape[:-1]), torch.get_num_threads())
        return facts

    def first(self, words: int) -> "CpuHead":
        """Make a head of the first `words` words, which shares this head's memory.

        words: a multiple of `WORD_BLOCK`, or K.
        """
        if words == self.words:
            return self
        part = copy.copy(self)
        part.shape, part._shared, part._screen = (words, self.shape[1]), True, None
        part.matrix = Matrix(self.matrix.weight, self.matrix.scale, self.matrix.bias, self.matrix.inputs, words)
        return part

    def rows(self, ids: Sequence[int]) -> States:
        """Read rows of the weight as embeddings: n token ids -> (1, n, I).

        Raises ValueError if the weight was rounded to 8 bits.
        """
        if self.eight_bits:
            raise ValueError("this head was rounded to 8 bits: read the rows of the bf16 head that it was made from")
        n = len(ids)
        out = States((1, n, self.shape[1]))
        build.library().ce_rows(byref(self.matrix), (c_int64 * n)(*ids), n, out.data_ptr())
        return out

    def screened(self, rough: "CpuHead", exact: Tensor, ids: Tensor | None = None) -> "CpuHead":
        """Return a copy of this head with a faster argmax. It uses a `HeadScreen` made from these arguments."""
        head = copy.copy(self)
        head._screen, head._shared = HeadScreen(rough, exact, ids), True
        return head


class HeadScreen:
    """Excludes most words from an argmax with a head rounded to 8 bits. The result is the same, for half of the bytes.

    For an output with weights w and rounded weights v, w . x differs from v . x by at most |w - v| |x| (Cauchy-Schwarz
    inequality). So only a few outputs can be the largest, and only these are computed with the bf16 weights.

    Args:
        rough: the head rounded to 8 bits.
        exact: the bf16 weight (K, I) that `rough` was made from.
        ids: for each output of `rough`, its number in the exact head; None if both numbers are equal.
    """

    def __init__(self, rough: CpuHead, exact: Tensor, ids: Tensor | None = None):
        error = size = 0.0
        for part in exact.detach().split(4096):
            part = part.float() / scale_of(part.float())[:, None]
            whole = part.round()
            error = max(error, float((part - whole).norm(dim=1).max()))
            size = max(size, float(whole.norm(dim=1).max()))
        self.rough, self._ids = rough, None if ids is None else ids.int().contiguous()
        self.structure = Screen(rough.matrix, None if ids is None else self._ids.data_ptr(), error * 1.001,
                                size * 1.001)
