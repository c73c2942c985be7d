"""Recorded: runs a function of tensors on a CUDA device as a CUDA graph, which is called a recording here.

A token needs hundreds of small kernels. Python starts them more slowly than a GPU finishes them. A recording is started
with one call. Its kernels always use the same memory. So each input is first copied to a fixed tensor, and the result
is copied out. There is one recording for each combination of input shapes and dtypes.
"""

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cascadeexit.backends.graphs import capture

log = logging.getLogger(__name__)


class Recorded:
    """Calls a function of tensors. If the first input (..., N, D) has N <= `rows`, the call uses a recording.

    The function must do the same work for every input of the same shape: no Python decision may depend on a tensor's
    values. To record it, `Recorded` calls the function a few times. If recording fails, the current call runs without a
    recording. If the reason was a lack of memory, the next call tries again. After any other failure, no call uses a
    recording.
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
    """Record the call function(*places) as a CUDA graph.

    Returns a function that replays the graph, and the tensor into which each replay writes the result.

    places: input tensors. Write new inputs into them before a replay.

    Raises RuntimeError if the call cannot be recorded.
    """
    with torch.cuda.device(places[0].device):
        return capture(lambda: function(*places), warm_ups=3)
