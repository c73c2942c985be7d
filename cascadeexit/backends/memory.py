"""Memory: huge pages for data that each token reads once (a CPU reads them a twelfth faster), and freed memory."""

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
# Private: shared memory, mmap's default, has huge pages only where the system gives them to files in memory, too.
_PRIVATE = dict(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if hasattr(mmap, "MAP_PRIVATE") else {}


def allocate(size: int) -> mmap.mmap:
    """Allocate bytes of zeros, in huge pages where the system has them. Freed with the last reference."""
    space = mmap.mmap(-1, max(size, 1), **_PRIVATE)
    if _HUGE_PAGES is not None:
        try:
            space.madvise(_HUGE_PAGES)
        except OSError:                                 # a kernel without them
            log.debug("no huge pages here")
    return space


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Make a tensor of zeros, in huge pages where the device is the CPU."""
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or not count:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(allocate(count * dtype.itemsize), dtype=dtype, count=count).view(*shape)


def give_back() -> None:
    """Return freed memory: to the system, where the C library has a function for it (glibc), and to the CUDA device."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
