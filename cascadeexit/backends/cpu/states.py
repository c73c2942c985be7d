"""States: bf16 hidden rows that go from one C++ kernel to the next without a torch tensor.

A pass sweeps the processor's caches. The first tensor operations after it take 50 to 200 us each, which adds 0.4 ms to
a pass of 14 ms. So the engine passes rows between kernels as `States`.
"""

import ctypes
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class States:
    """Hidden rows (..., D) in bf16, which C++ reads and writes. A part or an index shares their memory."""

    __slots__ = "shape", "_memory", "_offset"

    def __init__(self, shape: tuple[int, ...], memory: ctypes.Array | None = None, offset: int = 0):
        """Make rows of this shape in new memory, or over `memory` from byte `offset` on."""
        self.shape, self._offset = shape, offset
        self._memory = (ctypes.c_char * (2 * prod(shape)))() if memory is None else memory

    def data_ptr(self) -> int:
        """Return the address of the first number."""
        return ctypes.addressof(self._memory) + self._offset

    def part(self, first: int, shape: tuple[int, ...]) -> "States":
        """Return rows of this shape from row `first` on, in the same memory."""
        return States(shape, self._memory, self._offset + 2 * first * self.shape[-1])

    def __getitem__(self, at: tuple[slice, int | slice]) -> "States":
        """Select rows: `states[:, i]` gives (1, D), `states[:, a:b]` gives (1, n, D). No copy and no steps."""
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
    """Allocate rows of the same shape and kind, with any values."""
    return States(rows.shape) if isinstance(rows, States) else torch.empty_like(rows)


def in_bf16(rows: Hidden) -> Hidden:
    """Make rows bf16 and contiguous, as C++ needs them. Rows that already are so are returned as they are."""
    if isinstance(rows, States) or (rows.dtype == torch.bfloat16 and rows.is_contiguous()):
        return rows
    return rows.to(torch.bfloat16).contiguous()


def joined(parts: Sequence[States]) -> States:
    """Concatenate parts (1, n, D) to rows (1, N, D)."""
    out, at = States((1, sum(part.shape[1] for part in parts), parts[0].shape[2])), 0
    for part in parts:
        ctypes.memmove(out.data_ptr() + at, part.data_ptr(), 2 * prod(part.shape))
        at += 2 * prod(part.shape)
    return out
