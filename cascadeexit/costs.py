"""Costs: counts the bytes of weights that a run reads, and lists the segments that it runs.

Code that reads weights or runs segments reports this to a `Meter`. The decoding loop takes the counts for each event.
"""

from dataclasses import dataclass

from cascadeexit.events import Span


@dataclass(frozen=True)
class Costs:
    """Bytes of weights that the full model reads per token, and the depth at which each segment ends.

    `metrics.summarize` computes a run's `cost` and `average_depth` from these numbers.
    """

    full_token_bytes: int               # weight bytes that one token of `full` reads: layers and head
    depths: tuple[float, ...]           # share of the layers below each segment's end; the last is 1.0


class Meter:
    """Counts the bytes of weights that are read, and lists the spans (neighbouring segments) that run.

    Code that reads weights calls `add`, and code that runs segments calls `ran`. Each call of `taken` sets the count to
    0 and empties the list. So only the code that makes events may call `taken`.
    """

    def __init__(self):
        self._read = 0
        self._spans: list[Span] = []

    def add(self, read: int) -> None:
        """Add `read` bytes of weights to the count."""
        self._read += read

    def ran(self, span: Span) -> None:
        """Add a span of segments to the list of spans that ran."""
        self._spans.append(span)

    def taken(self) -> tuple[int, tuple[Span, ...]]:
        """Return the bytes of weights that were read and the spans that ran since the last call of `taken`."""
        taken = self._read, tuple(self._spans)
        self._read, self._spans = 0, []
        return taken
