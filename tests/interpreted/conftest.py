"""Triton's interpreter, repaired: kernels run on CPU tensors here, in numpy.

TRITON_INTERPRET is read when a kernel is defined, so these tests need a process of their own, which
tests/test_gpu_kernels.py starts. By hand: TRITON_INTERPRET=1 pytest tests/interpreted

Two operations of the interpreter (triton 3.9) are replaced:
- `tl.dot` is a matrix product of numpy, whose BLAS rounds a row differently by its place among the others, and which
  reads bf16 as whole numbers. Ours adds the products of each element one by one, in ascending order of K.
- Conversions from fp32 to bf16 cut digits off. Ours rounds to the nearest, ties to even, as a GPU does.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*"]

if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    _cast, _load = InterpreterBuilder.cast_impl, InterpreterBuilder.create_masked_load

    def widened(handle) -> np.ndarray:
        """Numbers of a bf16 or fp16 tensor in fp32."""
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right, total = widened(a), widened(b), d.data.astype(np.float32)
        for k in range(left.shape[1]):
            total = total + left[:, k:k + 1] * right[k]
        return TensorHandle(total, d.dtype.scalar)

    def cast(self, src, dst_type):
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(src), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            numbers = torch.from_numpy(np.array(src.data, np.float32)).to(torch.bfloat16).view(torch.int16).numpy()
            return TensorHandle(numbers.view(np.uint16), tl.bfloat16)
        return _cast(self, src, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast

    @pytest.fixture
    def read(monkeypatch):
        """Addresses of the 2-byte words that kernels load, each once: a function empties and counts them, in bytes."""
        seen: list[np.ndarray] = []

        def load(self, ptrs, mask, other, *rest):
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            at = np.unique(ptrs.data[mask.data.astype(bool)])
            seen.append(np.concatenate([at + 2 * i for i in range(max(1, size // 2))]))
            return _load(self, ptrs, mask, other, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)

        def count() -> int:
            addresses = np.unique(np.concatenate(seen)) if seen else []
            seen.clear()
            return 2 * len(addresses)

        return count
