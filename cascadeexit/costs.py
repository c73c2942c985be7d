"""Costs: what a run computes and reads. Functions that do the work add to a meter; one owner reads it."""

from dataclasses import dataclass

from cascadeexit.events import Span


@dataclass(frozen=True)
class Costs:
    """Cost of a token in `full`, and depth of each segment: the reference for a run's costs."""

    full_token_bytes: int               # weight bytes that one token of `full` reads: layers and head
    depths: tuple[float, ...]           # share of the layers below each segment's end; the last is 1.0


class Meter:
    """Counts the bytes of weights that were read, and lists the spans of segments that ran.

    `taken` belongs to one owner, who turns both into events.
    """

    def __init__(self):
        self._read = 0
        self._spans: list[Span] = []

    def add(self, read: int) -> None:
        """Count bytes that were read."""
        self._read += read

    def ran(self, span: Span) -> None:
        """Note segments that ran."""
        self._spans.append(span)

    def taken(self) -> tuple[int, tuple[Span, ...]]:
        """Return the bytes that were read and the spans that ran since the last call."""
        taken = self._read, tuple(self._spans)
        self._read, self._spans = 0, []
        return taken
