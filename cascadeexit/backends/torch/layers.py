"""TorchLayers: transformers' own decoder layers, run in segments on any device.

With PyTorch's kernels, a row's result depends on the number of rows in its pass. Two rules still make results bitwise
equal: every pass is padded to a multiple of a fixed number of rows (the row bucket), and attention always covers the
whole buffer of the cache, with a mask. Decoding and verification passes follow both rules. On CUDA, each segment is
recorded as a CUDA graph once for each cache.

Letters: B texts, N rows in the pass, D hidden size, C cache capacity.
"""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascadeexit.backends import graphs
from cascadeexit.backends.memory import give_back
from cascadeexit.backends.torch import attention
from cascadeexit.backends.torch.cache import SpreadCache, TorchCache
from cascadeexit.backends.torch.linear import frozen_linear
from cascadeexit.backends.torch.recording import Recorded
from cascadeexit.backends.weights import DecoderShape, is_spread, layer_devices, outer_weights

_RECORDED_CAPACITY = 1024       # a recording is for one cache, so few sizes are best; unused slots cost little to read
_IDLE_CACHES = 4
_ROW_COST = 0.02                # measured on a CPU; on a GPU a bucket of rows costs as much as one row
_FEW_ROWS = 8
_LATE_ROW_COST = 0.1            # of a row beside _FEW_ROWS or more
_CUDA_ROWS = 16                 # CUDA's kernels vary more with the shape: one bucket for all passes
_CPU_ROWS, _CPU_MAX_ROWS = 4, 32        # every multiple of 4 rows up to 40 agrees bitwise


class TorchLayers:
    """Runs the layers of a transformers model in segments. `base.LayerStack` describes the methods.

    The model's modules are copied and their weights are shared. So the caller's model does not change. Only a model
    that accelerate has spread over several devices is used without a copy, because the hooks that load its weights
    belong to its modules. Each layer of such a model runs on the layer's own device, which also holds the layer's keys
    and values. After each segment, rows are copied to the device of the model's head.

    Args:
        base: a transformers *ForCausalLM.
        bounds: layer numbers at which segments begin and end.
    """

    supports_trees = False
    prepared = True             # weights are packed and kernels recorded if that is faster

    def __init__(self, base, bounds: tuple[int, ...]):
        spread = is_spread(base)
        self._bounds = bounds
        weights = outer_weights(base)
        self._device, self._dtype = weights.device, weights.dtype
        self._layer_devices = layer_devices(base) if spread else [self._device] * len(base.model.layers)
        self._decoder = base.model if spread else _sharing_weights(base.model)
        self._decoder.config._attn_implementation = attention.register()
        self._shape = DecoderShape.of(self._decoder.config)
        self.segment_bytes = tuple(sum(p.nbytes for layer in self._decoder.layers[a:b] for p in layer.parameters())
                                   for a, b in zip(bounds, bounds[1:]))
        for layer in self._decoder.layers if self.prepared and not spread else ():
            for block in (layer.self_attn, layer.mlp):
                for name, module in list(block.named_children()):
                    if isinstance(module, nn.Linear):
                        setattr(block, name, frozen_linear(module.weight, module.bias))
        on_cuda = self._device.type == "cuda"
        self.row_multiple, self.max_rows = (_CUDA_ROWS, _CUDA_ROWS) if on_cuda else (_CPU_ROWS, _CPU_MAX_ROWS)
        recorded = self.prepared and not spread and graphs.wanted(self._device)
        self.recorded_rows = self.row_multiple if recorded else 0
        self._norm = Recorded(self._decoder.norm, self.row_multiple) if self.recorded_rows else self._decoder.norm
        self._idle_caches: list[TorchCache] = []
        self._caches_turn = threading.RLock()       # garbage collection may release a cache at any time

    # -- caches ---------------------------------------------------------------------------------------------------

    def new_cache(self, capacity: int, batch: int = 1) -> TorchCache:
        """Make an empty cache, or reuse a released cache of the same size; see `LayerStack.new_cache`.

        If memory is short, all released caches are freed first.
        """
        step = _RECORDED_CAPACITY if self.recorded_rows and batch == 1 else 16
        capacity = -(-capacity // step) * step
        with self._caches_turn:
            for cache in self._idle_caches:
                if cache.capacity == capacity and cache.keys.shape[1] == batch:
                    self._idle_caches.remove(cache)
                    return cache
        try:
            return self._made(capacity, batch)
        except torch.OutOfMemoryError:
            with self._caches_turn:
                if not self._idle_caches:
                    raise
                self._idle_caches.clear()
        gc.collect()                                # recordings and their caches refer to each other
        give_back()
        return self._made(capacity, batch)

    def _made(self, capacity: int, batch: int) -> TorchCache:
        """Allocate a new cache for `batch` texts of `capacity` positions each."""
        if set(self._layer_devices) != {self._device}:
            return SpreadCache(self._layer_devices, self._shape.kv_heads, self._shape.head_dim, capacity, batch=batch,
                               dtype=self._dtype, home=self._device)
        return TorchCache(self._bounds[-1], self._shape.kv_heads, self._shape.head_dim, capacity, batch=batch,
                          dtype=self._dtype, device=self._device)

    def release(self, cache: TorchCache) -> None:
        """Empty a cache and keep it, with its recordings, for a later call of `new_cache` with the same size.

        Does nothing if passes are not recorded.
        """
        if self.recorded_rows:
            with torch.inference_mode():        # the mode in which it was written
                cache.clear()
            with self._caches_turn:
                self._idle_caches.insert(0, cache)
                del self._idle_caches[_IDLE_CACHES:]

    def keep(self, cache: TorchCache, start: int, path: Sequence[int]) -> None:
        """Keep the first len(path) rows of the last pass; see `LayerStack.keep`.

        This backend has no draft trees, so `path` must be 0, 1, 2, ...
        """
        assert list(path) == list(range(len(path))), "a tree needs a backend with supports_trees"
        cache.truncate(start + len(path))

    # -- computing ------------------------------------------------------------------------------------------------

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Look up the embeddings of token ids (N,). Returns rows (1, N, D)."""
        return self._decoder.embed_tokens(torch.as_tensor(ids, device=self._device).reshape(1, -1)).to(self._device)

    def norm(self, rows: Tensor) -> Tensor:
        """Apply the model's final norm: (..., N, D) -> (..., N, D).

        For the computation, rows are padded to a multiple of `row_multiple` rows.
        """
        return self._norm(self._padded(rows))[..., :rows.shape[-2], :].to(self._device)

    def run(self, segments: range, rows: Tensor, cache: TorchCache,
            parents: Sequence[int] | None = None) -> list[Tensor]:
        """Run the next N positions of one text through consecutive segments: rows (1, N, D); see `LayerStack.run`.

        Padding rows are written to the cache after the real rows. They are masked, and later rows overwrite them.
        """
        assert parents is None, "a tree needs a backend with supports_trees"
        n, out, first = rows.shape[1], [], self._bounds[segments[0]]
        end = n + (cache.length(first) if first < self._bounds[-1] else 0)
        if end > self._shape.positions:
            raise ValueError(f"this model has {self._shape.positions} positions, {end} were asked for")
        for s in segments:
            if layers := range(self._bounds[s], self._bounds[s + 1]):
                padded = self._padded(rows)
                positions = cache.positions(layers[0], padded.shape[1])
                rows = self._through(s, cache, padded.shape[1])(padded, positions)[:, :n]
                cache.advance(layers, n)
            out.append(rows)
        return out

    def run_batch(self, segment: int, rows: Tensor, begins: Sequence[int], cache: TorchCache) -> Tensor:
        """Run the next position of B texts together through one segment; see `LayerStack.run_batch`."""
        layers = range(self._bounds[segment], self._bounds[segment + 1])
        if not layers:
            return rows
        positions = cache.positions(layers[0], 1)                                               # (1, 1)
        near = torch.arange(-(-(cache.length(layers[0]) + 1) // 64) * 64, device=rows.device)[:cache.capacity]
        mask = (near >= torch.tensor(begins, device=rows.device)[:, None]) & (near <= positions)
        out = self._run_layers(layers, rows.transpose(0, 1), positions, mask[:, None, None], cache)
        cache.advance(layers, 1)
        return out.transpose(0, 1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)

    def tensor(self, rows: Tensor) -> Tensor:
        return rows

    def row_cost(self, rows: int) -> float:
        return _ROW_COST if rows < _FEW_ROWS else _LATE_ROW_COST

    def _padded(self, rows: Tensor) -> Tensor:
        """Pad rows (..., N, D) with rows of zeros to a multiple of `row_multiple` rows."""
        missing = -rows.shape[-2] % self.row_multiple
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def _through(self, s: int, cache: TorchCache, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that runs segment s: rows (1, N, D) at positions (1, N) -> (1, N, D).

        If a pass of this many rows is recorded, the function uses the recording of this cache.

        rows: N, the number of rows, including padding.
        """
        layers, held = range(self._bounds[s], self._bounds[s + 1]), weakref.ref(cache)  # the cache holds the recording

        def through(h: Tensor, positions: Tensor) -> Tensor:
            cache = held()
            return self._run_layers(layers, h, positions, cache.mask(positions), cache)

        if rows > self.recorded_rows:
            return through
        if s not in cache.recordings:
            cache.recordings[s] = Recorded(through, self.recorded_rows)
        return cache.recordings[s]

    def _run_layers(self, layers: range, h: Tensor, positions: Tensor, mask: Tensor, cache: TorchCache) -> Tensor:
        """Run rows `h` (B, N, D) through these layers, and write their keys and values to the cache. Returns (B, N, D).

        All inputs are on the device of the model's head. The result is there, too.

        mask: boolean attention mask (B, 1, N, C).
        """
        angles = self._decoder.rotary_emb(torch.zeros((), dtype=self._dtype, device=self._device),
                                          position_ids=positions)
        added, device = attention.additive_mask(mask, self._shape.heads // self._shape.kv_heads, h.dtype), None
        for layer_idx in layers:
            if device != self._layer_devices[layer_idx]:
                device = self._layer_devices[layer_idx]
                h, added, positions, *angles = (t.to(device) for t in (h, added, positions, *angles))
                cache.write_at(positions[0])
            h = self._decoder.layers[layer_idx](h, attention_mask=added, position_ids=positions,
                                                position_embeddings=tuple(angles), cache=cache)
        return h.to(self._device)


class UnpreparedLayers(TorchLayers):
    """Runs the layers of a model for only a few passes; otherwise like `TorchLayers`.

    Weights are not packed and kernels are not recorded. In a few passes, both would take longer than they save.
    """

    prepared = False


def _sharing_weights(decoder: nn.Module) -> nn.Module:
    """Copy a decoder's modules and config, but share its weights.

    If modules of the copy are replaced, the original does not change.
    """
    memo = {id(tensor): tensor for tensor in chain(decoder.parameters(), decoder.buffers())}
    return copy.deepcopy(decoder, memo)
