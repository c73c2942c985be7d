"""Structures that Python and C++ share, field by field as in src/structs.h. They own no memory."""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_void_p


class Matrix(ctypes.Structure):
    """A packed weight: bf16, bf16 in 12 bits if `outliers` is set, or 8-bit integers if `scale` is set."""

    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("inputs", c_int32),
                ("outputs", c_int32), ("outliers", c_void_p)]


class Screen(ctypes.Structure):
    """A rounded copy of a head, the numbers of its words in the exact head, and bounds of the rounding errors."""

    _fields_ = [("rounded", Matrix), ("ids", c_void_p), ("error", c_float), ("norm", c_float)]


class Layer(ctypes.Structure):
    """One decoder layer: projections and norms."""

    _fields_ = [("qkv", Matrix), ("o", Matrix), ("gate_up", Matrix), ("down", Matrix),
                ("attention_norm", c_void_p), ("mlp_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p)]


class Stack(ctypes.Structure):
    """All decoder layers, with rotary cosines and sines (positions, head_dim / 2)."""

    _fields_ = [("layers", POINTER(Layer)), ("cosines", c_void_p), ("sines", c_void_p), ("hidden", c_int32),
                ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32), ("inner", c_int32),
                ("eps", c_float), ("scale", c_float)]


class Adapter(ctypes.Structure):
    """An exit's adapter. `linear` is empty if the linear part is the identity."""

    _fields_ = [("linear", Matrix), ("gate_down", Matrix), ("up", Matrix), ("norm", c_void_p), ("eps", c_float),
                ("column_scale", c_void_p)]


class Estimator(ctypes.Structure):
    """A confidence estimator's two linear layers."""

    _fields_ = [("inner", c_void_p), ("inner_bias", c_void_p), ("outer", c_void_p), ("outer_bias", c_float),
                ("inputs", c_int32), ("width", c_int32)]


class Cache(ctypes.Structure):
    """Addresses of a cache's keys and values."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("capacity", c_int32)]
