"""Recorded: a function of tensors that a CUDA device runs from a recording, a CUDA graph.

A token takes hundreds of small kernels, and Python starts them more slowly than a GPU finishes them. Recorded once for
each shape of its inputs, a function is started by one call. Recorded kernels read and write the same memory each time,
so inputs are copied to their places first and the result is copied away.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cascadeexit.backends.memory import no_collection

log = logging.getLogger(__name__)


def wanted(device: torch.device) -> bool:
    """True where recordings pay: on CUDA, unless CASCADEEXIT_GRAPHS=0."""
    return device.type == "cuda" and os.environ.get("CASCADEEXIT_GRAPHS") != "0"


class Recorded:
    """Calls a function, from a recording where the inputs (..., N, D) have at most `rows` rows.

    The function must do the same work for every input of a shape: no Python decision may depend on a tensor's values.
    It runs a few times when it is recorded. A function that cannot be recorded is called as it is from then on.
    """

    def __init__(self, function: Callable[..., Tensor], rows: int):
        self._function, self._rows = function, rows
        self._recordings: dict[tuple, tuple[list[Tensor], Callable[[], None], Tensor]] = {}
        self._turn = threading.Lock()           # runs in other threads use the same places

    def __call__(self, *inputs: Tensor) -> Tensor:
        if inputs[0].shape[-2] > self._rows:
            return self._function(*inputs)
        with self._turn, torch.inference_mode():         # its places may be written from outside of it
            key = tuple((t.shape, t.dtype) for t in inputs)
            if key not in self._recordings:
                places = [t.clone() for t in inputs]
                try:
                    self._recordings[key] = (places, *record(self._function, places))
                except RuntimeError as error:
                    log.warning("A CUDA graph could not be recorded, so its kernels start one by one: %s", error)
                    self._rows = -1
                    return self._function(*inputs)
            places, replay, out = self._recordings[key]
            for place, given in zip(places, inputs):
                place.copy_(given)
            replay()
            return out.clone()


_RECORDING = threading.Lock()           # CUDA records one graph at a time


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's graphs are recorded: one, since libraries keep a workspace for each."""
    return torch.cuda.Stream(device)


def record(function: Callable[..., Tensor], places: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a CUDA graph of function(*places). Returns what replays it, and where its result then is."""
    device = places[0].device
    with _RECORDING, torch.cuda.device(device):
        now, side, graph = torch.cuda.current_stream(), _side_stream(device), torch.cuda.CUDAGraph()
        side.wait_stream(now)
        with torch.cuda.stream(side):                   # leaves this stream even where recording fails
            for _ in range(3):                          # first calls allocate workspaces and pick kernels
                function(*places)
            # thread_local: other threads may go on working
            with no_collection(), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                out = function(*places)
        now.wait_stream(side)
    return graph.replay, out
