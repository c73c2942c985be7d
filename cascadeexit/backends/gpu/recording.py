"""Recordings: CUDA graphs of passes of at most 16 rows. Each graph is made once and works for every cache.

Everything that changes from pass to pass is copied into a few tensors with fixed addresses: the pass's input rows,
their places, and the inputs of an exit. A pass is postponed until its results are read. In decoding, the result
that is needed first is usually that of the exit after the pass. Then one recording runs the pass and the exit together.
This needs only one launch, and one synchronisation to read the exit's result.

Letters: N rows, D hidden size, V words.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cascadeexit.backends.cache import KVCache
from cascadeexit.backends.gpu.launches import ROWS
from cascadeexit.backends.gpu.places import Places
from cascadeexit.backends.graphs import capture


class Recorder:
    """Records GPU work as CUDA graphs, each under a name, and replays it. All graphs share one memory pool.

    If a recording fails, all recordings are deleted, and nothing is recorded any more.

    Attributes:
        error: message of the recording that failed; None if none has failed.
        seconds: time in seconds that all recordings took, including the compilation of their kernels.
    """

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._recordings: dict[Any, tuple[Callable[[], None], Any]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.error: str | None = None

    def record(self, name: Any, work: Callable[[], Any]) -> None:
        """Record the function `work` under this name.

        Each call of `work` must launch the same kernels on the same memory. The result of `work` is kept for
        `replay`. After a failed recording, this method does nothing.
        """
        if self.error is not None:
            return
        started = time.perf_counter()
        try:
            self._recordings[name] = capture(work, self._pool)
        except RuntimeError as error:               # torch.OutOfMemoryError is one
            self._recordings.clear()
            self.error = str(error)
        self.seconds += time.perf_counter() - started

    def __contains__(self, name: Any) -> bool:
        return name in self._recordings

    def replay(self, name: Any) -> Any:
        """Replay the recording of this name. Returns its result, which the next replay may overwrite."""
        replay, out = self._recordings[name]
        replay()
        return out


class Late:
    """Rows that are computed when they are first read: (1, N, D), or (1, D) for a single row.

    They come from a pass that may be postponed, or from the exit after that pass. `base.Rows` describes the methods.

    Args:
        find: function that computes the rows.
        source: the pass that the rows come from; None for embeddings.
        ends: None, except for rows after the last segment of the pass whose last row is the last row of the pass. For
            them, `ends` is `source`.
    """

    __slots__ = "shape", "source", "ends", "found", "_find"

    def __init__(self, shape: tuple[int, ...], find: Callable[[], Tensor], source: "Pass | None",
                 ends: "Pass | None" = None):
        self.shape, self.source, self.ends, self.found, self._find = shape, source, ends, None, find

    @property
    def waits(self) -> bool:
        return self.source is not None and self.source.waits

    def __getitem__(self, at: tuple[slice, int | slice]) -> "Late":
        _, n, d = self.shape
        chosen = range(n)[at[1]]
        shape, last = ((1, d), chosen) if isinstance(chosen, int) else ((1, len(chosen), d), chosen.stop - 1)
        return Late(shape, lambda: self.tensor()[at], self.source, self.ends if last == n - 1 else None)

    def tensor(self) -> Tensor:
        """Return the rows as a tensor of the same shape. If they are not computed yet, compute them now.

        If the pass of these rows is still postponed, it runs now.
        """
        if self.found is None:
            self.keep(self._find())
        return self.found

    def keep(self, found: Tensor) -> None:
        """Store the computed rows. Drop the reference to their pass, so that the pass can be freed."""
        self.found, self._find, self.source, self.ends = found, None, None, None


class Embedded(Late):
    """Embeddings of tokens (1, N, D), looked up when they are first read.

    A recording does not read these rows. The recording itself looks up the embeddings of `tokens`.

    Args:
        tokens: N token ids.
        hidden: hidden size D.
        look_up: function that returns the embeddings (1, N, D) of token ids.
    """

    __slots__ = ("tokens",)

    def __init__(self, tokens: Sequence[int], hidden: int, look_up: Callable[[Sequence[int]], Tensor]):
        super().__init__((1, len(tokens), hidden), lambda: look_up(tokens), None)
        self.tokens = tokens


Hidden = Tensor | Late


def tensor_of(rows: Hidden) -> Tensor:
    """Return rows as a tensor. `Late` rows that are not computed yet are computed now; see `Late.tensor`."""
    return rows.tensor() if isinstance(rows, Late) else rows


def joined(parts: Sequence[Hidden]) -> Hidden:
    """Concatenate several pieces of rows, (1, n, D) each. Returns (1, N, D), where N is the sum of all n.

    This runs no postponed pass: if a piece waits for its pass, the result is `Late`. If the last piece ends with the
    last row of its pass, `Late.ends` of the result is that pass. So one recording can run the pass and the exit after
    it.
    """
    parts = [part if isinstance(part, Late) and part.waits else tensor_of(part) for part in parts]
    late = next((part for part in reversed(parts) if isinstance(part, Late)), None)

    def join() -> Tensor:
        return torch.cat([tensor_of(part) for part in parts], dim=1)

    return join() if late is None else Late(
        (1, sum(part.shape[1] for part in parts), late.shape[2]), join, late.source,
        late.ends if late is parts[-1] else None)


class Pass:
    """One pass of at most 16 rows through consecutive segments. It runs when its results are first read.

    Args:
        passes: the `Passes` of the model. They run this pass by replaying a recording.
        span: number of the first segment, and number of the last segment plus 1.
        rows: input of the pass (1, N, D).
        places: positions and cache slots of the rows.
        cache: the cache that `places` refers to. This reference keeps the cache alive until the pass has run.
    """

    def __init__(self, passes: "Passes", span: tuple[int, int], rows: Hidden, places: Places, cache: KVCache):
        self.passes, self.span, self.input, self.places, self.shape = passes, span, rows, places, rows.shape
        self._cache: KVCache | None = cache
        self._rows: list[Tensor] | None = None

    @property
    def waits(self) -> bool:
        return self._rows is None

    def outputs(self) -> list[Late]:
        """Return the rows after each segment, (1, N, D) each, as `Late` rows. This does not run the pass."""
        last = self.span[1] - self.span[0] - 1
        return [Late(self.shape, lambda i=i: self.rows()[i], self, self if i == last else None)
                for i in range(last + 1)]

    def rows(self) -> list[Tensor]:
        """Return the rows after each segment, (1, N, D) each, as tensors. If the pass has not run yet, run it first."""
        with self.passes.turn:
            if self._rows is None:
                self.take(self.passes.run(self, self.span)[0])
        return self._rows

    @torch.inference_mode()
    def take(self, rows: Sequence[Tensor]) -> None:
        """Store the results of this pass: copy the rows after each segment, (16, D) each, out of the recording.

        Call this before the next replay, which overwrites the rows in the recording.
        """
        self._rows = [after[None, :self.shape[1]].clone() for after in rows]
        self.input = self._cache = None             # no longer needed


class Passes:
    """The recorded passes of one model, their inputs in tensors with fixed addresses, and at most one postponed pass.

    Args:
        hidden: hidden size D.
        spare: places in a cache that no text uses. Before kernels are recorded, they run once and write keys and values
            to this cache.
        launch: function that launches a span of consecutive segments on rows (16, D) at given places. It returns the
            rows after each segment. If the span begins with the first segment, the function ignores the given rows, and
            looks up the embeddings of `places.tokens` instead.
    """

    def __init__(self, recorder: Recorder, hidden: int, dtype: torch.dtype, device: torch.device,
                 spare: Places, launch: Callable[[tuple[int, int], Tensor, Places], list[Tensor]]):
        self.recorder, self._launch, self._device, self._spare = recorder, launch, device, spare
        self.x = torch.zeros(ROWS, hidden, dtype=dtype, device=device)
        self.places = Places.over(torch.zeros(Places.size(ROWS), dtype=torch.int64, device=device), ROWS)
        self.turn = threading.RLock()
        self._waiting: Pass | None = None

    @property
    def usable(self) -> bool:
        """True until a recording fails. After that, everything runs kernel by kernel."""
        return self.recorder.error is None

    def record(self, segments: int) -> None:
        """Record a pass for each span of consecutive segments.

        segments: number of segments of the model.
        """
        for first in range(segments):
            for stop in range(first + 1, segments + 1):
                self.record_span((first, stop))

    def record_span(self, span: tuple[int, int], name: Any = None,
                    after: Callable[[Tensor], Any] | None = None) -> None:
        """Record a pass through a span of consecutive segments, optionally with more work after it.

        A replay returns the rows after each segment, (16, D) each, and the result of `after`. If a pass has n < 16
        rows, only the first n of the 16 rows are real.

        Args:
            span: number of the first segment, and number of the last segment plus 1.
            name: name of the recording; None for the span.
            after: function for the work after the pass. Its argument is the rows (16, D) after the last segment.
        """
        def work() -> tuple[list[Tensor], Any]:
            rows = self._launch(span, self.x, self.places)
            return rows, after(rows[-1]) if after else None

        with self.turn:
            self.settle()
            self.places.buffer.copy_(self._spare.buffer)        # instead of those of a run, whose cache may be freed
            self.recorder.record(name or span, work)

    def last_row(self, rows: Tensor) -> Tensor:
        """Select the last row (1, D) of a pass from the rows (16, D) of its recording.

        A pass of n rows uses the first n rows of the recording.
        """
        return rows.index_select(0, self.places.count - 1)

    def record_top(self, segments: int, after: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        """Record each pass that ends with the last segment once more, this time followed by a call of `after`.

        `AskedTop` replays these recordings.

        Args:
            segments: number of segments of the model.
            after: function that computes normed rows, logits and tokens from the rows after the last segment.
        """
        for first in range(segments):
            self.record_span((first, segments), (first, "top"), after)

    def put_off(self, span: tuple[int, int], rows: Hidden, places: Places, cache: KVCache) -> list[Late]:
        """Postpone a pass. If an earlier pass is still postponed, first run the earlier pass.

        Returns the new pass's rows after each segment, (1, N, D) each, as `Late` rows.
        """
        with self.turn:
            self.settle()
            self._waiting = Pass(self, span, rows, places, cache)
            return self._waiting.outputs()

    def settle(self) -> None:
        """Run the postponed pass, if there is one. Afterwards the caches hold the keys and values of every pass."""
        with self.turn:
            if self._waiting is not None:
                self._waiting.rows()

    @torch.inference_mode()
    def run(self, waiting: Pass, name: Any, fill: Callable[[], None] = lambda: None) -> Any:
        """Run a postponed pass by replaying the recording `name`. Returns the result of the recording.

        fill: function that is called before the replay. It writes those inputs of the recording that are not inputs of
            the pass, such as the inputs of an exit.
        """
        self._waiting = None
        if waiting.span[0] == 0:
            waiting.places.tokens[:waiting.shape[1]] = torch.tensor(waiting.input.tokens)
        else:
            self.x[:waiting.shape[1]].copy_(tensor_of(waiting.input)[0])
        self.places.buffer.copy_(waiting.places.staged(self._device), non_blocking=True)
        fill()
        return self.recorder.replay(name)


class AskedTop(Late):
    """Rows of the full model after the final norm (1, N, D), computed when they are first read.

    If their pass is still postponed, `ask` runs the pass, the final norm and the head in one recording.

    Args:
        rows: the last N rows of a pass, after the last layer.
        norm: function that applies the final norm to these rows.
    """

    __slots__ = ()

    def __init__(self, rows: Late, norm: Callable[[Tensor], Tensor]):
        super().__init__(rows.shape, lambda: norm(rows.tensor()), rows.ends)

    @torch.inference_mode()
    def ask(self) -> tuple[Tensor, list[int]] | None:
        """Run the pass, the final norm and the head in one recording.

        Returns the logits (N, V) and the likeliest token of each row. Returns None if the pass has already run, or if
        there is no such recording.
        """
        if not self.waits:
            return None
        passes, name = self.source.passes, (self.source.span[0], "top")
        with passes.turn:
            if not self.waits or name not in passes.recorder:
                return None
            rows, answer = passes.run(self.source, name)
            part = slice(self.source.shape[1] - self.shape[1], self.source.shape[1])
            self.source.take(rows)
            normed, logits, tokens = (each[part].clone() for each in answer)
            self.keep(normed[None])
            return logits, tokens.tolist()                          # the one synchronisation
