"""Engine: one decoding loop for `full`, `cascade` and `verified`.

It knows token ids, segments and exits; it knows nothing of text, pages or files. Positions enter each segment in
order, so how deep each position is computed is a staircase: filled[0] >= filled[1] >= ... Hidden states wait on
each step; `Staircase.run` takes everything waiting at some segments through their layers in one pass. Prefill, a
decode step, catch-up of skipped layers and verification are all that one call.

Letters: N rows in a pass, D hidden size, V vocabulary, S segments (the last one ends in the full model).
"""

import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from cascadeexit.events import Status, TokenEvent
from cascadeexit.exits import ExitBank
from cascadeexit.lookup import Lookup
from cascadeexit.metrics import Costs, RunStats, summarize
from cascadeexit.model import SegmentedModel
from cascadeexit.sampling import Sampler
from cascadeexit.states import Hidden, joined
from cascadeexit.tree import Draft, DraftTree

_MAX_ROWS = 256             # rows of one prefill or catch-up pass: bounds the memory of masks and activations
CASCADE_THRESHOLD = 0.6
_REACH = 0.3                # by more than this an exit is seldom surer than the one before it: measured
_CAPACITY_STEP = 128        # cache sizes come in steps, so that runs of like length share kernels and buffers


class Mode(StrEnum):
    FULL = "full"           # every token from the last layer
    CASCADE = "cascade"     # every token from the first exit that is confident enough
    VERIFIED = "verified"   # exits draft, the full model confirms: exactly what `full` says


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. Refuses contradictions when it is made (ValueError)."""

    mode: Mode = Mode.CASCADE
    max_new_tokens: int = 256
    max_draft: int = 7
    """verified: the most tokens drafted before the full model looks at them."""
    thresholds: float | Sequence[float | None] | None = None
    """Confidence in [0, 1] from which an exit is taken: the first exit's, from which those of deeper ones follow
    (`graded_thresholds`), or one each; None in their place closes an exit. None alone is each mode's own rule: 0.6 for
    cascade; for verified a tree of drafts, made before the first layer and copied from earlier text, as large as is
    likely to save more than it costs (`DraftTree`)."""
    target_disagreement: float | None = None
    """cascade, greedy, instead of thresholds: the part of the tokens, in (0, 1), that may be others than the full model
    would choose after the same text. The exits' calibration knows the thresholds (`cascadeexit.calibration`)."""
    tolerance: float = 0.0
    """verified, greedy: a draft also stands when the full model gives it at least 1 - tolerance times the probability
    of its own choice. 0 is lossless; above, the text may differ where the full model itself is torn."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        try:
            object.__setattr__(self, "mode", Mode(self.mode))
        except ValueError:
            raise ValueError(f"mode must be one of {', '.join(Mode)}, got '{self.mode}'") from None
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.max_draft < 1:
            raise ValueError(f"max_draft must be at least 1, got {self.max_draft}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}")
        if self.tolerance and (self.mode is not Mode.VERIFIED or self.temperature):
            raise ValueError("tolerance goes with mode verified and temperature 0: elsewhere nothing is judged by it")
        if self.target_disagreement is not None:
            if not 0 < self.target_disagreement < 1:
                raise ValueError(f"target_disagreement must be in (0, 1), got {self.target_disagreement}")
            if self.mode is not Mode.CASCADE or self.temperature or self.thresholds is not None:
                raise ValueError("target_disagreement goes with mode cascade, temperature 0 and no thresholds: that is "
                                 "what it was measured for")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        each = [self.thresholds] if isinstance(self.thresholds, (int, float)) else list(self.thresholds or ())
        if any(t is not None and not 0 <= t <= 1 for t in each):
            raise ValueError(f"thresholds must be in [0, 1] or None, got {self.thresholds}")

    def threshold_per_exit(self, depths: Sequence[float]) -> tuple[float | None, ...]:
        """One threshold for each exit at these depths, None where it is closed or has none that is fixed.

        Raises ValueError for a wrong number of thresholds.
        """
        wanted = CASCADE_THRESHOLD if self.thresholds is None and self.mode is Mode.CASCADE else self.thresholds
        if wanted is None:
            return (None,) * len(depths)
        if isinstance(wanted, (int, float)):
            return graded_thresholds(wanted, depths)
        if len(wanted) != len(depths):
            raise ValueError(f"this model has {len(depths)} exits, got {len(wanted)} thresholds")
        return tuple(wanted)


def graded_thresholds(first: float, depths: Sequence[float]) -> tuple[float, ...]:
    """Thresholds of exits at these depths (parts of the layers, ascending) at one price, from that of the first exit.

    To leave early saves the layers above and risks a wrong word. An exit is taken where that risk, 1 - confidence, is
    at most a price times what it saves; so a deeper exit, which saves less, must be surer.
    """
    return tuple(1 - (1 - first) * (1 - depth) / (1 - depths[0]) for depth in depths)


@dataclass(frozen=True)
class Generation:
    """A finished run."""

    token_ids: list[int]
    events: list[TokenEvent]
    stats: RunStats


class Staircase:
    """One sequence: its tokens, the cache, and the hidden states waiting at each segment."""

    def __init__(self, model: SegmentedModel, capacity: int):
        self.model = model
        self.cache = model.new_cache(capacity)
        weakref.finalize(self, model.reuse, self.cache)
        self.tokens: list[int] = []
        self.waiting: list[Hidden | None] = [None] * model.num_segments   # (1, N, D) at segments 1..S-1
        self.weight_bytes = 0

    def filled(self, s: int) -> int:
        """Positions that segment s has computed."""
        if self.model.bounds[s] == self.model.bounds[s + 1]:        # no layers: all that went on is what was computed
            waiting = self.waiting[s + 1]
            return self.filled(s + 1) + (0 if waiting is None else waiting.shape[1])
        return self.cache.length(self.model.bounds[s])

    def run(self, segments: range, parents: Sequence[int] | None = None) -> list[Hidden]:
        """Everything waiting at these segments, through them up to the last: the rows after each, (1, N, D).

        In each, the newest row is the last. A span on which nobody waits is one pass.

        parents: the rows are a tree, as for `SegmentedModel.run_segments`.
        """
        out = []
        while segments:
            first, end = segments[0], next((s for s in segments[1:] if self.waiting[s] is not None), segments.stop)
            span, segments = range(first, end), range(end, segments.stop)
            if first == 0:
                rows = self.model.enter(self.tokens[self.filled(0):])
            else:
                rows, self.waiting[first] = self.waiting[first], None
            n = rows.shape[1]
            parts = [rows[:, a:a + _MAX_ROWS] for a in range(0, n, _MAX_ROWS)] if n > _MAX_ROWS else [rows]
            passed = [self.model.run_segments(span, part, self.cache, parents) for part in parts]
            self.weight_bytes += len(parts) * sum(self.model.segment_bytes[first:end])
            out += passed[0] if len(parts) == 1 else [joined(after) for after in zip(*passed)]
            if end < self.model.num_segments:
                before = self.waiting[end]
                self.waiting[end] = out[-1] if before is None else joined([before, out[-1]])
        return out

    def prefill(self, tokens: Sequence[int]) -> list[Hidden]:
        """Add tokens and take them through every segment at once: the rows after each (1, N, D), [] without tokens."""
        self.tokens.extend(tokens)
        return self.run(range(self.model.num_segments)) if len(tokens) else []

    def adopt(self, other: "Staircase") -> None:
        """Begin where another one is on which nothing waits."""
        self.tokens = list(other.tokens)
        self.cache.copy_from(other.cache)

    def keep(self, drafts: int, path: Sequence[int]) -> None:
        """Of the newest `drafts` tokens only those on a path stay. Only after a full-depth pass, when nothing waits."""
        assert all(w is None for w in self.waiting), "rows are waiting: keep a path only after the last segment ran"
        if len(path) == drafts:                         # all of them, in their order
            return
        first = len(self.tokens) - drafts
        self.tokens[first:] = [self.tokens[first + i] for i in path]
        self.model.keep(self.cache, first - 1, [0, *(i + 1 for i in path)])      # row 0 is the token before the drafts


class _Stopwatch:
    """Engine time: runs only while the engine works, not while a consumer holds the generator."""

    def __init__(self, device: torch.device):
        self._gpu = device if device.type == "cuda" else None
        self._spent, self._since = 0.0, time.perf_counter()

    def read(self) -> float:
        if self._gpu:
            torch.cuda.current_stream(self._gpu).synchronize()
        return self._spent + time.perf_counter() - self._since

    def pause(self) -> None:
        self._spent = self.read()

    def resume(self) -> None:
        self._since = time.perf_counter()


class Engine:
    """Decodes with one model and its exits. No run leaves anything to the next one, so runs may interleave."""

    def __init__(self, model: SegmentedModel, bank: ExitBank):
        self.model, self.bank = model, bank.attach(model)
        self._opening: Staircase | None = None
        depths = tuple(b / model.num_layers for b in model.bounds[1:])
        self.costs = Costs(model.pass_bytes + bank.choice_bytes, depths)
        self._sampled_costs = Costs(model.pass_bytes + model.head_bytes, depths)

    @property
    def num_exits(self) -> int:
        return self.model.num_segments - 1

    @property
    def exit_depths(self) -> tuple[float, ...]:
        """The part of the layers below each exit."""
        return self.costs.depths[:-1]

    @property
    def opening(self) -> list[int]:
        """The tokens that `read_opening` keeps."""
        return self._opening.tokens if self._opening else []

    def costs_for(self, config: DecodeConfig) -> Costs:
        """What a run is compared with: `full` at its temperature. `costs` are those of greedy runs."""
        return self._sampled_costs if config.temperature else self.costs

    def check(self, prompt_ids: Sequence[int], config: DecodeConfig) -> None:
        """Raise ValueError when this run cannot work; called before any work by `generate`."""
        if len(prompt_ids) == 0:
            raise ValueError("the prompt is empty: give at least one token")
        self.model.check_ids(prompt_ids)
        needed = len(prompt_ids) + config.max_new_tokens
        if needed > self.model.max_positions:
            raise ValueError(f"{len(prompt_ids)} prompt tokens and {config.max_new_tokens} new ones need {needed} "
                             f"positions; {self.model.name} has {self.model.max_positions}. Shorten one of them.")
        if config.mode is Mode.VERIFIED and config.max_draft >= self.model.max_verify_rows:
            raise ValueError(f"max_draft must be below {self.model.max_verify_rows} on this device (one pass of that "
                             f"many rows verifies the drafts), got {config.max_draft}")
        self.thresholds(config)

    def thresholds(self, config: DecodeConfig) -> tuple[float | None, ...]:
        """One threshold for each exit, None where it is closed or has none that is fixed.

        Raises ValueError for a wrong number of thresholds, or for a target when these exits were never calibrated.
        """
        if config.mode is Mode.FULL:
            return (None,) * self.num_exits
        if config.target_disagreement is None:
            return config.threshold_per_exit(self.exit_depths)
        if self.bank.calibration is None:
            raise ValueError("target_disagreement wants exits that were calibrated: run python -m training.calibrate, "
                             "or give thresholds")
        first = self.bank.calibration.threshold(config.target_disagreement)
        return (None,) * self.num_exits if first is None else graded_thresholds(first, self.exit_depths)

    @torch.inference_mode()
    def read_opening(self, token_ids: Sequence[int]) -> None:
        """Read once what many prompts begin with; runs go on from there, to the same result. No tokens: forget it.

        Only with our own kernels, whose rows do not depend on those beside them: elsewhere nothing is kept.

        Raises ValueError for token ids outside the vocabulary, as a tokenizer of another model gives.
        """
        self.model.check_ids(token_ids)
        self._opening = None
        if len(token_ids) and self.model.native:
            opening = Staircase(self.model, len(token_ids))
            opening.prefill(token_ids)
            self._opening = opening

    def begin(self, prompt: Sequence[int], new_tokens: int) -> tuple[Staircase, list[Hidden]]:
        """A staircase with room for so many tokens more that has read this prompt but for its newest token.

        And the rows after each segment that were read now, (1, N, D): all but those of the opening. None of a prompt
        of one token.
        """
        stairs, tokens = Staircase(self.model, self.capacity(len(prompt) + new_tokens)), list(prompt[:-1])
        n = len(self.opening)
        if 0 < n < len(tokens) and tokens[:n] == self.opening:
            stairs.adopt(self._opening)
        return stairs, stairs.prefill(tokens[len(stairs.tokens):])

    def run(self, prompt_ids: Sequence[int], config: DecodeConfig) -> Generation:
        """Generate to the end. Raises ValueError as `generate` does."""
        events = list(self.generate(prompt_ids, config))
        return Generation([e.token_id for e in events if e.final], events, summarize(events, self.costs_for(config)))

    def generate(self, prompt_ids: Sequence[int], config: DecodeConfig) -> Iterator[TokenEvent]:
        """Yield a TokenEvent for each token (and, in verified mode, for each draft) as it happens.

        Bad input raises ValueError here, before the first event is asked for.
        """
        prompt_ids = list(map(int, prompt_ids))
        self.check(prompt_ids, config)
        return self._timed(prompt_ids, config)

    def _timed(self, prompt_ids: list[int], config: DecodeConfig) -> Iterator[TokenEvent]:
        watch = _Stopwatch(self.model.device)
        # Nothing asks for gradients. The mode saves tensors work; our own kernels need none, and a switch takes 50 us.
        decode = self._decode if self.model.native else torch.inference_mode()(self._decode)
        for burst in decode(prompt_ids, config, watch):
            watch.pause()
            yield from burst
            watch.resume()

    def worth_asking(self, s: int, thresholds: Sequence[float | None], sure: float | None) -> bool:
        """Whether exit s may be taken, after the exit that was asked last was `sure`, None if none was.

        An exit that is much less sure than is wanted rules out those soon after it; the deepest is always asked.
        """
        if s == self.num_exits or thresholds[s] is None:
            return False
        return sure is None or s == self.num_exits - 1 or sure >= thresholds[s] - _REACH

    def next_exit(self, s: int, thresholds: Sequence[float | None], sure: float | None) -> int:
        """The first exit from s on that is worth asking; the top where there is none."""
        return next((t for t in range(s, self.num_exits) if self.worth_asking(t, thresholds, sure)), self.num_exits)

    def sampler(self, config: DecodeConfig) -> Sampler:
        """How tokens are chosen and drafts judged in a run."""
        return Sampler(config.temperature, config.top_p, config.seed, self.model.vocab_size, self.model.device,
                       config.tolerance)

    def _decode(self, prompt: list[int], config: DecodeConfig, watch: _Stopwatch) -> Iterator[list[TokenEvent]]:
        """The events of a run, those of one moment together."""
        model, bank, last = self.model, self.bank, self.num_exits
        verified = config.mode is Mode.VERIFIED
        thresholds = self.thresholds(config)
        tree = DraftTree(model, bank, prompt, config.temperature) if verified and config.thresholds is None else None
        lookup = Lookup(())                     # of the confirmed text, as far as exits were asked
        sampler = self.sampler(config)
        drafts: list[Draft] = []                                 # tokens not yet confirmed, parents first
        end = len(prompt) + config.max_new_tokens

        def event(position: int, token: int, exit: int, confidences, status: Status) -> TokenEvent:
            read, stairs.weight_bytes = stairs.weight_bytes, 0
            return TokenEvent(position - len(prompt), token, exit, confidences, status, watch.read(), read)

        # 1. Prefill: all but the newest token, through every segment, in every mode with the same shapes.
        stairs, passed = self.begin(prompt, config.max_new_tokens + config.max_draft)        # rows after each segment
        said = self.last_said(passed)                            # the hidden state that named the newest token (1, D)
        deep = (passed[1:-1], passed[0].shape[1] - 1) if passed else None    # and, for a drafter, what lay below it
        stairs.tokens.append(prompt[-1])
        stairs.weight_bytes = 0
        unasked = (None,) * last

        while True:
            finished = len(stairs.tokens) > len(prompt) and (
                len(stairs.tokens) >= end or stairs.tokens[-1] in model.eos_ids)
            if finished and not drafts:
                return

            asked, exit_hidden = unasked, None
            if tree:
                # 2. Verified by its own rule: a tree of drafts that cost next to nothing, then one pass over all of it.
                longest = min(config.max_draft, end - len(stairs.tokens))
                drafts = tree.grow(stairs.tokens, said, config.max_draft, longest, deep)
                confirmed = len(stairs.tokens)
                stairs.tokens += [draft.token for draft in drafts]
                stairs.weight_bytes += tree.weight_bytes
                tree.weight_bytes = 0
                yield [event(confirmed + d.depth, d.token, d.exit, d.confidences, Status.DRAFT) for d in drafts]
                parents = [-1, *(d.parent + 1 for d in drafts)]
                branching = parents != list(range(-1, len(drafts)))
                passed = stairs.run(range(last + 1), parents if branching else None)
                rows = passed[-1]
            else:
                # 3. Climb: deeper until an exit is sure enough, or to the top.
                may_exit, before, confidence = not finished and len(drafts) < config.max_draft, None, None
                copied, first = None, 0
                while exit_hidden is None:
                    s = self.next_exit(first, thresholds, confidence) if may_exit else last
                    rows = stairs.run(range(first, s + 1))[-1]                              # (1, N, D)
                    if s == last:
                        break
                    if copied is None:
                        lookup.extend(stairs.tokens[len(lookup):len(stairs.tokens) - len(drafts)])
                        copied = lookup.copied(stairs.tokens)
                    hidden = bank.hidden(s, rows[:, -1], said)                              # (1, D)
                    confidence, = bank.confidence(s, hidden, [copied], before if s == first else None)
                    before, first = hidden, s + 1
                    stairs.weight_bytes += bank.try_bytes(s)
                    asked = (*asked[:s], confidence, *asked[s + 1:])
                    if confidence >= thresholds[s]:
                        exit_hidden = hidden

            # 4. An exit was taken: its head names the token; deeper layers catch up when somebody next climbs there.
            if exit_hidden is not None:
                if verified or sampler.greedy:
                    token = bank.choice(s, exit_hidden)
                else:
                    token = sampler.choose(bank.logits(s, exit_hidden)[0], bank.head_ids)
                stairs.weight_bytes += bank.head_bytes(s)
                stairs.tokens.append(token)
                said = exit_hidden
                if verified:
                    drafts.append(Draft(token, s, asked, len(drafts) - 1, len(drafts)))
                yield [event(len(stairs.tokens) - 1, token, s, asked, Status.DRAFT if verified else Status.EMITTED)]
                continue

            # 5. The top: the row of a token speaks of the one after it. The newest token's row and those of the drafts
            #    judge: from the root on, as long as what stands is one of the drafts.
            confirmed = len(stairs.tokens) - len(drafts)
            judging = rows if rows.shape[1] == len(drafts) + 1 else rows[:, -len(drafts) - 1:]
            top = model.norm(model.pad_rows(judging))
            if sampler.greedy:
                says = model.judges(top, bank.screen, not sampler.exact)                        # drafts + 1
                stairs.weight_bytes += bank.choice_bytes
            else:
                says = model.read(top)[0]                                                       # (drafts + 1, V)
                stairs.weight_bytes += model.head_bytes
            burst, path, token, at = [], [], None, -1
            while token is None and not (path and (confirmed + len(path) >= end or drafts[at].token in model.eos_ids)):
                offered = {d.token: i for i, d in enumerate(drafts) if d.parent == at}
                stands = sampler.judge(list(offered), says[at + 1])
                if stands in offered:
                    at = offered[stands]
                    draft = drafts[at]
                    burst.append(event(confirmed + len(path), draft.token, draft.exit, draft.confidences,
                                       Status.ACCEPTED))
                    path.append(at)
                else:
                    token = stands
            # 6. Rollback: drafts that do not stand never were. The full model adds a token of its own.
            stairs.keep(len(drafts), path)
            burst += [event(confirmed + d.depth, d.token, d.exit, d.confidences, Status.REJECTED)
                      for i, d in enumerate(drafts) if i not in path]
            if token is not None:
                said = top[:, at + 1]
                stairs.tokens.append(token)
                burst.append(event(len(stairs.tokens) - 1, token, last, asked, Status.EMITTED))
            if tree:
                tree.judged(drafts, path, stairs.tokens[confirmed:])
                deep = passed[1:-1], at + 1
            drafts = []
            yield burst

    @torch.inference_mode()
    def full_choices(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        """What the full model would greedily say at each position of token_ids, given the tokens before it.

        One parallel pass over the finished text, for teacher-forced agreement. The rows run in the buckets of
        decoding, so on a text that `full` wrote the choices are that text.

        Raises ValueError for an empty prompt and for token ids outside the vocabulary.
        """
        if len(prompt_ids) == 0:
            raise ValueError("the prompt is empty: give at least one token")
        self.model.check_ids((*prompt_ids, *token_ids))
        if not token_ids:
            return []
        stairs, _ = self.begin(prompt_ids, len(token_ids))
        rows = [prompt_ids[-1], *token_ids[:-1]]
        choices = []
        for a in range(0, len(rows), self.model.max_verify_rows):
            *_, top = stairs.prefill(rows[a:a + self.model.max_verify_rows])
            choices += self.model.choices(self.model.norm(top), self.bank.screen)
        return choices

    def last_said(self, rows: list[Hidden]) -> Hidden:
        """The full model's hidden state that names the token after these prefilled rows (1, D); zeros without rows."""
        if not rows:
            return torch.zeros(1, self.model.hidden_size, dtype=self.model.dtype, device=self.model.device)
        return self.model.norm(rows[-1][:, -1])

    def capacity(self, positions: int) -> int:
        """Cache slots for a run: room for the padding of the last pass, rounded up."""
        return -(-(positions + self.model.row_multiple) // _CAPACITY_STEP) * _CAPACITY_STEP
