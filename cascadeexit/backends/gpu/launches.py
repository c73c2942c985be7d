"""Launches: starts kernels and chooses their block sizes.

Every kernel of this backend starts through `launch`. So a test can list the launches of a pass, and count their bytes,
without a GPU.
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
    """Start a Triton kernel on a grid of programs.

    Args:
        grid: number of programs in each dimension.
        args: tensors and numbers, in the order of the kernel's parameters.
        options: the kernel's compile-time parameters by name, and Triton's `num_warps` and `num_stages`.
    """
    for listener in _listeners:
        listener(kernel.__name__, grid, args, options)
    if not any(arg.is_meta for arg in args if isinstance(arg, Tensor)):     # meta: only inform listeners
        kernel[grid](*args, enable_fp_fusion=True, **options)               # the default differs between versions


def tiles(rows: int) -> int:
    """Return how many tiles of 16 rows are needed for this many rows."""
    return -(-rows // ROWS)


def power_of_2(size: int) -> int:
    """Return the smallest power of 2 that is at least `size` and at least 16, the smallest tile size of `tl.dot`."""
    return max(16, 1 << (size - 1).bit_length())


def output_block(outputs: int) -> int:
    """Return how many outputs one program computes: 16 if there are at most 4096 outputs, else 32.

    With blocks of 16, a small weight still gives enough programs to occupy the whole GPU.
    """
    return 16 if outputs <= 16 * _FEW_PROGRAMS else 32


def input_block(inputs: int, most: int) -> int:
    """Return how many inputs one step of a product reads: `power_of_2(inputs)`, but at most `most`."""
    return min(most, power_of_2(inputs))


def shrink(dtype: torch.dtype) -> float:
    """Return the factor by which kernels multiply rows that are not normalized yet: 2^-6 for fp16, else 1.

    Without this factor, products of these rows and the norm's weight could exceed 65504, the largest fp16 number.
    """
    return 2.0 ** -6 if dtype == torch.float16 else 1.0


class Counts:
    """Row counts as tensors in device memory. `counts(n)` returns an int32 tensor (1,) that holds n.

    The tensor of each n is made once and then reused.
    """

    def __init__(self, device: torch.device):
        self._device, self._made = device, {}

    def __call__(self, n: int) -> Tensor:
        if n not in self._made:
            self._made[n] = torch.tensor([n], dtype=torch.int32, device=self._device)
        return self._made[n]
