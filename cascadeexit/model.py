"""SegmentedModel: a frozen transformers decoder cut at its exits.

The only file of the core that knows transformers' module layout. Exits after layers 9, 17, 24 of 30 give the
bounds (0, 9, 17, 24, 30) and four segments. A segment takes hidden rows in and gives hidden rows out; embedding
and vocabulary projection are separate calls, so their cost is visible where they are made.

Row results of stock kernels depend on how many rows a pass has. Passes padded to the same row bucket over one masked
buffer agree bitwise, so decoding and verification always use those buckets. On a CPU in bf16 the layers run in our own
kernels (kernels.py), whose rows do not depend on each other at all.

Letters: N rows in the pass, D hidden size, V vocabulary, C cache capacity, S segments.
"""

import hashlib
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cascadeexit import graphs
from cascadeexit.cache import KVCache
from cascadeexit.graphs import Replayed
from cascadeexit.kernels import Choice, NativeLayers, NativeLinear, NativeNorm, NativeScreen
from cascadeexit.linear import pack, pack_stock
from cascadeexit.sampling import argmax
from cascadeexit.states import Hidden, tensor_of

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
_REPLAYED_CAPACITY = 1024       # a recording is for one cache, so few sizes are best; unused slots cost little to read
_IDLE_CACHES = 4
_ROW_COST = 0.02                # with stock kernels and on a GPU, where a bucket of rows costs what one of them does
_FEW_ROWS = 8
_LATE_ROW_COST = 0.1            # of a row beside so many or more
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def check_supported(config) -> None:
    """Raise ValueError with the reason when this architecture cannot be cut (a transformers config)."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in SUPPORTED:
        raise ValueError(f"model type '{kind}' is not supported: CascadeExit runs decoder layers one by one and knows "
                         f"the layout of {', '.join(SUPPORTED)}. Pick a model of one of these types.")
    sliding = any(t != "full_attention" for t in getattr(config, "layer_types", None) or ())
    if sliding or (kind == "mistral" and getattr(config, "sliding_window", None)):
        raise ValueError(f"this {kind} model uses sliding-window attention, which is not supported: its layers would "
                         "need masks of different widths. Pick one with full attention in every layer.")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _STATIC_ROPE:
        raise ValueError(f"rotary embedding type '{rope}' is not supported: its angles change with the length of the "
                         f"text, so cached keys would go stale. Supported: {', '.join(_STATIC_ROPE)}.")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None) -> Tensor:
    """Attention in which the query heads of a group share their keys as rows of one head: (B, H, N, d).

    Nothing is repeated in memory: of 9 query heads on 3 key-value heads, each key-value head sees 3 N query rows.

    Args:
        query: (B, H, N, d); key, value: (B, K, >= C, d) with K dividing H; slots from C on are not looked at.
        mask: (B, 1, H / K * N, C), added to the scores; a group's heads one after another (`additive_mask`).
    """
    (b, _, n, d), slots = query.shape, mask.shape[3]
    rows = query.reshape(b, key.shape[1], -1, d)                                            # (B, K, H / K * N, d)
    out = F.scaled_dot_product_attention(rows, key[:, :, :slots], value[:, :, :slots], attn_mask=mask, scale=scaling)
    # Not `view`: the memory-efficient kernel of CUDA, which a mask selects, returns a transposed layout.
    return out.reshape(b, -1, n, d)


def additive_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, N, C), True where a row may look -> 0 and -inf for each of a group's heads: (B, 1, groups * N, C)."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf).repeat(1, 1, groups, 1)


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                      scaling: float | None = None, **kwargs) -> tuple[Tensor, None]:
    """`attend` for transformers' layers, called with an `additive_mask`.

    Any other mask comes from the model called as a whole, and transformers' own attention answers.
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is None or attention_mask.shape[2] != groups * query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


class SegmentedModel:
    """A causal language model whose layers run in segments between exits.

    Args:
        model: a transformers *ForCausalLM of a supported type; it is put in eval mode and frozen. On a CPU its
            layers are taken over by packed ones; elsewhere its attention is set to `grouped_attention`.
        exit_layers: numbers of layers after which an exit sits, ascending, each in 0..num_layers-1. An exit after
            layer 0 reads the token's embedding, and the carried state if it has one.
        name: short name for messages and artifacts.
        native: use our own kernels where they fit.

    Raises ValueError for an unsupported architecture or bad exit layers.
    """

    def __init__(self, model, exit_layers: Sequence[int], *, name: str = "", native: bool = True):
        check_supported(model.config)
        num_layers = model.config.num_hidden_layers
        bounds = (0, *exit_layers, num_layers)
        if any(a >= b for a, b in zip((-1, *bounds[1:]), bounds[1:])):
            raise ValueError(f"exit layers must ascend within 0..{num_layers - 1}, got {tuple(exit_layers)}")
        self.name = name or model.config.model_type
        self.bounds = bounds
        self.config = model.config
        self.base = model.eval().requires_grad_(False)
        model.set_attn_implementation("grouped")
        layers = model.model.layers
        self.segment_bytes = tuple(sum(p.nbytes for layer in layers[a:b] for p in layer.parameters())
                                   for a, b in zip(bounds, bounds[1:]))
        head = model.lm_head
        self.device, self.dtype, self.vocab_size = head.weight.device, head.weight.dtype, head.weight.shape[0]
        self.head_bytes = head.weight.nbytes        # read by one vocabulary projection
        if self.device.type == "meta":
            raise ValueError("the vocabulary projection is not in memory: the device_map must put lm_head on a device")
        self.weight_bytes = sum(self.segment_bytes) + self.head_bytes       # of the model, in its dtype
        self.head = pack(head.weight, head.bias)    # the vocabulary projection: normed rows (..., D) -> (..., V)
        self._native: NativeLayers | None = None
        self.embeds_by_head = False                 # the packed head gives the embeddings, too
        self.norm = model.model.norm                # (..., D) -> (..., D), before every head
        self.norm_weight = model.model.norm.weight
        spread = hasattr(model, "hf_device_map")    # then accelerate's hooks, on the modules, bring weights and rows
        if native and not spread and NativeLayers.fits(layers, self.head_dim):
            cosines, sines = (t[0, :, :self.head_dim // 2] for t in model.model.rotary_emb(
                torch.zeros((), dtype=torch.float32), position_ids=torch.arange(self.max_positions)[None]))
            self._native = NativeLayers(layers, model.config, self.head_dim, cosines, sines)
            self.segment_bytes = tuple(sum(self._native.layer_bytes[a:b]) for a, b in zip(bounds, bounds[1:]))
            # A weight that was loaded is a view of the whole mapped file: a copy lets go of it.
            self.norm_weight.data = self.norm_weight.detach().clone()
            self.norm = NativeNorm(self.norm_weight, model.config.rms_norm_eps)
            # All these weights live in packed copies now.
            model.model.layers = torch.nn.ModuleList()
            self.embeds_by_head = head.weight is model.model.embed_tokens.weight
            if self.embeds_by_head:
                model.model.embed_tokens = torch.nn.Identity()
            model.lm_head = torch.nn.Identity()
        for layer in () if spread else model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for child, module in list(block.named_children()):
                    if isinstance(module, torch.nn.Linear):
                        setattr(block, child, pack_stock(module.weight, module.bias))
        self.replays = not spread and graphs.wanted(self.device)
        self._idle_caches: list[KVCache] = []
        self._caches_turn = threading.RLock()       # a run may end, and give its cache back, wherever memory is tidied
        # Stock kernels, CPU: every multiple of 4 rows up to 40 agrees bitwise. GPU kernels vary more with shape: one
        # bucket for all. Our own: a row does not depend on the others.
        self.row_multiple, self.max_verify_rows = (
            (16, 16) if self.device.type == "cuda" else (4, 32) if self._native is None else (1, 32))
        self._project = self.head
        if self.replays:
            self._project, self.norm = (Replayed(f, self.row_multiple) for f in (self.head, self.norm))

    # -- shape and place ------------------------------------------------------------------------------------------

    @property
    def pass_bytes(self) -> int:
        """Weight bytes that one pass through all layers reads: fewer than they have where they are kept in 12 bits."""
        return sum(self.segment_bytes)

    @property
    def num_segments(self) -> int:
        return len(self.bounds) - 1

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return self.bounds[1:-1]

    @property
    def num_layers(self) -> int:
        return self.bounds[-1]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.hidden_size // self.num_heads

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection, shared by every exit: (V, D). Made anew from our own kernels' packed copy."""
        if isinstance(self.base.lm_head, torch.nn.Identity):
            return self.head.rows(range(self.vocab_size)).tensor()[0]
        return self.base.lm_head.weight

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        ids = self.base.generation_config.eos_token_id
        if ids is None:
            ids = self.config.eos_token_id
        return frozenset(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])

    @cached_property
    def head_fingerprint(self) -> str:
        """SHA-256 of the head in bf16: tells which weights exits were trained on, whatever dtype is loaded."""
        weight = self.head_weight.detach().to("cpu", torch.bfloat16).contiguous()
        return hashlib.sha256(weight.view(torch.uint8).numpy()).hexdigest()

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise ValueError for token ids outside the vocabulary: kernels would read memory that is not theirs."""
        bad = [i for i in ids if not 0 <= i < self.vocab_size]
        if bad:
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {bad[:5]}")

    # -- computing ------------------------------------------------------------------------------------------------

    @property
    def native(self) -> bool:
        """True where our own kernels run the layers."""
        return self._native is not None

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for at least `capacity` positions; rows of padding need room too (see `pad`)."""
        if self._native is not None:
            return self._native.new_cache(capacity, batch)
        step = _REPLAYED_CAPACITY if self.replays and batch == 1 else 16
        capacity = -(-capacity // step) * step
        with self._caches_turn:
            for cache in self._idle_caches:
                if cache.capacity == capacity and cache.keys.shape[1] == batch:
                    self._idle_caches.remove(cache)
                    return cache
        return KVCache(self.num_layers, self.num_kv_heads, self.head_dim, capacity, batch=batch, dtype=self.dtype,
                       device=self.device)

    def reuse(self, cache: KVCache) -> None:
        """Nobody reads this cache any more: where work on it was recorded, the next run of its size takes it over."""
        if self.replays:
            with torch.inference_mode():        # as it was written
                cache.clear()
            with self._caches_turn:
                self._idle_caches.insert(0, cache)
                del self._idle_caches[_IDLE_CACHES:]

    def pad(self, n: int) -> int:
        """n rounded up to the row bucket."""
        return -(-n // self.row_multiple) * self.row_multiple

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Token ids (N,) -> hidden rows (1, N, D)."""
        return tensor_of(self.enter(ids))

    def enter(self, ids: Sequence[int] | Tensor) -> Hidden:
        """The same as `States` where our own kernels hold the embeddings: so are then the rows after each segment."""
        if self.embeds_by_head:
            return self.head.rows(ids.tolist() if isinstance(ids, Tensor) else ids)
        return self.base.model.embed_tokens(torch.as_tensor(ids, device=self.device).view(1, -1))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding at these positions (B, N): (B, N, d) each."""
        return self.base.model.rotary_emb(torch.zeros((), dtype=self.dtype, device=self.device), position_ids=positions)

    def run_layers(self, layers: range, h: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """Hidden rows (B, N, D) through some layers, writing their keys and values into the cache.

        mask: (B, 1, N, C), True where a row may look.
        """
        cache.at = positions[0]
        angles = self.angles(positions)
        added = additive_mask(mask, self.num_heads // self.num_kv_heads, h.dtype)
        for layer_idx in layers:
            h = self.base.model.layers[layer_idx](h, attention_mask=added, position_ids=positions,
                                                  position_embeddings=angles, cache=cache)
        return h

    def run_segment(self, s: int, h: Hidden, cache: KVCache, parents: Sequence[int] | None = None) -> Hidden:
        """The next N rows (1, N, D) of segment s, in order, through its layers: (1, N, D). As `run_segments`."""
        return self.run_segments(range(s, s + 1), h, cache, parents)[0]

    def run_segments(self, segments: range, h: Hidden, cache: KVCache,
                     parents: Sequence[int] | None = None) -> list[Hidden]:
        """The next N rows (1, N, D) of the first of these segments, through all: the rows after each, (1, N, D).

        Rows are padded to the bucket; padding is written past the real rows, masked, and overwritten later.

        parents: where `branches`; the rows are a tree, row r going on from row parents[r] < r, and row 0, with parent
            -1, from what the cache holds. `keep` makes one of its paths the text.
        """
        n, bounds = h.shape[1], self.bounds[segments.start:segments.stop + 1]
        if self._native is not None and bounds[0] < bounds[-1]:
            start = cache.claim(range(bounds[0], bounds[-1]), n)
            return self._native.run(bounds, h, cache, start, parents=parents)
        out = []
        for s in segments:
            if layers := range(self.bounds[s], self.bounds[s + 1]):
                padded = self.pad_rows(h)
                positions = cache.positions(layers[0], padded.shape[1])
                h = self._through(s, cache, padded.shape[1])(padded, positions)[:, :n]
                cache.advance(layers, n)
            out.append(h)
        return out

    def _through(self, s: int, cache: KVCache, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
        """What takes rows (1, N, D) at positions (1, N) through a segment, recorded where that is possible."""
        layers, held = range(self.bounds[s], self.bounds[s + 1]), weakref.ref(cache)    # the cache holds the recording

        def through(h: Tensor, positions: Tensor) -> Tensor:
            cache = held()
            return self.run_layers(layers, h, positions, cache.mask(positions), cache)

        if not self.replays or rows > self.row_multiple:
            return through
        if s not in cache.replayed:
            cache.replayed[s] = Replayed(through, self.row_multiple)
        return cache.replayed[s]

    def row_cost(self, rows: int) -> float:
        """What one more row costs in a pass of so many, in passes of one row: measured."""
        if self._native:
            return self._native.row_cost(rows)
        return _ROW_COST if rows < _FEW_ROWS else _LATE_ROW_COST

    @property
    def branches(self) -> bool:
        """True where the rows of a pass may be a tree, bitwise as if each of its paths were the text."""
        return self.native

    def keep(self, cache: KVCache, start: int, path: Sequence[int]) -> None:
        """Of a tree of rows after `start` positions, keep one path, row numbers ascending from 0; the rest goes."""
        if list(path) != list(range(len(path))):
            self._native.keep(cache, start, path)
        cache.truncate(start + len(path))

    def run_batch(self, s: int, h: Tensor, begins: Sequence[int], cache: KVCache) -> Tensor:
        """The next position of B texts at once, through segment s: rows (1, B, D) -> (1, B, D).

        begins: where each text begins in its part of the cache (made for `batch` B); earlier slots are not seen.
        """
        layers = range(self.bounds[s], self.bounds[s + 1])
        if not layers:
            return h
        if self._native is not None:
            return self._native.run(self.bounds[s:s + 2], h, cache, cache.claim(layers, 1), begins=begins)[0]
        positions = cache.positions(layers[0], 1)                                               # (1, 1)
        near = torch.arange(-(-(cache.length(layers[0]) + 1) // 64) * 64, device=h.device)[:cache.capacity]
        mask = (near >= torch.tensor(begins, device=h.device)[:, None]) & (near <= positions)
        out = self.run_layers(layers, h.transpose(0, 1), positions, mask[:, None, None], cache)
        cache.advance(layers, 1)
        return out.transpose(0, 1)

    def logits(self, h: Hidden) -> Tensor:
        """Hidden rows after the last layer (1, N, D) -> the full model's logits (1, N, V)."""
        return self.read(self.norm(h))

    def read(self, normed: Hidden) -> Tensor:
        """The same of rows that went through `norm` already: (1, N, D) -> (1, N, V)."""
        return self._project(self.pad_rows(tensor_of(normed)).to(self.device))[:, :normed.shape[1]]

    def choices(self, normed: Hidden, screen: NativeScreen | None = None) -> list[int]:
        """The likeliest token for each row that went through `norm`: (1, N, D) -> N. The screen is of the head."""
        if isinstance(self.head, NativeLinear):
            return self.head.argmax(normed, screen)
        return argmax(self.read(normed)[0])

    def judges(self, normed: Hidden, screen: NativeScreen | None, logits: bool) -> Sequence[int | Choice | Tensor]:
        """For each row that went through `norm` (1, N, D) what a greedy `Sampler` judges drafts by.

        Its likeliest token; where logits are wanted, too, with them, all (V,) or those that are asked for.
        """
        if not logits:
            return self.choices(normed, screen)
        if screen is None:
            return self.read(normed)[0]
        return [Choice(token, self.head, normed, i) for i, token in enumerate(self.choices(normed, screen))]

    def pad_rows(self, h: Hidden) -> Hidden:
        """(1, N, D) with zero rows up to the row bucket."""
        missing = self.pad(h.shape[1]) - h.shape[1]
        return F.pad(h, (0, 0, 0, missing)) if missing else h
