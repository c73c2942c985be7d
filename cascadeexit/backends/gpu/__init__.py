"""The `gpu` backend: our Triton kernels for bf16 and fp16 models on CUDA.

PyTorch's CUDA builds bring Triton with them. Triton is imported only when a `GpuBackend` is made, so this module also
works on machines without Triton. A model that does not fit this backend runs on another one.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from cascadeexit.backends.weights import PLAIN, DecoderShape, is_spread, layer_weights, outer_weights

_OLDEST = (8, 0)                # compute capability from which tensor cores multiply bf16
_WIDEST_HEAD = 128


class GpuBackend:
    """Runs a model with Triton kernels, which multiply rows in tiles of a fixed size.

    `base.Backend` describes the methods.
    """

    name = "gpu"

    def __init__(self, base, bounds: tuple[int, ...]):
        from cascadeexit.backends.gpu.heads import GpuHead
        from cascadeexit.backends.gpu.layers import GpuLayers
        self.layers = GpuLayers(base, bounds)
        weights = outer_weights(base)
        self.head = GpuHead(weights.head, weights.head_bias, counts=self.layers.counts, owned=False)
        self.head.in_top = self.layers.record_top(self.head.launch)
        self._device = weights.device

    @classmethod
    def build(cls) -> None:
        """Do nothing. Triton compiles each kernel at its first use, and keeps the compiled kernel on disk."""

    @classmethod
    def fits(cls, base) -> bool:
        return not cls.why_not(base)

    @classmethod
    def why_not(cls, base) -> str:
        """Return the reason why this backend cannot run a model; "" if it can.

        The backend needs Triton, and a model on the current NVIDIA GPU. The GPU's compute capability must be at least
        8.0. `fits_shape` must be True for the model. A model that accelerate has spread over devices is refused,
        because accelerate moves the model's weights for each call. On ZeroGPU every model is refused: the process that
        loads the model has no GPU on which CUDA graphs could be recorded.
        """
        device = outer_weights(base).device
        if os.environ.get("SPACES_ZERO_GPU"):
            return "on ZeroGPU, the process that loads the model has no GPU to record passes on"
        if device.type != "cuda" or torch.version.cuda is None:
            return f"the model is on {device}, and these kernels are for NVIDIA GPUs"
        if device.index not in (None, torch.cuda.current_device()):         # Triton launches on the current device
            return f"the model is on {device}, and the current device is {torch.cuda.current_device()}"
        if torch.cuda.get_device_capability(device) < _OLDEST:
            return "the GPU's compute capability is below 8.0"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        return "" if fits_shape(base) else "the kernels do not support the model's type, dtype, sizes or device map"

    def vocab_head(self, weight: Tensor, *, rounded: bool = False):
        from cascadeexit.backends.gpu.heads import GpuHead
        return GpuHead(weight, counts=self.layers.counts)

    def exits(self, bank):
        from cascadeexit.backends.gpu.exits import GpuExits
        return GpuExits(bank, self)

    def without_gradients(self, function: Callable) -> Callable:
        return torch.inference_mode()(function)

    def synchronize(self) -> None:
        self.layers.settle()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def fits_shape(base) -> bool:
    """Return True if the kernels support the type, the dtype and the sizes of a transformers model.

    The model may be on any device, but a model that accelerate has spread over several devices is not supported.
    """
    if base.config.model_type not in PLAIN or is_spread(base):
        return False
    dtype, shape, layers = outer_weights(base).dtype, DecoderShape.of(base.config), layer_weights(base)
    return (dtype in (torch.bfloat16, torch.float16) and shape.head_dim % 2 == 0 and shape.head_dim <= _WIDEST_HEAD
            and shape.heads % shape.kv_heads == 0
            and all(layer.plain_mlp and {w.dtype for w in (layer.q, layer.gate)} == {dtype} for layer in layers))
