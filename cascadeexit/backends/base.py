"""Interfaces of a backend, which the engine, drafting, inspection and training use.

A `Backend` runs one frozen model on its device. Other modules use only its layer stack (`LayerStack`), its vocabulary
heads (`VocabHead`) and its runtime of trained exits (`ExitRuntime`). Code outside `backends` does not depend on which
kernels run. `cache.py` and `exits.py` in this folder hold the code that all backends share.

A pass computes one or more rows together. A row is the hidden state of one token. Every backend guarantees that a row's
result does not depend on the other rows of its pass, or on its position among these rows. The cache's capacity and the
decoding mode do not change a row's result either. Therefore the mode `verified` gives exactly the text of the mode
`full`. If `row_multiple` is 1, the guarantee holds for passes of any size. Otherwise the guarantee holds only for the
layers, the final norm and the full model's head, and only in passes of at most `max_rows` rows. Such passes are padded
to a multiple of `row_multiple` rows.

A word is an entry of the vocabulary. An exit's head may have only the most frequent words.

Letters: N rows in a pass, D hidden size, K words of a head, B texts of a batch, E exits, not counting the first.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from cascadeexit.backends.cache import KVCache


class Unusable(RuntimeError):
    """Raised by the constructor of a backend: `fits` is True, but this machine cannot run the model after all.

    `backends.make` then tries the next backend, unless the caller asked for the failed backend.
    """


class Rows(Protocol):
    """Hidden states, one row for each token: (1, N, D), or (1, D) for a single row.

    Each backend has its own type of rows. All types have two kinds of index: `rows[:, i]` is a single row (1, D), and
    `rows[:, a:b]` is a part (1, n, D). Indexing copies no data. `LayerStack.tensor` converts rows to a tensor.

    Every method that takes rows also takes a tensor of the same shape, in the model's dtype and on its device. Training
    passes tensors. The carried state after a prompt of one token is also a tensor.
    """

    shape: tuple[int, ...]

    def __getitem__(self, at: tuple[slice, int | slice]) -> "Rows": ...


class Choice:
    """A vocabulary head's result for one row of hidden states: the likeliest token, and the logits of all tokens.

    `choice.token` is the index of the largest logit. If the head has the whole vocabulary, this index is the token id.
    `choice[t]` returns the logit with index t. Some backends compute this logit only when it is read.
    """

    __slots__ = "token", "_logit"

    def __init__(self, token: int, logit: Callable[[int], float]):
        self.token, self._logit = token, logit

    def __getitem__(self, token: int) -> float:
        return float(self._logit(token))


class LayerStack(Protocol):
    """The model without its vocabulary head: embedding, decoder layers cut into segments, and final norm."""

    row_multiple: int
    """Each pass is padded to a multiple of this number of rows. 1 means that passes are not padded."""
    max_rows: int
    """Largest number of rows in one verification pass."""
    supports_trees: bool
    """True if the rows of one pass may form a draft tree. Then each path of the tree must give bitwise the same results
    as the same tokens in a pass without a tree."""
    segment_bytes: tuple[int, ...]
    """For each segment: how many bytes of weights one pass through it reads."""

    def embed(self, ids: Sequence[int] | Tensor) -> Rows:
        """Look up the embeddings of token ids (N,). Returns rows (1, N, D)."""

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Make an empty KV cache for `batch` texts of equal length.

        capacity: minimum number of positions for each text. The caller includes positions for the padding rows of the
            last pass (see `row_multiple`), because padding rows are also written to the cache.
        """

    def release(self, cache: KVCache) -> None:
        """Take back a cache, which the caller must not use any more. `new_cache` may return it again, emptied."""

    def run(self, segments: range, rows: Rows, cache: KVCache, parents: Sequence[int] | None = None) -> list[Rows]:
        """Run the next N positions of one text through consecutive segments: rows (1, N, D).

        The pass writes the keys and values of all rows to the cache. It adds N to the cache's length for each layer of
        these segments. Returns a list with the rows after each segment, (1, N, D) each. A segment without layers
        returns its input.

        Args:
            segments: numbers of the segments, ascending without gaps.
            rows: for the first segment the embeddings from `embed`, otherwise the rows after the previous segment.
            cache: a cache from `new_cache` for one text.
            parents: None for consecutive tokens. Otherwise the rows form a draft tree, which needs `supports_trees`:
                row r follows row parents[r], and parents[r] < r. Row 0 has parent -1 and follows the last position in
                the cache. After the tree has passed all segments, the caller calls `keep` with one path.

        Raises ValueError if the cache or the model has too few positions left.
        """

    def run_batch(self, segment: int, rows: Rows, begins: Sequence[int], cache: KVCache) -> Rows:
        """Run one more token of each of B texts through one segment. Returns the rows after the segment, (1, B, D).

        A slot is an index of a position in the cache. All texts use the same next slot, `cache.length(layer)`, which is
        also the position for the rotary embedding. The call writes one key and one value of each text to this slot, and
        adds 1 to the length of each layer of the segment.

        Args:
            rows: one row for each text (1, B, D): embeddings, or the rows after the previous segment.
            begins: for each text, the slot of its first token. Earlier slots of this text are not read. So texts of
                different lengths can end in the same slot.
            cache: a cache from `new_cache` with `batch` B.

        Raises ValueError if the cache is full.
        """

    def keep(self, cache: KVCache, start: int, path: Sequence[int]) -> None:
        """Keep one path of a draft tree in the cache, and remove the other rows of the tree.

        Call this after `run` has taken the tree through all segments. After this call, every layer has
        start + len(path) positions.

        Args:
            start: number of positions that were in the cache before the tree.
            path: numbers of the tree's rows that are kept, ascending. Path row i moves to position start + i.
        """

    def norm(self, rows: Rows) -> Rows:
        """Apply the model's final norm: (..., D) -> (..., D). The full model's head reads the result."""

    def join(self, parts: Sequence[Rows]) -> Rows:
        """Concatenate several pieces of rows, (1, n, D) each. Returns (1, N, D), where N is the sum of all n."""

    def tensor(self, rows: Rows) -> Tensor:
        """Return rows as a tensor of the same shape. Rows that are already computed are not copied."""

    def row_cost(self, rows: int) -> float:
        """Return how much time one more row adds to a pass of `rows` rows, in units of the time of a one-row pass."""


class VocabHead(Protocol):
    """A vocabulary head: computes the logits of K words from rows of hidden states. A word is a vocabulary entry.

    The full model's head reads the output of the final norm. An exit's head reads the output of the exit's adapter. The
    number of a word is the index of its logit.
    """

    words: int
    """K, the number of words."""
    nbytes: int
    """How many bytes of weights one call of `argmax` reads."""
    owned_bytes: int
    """How many bytes of memory this head needs, without memory that it shares with another head."""

    @property
    def weight(self) -> Tensor:
        """Weight of the projection (K, D). Some backends compute it again on each access."""

    def logits(self, rows: Rows) -> Tensor:
        """Compute logits: rows (..., D) -> (..., K)."""

    def argmax(self, rows: Rows) -> list[int]:
        """Find the likeliest word of each row (..., D). Returns one word number for each row.

        If several words are equally likely, the one with the lowest number is returned.
        """

    def choices(self, rows: Rows) -> list[Choice]:
        """Find the likeliest word of each row (1, N, D). Returns N `Choice` objects, whose tokens are word numbers."""

    def likeliest(self, rows: Rows, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Find the k likeliest words of each row (..., D), best first.

        Returns their probabilities and their word numbers, (..., min(k, K)) each. The probabilities come from the
        softmax over all K words at this temperature.
        """

    def softmax_facts(self, rows: Tensor, copied: Tensor, before: Tensor | None = None) -> Tensor:
        """Compute the inputs of a `SketchConfidence` estimator from adapter outputs (..., D).

        `exits.confidence.softmax_facts` describes the arguments. Returns (..., 5) without `before`, and (..., 12) with
        `before`.
        """

    def first(self, words: int) -> "VocabHead":
        """Make a head of only this head's first `words` tokens.

        words: number of entries, a multiple of `exits.config.WORD_BLOCK`, or K.
        """


class ExitRuntime(Protocol):
    """Runs the trained exits of one model. Exits are numbered s = 0, 1, 2, ... from the lowest layer."""

    full_head: VocabHead
    """The full model's head. Its `argmax` may use the exits' 8-bit head to be faster. The result is the same."""
    draft_bytes: int
    """How many bytes of weights one call of `drafts` reads."""
    context_bytes: int
    """How many bytes of weights one call of `context` reads."""
    memory_bytes: int
    """How many bytes of memory the exits need in addition to the model."""

    def hidden(self, s: int, rows: Rows, carried: Rows) -> Rows:
        """Run the adapter of exit s on rows (..., D) from the exit's layer. Returns (..., D).

        carried: the carried state of each row (..., D).
        """

    def logits(self, s: int, hidden: Rows) -> Tensor:
        """Compute the logits of exit s from outputs of its adapter: (..., D) -> (..., K).

        Column k belongs to the token id `head_ids[k]` of the `ExitBank`. If the bank has no `head_ids`, column k
        belongs to token id k.
        """

    def choice(self, s: int, hidden: Rows) -> int:
        """Return the token id that exit s finds likeliest, from one output `hidden` (1, D) of its adapter."""

    def confidence(self, s: int, hidden: Rows, copied: Sequence[tuple[int, int]],
                   before: Rows | None = None) -> list[float]:
        """Estimate for each of N rows the probability that exit s and the full model choose the same token.

        Args:
            hidden: outputs of the adapter of exit s (N, D).
            copied: for each row, a pair from `Lookup.copied`: the token that n-gram lookup copies, and the length of
                the match in tokens.
            before: adapter outputs of the previous exit for the same tokens (N, D); None if that exit did not run.
        """

    def context(self, states: Sequence[Rows], row: int) -> Any:
        """Compute the drafter's context from one token's hidden states at all exits except the first.

        The context is a vector that the drafter adds to the carried state.

        Args:
            states: hidden states at each of these E exits, (1, N, D) each.
            row: number of the token's row in each of these states.

        Returns a value to pass to `drafts`. Returns None if there is no trained drafter.
        """

    def drafts(self, tokens: Sequence[int], carried: Sequence[Rows], k: int, temperature: float,
               context: Any = None) -> list[tuple[Rows, list[float], list[int]]]:
        """Draft the next token after each given token. Without a drafter, the exit before the first layer drafts.

        Args:
            tokens: token ids.
            carried: for each token, the hidden state that produced it (1, D).
            k: number of candidates for each next token. If fewer tokens may be drafted, fewer are returned.
            temperature: temperature of the softmax, above 0.
            context: result of `context`; None without a drafter.

        Returns three values for each token. The first is the carried state of the next token (1, D): the output of the
        drafter or, without a drafter, of that exit's adapter. The others are the probabilities of the k likeliest next
        tokens, best first, and their token ids. The softmax runs over all tokens that may be drafted.
        """

    def try_bytes(self, s: int) -> int:
        """Return how many bytes of weights one try of exit s reads.

        A try computes the adapter's output for one row and the confidence of the exit.
        """

    def head_bytes(self, s: int) -> int:
        """Return how many bytes of weights the vocabulary head of exit s reads in one pass."""


class Backend(Protocol):
    """Runs one frozen model: its decoder layers, its vocabulary head and its exits."""

    name: str
    layers: LayerStack
    head: VocabHead

    def __init__(self, base, bounds: tuple[int, ...]):
        """Take over the weights of a transformers *ForCausalLM for which `fits` is True.

        The caller may delete that model afterwards.

        bounds: layer numbers at which segments begin and end, ascending: 0, each exit's layer, and the number of
            layers. Segment s has the layers bounds[s] to bounds[s + 1] - 1, and may have none.

        Raises Unusable if this machine cannot run the model after all.
        """

    @classmethod
    def build(cls) -> None:
        """Prepare this machine once, for example compile kernels. If `build` was never called, `fits` prepares it."""

    @classmethod
    def fits(cls, base) -> bool:
        """Return True if this backend can run the transformers model `base` on this machine."""

    # Two more class methods are optional; `python -m cascadeexit.doctor` prints what they return.
    #   why_not(base) -> str        why `fits` is False, and what to do
    #   facts() -> dict[str, str]   what is there on this machine, such as compiled kernels, by name

    def vocab_head(self, weight: Tensor, *, rounded: bool = False) -> VocabHead:
        """Make a vocabulary head from a weight (K, D).

        rounded: allow the backend to round the weight to 8 bits. The logits may then be less exact.
        """

    def exits(self, bank) -> ExitRuntime:
        """Make the exit runtime for an `ExitBank`. Before this call, `ExitBank.prepare` was called with this model."""

    def without_gradients(self, function: Callable) -> Callable:
        """Wrap a function or generator function so that it records no gradients. The wrapper costs little time."""

    def synchronize(self) -> None:
        """Wait until the device has finished all work that was started. Call this before reading a clock."""
