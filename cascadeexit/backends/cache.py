"""KVCache: preallocated keys and values, with a length for each layer.

It manages positions and does not depend on what a layer computes. A rollback lowers the lengths and leaves the tensors.

Letters: L layers, B texts, H key-value heads, C capacity in positions, W numbers (or bytes) of a key or a value.
"""

import torch

from cascadeexit.backends import memory


class KVCache:
    """Keys and values (L, B, H, C, W) of one sequence, or of B sequences of equal length.

    Args:
        widths: W of a key and of a value.
    """

    def __init__(self, num_layers: int, num_heads: int, widths: tuple[int, int], capacity: int, *, batch: int = 1,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        # Zeros, not empty: slots past a layer's length are masked, but NaN times zero would still be NaN.
        self.keys, self.values = (memory.zeros((num_layers, batch, num_heads, capacity, width), dtype, device)
                                  for width in widths)
        self.capacity = capacity
        self.lengths = [0] * num_layers

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def length(self, layer_idx: int) -> int:
        """Return the number of positions of this layer that hold real tokens."""
        return self.lengths[layer_idx]

    def room(self, layer_idx: int, n: int) -> int:
        """Return the slot at which this layer's next n positions begin. Raises ValueError when they do not fit."""
        start = self.lengths[layer_idx]
        if start + n > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {start} are used and {n} more were asked "
                             "for: make it with a larger capacity")
        return start

    def claim(self, layers: range, n: int) -> int:
        """Reserve the next n positions in these layers. Returns the slot at which they begin.

        Raises ValueError when they do not fit.
        """
        start = self.room(layers[0], n)
        self.advance(layers, n)
        return start

    def advance(self, layers: range, n: int) -> None:
        """Increase the length of these layers by n, which makes the next n rows in their buffers real positions."""
        for layer_idx in layers:
            self.lengths[layer_idx] += n

    def copy_from(self, other: "KVCache") -> None:
        """Copy the contents of another cache, whose capacity may not be larger than this one's."""
        self.keys[:, :, :, :other.capacity] = other.keys
        self.values[:, :, :, :other.capacity] = other.values
        self.lengths = list(other.lengths)

    def truncate(self, length: int) -> None:
        """Remove every position from `length` on, in every layer."""
        self.lengths = [min(held, length) for held in self.lengths]
