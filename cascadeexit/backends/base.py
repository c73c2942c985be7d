"""Interface of backends to engine, drafting, inspection and training.

A `Backend` computes with one frozen model on its device. Three protocols are all of it that other modules
use: the layer stack, vocabulary heads, and the runtime of trained exits. No code outside `backends` decides by which
kernels run. `cache.py` and `exits.py` beside this file have what all backends share.

A backend guarantees this: a row's result depends neither on the rows beside it, nor on its place among them, nor on
the cache's capacity, nor on the mode. Then `verified` equals `full` bitwise by construction. Where `row_multiple` is 1
that holds for passes of any size. Elsewhere it holds for the layers, the final norm and the full head in passes of at
most `max_rows` rows, which they pad to a multiple of `row_multiple`.

Letters: N rows in a pass, D hidden size, K words of a head, B texts of a batch, E exits but the first.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from cascadeexit.backends.cache import KVCache


class Unusable(RuntimeError):
    """A backend that fits a model turned out not to work on this machine; the next one that fits is taken."""


class Rows(Protocol):
    """Hidden states in the form that a backend keeps them: (1, N, D), or (1, D) for one row.

    rows[:, i] is one row (1, D), rows[:, a:b] a part (1, n, D); neither copies. `LayerStack.tensor` gives a tensor.

    Every method that takes rows also takes a tensor in the model's dtype on its device: training, and the carried state
    after a prompt of one token, use tensors.
    """

    shape: tuple[int, ...]

    def __getitem__(self, at: tuple[slice, int | slice]) -> "Rows": ...


class Choice:
    """The likeliest token of one row of logits, and on demand the logit of any token: choice[token]."""

    __slots__ = "token", "_logit"

    def __init__(self, token: int, logit: Callable[[int], float]):
        self.token, self._logit = token, logit

    def __getitem__(self, token: int) -> float:
        return float(self._logit(token))


class LayerStack(Protocol):
    """Embedding, decoder layers in segments, and the final norm."""

    row_multiple: int
    """Passes are padded to a multiple of so many rows; 1 means that rows are independent as they come."""
    max_rows: int
    """The most rows that one verification pass may have."""
    supports_trees: bool
    """True where the rows of a pass may be a tree of drafts, each path bitwise as if it were the text."""
    segment_bytes: tuple[int, ...]
    """Bytes of weights that one pass through each segment reads."""

    def embed(self, ids: Sequence[int] | Tensor) -> Rows:
        """Embed token ids (N,): rows (1, N, D)."""

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Make an empty cache for at least `capacity` positions of `batch` texts, padding included."""

    def release(self, cache: KVCache) -> None:
        """Take back a cache that is no longer used; the next run may get it."""

    def run(self, segments: range, rows: Rows, cache: KVCache, parents: Sequence[int] | None = None) -> list[Rows]:
        """Run the next N rows (1, N, D) of the first of these segments through all of them.

        Returns the rows after each segment, (1, N, D) each. Keys and values go to the cache.

        Args:
            parents: only where `supports_trees`. The rows are a tree: row r follows row parents[r] < r, and row 0, with
                parent -1, follows what the cache holds. `keep` makes one of its paths the text.

        Raises ValueError when the cache or the model has too few positions.
        """

    def run_batch(self, segment: int, rows: Rows, begins: Sequence[int], cache: KVCache) -> Rows:
        """Run the next position of B texts at once through a segment: rows (1, B, D) -> (1, B, D).

        begins: the slot at which each text begins in its part of the cache; earlier slots are not read.
        """

    def keep(self, cache: KVCache, start: int, path: Sequence[int]) -> None:
        """Keep one path of a tree that was written after `start` positions, row numbers ascending; drop the rest."""

    def norm(self, rows: Rows) -> Rows:
        """Apply the final norm that every full head reads: (..., D) -> (..., D)."""

    def join(self, parts: Sequence[Rows]) -> Rows:
        """Concatenate rows (1, n, D): (1, N, D)."""

    def tensor(self, rows: Rows) -> Tensor:
        """View rows as a tensor of the same shape, without a copy."""

    def row_cost(self, rows: int) -> float:
        """Cost of adding a row to a pass of `rows` rows. Unit: the time of a pass of one row."""


class VocabHead(Protocol):
    """A projection of normed or adapted rows onto K words."""

    words: int
    nbytes: int
    """Bytes of weights that one call of `argmax` reads."""
    owned_bytes: int
    """Bytes of memory that this head holds and shares with no other."""

    @property
    def weight(self) -> Tensor:
        """The projection's weight (K, D); it may be made anew for each call."""

    def logits(self, rows: Rows) -> Tensor:
        """Logits of rows: (..., D) -> (..., K)."""

    def argmax(self, rows: Rows) -> list[int]:
        """The likeliest word of each row (..., D), the first of equal ones."""

    def choices(self, rows: Rows) -> list[Choice]:
        """The likeliest word of each row (..., N, D), with the logits of other words on demand: N choices."""

    def likeliest(self, rows: Rows, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The k likeliest words of each row, best first: probabilities and word numbers, (..., min(k, K)) each."""

    def softmax_facts(self, rows: Tensor, copied: Tensor, before: Tensor | None = None) -> Tensor:
        """Inputs of a sketch estimator, (..., 5) or (..., 12); see `cascadeexit.exits.confidence.softmax_facts`."""

    def first(self, words: int) -> "VocabHead":
        """A head of the first words only: a multiple of `exits.config.WORD_BLOCK`, or all of them."""


class ExitRuntime(Protocol):
    """The trained exits of one model, ready to run."""

    full_head: VocabHead
    """The full model's head. The exits' copy of its words may make its `argmax` faster, with the same result."""
    draft_bytes: int
    """Bytes of weights that one call of `drafts` reads."""
    context_bytes: int
    """Bytes of weights that one call of `context` reads."""
    memory_bytes: int
    """Bytes that the exits hold beside the model."""

    def hidden(self, s: int, rows: Rows, carried: Rows) -> Rows:
        """Adapt rows after segment s, each with its carried state: (..., D), (..., D) -> (..., D)."""

    def logits(self, s: int, hidden: Rows) -> Tensor:
        """Logits of exit s for adapted rows: (..., D) -> (..., K) over the first K of the bank's `head_ids`."""

    def choice(self, s: int, hidden: Rows) -> int:
        """The likeliest token of exit s for one adapted row (1, D)."""

    def confidence(self, s: int, hidden: Rows, copied: Sequence[tuple[int, int]],
                   before: Rows | None = None) -> list[float]:
        """Probability that exit s chooses what the full model would: adapted rows (N, D) -> N numbers in [0, 1].

        Args:
            copied: n-gram copy for each row, as `Lookup.copied` gives it.
            before: adapted rows of the previous exit for the same tokens (N, D); None if that exit did not run.
        """

    def context(self, states: Sequence[Rows], row: int) -> Any:
        """Compute the drafter's context from one row of the states at all exits but the first, E times (1, N, D).

        Returns None without a trained drafter.
        """

    def drafts(self, tokens: Sequence[int], carried: Sequence[Rows], k: int, temperature: float,
               context: Any = None) -> list[tuple[Rows, list[float], list[int]]]:
        """Draft what follows each of these tokens, by the drafter or else by the exit before the first layer.

        Args:
            carried: the state that produced each token, (1, D) each.
            context: from `context`, where there is a drafter.

        Returns for each token: its own hidden state (1, D), and the k likeliest next tokens, best first, as
        probabilities at this temperature among the words that drafts are chosen from, and as token ids.
        """

    def try_bytes(self, s: int) -> int:
        """Bytes of weights read to adapt one row for exit s and to compute its confidence."""

    def head_bytes(self, s: int) -> int:
        """Bytes of weights that the vocabulary projection of exit s reads."""


class Backend(Protocol):
    """One way of computing with one frozen model."""

    name: str
    layers: LayerStack
    head: VocabHead

    def __init__(self, base, bounds: tuple[int, ...]):
        """Take what is needed from a transformers *ForCausalLM that fits; the model may be dropped afterwards.

        bounds: numbers of layers at which segments begin and end: 0, the exit layers, the number of layers.
        """

    @classmethod
    def build(cls) -> None:
        """Do the one-time work on a machine, such as compiling kernels. `fits` does this work, too, if needed."""

    @classmethod
    def fits(cls, base) -> bool:
        """True where this backend can run the transformers model `base` on this machine."""

    # Two more class methods are optional; `python -m cascadeexit.doctor` prints what they return.
    #   why_not(base) -> str        why `fits` is False, and what to do
    #   facts() -> dict[str, str]   what is there on this machine, such as compiled kernels, by name

    def vocab_head(self, weight: Tensor, *, rounded: bool = False) -> VocabHead:
        """A head with another weight (K, D).

        rounded: its weights may be rounded to 8 bits, for results that need not be exactly those of the weight.
        """

    def exits(self, bank) -> ExitRuntime:
        """Make the runtime of an `ExitBank` that is prepared for this model (`ExitBank.prepare`)."""

    def without_gradients(self, function: Callable) -> Callable:
        """Wrap a function or generator function so that it runs as cheaply as possible without gradients."""

    def synchronize(self) -> None:
        """Wait until the device has finished all work in its queue, so that a clock can be read."""
