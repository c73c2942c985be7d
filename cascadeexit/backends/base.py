"""Interface between the backends and the modules that use them: engine, drafting, inspection and training.

A `Backend` runs one frozen model on its device. Other modules use only three parts of it: the layer stack, the
vocabulary heads, and the runtime of trained exits. No code outside `backends` depends on which kernels run. `cache.py`
and `exits.py` beside this file hold what all backends share.

Every backend guarantees that a row's result does not depend on the other rows of its pass, its place among them, the
cache's capacity, or the mode. Therefore `verified` equals `full` bitwise. If `row_multiple` is 1, this holds for passes
of any size. Otherwise it holds for the layers, the final norm and the full head, in passes of at most `max_rows` rows.
Such passes are padded to a multiple of `row_multiple` rows.

Letters: N rows in a pass, D hidden size, K words of a head, B texts of a batch, E exits, not counting the first.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from cascadeexit.backends.cache import KVCache


class Unusable(RuntimeError):
    """A backend fits a model but does not work on this machine. `backends.make` then tries the next backend."""


class Rows(Protocol):
    """Hidden states in a backend's own format: (1, N, D), or (1, D) for one row.

    `rows[:, i]` is one row (1, D), and `rows[:, a:b]` is a part (1, n, D). Neither copies. `LayerStack.tensor` converts
    rows to a tensor.

    Every method that takes rows also takes a tensor in the model's dtype on its device. Training uses tensors, and so
    does the carried state after a prompt of one token.
    """

    shape: tuple[int, ...]

    def __getitem__(self, at: tuple[slice, int | slice]) -> "Rows": ...


class Choice:
    """The likeliest token of one row of logits. `choice[token]` computes the logit of any other token."""

    __slots__ = "token", "_logit"

    def __init__(self, token: int, logit: Callable[[int], float]):
        self.token, self._logit = token, logit

    def __getitem__(self, token: int) -> float:
        return float(self._logit(token))


class LayerStack(Protocol):
    """Embedding, decoder layers in segments, and the final norm."""

    row_multiple: int
    """Passes are padded to a multiple of this number of rows. 1 means no padding, because rows are independent."""
    max_rows: int
    """Largest number of rows in one verification pass."""
    supports_trees: bool
    """True if the rows of a pass may be a tree of drafts. Each path then gives bitwise the results of plain text."""
    segment_bytes: tuple[int, ...]
    """For each segment, the bytes of weights that one pass through it reads."""

    def embed(self, ids: Sequence[int] | Tensor) -> Rows:
        """Embed token ids (N,) as rows (1, N, D)."""

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Make an empty cache for `batch` texts of at least `capacity` positions each, padding included."""

    def release(self, cache: KVCache) -> None:
        """Take back a cache that is no longer used. `new_cache` may return it to a later run."""

    def run(self, segments: range, rows: Rows, cache: KVCache, parents: Sequence[int] | None = None) -> list[Rows]:
        """Run the next N positions of a text, as rows (1, N, D), through these segments.

        Keys and values are written to the cache. Returns the rows after each segment, (1, N, D) each.

        Args:
            parents: makes the rows a tree; only if `supports_trees`. Row r follows row parents[r] < r. Row 0 has
                parent -1 and follows the last position in the cache. Afterwards, `keep` keeps one path of the tree.

        Raises ValueError when the cache or the model has too few positions.
        """

    def run_batch(self, segment: int, rows: Rows, begins: Sequence[int], cache: KVCache) -> Rows:
        """Run the next position of B texts together through one segment: rows (1, B, D) -> (1, B, D).

        begins: for each text, the slot at which it begins in its part of the cache. Earlier slots are not read.
        """

    def keep(self, cache: KVCache, start: int, path: Sequence[int]) -> None:
        """Keep one path of the tree that the last pass wrote to the cache, and drop its other rows.

        Args:
            start: number of positions in the cache before the tree.
            path: numbers of the path's rows, ascending.
        """

    def norm(self, rows: Rows) -> Rows:
        """Apply the final norm, whose output the full model's head reads: (..., D) -> (..., D)."""

    def join(self, parts: Sequence[Rows]) -> Rows:
        """Concatenate parts (1, n, D) to rows (1, N, D)."""

    def tensor(self, rows: Rows) -> Tensor:
        """View rows as a tensor of the same shape, without a copy."""

    def row_cost(self, rows: int) -> float:
        """Return the cost of adding one row to a pass of `rows` rows, in units of the time of a one-row pass."""


class VocabHead(Protocol):
    """A vocabulary head: projects normed or adapted rows onto K words."""

    words: int
    nbytes: int
    """Bytes of weights that one call of `argmax` reads."""
    owned_bytes: int
    """Bytes of memory that this head does not share with another head."""

    @property
    def weight(self) -> Tensor:
        """The projection's weight (K, D). Some backends compute it on each access."""

    def logits(self, rows: Rows) -> Tensor:
        """Compute the logits of rows: (..., D) -> (..., K)."""

    def argmax(self, rows: Rows) -> list[int]:
        """Find the number of the likeliest word of each row (..., D). Of equally likely words, the first counts."""

    def choices(self, rows: Rows) -> list[Choice]:
        """Find the likeliest word of each row (..., N, D). The N choices also compute logits of other words."""

    def likeliest(self, rows: Rows, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Find the k likeliest words of each row (..., D), best first, in the softmax at this temperature.

        Returns probabilities and word numbers, (..., min(k, K)) each.
        """

    def softmax_facts(self, rows: Tensor, copied: Tensor, before: Tensor | None = None) -> Tensor:
        """Compute the inputs of a sketch estimator, (..., 5) or (..., 12); see `cascadeexit.exits.confidence`."""

    def first(self, words: int) -> "VocabHead":
        """Make a head of the first `words` words, a multiple of `exits.config.WORD_BLOCK` or all K."""


class ExitRuntime(Protocol):
    """The trained exits of one model, ready to run."""

    full_head: VocabHead
    """The full model's head. Its `argmax` may use the exits' rounded head to be faster, with the same result."""
    draft_bytes: int
    """Bytes of weights that one call of `drafts` reads."""
    context_bytes: int
    """Bytes of weights that one call of `context` reads."""
    memory_bytes: int
    """Bytes of memory that the exits need in addition to the model."""

    def hidden(self, s: int, rows: Rows, carried: Rows) -> Rows:
        """Run the adapter of exit s on rows and their carried states: (..., D), (..., D) -> (..., D)."""

    def logits(self, s: int, hidden: Rows) -> Tensor:
        """Compute the logits of exit s for adapted rows: (..., D) -> (..., K).

        Column k belongs to token `head_ids[k]` of the bank, or to token k if the bank has no `head_ids`.
        """

    def choice(self, s: int, hidden: Rows) -> int:
        """Return the likeliest token id of exit s for one adapted row (1, D)."""

    def confidence(self, s: int, hidden: Rows, copied: Sequence[tuple[int, int]],
                   before: Rows | None = None) -> list[float]:
        """Estimate the probability that exit s chooses the full model's token: adapted rows (N, D) -> N numbers.

        Args:
            copied: for each row, the copied token and the match length that `Lookup.copied` returns.
            before: adapted rows of the previous exit for the same tokens (N, D); None if that exit did not run.
        """

    def context(self, states: Sequence[Rows], row: int) -> Any:
        """Compute the drafter's context from row number `row` of the states at all exits except the first.

        states: one entry for each of these E exits, (1, N, D).

        Returns a value for `drafts`; None without a trained drafter.
        """

    def drafts(self, tokens: Sequence[int], carried: Sequence[Rows], k: int, temperature: float,
               context: Any = None) -> list[tuple[Rows, list[float], list[int]]]:
        """Draft k next tokens for each of these tokens. Without a drafter, the exit before the first layer drafts.

        Args:
            carried: for each token, the hidden state that produced it (1, D).
            context: result of `context`; None without a drafter.

        Returns for each token its hidden state (1, D), and probabilities and token ids of the k likeliest next tokens,
        best first. The probabilities are those at this temperature among the words that may be drafted.
        """

    def try_bytes(self, s: int) -> int:
        """Return the bytes of weights that are read to adapt one row for exit s and compute its confidence."""

    def head_bytes(self, s: int) -> int:
        """Return the bytes of weights that the vocabulary projection of exit s reads."""


class Backend(Protocol):
    """Runs one frozen model: its layers, its vocabulary head and its exits."""

    name: str
    layers: LayerStack
    head: VocabHead

    def __init__(self, base, bounds: tuple[int, ...]):
        """Take the weights of a transformers *ForCausalLM that fits. The caller may delete that model afterwards.

        bounds: layer numbers at which segments begin and end: 0, the exit layers, the number of layers.
        """

    @classmethod
    def build(cls) -> None:
        """Do the one-time work on a machine, such as compiling kernels. `fits` does this work, too, if needed."""

    @classmethod
    def fits(cls, base) -> bool:
        """Return True if this backend can run the transformers model `base` on this machine."""

    # Two more class methods are optional; `python -m cascadeexit.doctor` prints what they return.
    #   why_not(base) -> str        why `fits` is False, and what to do
    #   facts() -> dict[str, str]   what is there on this machine, such as compiled kernels, by name

    def vocab_head(self, weight: Tensor, *, rounded: bool = False) -> VocabHead:
        """Make a head with another weight (K, D).

        rounded: allow rounding the weight to 8 bits, for results that need not be exact.
        """

    def exits(self, bank) -> ExitRuntime:
        """Make the runtime of an `ExitBank` that is prepared for this model (`ExitBank.prepare`)."""

    def without_gradients(self, function: Callable) -> Callable:
        """Wrap a function or generator function so that it records no gradients, with little overhead."""

    def synchronize(self) -> None:
        """Wait until the device has finished all work in its queue. Call this before reading a clock."""
