"""KVCache: preallocated keys and values with one length per layer.

It knows positions and masks; it does not know what a layer computes. A decoder layer touches it only
through `update`, as transformers' attention does. Rollback is subtraction: lengths move, tensors stay.

Letters: B sequences, H key-value heads, N rows in this pass, C capacity in positions, d head size (in a
cache of our own kernels the bytes of a key or a value).
"""

import torch
from torch import Tensor

from cascadeexit import memory


class KVCache:
    def __init__(self, num_layers: int, num_heads: int, head_dim: int | tuple[int, int], capacity: int, *,
                 batch: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        widths = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
        # Zeros, not empty: slots past a layer's length are masked, but NaN times zero would still be NaN.
        self.keys, self.values = (memory.zeros((num_layers, batch, num_heads, capacity, width), dtype, device)
                                  for width in widths)                  # (L, B, H, C, d)
        self.capacity = capacity
        self.places = self.keys.data_ptr(), self.values.data_ptr()      # their addresses, for our own kernels
        self.lengths = [0] * num_layers
        self.at: Tensor | None = None                                   # (N,), the slots that `update` writes
        self.replayed: dict = {}            # recordings of work on these very buffers, see `SegmentedModel`
        self._slots = torch.arange(capacity, device=device)             # (C,)

    def length(self, layer_idx: int) -> int:
        """Positions of this layer that hold real tokens."""
        return self.lengths[layer_idx]

    def positions(self, layer_idx: int, n: int) -> Tensor:
        """The n positions that follow what this layer holds: (1, N)."""
        start = self._room(layer_idx, n)
        return self._slots[None, start:start + n]

    def _room(self, layer_idx: int, n: int) -> int:
        """Where this layer's next n positions begin."""
        start = self.lengths[layer_idx]
        if start + n > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {start} are used and {n} more were asked "
                             "for: make it with a larger capacity")
        return start

    def mask(self, positions: Tensor) -> Tensor:
        """True where rows at these positions (1, N) may look: every slot up to their own. Shape (1, 1, N, C).

        Always explicit and always over the whole buffer: transformers' SDPA path with no mask keeps only the
        first N keys, and slicing the buffer to its length makes kernels round differently from step to step.
        """
        return (self._slots[None] <= positions.T)[None, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, N, d) into the slots `at`; return the layer's whole buffers (B, H, C, d).

        The length does not move: padded rows are written too, and only `advance` makes rows real.
        """
        # `to`: the layer of a model that is spread over devices may sit elsewhere than the buffers.
        self.keys[layer_idx].index_copy_(2, self.at, keys.to(self.keys))
        self.values[layer_idx].index_copy_(2, self.at, values.to(self.values))
        return self.keys[layer_idx].to(keys.device), self.values[layer_idx].to(keys.device)

    def claim(self, layers: range, n: int) -> int:
        """Make room for n more real positions in these layers, for kernels that write them: where they begin."""
        start = self._room(layers[0], n)
        self.advance(layers, n)
        return start

    def advance(self, layers: range, n: int) -> None:
        """The first n rows written last in these layers are real."""
        for layer_idx in layers:
            self.lengths[layer_idx] += n

    def copy_from(self, other: "KVCache") -> None:
        """Hold what another one holds, which has no more slots than this."""
        self.keys[:, :, :, :other.capacity] = other.keys
        self.values[:, :, :, :other.capacity] = other.values
        self.lengths = list(other.lengths)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def clear(self) -> None:
        """As new, in the same memory."""
        self.truncate(0)
        self.keys.zero_()
        self.values.zero_()

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on, in every layer."""
        self.lengths = [min(held, length) for held in self.lengths]
