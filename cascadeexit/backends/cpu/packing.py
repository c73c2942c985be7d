"""Packing: stores weights in the layouts that the C++ kernels read, in huge pages.

bf16 weights keep their 16 bits, or are packed to 12 bits without loss. Weights of exits may be rounded to 8-bit
integers.

Letters: O outputs, I inputs, B outputs in one block.
"""

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_int64

import torch
from torch import Tensor, nn

from cascadeexit.backends.cpu import build
from cascadeexit.backends.cpu.structures import Matrix
from cascadeexit.backends.memory import allocate

_MOST_OUTLIERS = 1 / 64         # a weight with a larger share of outliers stays in 16 bits


class Store:
    """Owns the memory of packed weights that C++ reads.

    The constructor only reserves memory. `matrix` and `matrix_in_8_bits` pack a weight into this memory, and reserve
    more if it is full. Keep the store as long as C++ may read its weights.

    Args:
        weights: the weights that will be packed, in bf16 (O, I), or as 8-bit integers from `rounded`. The constructor
            reads only their sizes, to reserve memory for all of them at once.
        in_12_bits: pack bf16 weights to 12 bits if possible.

    Attributes:
        bytes: size in bytes of all weights that `matrix` has packed so far, with their outliers but without biases.
    """

    def __init__(self, weights: Iterable[Tensor], *, in_12_bits: bool = False):
        lib = build.library()
        self._coded_bytes = lib.ce_coded_bytes if in_12_bits else lambda *shape: 0      # 0: the weight stays in 16 bits
        self._kept: list = []
        self._grow(sum(_whole_lines(w.nbytes if w.dtype == torch.int8
                                    else self._coded_bytes(*w.shape) or lib.ce_packed_bytes(*w.shape))
                       for w in weights))
        self.bytes = 0

    def _grow(self, size: int) -> None:
        self._kept.append(allocate(size))
        self._free = ctypes.addressof(ctypes.c_char.from_buffer(self._kept[-1]))
        self._end = self._free + size

    def _take(self, size: int) -> int:
        """Reserve `size` bytes and return their address."""
        if self._free + size > self._end:
            self._grow(_whole_lines(size))
        at = self._free
        self._free += _whole_lines(size)
        return at

    def matrix(self, *parts: Tensor, bias: Tensor | None = None) -> Matrix:
        """Pack a bf16 weight (O, I). Returns a `Matrix` with the addresses of the packed weight and the bias.

        With `in_12_bits`, the weight is packed to 12 bits without loss. It stays in 16 bits if the kernels do not
        support 12 bits here, or if more than 1 in 64 of its elements are outliers (not in the code book).

        Args:
            parts: one weight, or several weights of the same shape. Several weights become one matrix, in which blocks
                of their outputs alternate.
            bias: bias of the outputs (O,); None if there is none.
        """
        (outputs, inputs), lib, count = parts[0].shape, build.library(), len(parts)
        parts = [part.detach().contiguous() for part in parts]
        rows = outputs if count == 1 else count * -(-outputs // lib.ce_block()) * lib.ce_block()
        if self._coded_bytes(outputs, inputs) and (coded := self._coded(parts)):
            at, outliers = coded
            return Matrix(at, None, self.floats(bias), inputs, rows, ctypes.addressof(outliers))
        size = count * lib.ce_packed_bytes(outputs, inputs)
        at = self._take(size)
        self.bytes += size
        for i, part in enumerate(parts):
            lib.ce_pack(part.data_ptr(), outputs, inputs, at, i, count)
        return Matrix(at, None, self.floats(bias), inputs, rows)

    def _coded(self, parts: Sequence[Tensor]) -> tuple[int, ctypes.Array] | None:
        """Pack weights to 12 bits. Returns the address of the packed weights, and an array of the outliers.

        Outliers are weights that are not in the code book. Returns None if there are too many of them.
        """
        outputs, inputs = parts[0].shape
        size, most, found = self._coded_bytes(outputs, inputs), int(parts[0].numel() * len(parts) * _MOST_OUTLIERS), 0
        at, outliers = self._take(len(parts) * size), (c_int64 * most)()
        for i, part in enumerate(parts):
            found = build.library().ce_code(part.data_ptr(), outputs, inputs, at, outliers, most, found, i, len(parts))
            if found < 0:
                return None
        outliers = (c_int64 * (found + 1))(*outliers[:found])
        self._kept.append(outliers)
        self.bytes += len(parts) * size + 8 * found
        return at, outliers

    def matrix_in_8_bits(self, weight: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None) -> Matrix:
        """Store a weight of 8-bit integers. Returns a `Matrix` with the addresses of the weight, scale and bias.

        Args:
            weight, scale: results of `rounded`.
            outputs: number of outputs, without the zeros that fill up the last block.
            bias: bias of the outputs (O,); None if there is none.
        """
        at = self._take(weight.nbytes)
        ctypes.memmove(at, weight.data_ptr(), weight.nbytes)
        return Matrix(at, self.floats(scale), self.floats(bias), 2 * weight.shape[1], outputs)

    def floats(self, values: Tensor | None) -> int | None:
        """Store an fp32 copy of the values. Returns its address; None if `values` is None."""
        if values is None:
            return None
        self._kept.append(values.detach().float().contiguous().clone())
        return self._kept[-1].data_ptr()


def _whole_lines(size: int) -> int:
    """Round a size in bytes up to whole cache lines of 64 bytes."""
    return -(-size // 64) * 64


def scale_of(weight: Tensor) -> Tensor:
    """Compute the scale (O,) with which a weight (O, I) is rounded to 8-bit integers.

    The scale has one factor for each output. The rounded weight is an integer times this factor.
    """
    return weight.abs().amax(1).clamp(min=1e-30) / 127


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (O, I) to 8-bit integers, in the layout of the C++ kernels.

    The layout has blocks of B outputs, and the last block is filled up with zeros. A block is stored by pairs of
    inputs, so I must be even. Returns the integers (blocks, I / 2, 2 B) and the scale of each output (blocks * B,).
    """
    parts, scales, size = [], [], build.library().ce_block()
    for block in weight.detach().split(size):
        block = nn.functional.pad(block.float(), (0, 0, 0, size - len(block)))
        scales.append(scale_of(block))
        whole = (block / scales[-1][:, None]).round().to(torch.int8)
        # For each pair of inputs the first half of the outputs and the second alternate, byte by byte.
        parts.append(whole.view(2, size // 2, -1, 2).permute(2, 1, 3, 0).reshape(-1, 2 * size))
    return torch.stack(parts), torch.cat(scales)


def column_scale(weight: Tensor) -> Tensor:
    """Compute the power of 2 nearest to the root mean square of each column of a weight: (O, I) -> (I,).

    Each column is divided by its number before the weight is rounded. Otherwise rounding would lose small columns.
    """
    return weight.square().mean(0).clamp(min=1e-30).sqrt().log2().round().exp2()
