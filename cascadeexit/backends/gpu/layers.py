"""GpuLayers: the decoder layers of a Llama-like model with Triton kernels.

A row's result does not depend on the other rows of its pass. So passes need no padding. The rows of a pass may also be
the branches of a draft tree, or belong to different texts of a batch. The weights of the transformers model are not
copied.

Letters: N rows, T tiles of rows, D hidden size, B texts of a batch, H query heads, K key-value heads, d head size, S
splits of attention, F inner size of the MLP, I inputs, O outputs, V words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cascadeexit.backends.base import Unusable
from cascadeexit.backends.cache import KVCache
from cascadeexit.backends.gpu import kernels, places
from cascadeexit.backends.gpu.launches import (
    KEYS,
    ROWS,
    SPLIT,
    Counts,
    input_block,
    launch,
    output_block,
    power_of_2,
    shrink,
    tiles,
)
from cascadeexit.backends.gpu.places import Places
from cascadeexit.backends.gpu.recording import (
    AskedTop,
    Embedded,
    Hidden,
    Late,
    Passes,
    Recorder,
    joined,
    tensor_of,
)
from cascadeexit.backends.graphs import wanted
from cascadeexit.backends.weights import DecoderShape, layer_weights, outer_weights, rotary_angles

_CAPACITY_STEP = 128
_PROMPT_ROWS = 128              # rows of a pass of a prompt: more need more memory for the splits of attention
_CATCH_UP_ROWS = 4 * ROWS       # in recorded passes: each reads the weights, so more rows are cheaper in one pass
_RECORDED_POSITIONS = 8192      # longest context of a recording: longer ones run kernel by kernel
_ROW_COST = 0.02                # a tile of 16 rows costs about what one of them does


@dataclass(frozen=True)
class Scratch:
    """Memory for the intermediate results of one layer's kernels, for N rows and at most S splits of attention.

    In the shapes, `parts` is the number of groups of 16 query rows in a tile; see `kernels.attend`.
    """

    queries: Tensor     # (N, H d)
    attended: Tensor    # (N, H d)
    inner: Tensor       # (N, F)
    partial: Tensor     # (T, K, parts, S, 16, d) in fp32
    sums: Tensor        # (T, K, parts, S, 16, 2) in fp32


class GpuCache(KVCache):
    """A `KVCache` whose `copy_from` first runs the postponed pass, so that the copied keys and values are complete.

    A postponed pass is a pass that runs only when its results are needed; see `recording.py`.

    Args:
        settle: function that runs the postponed pass, if there is one.
    """

    def __init__(self, *shape, settle: Callable[[], None], **options):
        super().__init__(*shape, **options)
        self._settle = settle

    def copy_from(self, other: KVCache) -> None:
        self._settle()
        super().copy_from(other)


class GpuLayers:
    """Runs embedding, decoder layers and final norm with Triton kernels. `base.LayerStack` describes the methods.

    Args:
        base: a transformers *ForCausalLM for which `GpuBackend.fits` is True.
        bounds: layer numbers at which segments begin and end.
    """

    row_multiple, max_rows, supports_trees = 1, ROWS, True

    def __init__(self, base, bounds: tuple[int, ...]):
        self._shape, self._bounds = DecoderShape.of(base.config), bounds
        self._weights = layer_weights(base)
        outer = outer_weights(base)
        self._embedding, self._norm_weight = outer.embedding.detach(), outer.final_norm.detach()
        self._device, self._dtype = outer.device, outer.dtype
        self.counts = Counts(self._device)
        self._cosines, self._sines = (angles.float().contiguous().to(self._device)
                                      for angles in rotary_angles(base, self._shape))
        self._scale = self._weights[0].scaling
        self.segment_bytes = tuple(sum(layer.nbytes for layer in self._weights[a:b])
                                   for a, b in zip(bounds, bounds[1:]))
        self.passes: Passes | None = None
        if wanted(self._device):
            self._record()

    def _record(self) -> None:
        """Record passes as CUDA graphs, one for each span of consecutive segments.

        Raises Unusable if CUDA graphs cannot be recorded on this device.
        """
        self._recorded_positions = min(self._shape.positions, _RECORDED_POSITIONS)
        scratch = self.scratch(places.chain(0, ROWS), -(-self._recorded_positions // SPLIT))

        def spanned(span: tuple[int, int], x: Tensor, at: Places) -> list[Tensor]:
            x = x if span[0] else F.embedding(at.tokens, self._embedding)
            return self.launch_layers(self._bounds[span[0]:span[1] + 1], x, at, scratch)

        with torch.inference_mode():
            self._spare = self.new_cache(ROWS)
            self.passes = Passes(Recorder(self._device), self._shape.hidden, self._dtype, self._device,
                                 places.chain(0, ROWS).of(self._spare), spanned)
            self.passes.record(len(self._bounds) - 1)
        self._check_recordings()

    def _check_recordings(self) -> None:
        if not self.passes.usable:
            raise Unusable(f"CUDA graphs cannot be recorded here: {self.passes.recorder.error}")

    # -- caches ---------------------------------------------------------------------------------------------------

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        d = self._shape.head_dim
        return GpuCache(self._bounds[-1], self._shape.kv_heads, (d, d), capacity, batch=batch, dtype=self._dtype,
                        device=self._device, settle=self.settle)

    def settle(self) -> None:
        """Run the postponed pass, if there is one; see `Passes.settle`."""
        if self.passes:
            self.passes.settle()

    def release(self, cache: KVCache) -> None:
        """Do nothing. A cache is freed when the last reference to it is gone."""

    def keep(self, cache: KVCache, start: int, path: Sequence[int]) -> None:
        if list(path) != list(range(len(path))):
            self.settle()
            taken = torch.tensor(path, device=self._device) + start
            for part in (cache.keys, cache.values):
                part[:, :, :, start:start + len(path)] = part[:, :, :, taken]
        cache.truncate(start + len(path))

    # -- computing ------------------------------------------------------------------------------------------------

    def embed(self, ids: Sequence[int] | Tensor) -> Hidden:
        if self.passes and self.passes.usable and len(ids) <= ROWS and not isinstance(ids, Tensor):
            return Embedded(list(ids), self._shape.hidden, self._looked_up)
        return self._looked_up(ids)

    def _looked_up(self, ids: Sequence[int] | Tensor) -> Tensor:
        return F.embedding(torch.as_tensor(ids, device=self._device).reshape(1, -1), self._embedding)

    def norm(self, rows: Hidden) -> Hidden:
        ends = rows.ends if isinstance(rows, Late) else None
        if (ends is not None and ends.waits and ends.span[1] == len(self._bounds) - 1 and len(rows.shape) == 3
                and rows.shape[1] <= ends.shape[1]):
            return AskedTop(rows, self._normed)
        return self._normed(tensor_of(rows))

    def _normed(self, rows: Tensor, count: Tensor | None = None) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        count = self.counts(len(flat)) if count is None else count
        return rms_norm(flat, self._norm_weight, self._shape.norm_eps, count).view(rows.shape)

    def record_top(self, head: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> bool:
        """Record each pass that ends with the last segment once more, this time with the final norm and the head.

        Returns True if this backend records passes. Raises Unusable if CUDA graphs cannot be recorded on this device.

        head: function that launches the model's head. It takes normed rows (16, D) and the number of real rows (1,). It
        returns logits (16, V) and tokens (16,).
        """
        if self.passes:
            def answer(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                count = self.passes.places.count
                normed = self._normed(rows, count)
                return normed, *head(normed, count)

            with torch.inference_mode():
                self.passes.record_top(len(self._bounds) - 1, answer)
            self._check_recordings()
        return self.passes is not None

    def run(self, segments: range, rows: Hidden, cache: KVCache, parents: Sequence[int] | None = None) -> list[Hidden]:
        bounds, n = self._bounds[segments.start:segments.stop + 1], rows.shape[1]
        start = self._claim(cache, bounds, n, n if parents is None else 1)
        most = ROWS if parents is not None else _CATCH_UP_ROWS
        if (self.passes and self.passes.usable and n <= most and start + n <= self._recorded_positions
                and (segments.start or isinstance(rows, Embedded))):
            return self._put_off((segments.start, segments.stop), rows, cache, start, parents)
        if parents is not None:
            return self._run(bounds, rows, cache, places.tree(start, parents))
        rows = tensor_of(rows)
        parts = [self._run(bounds, rows[:, a:a + _PROMPT_ROWS], cache,
                           places.chain(start + a, min(n - a, _PROMPT_ROWS))) for a in range(0, n, _PROMPT_ROWS)]
        return parts[0] if len(parts) == 1 else [self.join(after) for after in zip(*parts)]

    def _put_off(self, span: tuple[int, int], rows: Hidden, cache: KVCache, start: int,
                 parents: Sequence[int] | None) -> list[Hidden]:
        """Postpone a recorded pass. Returns the rows after each segment, (1, N, D) each, without computing them.

        More than 16 rows, as in catch-up, become several passes. Only the last of them is postponed. The others run
        now.
        """
        n, parts = rows.shape[1], []
        for a in range(0, n, ROWS):
            some = rows if n <= ROWS else rows[:, a:a + ROWS]
            at = (places.chain(start + a, some.shape[1], ROWS) if parents is None
                  else places.tree(start, parents, ROWS))
            parts.append(self.passes.put_off(span, some, at.of(cache), cache))
        return parts[0] if len(parts) == 1 else [self.join(after) for after in zip(*parts)]

    def run_batch(self, segment: int, rows: Hidden, begins: Sequence[int], cache: KVCache) -> Tensor:
        bounds = self._bounds[segment:segment + 2]
        return self._run(bounds, rows, cache, places.batch(self._claim(cache, bounds, 1, 1), begins))[0]

    def join(self, parts: Sequence[Hidden]) -> Hidden:
        return joined(parts)

    def tensor(self, rows: Hidden) -> Tensor:
        return tensor_of(rows)

    def row_cost(self, rows: int) -> float:
        return _ROW_COST

    def _claim(self, cache: KVCache, bounds: Sequence[int], slots: int, positions: int) -> int:
        """Reserve the next `slots` slots of a cache in the layers from bounds[0] up to, but not including, bounds[-1].

        Returns the first of these slots. Raises ValueError if the cache has too few slots, or if the model has fewer
        than `positions` positions left.
        """
        if bounds[0] == bounds[-1]:
            return 0
        start = cache.room(bounds[0], slots)
        if start + positions > self._shape.positions:
            raise ValueError(f"this model has {self._shape.positions} positions, {start + positions} were asked for")
        cache.advance(range(bounds[0], bounds[-1]), slots)
        return start

    def _run(self, bounds: Sequence[int], rows: Hidden, cache: KVCache, at: Places) -> list[Tensor]:
        """Run rows (1, N, D) through the layers from bounds[0] up to, but not including, bounds[-1].

        Returns a list with the rows (1, N, D) before each of the layers bounds[1:]. Kernels are launched one by one,
        without recordings.

        at: places of the rows.
        """
        self.settle()
        x = tensor_of(rows)[0].to(self._dtype).contiguous()
        scratch = self.scratch(at, int(at.positions.max()) // SPLIT + 1) if bounds[0] < bounds[-1] else None
        return [out[None] for out in self.launch_layers(bounds, x, at.of(cache).to(self._device), scratch)]

    def scratch(self, at: Places, splits: int) -> Scratch:
        """Allocate memory for the intermediate results of a layer that runs rows at the places `at`.

        splits: largest number of splits, of 256 positions each, that a row attends to.
        """
        shape, n = self._shape, len(at.positions)
        parts = tiles(at.tile * (shape.heads // shape.kv_heads))
        of = (len(at.firsts), shape.kv_heads, parts, splits, ROWS)

        def empty(*size: int, dtype: torch.dtype = self._dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=self._device)

        width = shape.heads * shape.head_dim
        return Scratch(empty(n, width), empty(n, width), empty(n, shape.inner),
                       empty(*of, shape.head_dim, dtype=torch.float32), empty(*of, 2, dtype=torch.float32))

    def launch_layers(self, bounds: Sequence[int], x: Tensor, at: Places, scratch: Scratch | None) -> list[Tensor]:
        """Launch the layers from bounds[0] up to, but not including, bounds[-1] on rows (N, D).

        Returns a list with the rows (N, D) before each of the layers bounds[1:]. Only the values in `x` and `at` change
        from pass to pass. So the launches may be recorded.

        Args:
            bounds: layer numbers, ascending.
            x: rows (N, D) before layer bounds[0].
            at: places of the rows.
            scratch: memory from `self.scratch`; None if there is no layer to launch.
        """
        passed = []
        for first, end in zip(bounds, bounds[1:]):
            out = x if first == end else torch.empty_like(x)
            for layer in range(first, end):
                self._launch_layer(layer, x, out, at, scratch)
                x = out
            passed.append(out)
        return passed

    def _launch_layer(self, layer: int, x: Tensor, out: Tensor, at: Places, scratch: Scratch) -> None:
        """Launch the six kernels of one layer on rows x (N, D). They write `out` (N, D), which may be x itself."""
        shape, n, w = self._shape, len(x), self._weights[layer]
        D, H, K, d, eps = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.norm_eps
        parts, splits = scratch.partial.shape[2:4]
        sizes = dict(TILE=at.tile, SPLIT=SPLIT, WIDTH=power_of_2(d))
        biases, norms = (w.q_bias, w.k_bias, w.v_bias), (w.q_norm, w.k_norm)
        launch(kernels.qkv_heads, (tiles(n), H + 2 * K), x, w.attention_norm, w.q, w.k, w.v,
               *(w.q if part is None else part for part in (*biases, *norms)),      # pointers that are never read
               self._cosines, self._sines, scratch.queries, at.cache, layer, at.count, at.positions, at.slots, at.lanes,
               eps, D, H, K, d, SHRINK=shrink(x.dtype), BIAS=w.q_bias is not None,
               HEAD_NORM=w.q_norm is not None, HALF=power_of_2(d // 2), BLOCK=input_block(D, 64), num_warps=4,
               num_stages=4)
        launch(kernels.attend, (K * parts, splits, len(at.firsts)), scratch.queries, at.cache, layer, scratch.partial,
               scratch.sums, at.count, at.positions, at.lanes, at.paths, at.firsts, at.begins, self._scale, H, K, d,
               BLOCK=KEYS, num_warps=4, num_stages=2, **sizes)
        launch(kernels.combine, (tiles(n), H), scratch.partial, scratch.sums, scratch.attended, at.count, at.positions,
               H, K, splits, parts, d, num_warps=4, num_stages=2, **sizes)
        linear(scratch.attended, w.o, at.count, out, bias=w.o_bias, residual=x)
        gated(out, w.gate, w.up, at.count, scratch.inner, gain=w.mlp_norm, eps=eps)
        linear(scratch.inner, w.down, at.count, out, residual=out)


def rms_norm(rows: Tensor, gain: Tensor, eps: float, count: Tensor) -> Tensor:
    """Apply RMSNorm with the weight `gain` (D,) to the first `count` of N rows (N, D). Returns (N, D).

    count: how many rows to compute, as a tensor (1,) in device memory. The other rows of the result are undefined.
    """
    rows = rows.to(gain.dtype).contiguous()
    out = torch.empty_like(rows)
    launch(kernels.rms_norm, (len(rows),), rows, gain, out, count, eps, rows.shape[1],
           BLOCK=min(1024, power_of_2(rows.shape[1])), num_warps=4)
    return out


def linear(x: Tensor, weight: Tensor, count: Tensor, out: Tensor, *, bias: Tensor | None = None,
           residual: Tensor | None = None) -> Tensor:
    """Multiply the first `count` rows of x (N, I) by a weight (O, I). Add the bias and the residual, if given.

    Writes the result to `out` (N, O), and returns `out`.

    count: how many rows to compute, as a tensor (1,) in device memory.
    """
    outputs, inputs = weight.shape
    block = output_block(outputs)
    launch(kernels.linear, (tiles(len(x)), -(-outputs // block)), x, weight, bias, residual, out, count, inputs,
           outputs, BIAS=bias is not None, RESIDUAL=residual is not None, BLOCK_O=block,
           BLOCK=input_block(inputs, 256 if block == 16 else 128), num_warps=4, num_stages=4)
    return out


def gated(x: Tensor, gate: Tensor, up: Tensor, count: Tensor, out: Tensor, *, gain: Tensor | None = None,
          eps: float = 0.0) -> Tensor:
    """Compute silu(gate x) * (up x) for the first `count` rows of x (N, I).

    If `gain` (I,) is given, RMSNorm with this weight is first applied to these rows. Writes the result to `out` (N, F),
    and returns `out`.

    count: how many rows to compute, as a tensor (1,) in device memory.
    """
    width, inputs = gate.shape
    block = output_block(width)
    launch(kernels.gated, (tiles(len(x)), -(-width // block)), x, gain, gate, up, out, count, eps, inputs, width,
           NORM=gain is not None, SHRINK=shrink(x.dtype), BLOCK_F=block, BLOCK=input_block(inputs, 128), num_warps=4,
           num_stages=4)
    return out
