"""Frozen linear layers in the weight layout that reads fastest where they run.

In bf16 on a CPU our own kernels are the fastest. Where they cannot be had, or in fp32: the stock path hands oneDNN
plain row-major weights and reads them at a fraction of the memory bandwidth when a pass has few rows. Reordered once,
the same kernels read the same weights 2 to 3 times as fast, with bitwise the same results for every row bucket.
"""

import torch
from torch import Tensor, nn

from cascadeexit import kernels


def can_pack(weight: Tensor) -> bool:
    """True where packed kernels exist for this weight: on a CPU, fp32, or bf16 with hardware support."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor, bias: Tensor | None = None, *, eight_bits: bool = False) -> nn.Module:
    """A frozen linear layer with this weight (O, I), packed where that is possible; our own kernels answer in fp32.

    eight_bits: where our own kernels run, its weights may be rounded to 8 bits.
    """
    if kernels.usable(weight):
        return kernels.NativeLinear(weight, bias, eight_bits=eight_bits)
    return pack_stock(weight, bias)


def pack_stock(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """The same with torch's kernels, which keep the dtype: for layers that transformers' code calls."""
    if can_pack(weight):
        return PackedLinear(weight, bias)
    linear = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


class PackedLinear(nn.Module):
    """x (..., I) -> x W^T + b (..., O). Inference only: no gradient passes through."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.shape = tuple(weight.shape)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"out, in = {self.shape}"
