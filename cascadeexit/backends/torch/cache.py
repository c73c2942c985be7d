"""TorchCache: a cache that transformers' attention writes through `update`, with positions and masks.

Letters: B texts, H key-value heads, N rows in this pass, C capacity in positions, d head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeexit.backends.cache import KVCache


class TorchCache(KVCache):
    """A `KVCache` for transformers' layers."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, capacity: int, *, batch: int = 1,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        super().__init__(num_layers, num_heads, (head_dim, head_dim), capacity, batch=batch, dtype=dtype, device=device)
        self.recordings: dict = {}              # recorded work on these buffers, by segment
        self._slots = torch.arange(capacity, device=device)             # (C,)
        self._at: Tensor | None = None                                  # (N,), the slots that `update` writes

    def positions(self, layer_idx: int, n: int) -> Tensor:
        """Return the next n positions of this layer (1, n). Raises ValueError when they do not fit."""
        start = self.room(layer_idx, n)
        return self._slots[None, start:start + n]

    def write_at(self, positions: Tensor) -> None:
        """Let the next `update` of each layer write into these slots (N,)."""
        self._at = positions

    def mask(self, positions: Tensor) -> Tensor:
        """Make the attention mask (1, 1, N, C) of rows at positions (1, N): True for every slot up to the row's own.

        A mask is always used, and covers the whole buffer. Without a mask, transformers' SDPA path reads only the first
        N keys. With a buffer cut to its length, kernels would round differently from step to step.
        """
        return (self._slots[None] <= positions.T)[None, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, N, d) and return the layer's whole buffers (B, H, C, d).

        The length does not change here, because some rows may be padding. `advance` later adds the real rows.
        """
        buffers = self.keys[layer_idx], self.values[layer_idx]
        for buffer, new in zip(buffers, (keys, values)):
            buffer.index_copy_(2, self._at, new)
        return buffers

    def clear(self) -> None:
        """Empty the cache and fill its memory with zeros."""
        self.truncate(0)
        self.keys.zero_()
        self.values.zero_()


class SpreadCache(TorchCache):
    """A `TorchCache` for layers on several devices: each layer's buffers are on the layer's device.

    Args:
        devices: device of each layer.
        home: device of positions and masks.
    """

    def __init__(self, devices: Sequence[torch.device], num_heads: int, head_dim: int, capacity: int, *, batch: int = 1,
                 dtype: torch.dtype = torch.float32, home: torch.device | str = "cpu"):
        super().__init__(0, num_heads, head_dim, capacity, batch=batch, dtype=dtype, device=home)
        parts = [KVCache(1, num_heads, (head_dim, head_dim), capacity, batch=batch, dtype=dtype, device=device)
                 for device in devices]
        self.keys, self.values = ([getattr(part, name)[0] for part in parts] for name in ("keys", "values"))
        self.lengths = [0] * len(parts)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def copy_from(self, other: "SpreadCache") -> None:
        """Copy the contents of another cache, whose capacity may not be larger than this one's."""
        for ours, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values)):
            ours[:, :, :other.capacity] = theirs
        self.lengths = list(other.lengths)

    def clear(self) -> None:
        """Empty the cache and fill its memory with zeros."""
        self.truncate(0)
        for buffer in (*self.keys, *self.values):
            buffer.zero_()
