"""Machine: measures time, memory and read bandwidth of the machine itself."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from cascadeexit.backends import memory


def now(device: torch.device) -> float:
    """Wait until the device has finished its work, then return the time of a clock in seconds.

    Only the difference between two such times has a meaning.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe(device: torch.device) -> str:
    """Return one line about a device, for visitors: the name of the GPU, or 'CPU' and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def read_bandwidth(device: torch.device, megabytes: int = 1024) -> float:
    """Measure how fast a device reads memory, in bytes per second.

    The device sums a large tensor several times, and the fastest time counts.

    megabytes: size of the tensor.
    """
    data = memory.zeros((megabytes * 2**18,), torch.float32, device).fill_(1)
    return data.nbytes / min([seconds_of(data.sum, device) for _ in range(6)][1:])


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Measure how long a device takes for some work, in seconds.

    On a GPU, CUDA events measure it, so the time to start the work does not count.
    """
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
    """Return the main memory that this process holds, in bytes; None if the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else None
