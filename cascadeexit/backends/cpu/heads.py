"""CpuHead: a vocabulary head in C++, with weights in bf16 or rounded to 8 bits.

With a `HeadScreen`, the argmax of a bf16 head reads only half of the bytes.

Letters: N rows, I inputs (the hidden size), K words (entries of the vocabulary).
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
    """Computes fp32 logits of K words (entries of the vocabulary) from bf16 rows (..., I).

    `base.VocabHead` describes the methods.

    Args:
        weight: (K, I) in bf16. It is copied.
        bias: (K,); None if the head has no bias.
        eight_bits: store the weights as 8-bit integers, with one scale factor for each word. Rows are then rounded to
            16-bit integers, with one scale factor for each row. This halves the bytes and the work, but the logits are
            less exact.
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
        """Number of bytes of weights that one call of `argmax` reads.

        With a `HeadScreen`, only the bytes of the screen's 8-bit head count. `argmax` also reads a few rows of the
        bf16 weight, which are not counted.
        """
        if self._screen:
            return self._screen.rough.nbytes
        return self.shape[0] * (self.shape[1] + 4 if self.eight_bits else 2 * self.shape[1])

    @property
    def owned_bytes(self) -> int:
        return 0 if self._shared else self.nbytes

    @property
    def weight(self) -> Tensor:
        """The weight (K, I), unpacked into a new tensor on each access.

        Raises ValueError if the weight was rounded to 8 bits.
        """
        return self.rows(range(self.words)).tensor()[0]

    def logits(self, rows: Hidden) -> Tensor:
        rows = in_bf16(rows)
        out = torch.empty(*rows.shape[:-1], self.words)
        build.library().ce_linear(byref(self.matrix), rows.data_ptr(), out.data_ptr(), prod(rows.shape[:-1]),
                                  torch.get_num_threads())
        return out

    def argmax(self, rows: Hidden) -> list[int]:
        """Find the likeliest word (entry of the vocabulary) of each row (..., I).

        Returns the word's number for each row; if several words are equally likely, the lowest number. For a head that
        `screened` made, this call reads half as many bytes.
        """
        rows = in_bf16(rows)
        n = prod(rows.shape[:-1])
        numbers, screen = (c_int32 * n)(), self._screen
        build.library().ce_argmax(byref(self.matrix), screen and byref(screen.structure), rows.data_ptr(), numbers, n,
                                  torch.get_num_threads())
        return numbers[:]

    def choices(self, rows: Hidden) -> list[Choice]:
        return [Choice(token, partial(self.logit, rows, row)) for row, token in enumerate(self.argmax(rows))]

    def logit(self, rows: Hidden, row: int, number: int) -> float:
        """Compute one logit. It is bitwise equal to the value in `logits`. Only for a head that is not in 8 bits.

        Args:
            rows: rows of hidden states (1, N, I).
            row: index of the row, from 0 to N - 1.
            number: index of the logit, from 0 to K - 1.
        """
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
        """Make a head of only this head's first `words` tokens. It shares this head's memory.

        words: number of entries, a multiple of `WORD_BLOCK`, or K.
        """
        if words == self.words:
            return self
        part = copy.copy(self)
        part.shape, part._shared, part._screen = (words, self.shape[1]), True, None
        part.matrix = Matrix(self.matrix.weight, self.matrix.scale, self.matrix.bias, self.matrix.inputs, words)
        return part

    def rows(self, ids: Sequence[int]) -> States:
        """Read n rows of the weight (K, I). Returns them in bf16, (1, n, I).

        If the model ties its embedding to this head, these rows are the embeddings of n tokens.

        ids: indices of the rows, from 0 to K - 1.

        Raises ValueError if the weight was rounded to 8 bits.
        """
        if self.eight_bits:
            raise ValueError("this head was rounded to 8 bits: read the rows of the bf16 head that it was made from")
        n = len(ids)
        out = States((1, n, self.shape[1]))
        build.library().ce_rows(byref(self.matrix), (c_int64 * n)(*ids), n, out.data_ptr())
        return out

    def screened(self, rough: "CpuHead", exact: Tensor, ids: Tensor | None = None) -> "CpuHead":
        """Return a copy of this head whose `argmax` is faster, with the same results. It shares this head's weights.

        The copy uses a new `HeadScreen`. The class `HeadScreen` explains the arguments.
        """
        head = copy.copy(self)
        head._screen, head._shared = HeadScreen(rough, exact, ids), True
        return head


class HeadScreen:
    """Makes the argmax of a bf16 head read half of the bytes: an 8-bit copy of the head first excludes most words.

    The result does not change. Let w be the weights of a word, v the rounded weights and x a row. Then w . x differs
    from v . x by at most |w - v| |x| (Cauchy-Schwarz inequality). So only a few words can be the likeliest, and only
    their logits are computed with the bf16 weights. A word is an entry of the vocabulary.

    The constructor only computes the bounds of the rounding errors for C++. `CpuHead.screened` makes a head that uses
    them.

    Args:
        rough: the 8-bit copy of the bf16 head. It may have the words in another order.
        exact: the bf16 weight (K, I) that was rounded to make `rough`.
        ids: word number k of `rough` is word number ids[k] of the bf16 head. None if both heads have the words in the
            same order.
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
