"""The `torch` backend: runs a model in PyTorch, on every device. Tests compare the other backends with it."""

from collections.abc import Callable

import torch
from torch import Tensor

from cascadeexit.backends.torch.exits import TorchExits
from cascadeexit.backends.torch.heads import TorchHead
from cascadeexit.backends.torch.layers import TorchLayers, UnpreparedLayers
from cascadeexit.backends.weights import outer_weights
from cascadeexit.exits.bank import ExitBank


class TorchBackend:
    """Runs a model with PyTorch's own kernels. On CUDA, these kernels are recorded as CUDA graphs.

    `base.Backend` describes the methods.
    """

    name = "torch"
    layers_type = TorchLayers

    def __init__(self, base, bounds: tuple[int, ...]):
        self.layers = self.layers_type(base, bounds)
        self._recorded = bool(self.layers.recorded_rows)
        weights = outer_weights(base)
        self.head = TorchHead(weights.head, weights.head_bias, row_multiple=self.layers.row_multiple,
                              recorded_rows=self.layers.recorded_rows, packed=self.layers.prepared)
        self._device = weights.device

    @classmethod
    def build(cls) -> None:
        """Do nothing: PyTorch comes with its kernels."""

    @classmethod
    def fits(cls, base) -> bool:
        return True

    def vocab_head(self, weight: Tensor, *, rounded: bool = False) -> TorchHead:
        return TorchHead(weight, recorded_rows=int(self._recorded))

    def exits(self, bank: ExitBank) -> TorchExits:
        return TorchExits(bank, self, recorded=self._recorded)

    def without_gradients(self, function: Callable) -> Callable:
        return torch.inference_mode()(function)

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class TorchReference(TorchBackend):
    """A `torch` backend that runs only a few passes, to check another backend.

    It neither packs weights nor records kernels, so that it is ready at once. It shares the weights of the caller's
    model.
    """

    layers_type = UnpreparedLayers
