"""KVCache: memory for keys and values, allocated in advance, with a length for each layer.

The cache only manages positions, and does not depend on what a layer computes. A slot is the index of a position in
the cache's tensors. A rollback only lowers the lengths. The keys and values stay in memory.

Letters: L layers, B texts, H key-value heads, C capacity in positions, W elements of one key or one value.
"""

import torch

from cascadeexit.backends import memory


class KVCache:
    """Keys and values of one text, or of B texts of equal length: `keys` and `values`, two tensors (L, B, H, C, W).

    The constructor allocates both tensors, filled with zeros. `lengths` has the number of used positions of each layer.

    Args:
        num_heads: number of key-value heads.
        widths: number of elements of one key, and number of elements of one value.
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
        """Return how many positions of this layer hold real tokens, without padding."""
        return self.lengths[layer_idx]

    def room(self, layer_idx: int, n: int) -> int:
        """Return the slot (index in the cache) at which this layer's next n positions begin. Nothing is reserved.

        Raises ValueError if the positions do not fit into the cache.
        """
        start = self.lengths[layer_idx]
        if start + n > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {start} are used and {n} more were asked "
                             "for: make it with a larger capacity")
        return start

    def claim(self, layers: range, n: int) -> int:
        """Reserve the next n positions in each of these layers. Returns the slot (index) at which they begin.

        The layers must have equal lengths, to which the call adds n.

        Raises ValueError if the positions do not fit into the cache.
        """
        start = self.room(layers[0], n)
        self.advance(layers, n)
        return start

    def advance(self, layers: range, n: int) -> None:
        """Add n to the length of each of these layers, so that the next n positions count as real tokens."""
        for layer_idx in layers:
            self.lengths[layer_idx] += n

    def copy_from(self, other: "KVCache") -> None:
        """Copy keys, values and lengths from `other`, a cache of at most this capacity and otherwise equal shape."""
        self.keys[:, :, :, :other.capacity] = other.keys
        self.values[:, :, :, :other.capacity] = other.values
        self.lengths = list(other.lengths)

    def truncate(self, length: int) -> None:
        """Limit the length of every layer to `length` positions. Keys and values stay in memory."""
        self.lengths = [min(held, length) for held in self.lengths]
