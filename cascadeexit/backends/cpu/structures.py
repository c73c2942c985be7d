"""ctypes structures that Python and C++ share. Their fields are those of src/structs.h, in the same order.

The structures hold addresses. They do not keep the memory at these addresses alive.
"""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_void_p


class Matrix(ctypes.Structure):
    """A packed weight: in 8-bit integers if `scale` is set, in 12 bits if `outliers` is set, else in 16-bit bf16."""

    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("inputs", c_int32),
                ("outputs", c_int32), ("outliers", c_void_p)]


class Screen(ctypes.Structure):
    """An 8-bit copy of a bf16 vocabulary head, which excludes most words from an argmax; see `heads.HeadScreen`.

    Word number k of the copy is word number `ids[k]` of the bf16 head; without `ids`, the numbers are equal. `error`
    and `norm` bound the rounding errors.
    """

    _fields_ = [("rounded", Matrix), ("ids", c_void_p), ("error", c_float), ("norm", c_float)]


class Layer(ctypes.Structure):
    """Weights of one decoder layer: projections and norms."""

    _fields_ = [("qkv", Matrix), ("o", Matrix), ("gate_up", Matrix), ("down", Matrix),
                ("attention_norm", c_void_p), ("mlp_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p)]


class Stack(ctypes.Structure):
    """All decoder layers of a model, its sizes, and rotary cosines and sines (positions, head_dim / 2) each."""

    _fields_ = [("layers", POINTER(Layer)), ("cosines", c_void_p), ("sines", c_void_p), ("hidden", c_int32),
                ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32), ("inner", c_int32),
                ("eps", c_float), ("scale", c_float)]


class Adapter(ctypes.Structure):
    """Weights of an exit's adapter. `linear` is empty for the kind `swiglu`, which has no such layer."""

    _fields_ = [("linear", Matrix), ("gate_down", Matrix), ("up", Matrix), ("norm", c_void_p), ("eps", c_float),
                ("column_scale", c_void_p)]


class Estimator(ctypes.Structure):
    """Weights of a confidence estimator: two linear layers, `inner` and `outer`."""

    _fields_ = [("inner", c_void_p), ("inner_bias", c_void_p), ("outer", c_void_p), ("outer_bias", c_float),
                ("inputs", c_int32), ("width", c_int32)]


class Cache(ctypes.Structure):
    """A KV cache: addresses of its keys and its values, and its capacity in positions."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("capacity", c_int32)]
