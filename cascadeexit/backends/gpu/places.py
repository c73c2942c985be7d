"""Places: where the rows of a pass are, as tensors that kernels read from device memory.

A place is a row's position in its text and its slot in the cache.

Letters: N rows, T tiles of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascadeexit.backends.cache import KVCache
from cascadeexit.backends.gpu.launches import ROWS, tiles

_CACHE = 4                      # numbers that say where a cache is
_CHAINS: dict[int, Tensor] = {}         # buffers of `_from_zero`: making one takes longer than copying it


@dataclass(frozen=True)
class Places:
    """Places of N rows: their positions in the text, their slots in the cache, and their paths in a draft tree.

    The address of the cache is included. All tensors are views of one buffer, so one copy transfers all of them.
    Attention works on tiles of `tile` rows. Usually a tile is 16 rows of one text, which are consecutive or form a
    tree. In a batch, each row belongs to a different text. Then a tile is one row.
    """

    buffer: Tensor      # int64; all but `cache` is viewed as int32
    cache: Tensor       # (4,) addresses of keys and values, capacity, how many numbers a layer's keys have
    count: Tensor       # (1,) number of rows
    positions: Tensor   # (N,) in the text
    slots: Tensor       # (N,) in the cache
    lanes: Tensor       # (N,) number of the text in a batch
    tokens: Tensor      # (N,) token ids, for recordings that begin with embeddings
    paths: Tensor       # (N, 16) slots of the positions from firsts[tile] on, on the path that ends in this row
    firsts: Tensor      # (T,) first position of the tile; all its rows see the positions before it
    begins: Tensor      # (T,) the first position that is read
    tile: int

    @classmethod
    def over(cls, buffer: Tensor, rows: int, tile: int = ROWS) -> "Places":
        """Make places whose tensors are views of an existing buffer of `size(rows, tile)` int64 elements."""
        parts = buffer[_CACHE:].view(torch.int32)[:sum(_sizes(rows, tile))]
        count, positions, slots, lanes, tokens, paths, firsts, begins = parts.split(_sizes(rows, tile))
        paths = paths.view(-1, ROWS)
        return cls(buffer, buffer[:_CACHE], count, positions, slots, lanes, tokens, paths, firsts, begins, tile)

    @staticmethod
    def size(rows: int, tile: int = ROWS) -> int:
        """Return how many int64 numbers a buffer needs for the places of this many rows."""
        return _CACHE + -(-sum(_sizes(rows, tile)) // 2)

    def of(self, cache: KVCache) -> "Places":
        """Make these places refer to a cache: write its addresses and sizes into the buffer. Returns this object."""
        self.cache.copy_(torch.tensor([cache.keys.data_ptr(), cache.values.data_ptr(), cache.capacity,
                                       cache.keys[0].numel()]))
        return self

    def to(self, device: torch.device) -> "Places":
        """Copy the places to a device without waiting for the transfer. Returns the copy.

        If the device is a CPU, this returns the object itself.
        """
        if device.type == "cpu":
            return self
        return Places.over(self.staged(device).to(device, non_blocking=True), len(self.positions), self.tile)

    def staged(self, device: torch.device) -> Tensor:
        """Return the buffer of these places, ready for a copy to this device in the background.

        For CUDA, the result is a copy of the buffer in pinned memory. For other devices, it is the buffer itself.
        """
        return self.buffer.pin_memory() if device.type == "cuda" else self.buffer


def chain(start: int, n: int, rows: int | None = None) -> Places:
    """Make places for the next n positions of a text that has `start` positions in the cache.

    rows: number of rows for which the buffer has room, at least n; None for n.
    """
    places = _from_zero(rows or n)
    places.count[0] = n
    for view in (places.positions, places.slots, places.paths, places.firsts):
        view += start
    return places


def _from_zero(rows: int) -> Places:
    """Make places for the positions 0, ..., rows - 1 of a text."""
    if rows not in _CHAINS:
        places, at = _empty(rows), torch.arange(rows, dtype=torch.int32)
        places.positions[:], places.slots[:], places.firsts[:] = at, at, at[::ROWS]
        places.paths[:] = (at // ROWS * ROWS)[:, None] + torch.arange(ROWS, dtype=torch.int32)
        _CHAINS[rows] = places.buffer
    return Places.over(_CHAINS[rows].clone(), rows)


def tree(start: int, parents: Sequence[int], rows: int | None = None) -> Places:
    """Make places for a draft tree of at most 16 rows, after a text that has `start` positions in the cache.

    Args:
        parents: row r follows row parents[r], and parents[r] < r. Row 0 has parent -1 and follows the last position in
            the cache.
        rows: number of rows for which the buffer has room; None for the rows of the tree.

    Raises ValueError if the tree has more than 16 rows.
    """
    n = len(parents)
    if n > ROWS:
        raise ValueError(f"a tree has at most {ROWS} rows on this backend, got {n}")
    places, paths = chain(start, n, rows), []
    for row, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), start + row])
        places.positions[row] = start + len(paths[row]) - 1
        places.paths[row, :len(paths[row])] = torch.tensor(paths[row], dtype=torch.int32)
    return places


def batch(start: int, begins: Sequence[int]) -> Places:
    """Make places for the next row of each text of a batch. All rows are in slot `start` of their texts.

    begins: for each text, the first slot that is read.
    """
    places = _empty(len(begins), 1)
    places.count[0], places.lanes[:] = len(begins), torch.arange(len(begins))
    places.begins[:] = torch.tensor(begins)
    for view in (places.positions, places.slots, places.firsts, places.paths):
        view[:] = start
    return places


def _empty(rows: int, tile: int = ROWS) -> Places:
    return Places.over(torch.zeros(Places.size(rows, tile), dtype=torch.int64), rows, tile)


def _sizes(rows: int, tile: int) -> list[int]:
    """Return how many int32 numbers of the buffer each tensor has, in order from `count` to `begins`."""
    many = tiles(rows) if tile == ROWS else rows
    return [1, rows, rows, rows, rows, rows * ROWS, many, many]
