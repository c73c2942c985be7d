"""States: bf16 hidden states in memory that C++ kernels read and write, without torch tensors.

A pass displaces everything else from the processor's caches. The first few tensor operations after a pass then take 50
to 200 us each. Together they would add 0.4 ms to a pass of 14 ms. So the engine passes `States` from kernel to kernel.
"""

import ctypes
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class States:
    """Rows of bf16 hidden states (..., D) that C++ reads and writes. `part` selects rows without copying them."""

    __slots__ = "shape", "_memory", "_offset"

    def __init__(self, shape: tuple[int, ...], memory: ctypes.Array | None = None, offset: int = 0):
        """Make rows of this shape in new memory, or in `memory`, if given, from byte number `offset` on."""
        self.shape, self._offset = shape, offset
        self._memory = (ctypes.c_char * (2 * prod(shape)))() if memory is None else memory

    def data_ptr(self) -> int:
        """Return the memory address of the first number of the rows."""
        return ctypes.addressof(self._memory) + self._offset

    def part(self, first: int, shape: tuple[int, ...]) -> "States":
        """Return some of the rows, from row number `first` on, without a copy.

        shape: shape of the returned rows (..., D).
        """
        return States(shape, self._memory, self._offset + 2 * first * self.shape[-1])

    def __getitem__(self, at: tuple[slice, int | slice]) -> "States":
        """Select rows: `states[:, i]` gives (1, D), and `states[:, a:b]` gives (1, n, D).

        The selected rows are not copied. Slices with a step are not supported.
        """
        _, n, d = self.shape
        chosen = range(n)[at[1]]
        return self.part(chosen, (1, d)) if isinstance(chosen, int) else self.part(chosen.start, (1, len(chosen), d))

    def tensor(self) -> Tensor:
        """Return a bf16 tensor of the same shape that shares the memory of the rows."""
        count = prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=torch.bfloat16)
        return torch.frombuffer(self._memory, dtype=torch.bfloat16, count=count, offset=self._offset).view(self.shape)


Hidden = Tensor | States        # rows of the engine are `States`, those of training are tensors


def tensor_of(rows: Hidden) -> Tensor:
    """Return rows as a tensor. A tensor made from `States` shares their memory. A tensor is returned unchanged."""
    return rows.tensor() if isinstance(rows, States) else rows


def like(rows: Hidden) -> Hidden:
    """Allocate new rows with the shape and the type (`States` or tensor) of `rows`. Their values are arbitrary."""
    return States(rows.shape) if isinstance(rows, States) else torch.empty_like(rows)


def in_bf16(rows: Hidden) -> Hidden:
    """Return rows as C++ needs them: in bf16 and contiguous. Rows that are already in this form are not copied."""
    if isinstance(rows, States) or (rows.dtype == torch.bfloat16 and rows.is_contiguous()):
        return rows
    return rows.to(torch.bfloat16).contiguous()


def joined(parts: Sequence[States]) -> States:
    """Concatenate pieces of rows, (1, n, D) each, in new memory. Returns (1, N, D), where N is the sum of all n."""
    out, at = States((1, sum(part.shape[1] for part in parts), parts[0].shape[2])), 0
    for part in parts:
        ctypes.memmove(out.data_ptr() + at, part.data_ptr(), 2 * prod(part.shape))
        at += 2 * prod(part.shape)
    return out
