"""Recordings: CUDA graphs of passes of at most 16 rows. They are made once and work for every cache and context.

All inputs that change from pass to pass are in a few tensors with fixed addresses: rows, places, and inputs of an exit.
A pass is postponed until its rows are read. In decoding, the exit after the pass is usually computed next. Then pass
and exit are one recording, with one launch and one synchronisation for the exit's result.

Letters: N rows, D hidden size.
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
    """Records pieces of work by name, in one memory pool, and replays them.

    After a recording has failed, nothing is recorded or replayed any more.

    Attributes:
        error: why a recording failed; None if none has failed.
        seconds: how long all recordings took, compilation of their kernels included.
    """

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._recordings: dict[Any, tuple[Callable[[], None], Any]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.error: str | None = None

    def record(self, name: Any, work: Callable[[], Any]) -> None:
        """Record work that launches the same kernels on the same memory each time, and keep its result for `replay`."""
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
        """Replay a recording. Returns its result, which the next replay overwrites."""
        replay, out = self._recordings[name]
        replay()
        return out


class Late:
    """Rows of a pass that may be postponed, or of the exit after it: (1, N, D), or (1, D) for one row.

    `base.Rows` describes the methods. `tensor` runs the pass if it has not run yet.

    Args:
        find: computes the rows.
        source: the pass that they come from; None for embeddings.
        ends: `source`, if these rows end with the last row of that pass after its last segment; else None.
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
        """Return the rows as a tensor of the same shape."""
        if self.found is None:
            self.keep(self._find())
        return self.found

    def keep(self, found: Tensor) -> None:
        """Store the computed rows and drop the reference to their pass, so that old hidden states can be freed."""
        self.found, self._find, self.source, self.ends = found, None, None, None


class Embedded(Late):
    """Embeddings of tokens (1, N, D). A recording looks up the embeddings itself, from `tokens`.

    Args:
        look_up: computes the embeddings (1, N, D) of tokens.
    """

    __slots__ = ("tokens",)

    def __init__(self, tokens: Sequence[int], hidden: int, look_up: Callable[[Sequence[int]], Tensor]):
        super().__init__((1, len(tokens), hidden), lambda: look_up(tokens), None)
        self.tokens = tokens


Hidden = Tensor | Late


def tensor_of(rows: Hidden) -> Tensor:
    """Return the rows as a tensor. `Late` rows may first have to be computed: then this runs their pass."""
    return rows.tensor() if isinstance(rows, Late) else rows


def joined(parts: Sequence[Hidden]) -> Hidden:
    """Concatenate rows (1, n, D) to (1, N, D). This does not run the pass of postponed rows.

    The last rows of the whole are those of the last part, so an exit after them can still be part of its recording.
    """
    parts = [part if isinstance(part, Late) and part.waits else tensor_of(part) for part in parts]
    late = next((part for part in reversed(parts) if isinstance(part, Late)), None)

    def join() -> Tensor:
        return torch.cat([tensor_of(part) for part in parts], dim=1)

    return join() if late is None else Late(
        (1, sum(part.shape[1] for part in parts), late.shape[2]), join, late.source,
        late.ends if late is parts[-1] else None)


class Pass:
    """One pass of at most 16 rows through a span of segments, postponed until its rows are read.

    Args:
        passes: the recorded passes, which run this one.
        span: number of the first segment, and of the last one plus 1.
        cache: the cache that `places` refers to. This reference keeps it alive until the pass runs.
    """

    def __init__(self, passes: "Passes", span: tuple[int, int], rows: Hidden, places: Places, cache: KVCache):
        self.passes, self.span, self.input, self.places, self.shape = passes, span, rows, places, rows.shape
        self._cache: KVCache | None = cache
        self._rows: list[Tensor] | None = None

    @property
    def waits(self) -> bool:
        return self._rows is None

    def outputs(self) -> list[Late]:
        """Return the rows after each segment, (1, N, D) each, without running the pass."""
        last = self.span[1] - self.span[0] - 1
        return [Late(self.shape, lambda i=i: self.rows()[i], self, self if i == last else None)
                for i in range(last + 1)]

    def rows(self) -> list[Tensor]:
        """Run the pass if it has not run yet. Returns the rows after each segment, (1, N, D) each."""
        with self.passes.turn:
            if self._rows is None:
                self.take(self.passes.run(self, self.span)[0])
        return self._rows

    @torch.inference_mode()
    def take(self, rows: Sequence[Tensor]) -> None:
        """Copy the rows (16, D) of each segment out of the recording, before the next replay overwrites them."""
        self._rows = [after[None, :self.shape[1]].clone() for after in rows]
        self.input = self._cache = None             # no longer needed


class Passes:
    """Recorded passes of one model, their input tensors with fixed addresses, and at most one postponed pass.

    Args:
        hidden: hidden size D.
        spare: places in a cache that no text uses. Recording runs each kernel once, which writes keys and values there.
        launch: launches a span of segments on rows (16, D) at places, and returns the rows after each. A span that
            begins with the first segment reads the places' tokens instead.
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
        """False after a recording has failed: from then on everything runs kernel by kernel."""
        return self.recorder.error is None

    def record(self, segments: int) -> None:
        """Record every span of segments."""
        for first in range(segments):
            for stop in range(first + 1, segments + 1):
                self.record_span((first, stop))

    def record_span(self, span: tuple[int, int], name: Any = None,
                    after: Callable[[Tensor], Any] | None = None) -> None:
        """Record a span of segments, then `after` on its last rows (16, D). The result is (rows, result of `after`).

        A pass may have fewer than 16 rows, which come first: `last_row` selects the last of them.
        """
        def work() -> tuple[list[Tensor], Any]:
            rows = self._launch(span, self.x, self.places)
            return rows, after(rows[-1]) if after else None

        with self.turn:
            self.settle()
            self.places.buffer.copy_(self._spare.buffer)        # instead of those of a run, whose cache may be freed
            self.recorder.record(name or span, work)

    def last_row(self, rows: Tensor) -> Tensor:
        """Select the last row (1, D) of a pass among the rows (16, D) of a recording. The pass may have fewer rows."""
        return rows.index_select(0, self.places.count - 1)

    def record_top(self, segments: int, after: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        """Record every span that ends with the last segment once more, with the full model's head, for `AskedTop`."""
        for first in range(segments):
            self.record_span((first, segments), (first, "top"), after)

    def put_off(self, span: tuple[int, int], rows: Hidden, places: Places, cache: KVCache) -> list[Late]:
        """Postpone a pass, and run the previously postponed one. Returns the new pass's rows after each segment."""
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
        """Run a pass by replaying the recording `name`, and return its result. `fill` first writes its other inputs."""
        self._waiting = None
        if waiting.span[0] == 0:
            waiting.places.tokens[:waiting.shape[1]] = torch.tensor(waiting.input.tokens)
        else:
            self.x[:waiting.shape[1]].copy_(tensor_of(waiting.input)[0])
        self.places.buffer.copy_(waiting.places.staged(self._device), non_blocking=True)
        fill()
        return self.recorder.replay(name)


class AskedTop(Late):
    """Normed rows of the full model (1, N, D). If their pass is still postponed, `ask` runs pass and head together.

    Args:
        rows: the last rows of the pass, after the last layer.
        norm: applies the final norm to them.
    """

    __slots__ = ()

    def __init__(self, rows: Late, norm: Callable[[Tensor], Tensor]):
        super().__init__(rows.shape, lambda: norm(rows.tensor()), rows.ends)

    @torch.inference_mode()
    def ask(self) -> tuple[Tensor, list[int]] | None:
        """Run pass and head from one recording. Returns logits (N, V) and the likeliest tokens.

        Returns None if the pass has already run, or if there is no recording of it with the head.
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
