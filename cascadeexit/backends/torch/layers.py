"""TorchLayers: transformers' own decoder layers, run in segments on any device.

With PyTorch's kernels, a row's result depends on the number of rows in its pass. Results agree bitwise if passes are
padded to a multiple of a fixed number of rows (the row bucket) and attend over the same masked buffer. Decoding and
verification always do both. On CUDA the layers of a segment are recorded once as a CUDA graph for each cache.

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
    """The layers of a transformers model, in segments between `bounds`. `base.LayerStack` describes the methods.

    The model's modules are copied and their weights are shared, so the caller's model does not change. A model that
    accelerate has spread over several devices is used in place, because the hooks that load its weights from main
    memory or disk belong to its modules. Each of its layers runs on its own device, where its part of the cache is.
    After each segment, rows are copied to the head's device.
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
        """Make an empty cache, or reuse one that was released; see `LayerStack.new_cache`.

        If memory is short, unused caches of other sizes are freed first.
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
        """Allocate a cache."""
        if set(self._layer_devices) != {self._device}:
            return SpreadCache(self._layer_devices, self._shape.kv_heads, self._shape.head_dim, capacity, batch=batch,
                               dtype=self._dtype, home=self._device)
        return TorchCache(self._bounds[-1], self._shape.kv_heads, self._shape.head_dim, capacity, batch=batch,
                          dtype=self._dtype, device=self._device)

    def release(self, cache: TorchCache) -> None:
        """Keep a cache and its recordings for a later run of the same size. Without recordings, the cache is freed."""
        if self.recorded_rows:
            with torch.inference_mode():        # the mode in which it was written
                cache.clear()
            with self._caches_turn:
                self._idle_caches.insert(0, cache)
                del self._idle_caches[_IDLE_CACHES:]

    def keep(self, cache: TorchCache, start: int, path: Sequence[int]) -> None:
        """Keep the first rows of a pass; see `LayerStack.keep`. `path` must be 0, 1, 2, ...: no trees here."""
        assert list(path) == list(range(len(path))), "a tree needs a backend with supports_trees"
        cache.truncate(start + len(path))

    # -- computing ------------------------------------------------------------------------------------------------

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Embed token ids (N,) as rows (1, N, D)."""
        return self._decoder.embed_tokens(torch.as_tensor(ids, device=self._device).reshape(1, -1)).to(self._device)

    def norm(self, rows: Tensor) -> Tensor:
        """Apply the final norm: (..., N, D) -> (..., N, D). Rows are padded to the row bucket for it."""
        return self._norm(self._padded(rows))[..., :rows.shape[-2], :].to(self._device)

    def run(self, segments: range, rows: Tensor, cache: TorchCache,
            parents: Sequence[int] | None = None) -> list[Tensor]:
        """Run the next rows (1, N, D) through segments; see `LayerStack.run`.

        Padding rows are written to the cache after the real rows. They are masked, and overwritten later.
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
        """Run the next position of B texts through a segment; see `LayerStack.run_batch`."""
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
        """Pad rows (..., N, D) with zero rows to the size of the row bucket."""
        missing = -rows.shape[-2] % self.row_multiple
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def _through(self, s: int, cache: TorchCache, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Make the function that runs rows (1, N, D) at positions (1, N) through segment s, recorded if possible."""
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
        """Run hidden rows (B, N, D) through layers, and write keys and values into the cache; mask (B, 1, N, C).

        All inputs and the result lie on the head's device.
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
    """Layers for only a few passes: weights are not packed and kernels not recorded, since that would take longer."""

    prepared = False


def _sharing_weights(decoder: nn.Module) -> nn.Module:
    """Copy a decoder's modules and config, but share its weights. Changes to the copy do not change the original."""
    memo = {id(tensor): tensor for tensor in chain(decoder.parameters(), decoder.buffers())}
    return copy.deepcopy(decoder, memo)
