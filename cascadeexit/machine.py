"""Measurements of the machine itself: time, memory and read bandwidth."""

import time
from pathlib import Path

import torch

from cascadeexit.backends import memory


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its work."""
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
    """Measure how many bytes a second a sum over a large tensor reads: the best of five runs."""
    data, times = memory.zeros((megabytes * 2**18,), torch.float32, device).fill_(1), []
    for _ in range(6):
        start = now(device)
        data.sum()
        times.append(now(device) - start)
    return data.nbytes / min(times[1:])


def resident_bytes() -> int | None:
    """Return how much main memory this process holds, in bytes; None where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else None
