"""States: hidden states in bf16 between our own kernels, without a tensor.

A pass sweeps the processor's caches, and the first tensor operations after it take 50 to 200 us each: 0.4 ms of a pass
of 14. So where our own kernels run, the engine's states are these.
"""

import ctypes
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class States:
    """Hidden rows (..., D) in bf16 that C reads and writes; a part of them shares their memory."""

    __slots__ = "shape", "_room", "_at"

    def __init__(self, shape: tuple[int, ...], room: ctypes.Array | None = None, at: int = 0):
        """Room for rows of this shape, or rows that lie in another's room from byte `at` on."""
        self.shape, self._at = shape, at
        self._room = (ctypes.c_char * (2 * prod(shape)))() if room is None else room

    def data_ptr(self) -> int:
        return ctypes.addressof(self._room) + self._at

    def part(self, first: int, shape: tuple[int, ...]) -> "States":
        """Rows of this shape from row `first` on."""
        return States(shape, self._room, self._at + 2 * first * self.shape[-1])

    def __getitem__(self, at: tuple[slice, int | slice]) -> "States":
        """Of (1, N, D) what [:, i] or [:, a:b] of a tensor is: (1, D) or (1, n, D). Without steps."""
        _, n, d = self.shape
        chosen = range(n)[at[1]]
        return self.part(chosen, (1, d)) if isinstance(chosen, int) else self.part(chosen.start, (1, len(chosen), d))

    def tensor(self) -> Tensor:
        """The same as a tensor, on the same memory."""
        count = prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=torch.bfloat16)
        return torch.frombuffer(self._room, dtype=torch.bfloat16, count=count, offset=self._at).view(self.shape)


Hidden = Tensor | States        # rows of the engine: whatever goes into a pass, the same kind comes out of it


def tensor_of(rows: Hidden) -> Tensor:
    return rows.tensor() if isinstance(rows, States) else rows


def like(rows: Hidden) -> Hidden:
    """Room for as many rows of the same kind."""
    return States(rows.shape) if isinstance(rows, States) else torch.empty_like(rows)


def joined(parts: Sequence[Hidden]) -> Hidden:
    """Rows (1, N, D) one after another, all of one kind: (1, sum of N, D)."""
    if not isinstance(parts[0], States):
        return torch.cat(list(parts), dim=1)
    out, at = States((1, sum(part.shape[1] for part in parts), parts[0].shape[2])), 0
    for part in parts:
        ctypes.memmove(out.data_ptr() + at, part.data_ptr(), 2 * prod(part.shape))
        at += 2 * prod(part.shape)
    return out
