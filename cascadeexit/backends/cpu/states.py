"""States: hidden rows in bf16 between C++ kernels, without a tensor.

A pass sweeps the processor's caches, and the first tensor operations after it take 50 to 200 us each: 0.4 ms of a pass
of 14 ms. So the rows that the engine hands from kernel to kernel are these.
"""

import ctypes
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class States:
    """Hidden rows (..., D) in bf16 that C++ reads and writes; a part of them shares their memory."""

    __slots__ = "shape", "_memory", "_offset"

    def __init__(self, shape: tuple[int, ...], memory: ctypes.Array | None = None, offset: int = 0):
        """Make rows of this shape in new memory, or over `memory` from byte `offset` on."""
        self.shape, self._offset = shape, offset
        self._memory = (ctypes.c_char * (2 * prod(shape)))() if memory is None else memory

    def data_ptr(self) -> int:
        """Address of the first number."""
        return ctypes.addressof(self._memory) + self._offset

    def part(self, first: int, shape: tuple[int, ...]) -> "States":
        """Rows of this shape from row `first` on, in the same memory."""
        return States(shape, self._memory, self._offset + 2 * first * self.shape[-1])

    def __getitem__(self, at: tuple[slice, int | slice]) -> "States":
        """Select rows: `states[:, i]` gives (1, D), `states[:, a:b]` gives (1, n, D). No copy, no steps."""
        _, n, d = self.shape
        chosen = range(n)[at[1]]
        return self.part(chosen, (1, d)) if isinstance(chosen, int) else self.part(chosen.start, (1, len(chosen), d))

    def tensor(self) -> Tensor:
        """View the rows as a tensor of the same shape and memory."""
        count = prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=torch.bfloat16)
        return torch.frombuffer(self._memory, dtype=torch.bfloat16, count=count, offset=self._offset).view(self.shape)


Hidden = Tensor | States        # rows of the engine are `States`, those of training are tensors


def tensor_of(rows: Hidden) -> Tensor:
    """View rows of either kind as a tensor."""
    return rows.tensor() if isinstance(rows, States) else rows


def like(rows: Hidden) -> Hidden:
    """Make room for as many rows of the same kind."""
    return States(rows.shape) if isinstance(rows, States) else torch.empty_like(rows)


def in_bf16(rows: Hidden) -> Hidden:
    """Make rows bf16 and contiguous, as C++ reads them. They are copied only if they are not yet."""
    if isinstance(rows, States) or (rows.dtype == torch.bfloat16 and rows.is_contiguous()):
        return rows
    return rows.to(torch.bfloat16).contiguous()


def joined(parts: Sequence[States]) -> States:
    """Concatenate rows (1, n, D): (1, N, D)."""
    out, at = States((1, sum(part.shape[1] for part in parts), parts[0].shape[2])), 0
    for part in parts:
        ctypes.memmove(out.data_ptr() + at, part.data_ptr(), 2 * prod(part.shape))
        at += 2 * prod(part.shape)
    return out
