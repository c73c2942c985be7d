"""KVCache: preallocated keys and values with one length for each layer.

It knows positions; it does not know what a layer computes. Rollback is subtraction: lengths move, tensors stay.

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
        """Positions of this layer that hold real tokens."""
        return self.lengths[layer_idx]

    def room(self, layer_idx: int, n: int) -> int:
        """Return the slot at which this layer's next n positions begin. Raises ValueError when they do not fit."""
        start = self.lengths[layer_idx]
        if start + n > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {start} are used and {n} more were asked "
                             "for: make it with a larger capacity")
        return start

    def claim(self, layers: range, n: int) -> int:
        """Make n more positions real in these layers and return the slot where they begin.

        Raises ValueError when they do not fit.
        """
        start = self.room(layers[0], n)
        self.advance(layers, n)
        return start

    def advance(self, layers: range, n: int) -> None:
        """Make the first n rows that were written last in these layers real."""
        for layer_idx in layers:
            self.lengths[layer_idx] += n

    def copy_from(self, other: "KVCache") -> None:
        """Take over the contents of a cache that has no more slots than this one."""
        self.keys[:, :, :, :other.capacity] = other.keys
        self.values[:, :, :, :other.capacity] = other.values
        self.lengths = list(other.lengths)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on, in every layer."""
        self.lengths = [min(held, length) for held in self.lengths]
