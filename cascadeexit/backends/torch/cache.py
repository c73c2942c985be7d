"""TorchCache: a KV cache for transformers' layers, which also makes positions and attention masks.

Letters: B texts, H key-value heads, N rows in this pass, C capacity in positions, d head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeexit.backends.cache import KVCache


class TorchCache(KVCache):
    """A `KVCache` for transformers' layers. Their attention calls `update` to write keys and values."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, capacity: int, *, batch: int = 1,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        super().__init__(num_layers, num_heads, (head_dim, head_dim), capacity, batch=batch, dtype=dtype, device=device)
        self.recordings: dict = {}              # recorded work on these buffers, by segment
        self._slots = torch.arange(capacity, device=device)             # (C,)
        self._at: Tensor | None = None                                  # (N,), the slots that `update` writes

    def positions(self, layer_idx: int, n: int) -> Tensor:
        """Return the next n positions of this layer as a tensor (1, n). Nothing is reserved.

        Raises ValueError if the positions do not fit into the cache.
        """
        start = self.room(layer_idx, n)
        return self._slots[None, start:start + n]

    def write_at(self, positions: Tensor) -> None:
        """Choose the slots (N,) to which later calls of `update` write, until the next call of this method."""
        self._at = positions

    def mask(self, positions: Tensor) -> Tensor:
        """Make the boolean attention mask (1, 1, N, C) for rows at positions (1, N).

        It is True for every slot up to the row's own position. A mask is always used, and always covers all C slots.
        Without a mask, transformers' SDPA attention would read only the first N keys. If the buffers were cut to the
        current length, kernels would round differently from step to step.
        """
        return (self._slots[None] <= positions.T)[None, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, N, d) of a layer to the slots chosen by `write_at`.

        Returns all keys and all values of the layer, (B, H, C, d) each. The length of the layer does not change here,
        because some rows may be padding. A later call of `advance` adds the rows that are not padding.
        """
        buffers = self.keys[layer_idx], self.values[layer_idx]
        for buffer, new in zip(buffers, (keys, values)):
            buffer.index_copy_(2, self._at, new)
        return buffers

    def clear(self) -> None:
        """Set all lengths to 0, and fill keys and values with zeros."""
        self.truncate(0)
        self.keys.zero_()
        self.values.zero_()


class SpreadCache(TorchCache):
    """A `TorchCache` for a model whose layers are on several devices.

    The keys and values of each layer are on the device of this layer.

    Args:
        devices: the device of each layer.
        home: the device of positions and masks.
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
        """Copy keys, values and lengths from `other`, a cache of at most this capacity and otherwise equal shape."""
        for ours, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values)):
            ours[:, :, :other.capacity] = theirs
        self.lengths = list(other.lengths)

    def clear(self) -> None:
        """Set all lengths to 0, and fill keys and values with zeros."""
        self.truncate(0)
        for buffer in (*self.keys, *self.values):
            buffer.zero_()
