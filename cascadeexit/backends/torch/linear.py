"""Frozen linear layers for PyTorch, with weights in the layout that is fastest to read.

On a CPU, PyTorch gives row-major weights to oneDNN. If a pass has few rows, oneDNN reads such weights at only a
fraction of the memory bandwidth. Packing means that a weight is reordered once. The same oneDNN kernels read packed
weights 2 to 3 times as fast. Passes are padded to certain numbers of rows (see `layers.py`). A row's result is bitwise
the same with each of these numbers.
"""

import torch
from torch import Tensor, nn


def can_pack(weight: Tensor) -> bool:
    """Return True if oneDNN can pack this weight.

    The weight must be on a CPU. It must be in fp32, or in bf16 if oneDNN supports bf16 on this processor.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def frozen_linear(weight: Tensor, bias: Tensor | None = None, *, packed: bool = True) -> nn.Module:
    """Make a linear layer without gradients from this weight (O, I).

    packed: pack the weight if oneDNN can do this.
    """
    if packed and can_pack(weight):
        return PackedLinear(weight, bias)
    linear = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


class PackedLinear(nn.Module):
    """A linear layer with a packed weight W (O, I): x (..., I) -> x W^T + b (..., O). It has no gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.shape = tuple(weight.shape)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) in row-major layout. It is unpacked into a new tensor on each access."""
        return self._weight.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"out, in = {self.shape}"
