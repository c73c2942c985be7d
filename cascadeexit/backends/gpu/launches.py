"""Launches: how kernels are started and sized. Every kernel of this backend starts through `launch`.

So a test can list the launches of a pass, and count kernels and bytes without a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROWS = 16                       # rows of a tile, as in `kernels`
SPLIT, KEYS = 256, 64           # positions of a split of attention, and of a block in it
_FEW_PROGRAMS = 256             # up to so many programs of 16 outputs each; larger weights get larger blocks
_listeners: list[Callable[[str, tuple[int, ...], Sequence[Any], dict[str, Any]], None]] = []


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Start a kernel on a grid of programs.

    Args:
        args: tensors and numbers, in the order of the kernel's parameters.
        options: its compile-time parameters, `num_warps` and `num_stages`.
    """
    for listener in _listeners:
        listener(kernel.__name__, grid, args, options)
    if not any(arg.is_meta for arg in args if isinstance(arg, Tensor)):     # meta: only inform listeners
        kernel[grid](*args, enable_fp_fusion=True, **options)               # the default differs between versions


def tiles(rows: int) -> int:
    """Return the number of tiles that hold this many rows."""
    return -(-rows // ROWS)


def power_of_2(size: int) -> int:
    """Return the smallest power of 2 that is at least `size` and at least 16, the minimum tile size of `tl.dot`."""
    return max(16, 1 << (size - 1).bit_length())


def output_block(outputs: int) -> int:
    """Choose how many outputs one program computes: few enough that small weights still occupy the whole GPU."""
    return 16 if outputs <= 16 * _FEW_PROGRAMS else 32


def input_block(inputs: int, most: int) -> int:
    """Choose how many inputs one step of a product reads: a power of 2 from 16 to `most`."""
    return min(most, power_of_2(inputs))


def shrink(dtype: torch.dtype) -> float:
    """Return the factor that keeps products of unnormed rows and gains in range: fp16 overflows above 65504."""
    return 2.0 ** -6 if dtype == torch.float16 else 1.0


class Counts:
    """Row counts in device memory, made once: `counts(n)` is an int32 tensor (1,) that holds n."""

    def __init__(self, device: torch.device):
        self._device, self._made = device, {}

    def __call__(self, n: int) -> Tensor:
        if n not in self._made:
            self._made[n] = torch.tensor([n], dtype=torch.int32, device=self._device)
        return self._made[n]
