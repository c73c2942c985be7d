"""Costs: bytes of weights that a run reads. Functions that read weights add bytes to a meter; its owner takes them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Reference for the costs of a run: bytes per token in `full`, and the depth of each segment."""

    full_token_bytes: int               # weight bytes that one token of `full` reads: layers and head
    depths: tuple[float, ...]           # share of the layers below each segment's end; the last is 1.0


class Meter:
    """Counts the bytes of weights that are read. Only one caller, the one that makes events, may use `taken`."""

    def __init__(self):
        self.total = 0
        self._taken = 0

    def add(self, read: int) -> None:
        """Add this number of bytes that were read."""
        self.total += read

    def taken(self) -> int:
        """Return the number of bytes that were read since the last call of `taken`."""
        new, self._taken = self.total - self._taken, self.total
        return new
