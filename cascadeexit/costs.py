"""Costs: bytes of weights that a run reads. Functions that read weights add to a meter; one owner reads it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Cost of a token in `full`, and depth of each segment: the reference for a run's costs."""

    full_token_bytes: int               # weight bytes that one token of `full` reads: layers and head
    depths: tuple[float, ...]           # share of the layers below each segment's end; the last is 1.0


class Meter:
    """Counts bytes of weights that were read. `taken` belongs to one owner, who turns them into events."""

    def __init__(self):
        self.total = 0
        self._taken = 0

    def add(self, read: int) -> None:
        """Count bytes that were read."""
        self.total += read

    def taken(self) -> int:
        """Return the bytes that were read since the last call."""
        new, self._taken = self.total - self._taken, self.total
        return new
