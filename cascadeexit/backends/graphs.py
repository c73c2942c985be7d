"""CUDA graphs: record GPU work once, then replay it with one call. The backends `torch` and `gpu` use this module."""

import contextlib
import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_RECORDING = threading.Lock()           # CUDA records one graph at a time


def wanted(device: torch.device) -> bool:
    """Return True if work on this device should be recorded as CUDA graphs.

    This is the case on CUDA, unless the environment variable CASCADEEXIT_GRAPHS is 0.
    """
    return device.type == "cuda" and os.environ.get("CASCADEEXIT_GRAPHS") != "0"


def capture(work: Callable[[], Any], pool: Any = None, warm_ups: int = 1) -> tuple[Callable[[], None], Any]:
    """Call `work` on the current CUDA device, and record the kernels that it launches as a CUDA graph.

    Returns a function and a result. The function launches the recorded kernels again. The result is what `work`
    returned while it was recorded. Each replay overwrites the tensors in this result.

    Args:
        pool: memory pool of the graph; None for a new pool.
        warm_ups: number of calls of `work` before the recording. These calls allocate workspaces, and choose or compile
            kernels.

    Raises RuntimeError if the kernels cannot be recorded.
    """
    with _RECORDING:
        now, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(now)
        with torch.cuda.stream(side):                   # leaves this stream even where recording fails
            for _ in range(warm_ups):
                work()
            # thread_local: other threads may go on working
            with _no_collection(), torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                out = work()
        now.wait_stream(side)
    return graph.replay, out


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the CUDA stream on which all graphs of this device are recorded.

    All graphs use the same stream, because libraries keep a workspace for each stream.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable Python's garbage collection inside the `with` block.

    During a recording, garbage collection could release a KV cache. The kernels that fill this cache with zeros would
    then become part of the graph.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
