"""Recorded: runs a function of tensors on a CUDA device from a recording, which is a CUDA graph.

A token needs hundreds of small kernels, and Python starts them more slowly than a GPU finishes them. One call starts a
whole recording. Recorded kernels always use the same memory, so each input is first copied to a fixed place, and the
result is copied out. There is one recording for each shape of the inputs.
"""

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cascadeexit.backends.graphs import capture

log = logging.getLogger(__name__)


class Recorded:
    """Calls a function. It uses a recording if the inputs (..., N, D) have at most `rows` rows.

    The function must do the same work for every input of a shape: no Python decision may depend on a tensor's values.
    It runs a few times when it is recorded. A function that cannot be recorded is called as it is from then on. Where
    only the memory for a recording is missing, the next call tries again.
    """

    def __init__(self, function: Callable[..., Tensor], rows: int):
        self._function, self._rows = function, rows
        self._recordings: dict[tuple, tuple[list[Tensor], Callable[[], None], Tensor]] = {}
        self._turn = threading.Lock()           # runs in other threads use the same places

    def __call__(self, *inputs: Tensor) -> Tensor:
        if inputs[0].shape[-2] > self._rows:
            return self._function(*inputs)
        with self._turn, torch.inference_mode():         # places are inference tensors
            key = tuple((t.shape, t.dtype) for t in inputs)
            if key not in self._recordings:
                places = [t.clone() for t in inputs]
                try:
                    self._recordings[key] = (places, *record(self._function, places))
                except torch.OutOfMemoryError:
                    return self._function(*inputs)
                except RuntimeError as error:
                    log.warning("A CUDA graph could not be recorded, so its kernels start one by one: %s", error)
                    self._rows = -1
                    return self._function(*inputs)
            places, replay, out = self._recordings[key]
            for place, given in zip(places, inputs):
                place.copy_(given)
            replay()
            return out.clone()


def record(function: Callable[..., Tensor], places: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a CUDA graph of function(*places). Returns a function that replays it, and the tensor of its result."""
    with torch.cuda.device(places[0].device):
        return capture(lambda: function(*places), warm_ups=3)
