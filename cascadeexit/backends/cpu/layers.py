"""CpuLayers: the decoder layers of a Llama-like model in C++.

Weights are bf16. They are packed to 12 bits each, without loss, if the kernels read this format on this processor. Each
element of the KV cache is rounded to 12 bits. A row's result does not depend on the other rows of its pass. So passes
need no padding. The rows of a pass may also be the branches of a draft tree, or belong to different texts of a batch.

Letters: N rows, D hidden size, B texts of a batch, d head size, I inputs, O outputs.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref, c_int32
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn

from cascadeexit.backends.cache import KVCache
from cascadeexit.backends.cpu import build
from cascadeexit.backends.cpu.heads import CpuHead
from cascadeexit.backends.cpu.packing import Store
from cascadeexit.backends.cpu.states import Hidden, States, in_bf16, joined, like, tensor_of
from cascadeexit.backends.cpu.structures import Cache, Layer, Stack
from cascadeexit.backends.weights import DecoderShape, layer_weights, outer_weights, rotary_angles


class CpuCache(KVCache):
    """A `KVCache` whose elements are bytes, in the layout of the C++ kernels.

    The capacity is rounded up to whole blocks of positions.
    """

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, capacity: int, batch: int):
        lib = build.library()
        block, widths = lib.ce_block(), (lib.ce_key_bytes(head_dim), lib.ce_value_bytes(head_dim))
        super().__init__(num_layers, num_heads, widths, -(-capacity // block) * block, batch=batch, dtype=torch.uint8)
        self.structure = Cache(self.keys.data_ptr(), self.values.data_ptr(), self.capacity)


class CpuLayers:
    """Runs embedding, decoder layers and final norm in C++. `base.LayerStack` describes the methods.

    Args:
        base: a transformers *ForCausalLM for which `CpuBackend.fits` is True. Its weights are copied.
        bounds: layer numbers at which segments begin and end.
        head: the model's vocabulary head. If the model ties its embedding to its head, embeddings are also read
            from this head.
    """

    row_multiple, max_rows, supports_trees = 1, 32, True

    def __init__(self, base, bounds: tuple[int, ...], head: CpuHead):
        shape, layers, outer = DecoderShape.of(base.config), layer_weights(base), outer_weights(base)
        self._shape, self._bounds = shape, bounds
        self._head = head if outer.tied else None
        self._embedding = None if outer.tied else outer.embedding.detach().clone()      # frees its file
        self._norm = outer.final_norm.detach().float().contiguous()
        qkv = [_by_group(shape.kv_heads, w.q, w.k, w.v) for w in layers]
        self._store = Store(chain.from_iterable((first, w.o, w.gate, w.up, w.down) for first, w in zip(qkv, layers)),
                            in_12_bits=True)
        matrix, floats, packed, sizes = self._store.matrix, self._store.floats, [], []
        for first, w in zip(qkv, layers):
            before = self._store.bytes
            packed.append(Layer(
                matrix(first, bias=_by_group(shape.kv_heads, w.q_bias, w.k_bias, w.v_bias)),
                matrix(w.o, bias=w.o_bias), matrix(w.gate, w.up), matrix(w.down), floats(w.attention_norm),
                floats(w.mlp_norm), floats(w.q_norm), floats(w.k_norm)))
            sizes.append(self._store.bytes - before)
        self.segment_bytes = tuple(sum(sizes[a:b]) for a, b in zip(bounds, bounds[1:]))
        cosines, sines = rotary_angles(base, shape)
        self._stack = Stack((Layer * len(packed))(*packed), floats(cosines), floats(sines), shape.hidden, shape.heads,
                            shape.kv_heads, shape.head_dim, shape.inner, shape.norm_eps,
                            layers[0].scaling)

    @property
    def embedding_head(self) -> CpuHead | None:
        """The head whose weight rows are the embeddings; None if the model does not tie its embedding to its head."""
        return self._head

    # -- caches ---------------------------------------------------------------------------------------------------

    def new_cache(self, capacity: int, batch: int = 1) -> CpuCache:
        return CpuCache(self._bounds[-1], self._shape.kv_heads, self._shape.head_dim, capacity, batch)

    def release(self, cache: CpuCache) -> None:
        """Do nothing. A cache is freed when the last reference to it is gone."""

    def keep(self, cache: CpuCache, start: int, path: Sequence[int]) -> None:
        if list(path) != list(range(len(path))):
            build.library().ce_keep(byref(cache.structure), self._bounds[-1], self._shape.kv_heads,
                                    self._shape.head_dim, start, _ints(path), len(path))
        cache.truncate(start + len(path))

    # -- computing ------------------------------------------------------------------------------------------------

    def embed(self, ids: Sequence[int] | Tensor) -> States:
        ids = ids.flatten().tolist() if isinstance(ids, Tensor) else ids
        if self._head is not None:
            return self._head.rows(ids)
        out = States((1, len(ids), self._shape.hidden))
        out.tensor()[0] = nn.functional.embedding(torch.tensor(ids, dtype=torch.long), self._embedding)
        return out

    def norm(self, rows: Hidden) -> Hidden:
        rows = in_bf16(rows)
        out = like(rows)
        build.library().ce_norm(self._norm.data_ptr(), self._shape.norm_eps, rows.data_ptr(), out.data_ptr(),
                                prod(rows.shape[:-1]), rows.shape[-1])
        return out

    def run(self, segments: range, rows: Hidden, cache: CpuCache, parents: Sequence[int] | None = None) -> list[States]:
        bounds, n = self._bounds[segments.start:segments.stop + 1], rows.shape[1]
        start = cache.claim(range(bounds[0], bounds[-1]), n) if bounds[0] < bounds[-1] else 0
        return self._run(bounds, rows, cache, start, parents=parents)

    def run_batch(self, segment: int, rows: Hidden, begins: Sequence[int], cache: CpuCache) -> States:
        bounds = self._bounds[segment:segment + 2]
        start = cache.claim(range(*bounds), 1) if bounds[0] < bounds[1] else 0
        return self._run(bounds, rows, cache, start, begins=begins)[0]

    def join(self, parts: Sequence[States]) -> States:
        return joined(parts)

    def tensor(self, rows: Hidden) -> Tensor:
        return tensor_of(rows)

    def row_cost(self, rows: int) -> float:
        return _row_cost(rows)

    def _run(self, bounds: tuple[int, ...], rows: Hidden, cache: CpuCache, start: int, *,
             parents: Sequence[int] | None = None, begins: Sequence[int] | None = None) -> list[States]:
        """Run rows (1, N, D) through the layers from bounds[0] up to, but not including, bounds[-1].

        Returns a list with the rows (1, N, D) before each of the layers bounds[1:]. Without `parents` and `begins`, the
        rows are the positions start, ..., start + N - 1 of one text.

        Args:
            start: number of positions in the cache before this pass.
            parents: the rows form a draft tree after these positions; see `LayerStack.run`.
            begins: the rows belong to N different texts. Row r is position `start` of text r. Positions of text r
                before begins[r] are not read.
        """
        end = start + (rows.shape[1] if parents is None and begins is None else 1)
        if end > self._shape.positions:
            raise ValueError(f"this model has {self._shape.positions} positions, {end} were asked for")
        rows, stops = in_bf16(rows), _stops(bounds)
        (n, d), count = rows.shape[1:], len(stops)
        out = States((count, n, d))
        if count:
            build.library().ce_layers(byref(self._stack), bounds[0], bounds[-1], stops, rows.data_ptr(), out.data_ptr(),
                                      n, byref(cache.structure), start, _ints(parents), _ints(begins),
                                      torch.get_num_threads())
        # An exit may be before the first of these layers: its rows are the input.
        return [rows] * (len(bounds) - 1 - count) + [out.part(i * n, (1, n, d)) for i in range(count)]


@functools.cache                # after a pass has swept the processor's caches, even a small call takes long
def _row_cost(rows: int) -> float:
    return build.library().ce_row_cost(rows)


def _ints(values: Sequence[int] | None) -> ctypes.Array | None:
    return None if values is None else (c_int32 * len(values))(*values)


@functools.cache
def _stops(bounds: tuple[int, ...]) -> ctypes.Array:
    """Return the layer numbers of bounds[1:] that are above bounds[0], as an array for C++.

    C++ returns the rows before each of these layers.
    """
    return _ints([bound for bound in bounds[1:] if bound > bounds[0]])


def _by_group(groups: int, *parts: Tensor | None) -> Tensor | None:
    """Concatenate the weights (O, I) or biases (O,) of queries, keys and values, grouped by key-value head.

    The result has one group after another: the weights of a key-value head's queries, then of its key, then of its
    value. One thread projects a group, and then computes its attention. Returns None if the parts are None.

    Args:
        groups: number of key-value heads.
        parts: weights or biases of queries, keys and values.
    """
    if parts[0] is None:
        return None
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
