"""Self-check: tests whether a backend computes the same as the `torch` backend, and whether `verified` equals `full`.

It runs when a model is loaded, and takes about a second for the bundled model. It is needed because kernels that were
compiled or tuned for other machines can be wrong on this machine without an error.

First, the tested backend runs random tokens in two passes: a prompt, and a verification pass after it. Then the `torch`
backend computes the same parts: embedding, each segment, final norm and head. The input of each part is what the tested
backend computed before this part, so errors do not add up. `TOLERANCES` limits how far the rows and logits of the two
backends may differ. Last, a short text of `verified` must equal the text of `full`.

A large model would take long. So after `SECONDS` seconds no further segment is compared, and the texts end early. The
first segment, the head and a text of at least `LEAST_TOKENS` tokens are always compared.

`tests/test_selfcheck.py` checks that wrong kernels exceed the tolerances.

Letters: N rows, D hidden size, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascadeexit.backends.base import Backend, Rows
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine

SECONDS = 0.4               # for the comparison of segments, and again for each text
PROMPT_ROWS, MORE_ROWS = 8, 4
TEXT_PROMPT, TOKENS, LEAST_TOKENS, MAX_DRAFT = 4, 16, 3, 7
# Largest median over the rows of |ours - theirs| / |what the part added|, by dtype. Found on the bundled model in bf16
# on the `cpu` backend: at most 0.018 with correct kernels (8 random prompts), at least 0.042 with wrong ones (scores
# scaled by 1.1, a wrong rotary base, one query head or the last 16 columns lost). In fp32 the packed `torch` backend
# gave 0.000004. fp16 rounds 8 times finer than bf16; it was not measured.
TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.006, torch.float32: 0.001}
WORST_ROW = 10              # a single row may differ by so many tolerances: rows with outliers are rounded coarsely
LAYERS = 8                  # the tolerance is for so many layers; rounding errors of more add up like random steps


@dataclass(frozen=True)
class SelfCheck:
    """Result of a self-check, which tests if a backend computes the same as the `torch` backend on this machine."""

    backend: str                    # name of the backend that was checked
    problem: str                    # what is wrong, as part of a sentence; "" if all is well
    seconds: float
    error: float | None = None      # largest error / largest allowed error; None if nothing was compared
    layers: int = 0                 # layers that were compared with the `torch` backend
    tokens: int = 0                 # length of the text of `full` that `verified` repeated

    @property
    def passed(self) -> bool:
        return not self.problem


class _Different(Exception):
    """Raised if a comparison fails. The message says what is wrong."""


def prompt_ids(vocab_size: int) -> list[int]:
    """Return the token ids that the self-check runs. They are random, but always the same for one vocabulary size."""
    return torch.randint(vocab_size, (PROMPT_ROWS + MORE_ROWS,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.inference_mode()
def check(engine: Engine, reference: Backend | None) -> SelfCheck:
    """Check that an engine's backend computes correctly on this machine. Returns the result.

    Args:
        reference: backend from `backends.reference` for the same model and segments. None if the engine itself runs on
            the `torch` backend; then only the texts of `verified` and `full` are compared.

    An exception of the tested backend becomes a problem in the result and is not raised.
    """
    started, name, seen = time.perf_counter(), engine.model.backend.name, _Comparison(engine)
    problem = ""
    try:
        if reference is not None:
            seen.compare_parts(reference)
        seen.compare_texts()
    except _Different as different:
        problem = str(different)
    except Exception as error:          # kernels raise errors of many kinds
        lines = str(error).strip().splitlines()
        problem = f"it failed with an error ({type(error).__name__}: {lines[0] if lines else 'no message'})"
    return SelfCheck(name, problem, time.perf_counter() - started, seen.error, seen.layers, seen.tokens)


class _Comparison:
    """A self-check while it runs. `error`, `layers` and `tokens` are later copied to `SelfCheck`."""

    def __init__(self, engine: Engine):
        self._engine, self._model = engine, engine.model
        self._ids = prompt_ids(engine.model.vocab_size)
        self._tolerance = TOLERANCES.get(engine.model.dtype, TOLERANCES[torch.float32])
        self.error: float | None = None
        self.layers = self.tokens = 0

    # -- the parts ------------------------------------------------------------------------------------------------

    def compare_parts(self, reference: Backend) -> None:
        """Compare embedding, vocabulary projection and segments of both backends. Both get the same rows as input.

        Raises `_Different`.
        """
        layers, end = self._model.layers, time.perf_counter() + SECONDS
        states = self._run()
        self._expect("the embedding", states[0], reference.layers.embed(self._ids))
        top = states[-1]
        logits = reference.head.logits(reference.layers.norm(top)).float()
        self._expect("the vocabulary projection", self._model.head.logits(layers.norm(top)), logits)
        self._expect_choices(self._engine.exits.full_head.argmax(layers.norm(top)), logits[0])
        cache = reference.layers.new_cache(len(self._ids) + reference.layers.row_multiple)
        for s in _first_last_others(self._model.bounds):
            if self.layers and time.perf_counter() > end:
                break
            theirs, = reference.layers.run(range(s, s + 1), states[s], cache)
            begin, stop = self._model.bounds[s:s + 2]
            self._expect(f"layers {begin + 1} to {stop}", states[s + 1], theirs, states[s], stop - begin)
            self.layers += stop - begin

    def _run(self) -> list[Tensor]:
        """Run the random tokens through all segments of the tested backend.

        Returns the rows before the first segment and the rows after each segment, (1, N, D) each.
        """
        layers, segments = self._model.layers, range(self._model.num_segments)
        cache, passes = layers.new_cache(len(self._ids) + layers.row_multiple), []
        for part in (self._ids[:PROMPT_ROWS], self._ids[PROMPT_ROWS:]):
            rows = layers.embed(part)
            passes.append([self._tensor(r) for r in (rows, *layers.run(segments, rows, cache))])
        return [torch.cat(parts, dim=1) for parts in zip(*passes)]

    def _tensor(self, rows: Rows) -> Tensor:
        return self._model.layers.tensor(rows).to(self._model.device, self._model.dtype)

    def _expect(self, part: str, ours: Tensor, theirs: Tensor, before: Tensor | None = None, layers: int = 0) -> None:
        """Compare what both backends computed for one part of the model. Raises `_Different` if the error is too large.

        The error of a row is relative to what the part added to the row. If the part added little to a large row, the
        error is relative to a tenth of the row instead, because rounding the sum causes an error, too.

        Args:
            part: name of the part, for the message.
            ours, theirs: rows of the tested backend and of the `torch` backend (1, N, ...).
            before: rows before the part (1, N, D); None if the part does not add to rows.
            layers: number of layers in the part; more layers may have a larger error.
        """
        ours, theirs = ours.float().to(self._model.device), theirs.float().to(self._model.device)
        added = theirs if before is None else theirs - before.float()
        size = torch.maximum(added.norm(dim=-1), theirs.norm(dim=-1) / 10).clamp(min=1e-30)
        errors = (ours - theirs).norm(dim=-1) / size
        allowed = self._tolerance * max(1.0, layers / LAYERS) ** 0.5
        median, worst = float(errors.median()), float(errors.max())
        self.error = max(self.error or 0.0, median / allowed, worst / allowed / WORST_ROW)
        if not (median <= allowed and worst <= WORST_ROW * allowed):            # NaN, too
            raise _Different(f"{part} differed from the reference by {median:.2%} (worst row {worst:.2%}), and "
                             f"{allowed:.2%} is allowed")

    def _expect_choices(self, chosen: Sequence[int], logits: Tensor) -> None:
        """Check that each chosen token is the likeliest one by the logits (N, V) of the `torch` backend.

        If two tokens are nearly equally likely, either is correct. Raises `_Different` for any other token.
        """
        allowed = self._tolerance * logits.norm(dim=-1) / logits.shape[-1] ** 0.5
        rows = torch.arange(len(chosen), device=logits.device)
        missing = logits.amax(-1) - logits[rows, torch.tensor(chosen, device=logits.device)]
        if not bool((missing <= WORST_ROW * allowed).all()):
            raise _Different("it chose a word that is not the most likely one")

    # -- the texts ------------------------------------------------------------------------------------------------

    def compare_texts(self) -> None:
        """Compare a short text of `verified` with a text of `full`. Raises `_Different` if they are not equal."""
        prompt = self._ids[:TEXT_PROMPT]
        full = _text(self._engine, prompt, Mode.FULL, TOKENS)
        verified = _text(self._engine, prompt, Mode.VERIFIED, len(full))
        if verified != full[:len(verified)]:
            raise _Different("verified mode did not write the text of the full model")
        self.tokens = len(verified)


def _text(engine: Engine, prompt: Sequence[int], mode: Mode, tokens: int) -> list[int]:
    """Decode up to `tokens` tokens and return them.

    After `SECONDS` seconds decoding stops early, but not before `LEAST_TOKENS` tokens.
    """
    config = DecodeConfig(mode=mode, max_new_tokens=tokens, max_draft=MAX_DRAFT, ignore_eos=True)
    end = time.perf_counter() + SECONDS
    text: list[int] = []
    for event in engine.generate(prompt, config):
        if event.final:
            text.append(event.token_id)
            if len(text) >= LEAST_TOKENS and time.perf_counter() > end:
                break
    return text


def _first_last_others(bounds: Sequence[int]) -> Iterator[int]:
    """Yield the numbers of the segments that have layers, in the order of the self-check.

    This order is the first segment, the last one, then all others.
    """
    segments = [s for s, (a, b) in enumerate(zip(bounds, bounds[1:])) if a < b]
    yield from dict.fromkeys((segments[0], segments[-1], *segments))


def instead_words(check: SelfCheck) -> str:
    """Return a sentence that tells visitors why a model runs on the `torch` backend after a failed self-check."""
    return (f"The model runs on the slower torch backend because the {check.backend} backend failed its self-check: "
            f"{check.problem}.")
