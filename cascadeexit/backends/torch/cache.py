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
        self.recordings: dict = {}              # of work on these very buffers, by segment
        self._slots = torch.arange(capacity, device=device)             # (C,)
        self._at: Tensor | None = None                                  # (N,), the slots that `update` writes

    def positions(self, layer_idx: int, n: int) -> Tensor:
        """Return the n positions that follow what this layer holds: (1, N). Raises ValueError when they do not fit."""
        start = self.room(layer_idx, n)
        return self._slots[None, start:start + n]

    def write_at(self, positions: Tensor) -> None:
        """Let the next `update` of each layer write into these slots (N,)."""
        self._at = positions

    def mask(self, positions: Tensor) -> Tensor:
        """Make the attention mask (1, 1, N, C) of rows at positions (1, N): True for every slot up to the row's own.

        Always explicit and always over the whole buffer: transformers' SDPA path with no mask keeps only the first N
        keys, and slicing the buffer to its length makes kernels round differently from step to step.
        """
        return (self._slots[None] <= positions.T)[None, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, N, d) and return the layer's whole buffers (B, H, C, d).

        The length does not move: padded rows are written too, and only `advance` makes rows real.
        """
        buffers = self.keys[layer_idx], self.values[layer_idx]
        for buffer, new in zip(buffers, (keys, values)):
            buffer.index_copy_(2, self._at, new)
        return buffers

    def clear(self) -> None:
        """Make the cache as new, in the same memory."""
        self.truncate(0)
        self.keys.zero_()
        self.values.zero_()


class SpreadCache(TorchCache):
    """A `TorchCache` for layers on several devices: each layer's buffers lie where the layer runs.

    Args:
        devices: device of each layer. Positions and masks are made on the device `home`.
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
        """Take over the contents of a cache that has no more slots than this one."""
        for ours, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values)):
            ours[:, :, :other.capacity] = theirs
        self.lengths = list(other.lengths)

    def clear(self) -> None:
        """Make the cache as new, in the same memory."""
        self.truncate(0)
        for buffer in (*self.keys, *self.values):
            buffer.zero_()
