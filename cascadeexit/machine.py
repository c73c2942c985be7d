"""Measurements of the machine itself: time, memory and read bandwidth."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from cascadeexit.backends import memory


def now(device: torch.device) -> float:
    """Wait until the device has finished its work, then return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe(device: torch.device) -> str:
    """Name the machine on which a model runs, in one line for a visitor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def read_bandwidth(device: torch.device, megabytes: int = 1024) -> float:
    """Measure the read bandwidth in bytes per second, by a sum over a large tensor: the best of five runs."""
    data = memory.zeros((megabytes * 2**18,), torch.float32, device).fill_(1)
    return data.nbytes / min([seconds_of(data.sum, device) for _ in range(6)][1:])


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Measure how long a device takes for some work: by CUDA events on a GPU, without the time to start it."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3


def resident_bytes() -> int | None:
    """Return how much main memory this process holds, in bytes; None if the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else None
