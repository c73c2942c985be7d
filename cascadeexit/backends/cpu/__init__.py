"""The `cpu` backend: our C++ kernels for bf16 models on a CPU.

In passes of few rows, PyTorch's matrix kernels use only a quarter of the memory bandwidth, and starting them takes as
long as running them. One call of our kernels runs rows through whole segments, and uses most of the memory bandwidth.
This machine's C++ compiler builds the kernels once, in seconds. Models in fp32 run on the `torch` backend. On a machine
without a compiler, all models run on the `torch` backend.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cascadeexit.backends.cpu import build
from cascadeexit.backends.cpu.exits import CpuExits
from cascadeexit.backends.cpu.heads import CpuHead
from cascadeexit.backends.cpu.layers import CpuLayers
from cascadeexit.backends.weights import DecoderShape, is_spread, layer_weights, outer_weights
from cascadeexit.exits.bank import ExitBank


class CpuBackend:
    """Runs a model with C++ kernels, which compute each row by itself and add numbers in a fixed order.

    `base.Backend` describes the methods.
    """

    name = "cpu"
    families = ("llama", "mistral", "qwen2", "qwen3")       # model types that tests/test_kernels.py compares

    def __init__(self, base, bounds: tuple[int, ...]):
        weights = outer_weights(base)
        self.head = CpuHead(weights.head, weights.head_bias)
        self.layers = CpuLayers(base, bounds, self.head)

    @classmethod
    def build(cls) -> None:
        """Compile the kernels if this machine has not compiled them before. Compiling takes seconds."""
        build.library()

    @classmethod
    def fits(cls, base) -> bool:
        return not cls.why_not(base)

    @classmethod
    def why_not(cls, base) -> str:
        """Return the reason why this backend cannot run a model; "" if it can.

        The backend needs the compiled kernels and a bf16 model on a CPU. The model's type must be in `families`, its
        head size a multiple of 16, its MLP a SwiGLU without biases, and its hidden and inner sizes even. A model that
        accelerate has spread over devices is refused, because accelerate moves the model's weights for each call.
        """
        weights = outer_weights(base)
        if weights.device.type != "cpu":
            return f"the model is on {weights.device}, and these kernels are for CPUs"
        if weights.dtype != torch.bfloat16:
            return f"the model is in {str(weights.dtype).removeprefix('torch.')}, and these kernels need bfloat16"
        if not cls._knows(base):
            return "the kernels do not support the model's type, its sizes or its device map"
        return build.why_not() if build.library() is None else ""

    @classmethod
    def _knows(cls, base) -> bool:
        if base.config.model_type not in cls.families or is_spread(base):
            return False
        shape, layer = DecoderShape.of(base.config), layer_weights(base)[0]
        return (layer.plain_mlp and layer.gate.dtype == torch.bfloat16
                and shape.head_dim % 16 == 0 and shape.hidden % 2 == 0 and shape.inner % 2 == 0)

    @classmethod
    def facts(cls) -> dict[str, str]:
        """Describe the kernels on this machine; see `build.facts`. Returns {fact: value}."""
        return build.facts()

    def vocab_head(self, weight: Tensor, *, rounded: bool = False) -> CpuHead:
        return CpuHead(weight, eight_bits=rounded)

    def exits(self, bank: ExitBank) -> CpuExits:
        return CpuExits(bank, self)

    def without_gradients(self, function: Callable) -> Callable:
        return function         # kernels record no gradients, and inference mode costs 50 us a token

    def synchronize(self) -> None:
        """Do nothing. Every call of a kernel returns only when its work is done."""
