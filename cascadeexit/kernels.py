"""Kernels: the CPU's own way through decoder layers, exits and heads, from the C++ in backends/cpu/src.

Weights are bf16, the same in 12 bits without loss, or rounded to 8 bits; keys and values bf16 in 12 bits.

Stock matrix kernels read weights at a quarter of the memory bandwidth when a pass has few rows, and dispatch costs
as much again. Our C++ takes rows through whole segments at most of the bandwidth. The machine's own C++ compiler
builds it once, in seconds, for this very processor; without one, or in fp32, transformers' layers run as before.

A row's result does not depend on the other rows of its pass, so row buckets need no padding here, and rows may as well
be branches of a tree of drafts, or texts of a batch.
"""

import copy
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from itertools import chain
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from cascadeexit.cache import KVCache
from cascadeexit.memory import room
from cascadeexit.states import Hidden, States, like

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "backends" / "cpu" / "src"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_MOST_ODD = 1 / 64              # of a weight's numbers may have no code of 12 bits, else it stays in 16


class _Matrix(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("inputs", c_int32),
                ("outputs", c_int32), ("odd", c_void_p)]


class _Screen(ctypes.Structure):
    _fields_ = [("rough", _Matrix), ("ids", c_void_p), ("error", c_float), ("size", c_float)]


class _Layer(ctypes.Structure):
    _fields_ = [("qkv", _Matrix), ("o", _Matrix), ("gate_up", _Matrix), ("down", _Matrix),
                ("attention_norm", c_void_p), ("mlp_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p)]


class _Stack(ctypes.Structure):
    _fields_ = [("layers", POINTER(_Layer)), ("cosines", c_void_p), ("sines", c_void_p), ("hidden", c_int32),
                ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32), ("inner", c_int32),
                ("eps", c_float), ("scale", c_float)]


class _Exit(ctypes.Structure):
    _fields_ = [("straight", _Matrix), ("gate_down", _Matrix), ("up", _Matrix), ("norm", c_void_p), ("eps", c_float),
                ("reach", c_void_p)]


class _Estimator(ctypes.Structure):
    _fields_ = [("inner", c_void_p), ("inner_bias", c_void_p), ("outer", c_void_p), ("outer_bias", c_float),
                ("inputs", c_int32), ("width", c_int32)]


class _Cache(ctypes.Structure):
    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("capacity", c_int32)]


# -- building ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$CASCADEEXIT_CACHE, else cascadeexit in the user's cache folder."""
    if folder := os.environ.get("CASCADEEXIT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascadeexit"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a line in the log, where they cannot be had. CASCADEEXIT_KERNELS=0 says no."""
    if os.environ.get("CASCADEEXIT_KERNELS") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        log.warning("No C++ compiler (g++) here: the model runs on stock kernels, several times slower.")
        return None
    try:
        return _declare(ctypes.CDLL(str(_build(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("The CPU kernels could not be built, so the model runs on stock ones, several times slower: %s",
                    said.strip()[-500:])
        return None


def _build(compiler: str) -> Path:
    """Path of the shared library for these sources, compiler and processor, which is compiled where it is missing."""
    said = subprocess.run([compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull], capture_output=True,
                          text=True, timeout=60).stderr                   # names the processor that `native` is
    sources = [(path.name, path.read_bytes()) for path in sorted(_SOURCES.iterdir())]
    target = hashlib.sha256(repr((sources, _FLAGS, said, platform.machine())).encode()).hexdigest()[:16]
    path = cache_folder() / f"kernels-{target}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:    # two processes at once: the last one wins
            made = Path(folder) / "kernels.so"
            subprocess.run([compiler, *_FLAGS, f"-I{_SOURCES}", "-o", str(made), str(_SOURCES / "kernels.cpp")],
                           check=True, capture_output=True, text=True, timeout=300)
            os.replace(made, path)
    return path


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.ce_row_cost.restype = c_float
    lib.ce_row_cost.argtypes = [c_int32]
    lib.ce_key_bytes.argtypes = lib.ce_value_bytes.argtypes = [c_int32]
    lib.ce_packed_bytes.restype = c_int64
    lib.ce_packed_bytes.argtypes = [c_int32, c_int32]
    lib.ce_pack.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_int32, c_int32]
    lib.ce_coded_bytes.restype = c_int64
    lib.ce_coded_bytes.argtypes = [c_int32, c_int32]
    lib.ce_code.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_void_p, *[c_int32] * 4]
    lib.ce_rows.argtypes = [POINTER(_Matrix), c_void_p, c_int32, c_void_p]
    lib.ce_linear.argtypes = [POINTER(_Matrix), c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_argmax.argtypes = [POINTER(_Matrix), POINTER(_Screen), c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_layers.argtypes = [POINTER(_Stack), c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int32, POINTER(_Cache),
                              c_int32, c_void_p, c_void_p, c_int32]
    lib.ce_keep.argtypes = [POINTER(_Cache), c_int32, c_int32, c_int32, c_int32, c_void_p, c_int32]
    lib.ce_exit.argtypes = [POINTER(_Exit), c_void_p, c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_norm.argtypes = [c_void_p, c_float, c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_likeliest.argtypes = [POINTER(_Matrix), c_void_p, c_float, c_int32, c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_draft.argtypes = [POINTER(_Matrix), POINTER(_Exit), POINTER(_Matrix), *[c_void_p] * 4, c_float, c_int32,
                             c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_gathered.argtypes = [POINTER(_Matrix), c_void_p, POINTER(c_void_p), c_int32, c_void_p, c_int32]
    lib.ce_softmax_facts.argtypes = [POINTER(_Matrix), *[c_void_p] * 4, c_int32, c_int32]
    lib.ce_confidence.argtypes = [POINTER(_Matrix), POINTER(_Estimator), *[c_void_p] * 4, c_int32, c_int32]
    return lib


def usable(weight: Tensor) -> bool:
    """True where these kernels can multiply by this weight (O, I)."""
    return (weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
            and library() is not None)


# -- weights ----------------------------------------------------------------------------------------------------------


class _Store:
    """Keeps alive what C holds pointers to, and packs weights into huge pages.

    Args:
        weights: all that it will hold; those in 8 bits as `_in_8_bits` makes them.
        in_12_bits: bf16 weights are kept in 12 bits where that is possible, without loss.
    """

    def __init__(self, weights: Iterable[Tensor], *, in_12_bits: bool = False):
        self._size_of = library().ce_coded_bytes if in_12_bits else lambda *shape: 0    # in 12 bits; 0: stays in 16
        self._kept: list = []
        self._grow(sum(_whole_lines(w.nbytes if w.dtype == torch.int8
                                    else self._size_of(*w.shape) or library().ce_packed_bytes(*w.shape))
                       for w in weights))
        self.bytes = 0                              # of its bf16 weights, as they are kept

    def _grow(self, size: int) -> None:
        self._kept.append(room(size))
        self._free = ctypes.addressof(ctypes.c_char.from_buffer(self._kept[-1]))
        self._end = self._free + size

    def _take(self, size: int) -> int:
        """Where so many bytes may lie."""
        if self._free + size > self._end:
            self._grow(_whole_lines(size))
        at = self._free
        self._free += _whole_lines(size)
        return at

    def matrix(self, *parts: Tensor, bias: Tensor | None = None) -> _Matrix:
        """One weight (O, I), or several with the same shape laid block by block in turn."""
        (outputs, inputs), lib, count = parts[0].shape, library(), len(parts)
        parts = [part.detach().contiguous() for part in parts]
        rows = outputs if count == 1 else count * -(-outputs // lib.ce_block()) * lib.ce_block()
        if self._size_of(outputs, inputs) and (coded := self._coded(parts)):
            at, odd = coded
            return _Matrix(at, None, self.floats(bias), inputs, rows, ctypes.addressof(odd))
        size = count * lib.ce_packed_bytes(outputs, inputs)
        at = self._take(size)
        self.bytes += size
        for i, part in enumerate(parts):
            lib.ce_pack(part.data_ptr(), outputs, inputs, at, i, count)
        return _Matrix(at, None, self.floats(bias), inputs, rows)

    def _coded(self, parts: Sequence[Tensor]) -> tuple[int, ctypes.Array] | None:
        """The same in 12 bits: where it lies, and its odd weights; None where too many have no code."""
        outputs, inputs = parts[0].shape
        size, most, found = self._size_of(outputs, inputs), int(parts[0].numel() * len(parts) * _MOST_ODD), 0
        at, odd = self._take(len(parts) * size), (c_int64 * most)()
        for i, part in enumerate(parts):
            found = library().ce_code(part.data_ptr(), outputs, inputs, at, odd, most, found, i, len(parts))
            if found < 0:
                return None
        odd = (c_int64 * (found + 1))(*odd[:found])
        self._kept.append(odd)
        self.bytes += len(parts) * size + 8 * found
        return at, odd

    def matrix_in_8_bits(self, weight: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None) -> _Matrix:
        """One weight as `_in_8_bits` made it."""
        at = self._take(weight.nbytes)
        ctypes.memmove(at, weight.data_ptr(), weight.nbytes)
        return _Matrix(at, self.floats(scale), self.floats(bias), 2 * weight.shape[1], outputs)

    def floats(self, values: Tensor | None) -> int | None:
        """Address of an fp32 copy; None for None."""
        if values is None:
            return None
        self._kept.append(values.detach().float().contiguous().clone())
        return self._kept[-1].data_ptr()


def _whole_lines(size: int) -> int:
    """Bytes up to the next cache line."""
    return -(-size // 64) * 64


def _scale_of(weight: Tensor) -> Tensor:
    """What the integers of 8 bits of each output of a weight (O, I) are multiplied by (O,)."""
    return weight.abs().amax(1).clamp(min=1e-30) / 127


def _in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, I), I even, as integers up to 127, by blocks of B outputs and pairs of inputs: (O / B, I / 2, 2 B).

    And what the integers of each output are to be multiplied by, for whole blocks.
    """
    parts, scales, size = [], [], library().ce_block()
    for block in weight.detach().split(size):
        block = nn.functional.pad(block.float(), (0, 0, 0, size - len(block)))
        scales.append(_scale_of(block))
        whole = (block / scales[-1][:, None]).round().to(torch.int8)
        # Of each pair of inputs the first half of the outputs and the second in turn, byte by byte.
        parts.append(whole.view(2, size // 2, -1, 2).permute(2, 1, 3, 0).reshape(-1, 2 * size))
    return torch.stack(parts), torch.cat(scales)


class NativeLinear(nn.Module):
    """x (..., I) bf16 -> x W^T + b (..., O) in fp32. Inference only: no gradient passes through.

    Args:
        eight_bits: keep the weights as integers of 8 bits, each output with a scale of its own, and read rows as
            integers of up to 16, each with one of its own: half as much to read and half the work, for results that
            need not be those of the bf16 weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, eight_bits: bool = False):
        super().__init__()
        self.shape, self.eight_bits, self.has_bias = tuple(weight.shape), eight_bits, bias is not None
        if eight_bits:
            whole, scale = _in_8_bits(weight)
            self._store = _Store([whole])
            self._matrix = self._store.matrix_in_8_bits(whole, scale, len(weight), bias)
        else:
            self._store = _Store([weight])
            self._matrix = self._store.matrix(weight, bias=bias)

    @property
    def row_bytes(self) -> int:
        """Bytes of weights that one output reads."""
        return self.shape[1] + 4 if self.eight_bits else 2 * self.shape[1]

    def forward(self, x: Hidden) -> Tensor:
        x = _bf16(x)
        out = torch.empty(*x.shape[:-1], self.shape[0])
        library().ce_linear(byref(self._matrix), x.data_ptr(), out.data_ptr(), prod(x.shape[:-1]),
                            torch.get_num_threads())
        return out

    def argmax(self, x: Hidden, screen: "NativeScreen | None" = None) -> list[int]:
        """Of each row (..., I) the output that is largest, the first of equal ones; the same with a screen, sooner."""
        x = _bf16(x)
        n = prod(x.shape[:-1])
        numbers = (c_int32 * n)()
        library().ce_argmax(byref(self._matrix), screen and byref(screen.structure), x.data_ptr(), numbers, n,
                            torch.get_num_threads())
        return numbers[:]

    def output(self, x: Hidden, row: int, number: int) -> float:
        """One output for one of these rows (1, N, I) bf16, bitwise what all of them together hold."""
        size, of = library().ce_block(), self._matrix
        first = number // size * size
        # Its block alone, as a matrix of its own.
        block = _Matrix(of.weight + library().ce_packed_bytes(first, of.inputs), None, of.bias and of.bias + 4 * first,
                        of.inputs, min(size, of.outputs - first))
        out = (c_float * size)()
        library().ce_linear(byref(block), x.data_ptr() + 2 * row * of.inputs, out, 1, 1)
        return out[number - first]

    def rows(self, ids: Sequence[int]) -> States:
        """Rows of the weight: n numbers -> (1, n, I) bf16. Raises ValueError where they were rounded to 8 bits."""
        if self.eight_bits:
            raise ValueError("these weights were rounded to 8 bits; ask the layer that they were made from")
        n = len(ids)
        out = States((1, n, self.shape[1]))
        library().ce_rows(byref(self._matrix), (c_int64 * n)(*ids), n, out.data_ptr())
        return out

    def softmax_facts(self, x: Tensor, copied: Tensor, before: Tensor | None = None) -> Tensor:
        """Facts told in `cascadeexit.exits.softmax_facts`: rows (N, I), copies (N, 2) -> (N, 5 or 12)."""
        x, copied, before = _bf16(x), copied.float().contiguous(), None if before is None else _bf16(before)
        facts = torch.empty(*x.shape[:-1], 5 if before is None else 12)
        library().ce_softmax_facts(byref(self._matrix), x.data_ptr(), copied.data_ptr(),
                                   None if before is None else before.data_ptr(), facts.data_ptr(),
                                   prod(x.shape[:-1]), torch.get_num_threads())
        return facts

    def likeliest(self, x: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The k largest outputs (..., I) -> (..., k), best first: probabilities in their softmax, and their numbers."""
        x, k = _bf16(x), min(k, self.shape[0])
        probs, numbers = (torch.empty(*x.shape[:-1], k, dtype=dtype) for dtype in (torch.float32, torch.int32))
        library().ce_likeliest(byref(self._matrix), x.data_ptr(), temperature, k, numbers.data_ptr(), probs.data_ptr(),
                               prod(x.shape[:-1]), torch.get_num_threads())
        return probs, numbers

    def first(self, outputs: int) -> "NativeLinear":
        """Its first outputs alone, on the same weights: a multiple of 32, or all."""
        part = copy.copy(self)
        part.shape = (outputs, self.shape[1])
        part._matrix = _Matrix(self._matrix.weight, self._matrix.scale, self._matrix.bias, self._matrix.inputs, outputs)
        return part

    def extra_repr(self) -> str:
        return f"out, in = {self.shape}"


class NativeScreen:
    """A weight in 8 bits that finds the largest output of the exact one: half of it is read, the result is the same.

    The exact sum w . x of an output is within |w - v| |x| of that with the rounded v (Cauchy and Schwarz), so few
    outputs can be the largest, and only these are read in bf16.

    Args:
        rough: weights (O, I) in 8 bits; exact: the bf16 weights they were made from.
        ids: of each of its outputs, the number in the weight that is asked; None: the same.
    """

    def __init__(self, rough: NativeLinear, exact: Tensor, ids: Tensor | None = None):
        error = size = 0.0
        for part in exact.detach().split(4096):
            part = part.float() / _scale_of(part.float())[:, None]
            whole = part.round()
            error = max(error, float((part - whole).norm(dim=1).max()))
            size = max(size, float(whole.norm(dim=1).max()))
        self.rough, self._ids = rough, None if ids is None else ids.int().contiguous()
        self.structure = _Screen(rough._matrix, None if ids is None else self._ids.data_ptr(), error * 1.001,
                                 size * 1.001)

    @property
    def bytes(self) -> int:
        """Weight bytes that one look reads, without the few exact ones."""
        return self.rough.shape[0] * self.rough.row_bytes


class Choice:
    """The full model's likeliest token after one row, and on demand the logits of others: choice[token]."""

    __slots__ = "token", "_head", "_rows", "_row"

    def __init__(self, token: int, head: NativeLinear, rows: Hidden, row: int):
        self.token, self._head, self._rows, self._row = token, head, rows, row

    def __getitem__(self, token: int) -> float:
        return self._head.output(self._rows, self._row, token)


class NativeNorm:
    """RMSNorm of rows (..., D) bf16 -> bf16, computed in fp32."""

    def __init__(self, weight: Tensor, eps: float):
        self._fp32, self._eps = weight.detach().float().contiguous(), eps

    def __call__(self, x: Hidden) -> Hidden:
        x = _bf16(x)
        out = like(x)
        library().ce_norm(self._fp32.data_ptr(), self._eps, x.data_ptr(), out.data_ptr(), prod(x.shape[:-1]),
                          x.shape[-1])
        return out


class NativeLayers:
    """The decoder layers of a Llama-like model, with rotary angles for `positions` positions.

    Args:
        layers: transformers' decoder layers of a type in `cascadeexit.model.SUPPORTED`; not kept.
        config: the model's config.
        cosines, sines: (positions, d / 2).
    """

    def __init__(self, layers: Sequence[nn.Module], config, head_dim: int, cosines: Tensor, sines: Tensor):
        blocks = [(layer.self_attn, layer.mlp) for layer in layers]
        groups = config.num_key_value_heads
        qkv = [_by_group(groups, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight) for a, _ in blocks]
        self._store = _Store(chain.from_iterable(
            (w, a.o_proj.weight, m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight)
            for w, (a, m) in zip(qkv, blocks)), in_12_bits=True)
        matrix, floats = self._store.matrix, self._store.floats
        self.layer_bytes: list[int] = []    # of the weights of each layer, as they are read
        packed = []
        for w, layer, (a, m) in zip(qkv, layers, blocks):
            before = self._store.bytes
            packed.append(_Layer(
                matrix(w, bias=_by_group(groups, a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)),
                matrix(a.o_proj.weight, bias=a.o_proj.bias), matrix(m.gate_proj.weight, m.up_proj.weight),
                matrix(m.down_proj.weight), floats(layer.input_layernorm.weight),
                floats(layer.post_attention_layernorm.weight), floats(_weight(a, "q_norm")),
                floats(_weight(a, "k_norm"))))
            self.layer_bytes.append(self._store.bytes - before)
        self._layers = (_Layer * len(packed))(*packed)
        self._positions = len(cosines)
        self._stack = _Stack(self._layers, floats(cosines), floats(sines), config.hidden_size,
                             config.num_attention_heads, config.num_key_value_heads, head_dim, config.intermediate_size,
                             config.rms_norm_eps, layers[0].self_attn.scaling)

    @staticmethod
    @functools.cache                # between passes, which sweep the caches, even a small call takes long
    def row_cost(rows: int) -> float:
        """What one more row beside so many costs, in passes of one row."""
        return library().ce_row_cost(rows)

    @staticmethod
    def fits(layers: Sequence[nn.Module], head_dim: int) -> bool:
        """True where the kernels know this shape: bf16 on a CPU, heads of a multiple of 16, no bias in the MLP."""
        mlp = layers[0].mlp
        return (head_dim % 16 == 0 and mlp.down_proj.bias is None and mlp.gate_proj.bias is None
                and layers[0].mlp.act_fn.__class__.__name__ in ("SiLU", "SiLUActivation")
                and mlp.down_proj.weight.shape[1] % 2 == 0 and usable(mlp.gate_proj.weight))

    def new_cache(self, capacity: int, batch: int) -> KVCache:
        """A cache for at least so many positions in the kernels' own layout, as bytes: whole blocks of positions."""
        lib, head_dim = library(), self._stack.head_dim
        block = lib.ce_block()
        widths = lib.ce_key_bytes(head_dim), lib.ce_value_bytes(head_dim)
        return KVCache(len(self._layers), self._stack.kv_heads, widths, -(-capacity // block) * block, batch=batch,
                       dtype=torch.uint8)

    def run(self, bounds: tuple[int, ...], h: Hidden, cache: KVCache, start: int, *,
            parents: Sequence[int] | None = None, begins: Sequence[int] | None = None) -> list[Hidden]:
        """Rows (1, N, D) from layer bounds[0] on: what they are before each of the layers bounds[1:], (1, N, D).

        Without more said, they are positions start.. of one text.

        Args:
            cache: of B texts, from `new_cache`.
            parents: the rows are a tree after `start` positions; row r goes on from row parents[r] < r, row 0, whose
                parent is -1, from the text. See `keep`.
            begins: row r is position `start` of text r of B = N, which sees its own positions from begins[r] on.
        """
        end = start + (h.shape[1] if parents is None and begins is None else 1)
        if end > self._positions:
            raise ValueError(f"this model has {self._positions} positions, {end} were asked for")
        h, stops = _bf16(h), _stops(bounds)
        (n, d), count = h.shape[1:], len(stops)
        out = States((count, n, d))
        library().ce_layers(byref(self._stack), bounds[0], bounds[-1], stops, h.data_ptr(), out.data_ptr(), n,
                            byref(_Cache(*cache.places, cache.capacity)), start, _ints(parents), _ints(begins),
                            torch.get_num_threads())
        # Before the first of these layers they are what came in: there an exit may sit, too.
        passed = [h] * (len(bounds) - 1 - count)
        after = [out.part(i * n, (1, n, d)) for i in range(count)]
        return passed + (after if isinstance(h, States) else [rows.tensor() for rows in after])

    def keep(self, cache: KVCache, start: int, path: Sequence[int]) -> None:
        """Of a tree's rows, written from slot `start` on, keep a path, ascending, as a text in all layers."""
        library().ce_keep(byref(_Cache(*cache.places, cache.capacity)), len(self._layers), self._stack.kv_heads,
                          self._stack.head_dim, start, _ints(path), len(path))


def _bf16(x: Hidden) -> Hidden:
    """As C reads whatever lies there."""
    if isinstance(x, States) or (x.dtype == torch.bfloat16 and x.is_contiguous()):
        return x
    return x.to(torch.bfloat16).contiguous()


def _ints(values: Sequence[int] | None):
    return None if values is None else (c_int32 * len(values))(*values)


@functools.cache
def _stops(bounds: tuple[int, ...]) -> ctypes.Array:
    """Those of these layers, after the first, before which C has rows to hand out."""
    return _ints([bound for bound in bounds[1:] if bound > bounds[0]])


def _reach(weight: Tensor) -> Tensor:
    """The size of each column of a weight (O, I), as powers of 2 (I,)."""
    return weight.square().mean(0).clamp(min=1e-30).sqrt().log2().round().exp2()


def _adapter_in_8_bits(gate: Tensor, down: Tensor, up: Tensor, straight: Tensor | None):
    """A store with an adapter's weights, its matrices as in `_Exit`, and the reach of its inputs (I,).

    Weights of strong inputs are small, and rounding would lose them: so columns are brought to one size first, by
    powers of 2, and the inputs by their inverse; what `up` reads, by the outputs of `down`.
    """
    gate, down, up = gate.detach().float(), down.detach().float(), up.detach().float()
    whole = [] if straight is None else [straight.detach().float()]
    reach, inner = _reach(torch.cat([*whole, gate, down])), _reach(up)
    first = [_in_8_bits(weight / reach) for weight in (*whole, gate, down * inner[:, None])]
    (gates, gate_scale), (downs, down_scale) = first[-2:]
    both = torch.stack([gates, downs], 1).flatten(0, 1)                         # block by block in turn
    size = library().ce_block()
    both_scale = torch.stack([gate_scale.view(-1, size), down_scale.view(-1, size)], 1).flatten()
    ups, up_scale = _in_8_bits(up / inner)
    store = _Store([*(packed for packed, _ in first[:-2]), both, ups])
    matrix = store.matrix_in_8_bits
    linear = matrix(*first[0], len(whole[0])) if whole else _Matrix()
    return store, linear, matrix(both, both_scale, len(both_scale)), matrix(ups, up_scale, len(up)), reach


class NativeAdapter:
    """An exit's adapter: rows (N, D), and what is carried to them (N, D) or None -> (N, D).

    Args:
        gate, down, up, norm: its weights; straight: that of its linear part, None where that is the identity.
        eight_bits: round weights to 8 bits, for results that need not be those of the bf16 weights.
    """

    def __init__(self, gate: Tensor, down: Tensor, up: Tensor, norm: Tensor, eps: float, straight: Tensor | None, *,
                 eight_bits: bool = False):
        self.carries = straight is not None
        if eight_bits and up.shape[1] % 2 == 0:
            self._store, *parts, reach = _adapter_in_8_bits(gate, down, up, straight)
        else:
            self._store, reach = _Store([gate, down, up, *([straight] if self.carries else [])]), None
            matrix = self._store.matrix
            parts = matrix(straight) if self.carries else _Matrix(), matrix(gate, down), matrix(up)
        self._exit = _Exit(*parts, self._store.floats(norm), eps, self._store.floats(reach))

    def __call__(self, h: Hidden, said: Hidden) -> Hidden:
        h, said = _bf16(h), _bf16(said) if self.carries else None
        out = like(h)
        library().ce_exit(byref(self._exit), h.data_ptr(), said.data_ptr() if self.carries else None, out.data_ptr(),
                          prod(h.shape[:-1]), torch.get_num_threads())
        return out


class NativeDrafter:
    """A drafter, or the exit before the first layer, as a whole: from tokens to what is drafted after, in one call.

    Args:
        embedding: of all tokens; words: those that may be drafted, whose token ids are `ids`, None = their numbers.
    """

    def __init__(self, embedding: NativeLinear, adapter: NativeAdapter, words: NativeLinear, ids: Sequence[int] | None):
        self._embedding, self._adapter, self._words, self._ids = embedding, adapter, words, ids
        self._matrices = byref(embedding._matrix), byref(adapter._exit), byref(words._matrix)

    def __call__(self, tokens: Sequence[int], said: Sequence[Hidden], k: int, temperature: float,
                 context: ctypes.Array | None = None):
        """As `ExitBank.drafts`; states are bf16."""
        n, k, d = len(tokens), min(k, self._words.shape[0]), self._embedding.shape[1]
        carried = (c_void_p * n)(*(state.data_ptr() for state in said)) if self._adapter.carries else None
        hidden, numbers, probs = States((n, d)), (c_int32 * (n * k))(), (c_float * (n * k))()
        library().ce_draft(*self._matrices, (c_int64 * n)(*tokens), carried, context, hidden.data_ptr(), temperature, k,
                           numbers, probs, n, torch.get_num_threads())
        ids = numbers[:] if self._ids is None else [self._ids[number] for number in numbers]
        return [(hidden.part(i, (1, d)), probs[i * k:i * k + k], ids[i * k:i * k + k]) for i in range(n)]


class NativeContext:
    """A drafter's weight (D, E D) in 8 bits, for one row that lies in E parts: what was after each of E layers."""

    def __init__(self, weight: Tensor):
        weight = weight.detach().float()
        reach = _reach(weight)
        whole, scale = _in_8_bits(weight / reach)
        self._store = _Store([whole])
        self._matrix, self._reach = self._store.matrix_in_8_bits(whole, scale, len(weight)), self._store.floats(reach)

    def __call__(self, states: Sequence[Hidden], row: int) -> ctypes.Array:
        """One row of each of these (1, N, D), bf16 as our layers give them -> D numbers in fp32."""
        n, d = len(states), self._matrix.outputs
        out = (c_float * d)()
        library().ce_gathered(byref(self._matrix), self._reach,
                              (c_void_p * n)(*(state.data_ptr() + 2 * row * d for state in states)), n, out,
                              torch.get_num_threads())
        return out


class NativeConfidence:
    """A `SketchConfidence` with the head it looks at: rows (N, D), N copies, rows of the exit before -> N chances.

    Args:
        alone, after: its networks, without and with the exit before: linear, SiLU, linear.
    """

    def __init__(self, head: NativeLinear, alone: nn.Sequential, after: nn.Sequential):
        self._head, self._kept = head, []
        self._alone, self._after = self._estimator(alone), self._estimator(after)

    def _estimator(self, network: nn.Sequential) -> _Estimator:
        inner, _, outer = network
        kept = [t.detach().float().contiguous() for t in (inner.weight, inner.bias, outer.weight)]
        self._kept += kept
        return _Estimator(*(t.data_ptr() for t in kept), float(outer.bias), inner.in_features, inner.out_features)

    def __call__(self, x: Hidden, copied: Sequence[tuple[int, float]], before: Hidden | None = None) -> list[float]:
        x, before, n = _bf16(x), None if before is None else _bf16(before), len(copied)
        chances = (c_float * n)()
        library().ce_confidence(byref(self._head._matrix), byref(self._alone if before is None else self._after),
                                x.data_ptr(), (c_float * (2 * n))(*chain.from_iterable(copied)),
                                None if before is None else before.data_ptr(), chances, n, torch.get_num_threads())
        return chances[:]


def _by_group(groups: int, *parts: Tensor | None) -> Tensor | None:
    """Queries, keys and values (O, ...) as one, a key-value head's beside its queries: threads use what they made."""
    if parts[0] is None:
        return None
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)


def _weight(module: nn.Module, name: str) -> Tensor | None:
    part = getattr(module, name, None)
    return None if part is None else part.weight
