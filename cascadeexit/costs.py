"""Costs: what a run computes and reads. Functions that do the work add to a meter; its owner takes the counts."""

from dataclasses import dataclass

from cascadeexit.events import Span


@dataclass(frozen=True)
class Costs:
    """Reference for the costs of a run: bytes per token in `full`, and the depth of each segment."""

    full_token_bytes: int               # weight bytes that one token of `full` reads: layers and head
    depths: tuple[float, ...]           # share of the layers below each segment's end; the last is 1.0


class Meter:
    """Counts the bytes of weights that are read, and lists the spans of segments that run.

    Only one caller, the one that makes events, may use `taken`.
    """

    def __init__(self):
        self._read = 0
        self._spans: list[Span] = []

    def add(self, read: int) -> None:
        """Add this number of bytes that were read."""
        self._read += read

    def ran(self, span: Span) -> None:
        """Add segments that ran."""
        self._spans.append(span)

    def taken(self) -> tuple[int, tuple[Span, ...]]:
        """Return the number of bytes that were read, and the spans that ran, since the last call of `taken`."""
        taken = self._read, tuple(self._spans)
        self._read, self._spans = 0, []
        return taken
