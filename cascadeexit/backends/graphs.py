"""CUDA graphs: record work once, then replay it with one call. The backends `torch` and `gpu` use this."""

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
    """Return True if work should be recorded: on CUDA, unless the environment sets CASCADEEXIT_GRAPHS=0."""
    return device.type == "cuda" and os.environ.get("CASCADEEXIT_GRAPHS") != "0"


def capture(work: Callable[[], Any], pool: Any = None, warm_ups: int = 1) -> tuple[Callable[[], None], Any]:
    """Record the kernel launches of `work` on the current device.

    Returns a function that replays them, and the result of `work`, which every replay overwrites.

    Args:
        pool: memory pool of the graph; None for a new one.
        warm_ups: number of calls before the recording, which allocate workspaces and choose or compile kernels.
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
    """Return the stream on which all graphs of a device are recorded.

    One stream is enough, and libraries keep a workspace for each stream.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection inside the `with` block.

    Otherwise it might release a KV cache, and the kernels that clear this cache would become part of the graph.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
