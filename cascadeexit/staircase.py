"""Staircase: the state of one sequence, and how many positions each segment has computed.

Tokens that leave at an early exit skip deep segments, so the computed part looks like a staircase:
filled(0) >= filled(1) >= ... The hidden states of skipped positions wait at the next segment. `run` takes all positions
that wait at a range of segments through the layers of these segments. Prefill, a decode step, catch-up of skipped
layers and verification all use this one method.

Letters: N rows in a pass, n rows in a chunk of a prompt, D hidden size, S segments (the last one ends in the full
model).
"""

import weakref
from collections.abc import Iterator, Sequence

from cascadeexit.backends.base import Rows
from cascadeexit.costs import Meter
from cascadeexit.events import Span
from cascadeexit.model import SegmentedModel

_MAX_ROWS = 256             # rows of a chunk of the prompt or of a catch-up pass: bounds the memory of masks and
                            # activations


class Staircase:
    """One sequence: its tokens, its KV cache, and the hidden states that wait at each segment.

    Args:
        capacity: number of positions that the cache has room for.
    """

    def __init__(self, model: SegmentedModel, capacity: int):
        self.model = model
        self.cache = model.layers.new_cache(capacity)
        weakref.finalize(self, model.layers.release, self.cache)
        self.tokens: list[int] = []
        self.waiting: list[Rows | None] = [None] * model.num_segments   # (1, N, D) at segments 1..S-1

    def filled(self, s: int) -> int:
        """Return the number of positions that segment s has computed."""
        if self.model.bounds[s] == self.model.bounds[s + 1]:        # no layers: it has computed all that it passed on
            waiting = self.waiting[s + 1]
            return self.filled(s + 1) + (0 if waiting is None else waiting.shape[1])
        return self.cache.length(self.model.bounds[s])

    def lowest(self) -> int:
        """Return the number of the first segment at which positions wait. At least one position must wait."""
        if self.filled(0) < len(self.tokens):
            return 0
        return next(s for s, rows in enumerate(self.waiting) if rows is not None)

    def run(self, segments: range, parents: Sequence[int] | None = None, meter: Meter | None = None) -> list[Rows]:
        """Run all positions that wait at these segments through the layers of these segments.

        Returns, for each segment, the rows (hidden states) after this segment, (1, N, D) each. The newest position is
        the last row. Neighbouring segments run in one pass if no rows wait between them.

        Args:
            segments: numbers of neighbouring segments.
            parents: makes the rows a tree of drafts, as in `LayerStack.run`; None if each row follows the row before
                it.
            meter: counts the bytes of weights that are read, and lists the segments that run.
        """
        out = []
        while segments:
            first, end = segments[0], next((s for s in segments[1:] if self.waiting[s] is not None), segments.stop)
            span, segments = range(first, end), range(end, segments.stop)
            if first == 0:
                rows = self.model.layers.embed(self.tokens[self.filled(0):])
            else:
                rows, self.waiting[first] = self.waiting[first], None
            out += self._through(span, rows, parents, meter)
            if end < self.model.num_segments:
                before = self.waiting[end]
                self.waiting[end] = out[-1] if before is None else self.model.layers.join([before, out[-1]])
        return out

    def _through(self, span: range, rows: Rows, parents: Sequence[int] | None, meter: Meter | None) -> list[Rows]:
        """Run rows through a span of segments, in several passes if there are more than 256 rows.

        Returns the rows after each segment, (1, N, D) each. The other arguments are those of `run`.
        """
        layers, n = self.model.layers, rows.shape[1]
        parts = [rows[:, a:a + _MAX_ROWS] for a in range(0, n, _MAX_ROWS)] if n > _MAX_ROWS else [rows]
        passed = [layers.run(span, part, self.cache, parents) for part in parts]
        if meter:
            meter.add(len(parts) * sum(layers.segment_bytes[span.start:span.stop]))
            meter.ran(Span(span.start, span.stop, n))
        return self._joined(passed)

    def _joined(self, parts: Sequence[list[Rows]]) -> list[Rows]:
        """Join the results of several passes. Returns the rows after each segment, (1, N, D) each; [] without parts.

        parts: for each pass, its rows after each segment.
        """
        return parts[0] if len(parts) == 1 else [self.model.layers.join(after) for after in zip(*parts)]

    def read(self, tokens: Sequence[int]) -> Iterator[list[Rows]]:
        """Add tokens to the sequence and run them through all segments, in chunks of at most 256 tokens.

        Yields a list for each chunk. It holds, for each segment, the chunk's rows (hidden states) after this segment,
        (1, n, D) each.
        """
        for a in range(0, len(tokens), _MAX_ROWS):
            self.tokens.extend(tokens[a:a + _MAX_ROWS])
            yield self.run(range(self.model.num_segments))

    def prefill(self, tokens: Sequence[int]) -> list[Rows]:
        """Add tokens to the sequence and run them through all segments.

        Returns, for each segment, the rows (hidden states) of these tokens after this segment, (1, N, D) each. Returns
        [] if there are no tokens.
        """
        return self._joined(list(self.read(tokens)))

    def adopt(self, other: "Staircase") -> None:
        """Copy the tokens and the cache of another staircase into this one. In `other`, no rows may wait."""
        self.tokens = list(other.tokens)
        self.cache.copy_from(other.cache)

    def keep(self, drafts: int, path: Sequence[int]) -> None:
        """Remove rejected drafts from the end of the sequence and from the cache. No rows may wait at any segment.

        Args:
            drafts: number of drafts at the end of the sequence.
            path: indices of the accepted drafts, counted from the first draft, ascending.
        """
        assert all(w is None for w in self.waiting), "rows are waiting: keep a path only after the last segment ran"
        if len(path) == drafts:                         # all of them, in their order
            return
        first = len(self.tokens) - drafts
        self.tokens[first:] = [self.tokens[first + i] for i in path]
        # Row 0 of the pass is the token before the drafts.
        self.model.layers.keep(self.cache, first - 1, [0, *(i + 1 for i in path)])
