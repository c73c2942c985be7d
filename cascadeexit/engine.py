"""Engine: one decoding loop for `full`, `cascade` and `verified`, in four steps: draft, run, judge, commit.

The engine works with token ids, segments and exits. It does not handle text, pages or files. Backends compute the
numbers. `staircase.py` explains how positions pass through the segments.

Letters: N rows in a pass, D hidden size, V vocabulary, S segments (the last one ends in the full model).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from cascadeexit.backends.base import Choice, Rows
from cascadeexit.carry import Carry
from cascadeexit.config import DecodeConfig, Mode, graded_thresholds
from cascadeexit.costs import Costs, Meter
from cascadeexit.drafting import Draft, DraftSource, ExitDrafts
from cascadeexit.events import Status, TokenEvent
from cascadeexit.exits import ExitBank
from cascadeexit.metrics import RunStats, summarize
from cascadeexit.model import SegmentedModel, token_ids
from cascadeexit.sampling import Sampler
from cascadeexit.staircase import Staircase
from cascadeexit.tree import DraftTree

_CAPACITY_STEP = 128        # cache sizes come in steps, so that runs of like length share kernels and buffers


@dataclass(frozen=True)
class Generation:
    """Result of a run: its new tokens, all its events, and its statistics."""

    token_ids: list[int]
    events: list[TokenEvent]
    stats: RunStats


class Engine:
    """Generates text with one model and its exits. Runs do not influence each other and may be interleaved.

    The constructor prepares the exits for the model's device and dtype. Raises ValueError if the exits were made for a
    model of other sizes.

    Attributes:
        model: the frozen model.
        bank: the exits as a plain module, with their config and calibration.
        exits: the same exits ready to run on the model's backend (`backends.base.ExitRuntime`).
        costs: how many bytes of weights greedy `full` reads for each token (`Costs`). A greedy run's `cost` is relative
            to this number.
        self_check: result of the self-check at load (`cascadeexit.selfcheck.SelfCheck`); None if there was no
            self-check.
        payoff: which exits and drafts save time on this machine (`cascadeexit.payoff.Payoff`); None if that was not
            measured. Without this measurement, all exits and drafts are used.
        notice: a message for users, such as the reason why this engine runs on another backend; "" if there is no
            message.
    """

    self_check = payoff = None
    notice = ""

    def __init__(self, model: SegmentedModel, bank: ExitBank):
        self.model, self.bank = model, bank.prepare(model)
        self.exits = model.backend.exits(bank)
        self._opening: Staircase | None = None
        depths = tuple(b / model.num_layers for b in model.bounds[1:])
        self.costs = Costs(model.pass_bytes + self.exits.full_head.nbytes, depths)
        self._sampled_costs = Costs(model.pass_bytes + model.head.nbytes, depths)

    @property
    def num_exits(self) -> int:
        return self.model.num_segments - 1

    @property
    def exit_depths(self) -> tuple[float, ...]:
        """Depth of each exit: the share of the layers below it, in [0, 1)."""
        return self.costs.depths[:-1]

    def costs_for(self, config: DecodeConfig) -> Costs:
        """Return the costs of mode `full` that a run with this config is compared with.

        A run at temperature 0 is compared with `full` at temperature 0, and a sampled run with sampled `full`.
        """
        return self._sampled_costs if config.temperature else self.costs

    # -- before a run ---------------------------------------------------------------------------------------------

    def check(self, prompt_ids: Sequence[int], config: DecodeConfig) -> None:
        """Raise ValueError if a run with this prompt and this config cannot work. `generate` calls this first."""
        self.model.check_prompt(prompt_ids)
        needed = len(prompt_ids) + config.max_new_tokens
        if needed > self.model.max_positions:
            raise ValueError(f"{len(prompt_ids)} prompt tokens and {config.max_new_tokens} new ones need {needed} "
                             f"positions; {self.model.name} has {self.model.max_positions}. Shorten one of them.")
        most = self.model.layers.max_rows
        if config.max_draft >= most:
            raise ValueError(f"max_draft must be below {most} on this device (a pass has at most that many rows: the "
                             f"newest token and its drafts), got {config.max_draft}")
        self.thresholds(config)

    def thresholds(self, config: DecodeConfig) -> tuple[float | None, ...]:
        """Return the confidence threshold of each exit, or None for an exit that is disabled.

        All are None in mode `full`, and in mode `verified` without thresholds in the config. An exit that costs
        more time than it saves on this machine (`payoff`) is disabled unless the config asks for it with thresholds.
        With a target disagreement, all exits are disabled if none of them saves time, or if no measured threshold meets
        the target. Otherwise even an exit that saves no time stays enabled, because all were calibrated together.

        Raises ValueError if the config has a wrong number of thresholds, or if it has a target disagreement and these
        exits were never calibrated.
        """
        if config.mode is Mode.FULL:
            return (None,) * self.num_exits
        if config.target_disagreement is None:
            each = config.threshold_per_exit(self.exit_depths)
            if self.payoff is None or not (config.thresholds is None or config.only_paying):
                return each
            return tuple(t if pays else None for t, pays in zip(each, self.payoff.paying))
        if self.bank.calibration is None:
            raise ValueError("target_disagreement needs exits that were calibrated: run python -m training.calibrate, "
                             "or give thresholds")
        first = self.bank.calibration.threshold(config.target_disagreement)
        if first is None or (self.payoff is not None and not any(self.payoff.paying)):
            return (None,) * self.num_exits
        return graded_thresholds(first, self.exit_depths)

    @property
    def opening(self) -> list[int]:
        """Token ids of the opening that `read_opening` computed; [] if there is none."""
        return self._opening.tokens if self._opening else []

    @torch.inference_mode()
    def read_opening(self, token_ids: Sequence[int]) -> None:
        """Prefill a prefix that many prompts share, the opening, and keep its KV cache for all later runs.

        A later run whose prompt begins with `token_ids` starts after them. Its result is the same as without an
        opening. A second call replaces the opening. Nothing is kept if `token_ids` is empty, or on a backend whose
        results depend on the number of rows in a pass.

        Raises ValueError for token ids outside the vocabulary, such as ids from another model's tokenizer.
        """
        self.model.check_ids(token_ids)
        self._opening = None
        if len(token_ids) and self.model.layers.row_multiple == 1:
            opening = Staircase(self.model, len(token_ids))
            opening.prefill(token_ids)
            self._opening = opening

    def begin(self, prompt: Sequence[int], new_tokens: int) -> tuple[Staircase, list[Rows]]:
        """Prefill all tokens of a prompt except the last one, with room in the cache for more tokens.

        A long prompt is read in chunks. Returns the `Staircase`, and a list: for each segment, the rows (hidden states)
        that the prompt's last chunk had after this segment, (1, N, D) each. Tokens of the opening were computed before
        and have no rows here. For a prompt of one token, the list is [].

        new_tokens: number of tokens for which the cache needs room.
        """
        return deque(self._reading(prompt, new_tokens), maxlen=1).pop()

    def _reading(self, prompt: Sequence[int], new_tokens: int) -> Iterator[tuple[Staircase, list[Rows]]]:
        """Prefill a prompt in chunks, as `begin` does, so that the caller can interrupt the work between two chunks.

        After each chunk, yields the staircase and the rows of this chunk, in the form in which `begin` returns them.
        """
        stairs, tokens = Staircase(self.model, self.capacity(len(prompt) + new_tokens)), list(prompt[:-1])
        n = len(self.opening)
        if 0 < n < len(tokens) and tokens[:n] == self.opening:
            stairs.adopt(self._opening)
        chunks = stairs.read(tokens[len(stairs.tokens):])
        yield stairs, next(chunks, [])
        for passed in chunks:
            yield stairs, passed

    def capacity(self, positions: int) -> int:
        """Return the number of cache slots for a run of this many positions.

        It includes room for the padding of the last pass, and is rounded up to a multiple of 128.
        """
        return -(-(positions + self.model.layers.row_multiple) // _CAPACITY_STEP) * _CAPACITY_STEP

    # -- a run ----------------------------------------------------------------------------------------------------

    def run(self, prompt_ids: Sequence[int], config: DecodeConfig) -> Generation:
        """Generate a text to its end. Returns its token ids, events and statistics.

        Raises ValueError as `generate` does.
        """
        events = list(self.generate(prompt_ids, config))
        return Generation([e.token_id for e in events if e.final], events, summarize(events, self.costs_for(config)))

    def generate(self, prompt_ids: Sequence[int], config: DecodeConfig) -> Iterator[TokenEvent]:
        """Generate a text. Yields a TokenEvent for each token, as soon as it is decoded.

        In verified mode, each draft and each rejection also gives an event. A long prompt is read in chunks. Each chunk
        except the last one gives an event with `Status.READING`.

        Raises ValueError for bad input at the call, before the first event.
        """
        prompt_ids = token_ids(prompt_ids)
        self.check(prompt_ids, config)
        return self._timed(prompt_ids, config)

    def _timed(self, prompt: list[int], config: DecodeConfig) -> Iterator[TokenEvent]:
        watch = _Stopwatch(self.model.backend.synchronize)
        for burst in self.model.backend.without_gradients(self._decode)(prompt, config, watch):
            watch.pause()
            yield from burst
            watch.resume()

    def _decode(self, prompt: list[int], config: DecodeConfig, watch: "_Stopwatch") -> Iterator[list[TokenEvent]]:
        """Run the decoding loop. Yields lists of events; the events of one list happen at the same moment."""
        end, eos_ids = len(prompt) + config.max_new_tokens, frozenset() if config.ignore_eos else self.model.eos_ids
        verified, meter, sampler = config.mode is Mode.VERIFIED, Meter(), self.sampler(config)

        def ended(length: int, newest: int) -> bool:
            return length >= end or (length > len(prompt) and newest in eos_ids)

        def event(position: int, draft: Draft, status: Status, checked: Sequence[int] = ()) -> TokenEvent:
            tree = (draft.parent, draft.chance) if status is Status.DRAFT else (-1, None)
            return TokenEvent(position - len(prompt), draft.token, draft.exit, draft.confidences, status, watch.read(),
                              *meter.taken(), *tree, tuple(checked))

        def own(token: int, confidences: tuple[float | None, ...]) -> Draft:
            return Draft(token, self.num_exits, confidences, -1)

        # Prefill: all but the newest token, through every segment, in every mode with the same shapes.
        for chunk in self._reading(prompt, config.max_new_tokens + config.max_draft):
            stairs, passed = chunk
            if len(stairs.tokens) < len(prompt) - 1:
                newest = own(stairs.tokens[-1], (None,) * self.num_exits)
                yield [event(len(stairs.tokens), newest, Status.READING)]
        carry = Carry.after_prompt(self.model, passed)
        source = self._source(config, prompt, passed, sampler, ended)
        stairs.tokens.append(prompt[-1])

        while not ended(len(stairs.tokens), stairs.tokens[-1]):
            # 1. Draft: exits or the drafter propose tokens. In cascade mode an exit's token is final at once.
            confirmed, drafts = len(stairs.tokens), []
            for proposed in source.draft(stairs, carry, meter):
                drafts += proposed
                yield [event(confirmed + d.depth, d, Status.DRAFT if verified else Status.EMITTED) for d in proposed]
            if not verified:
                confirmed, drafts = len(stairs.tokens), []
                if ended(confirmed, stairs.tokens[-1]):
                    return

            # 2. Run: the newest token and its drafts, and whatever waits for deeper layers, up to the top.
            passed = stairs.run(range(stairs.lowest(), self.num_exits + 1), _parents(drafts), meter)

            # 3. Judge: a token's row after the last layer predicts the token after it.
            normed, verdicts, checked = self._verdicts(passed[-1], len(drafts) + 1, config.check_late, sampler, meter)
            path, token = _judge(drafts, verdicts, sampler, confirmed, ended)

            # 4. Commit: rejected drafts leave no trace. The full model adds a token of its own.
            stairs.keep(len(drafts), path)
            burst = [event(confirmed + n, drafts[i], Status.ACCEPTED) for n, i in enumerate(path)]
            burst += [event(confirmed + d.depth, d, Status.REJECTED) for i, d in enumerate(drafts) if i not in path]
            if token is not None:
                carry.state = normed[:, (path[-1] if path else -1) + 1]
                stairs.tokens.append(token)
                full = own(token, source.confidences)
                burst.append(event(len(stairs.tokens) - 1, full, Status.EMITTED, checked))
            source.judged(drafts, path, stairs.tokens[confirmed:], passed)
            yield burst

    def _source(self, config: DecodeConfig, prompt: list[int], passed: list[Rows], sampler: Sampler,
                ended: Callable[[int, int], bool]) -> DraftSource:
        """Make the draft source of a run: a `DraftTree` in verified mode without thresholds, else `ExitDrafts`.

        Args:
            passed: rows of the prefill after each segment, (1, N, D) each.
            ended: function that returns True if the text is complete. Its arguments are the length of the text and its
                newest token.
        """
        if config.mode is Mode.VERIFIED and config.thresholds is None:
            return DraftTree(self.model, self.exits, prompt, config.temperature, passed=passed, limit=config.max_draft,
                             eos_ids=frozenset() if config.ignore_eos else self.model.eos_ids,
                             end=len(prompt) + config.max_new_tokens,
                             use_drafter=self.payoff is None or self.payoff.drafter_pays,
                             row_factor=1.0 if self.payoff is None else self.payoff.row_factor)

        def sampled(s: int, hidden: Rows) -> int:
            return sampler.choose(self.exits.logits(s, hidden)[0], self.bank.head_ids)

        verified = config.mode is Mode.VERIFIED
        choose = self.exits.choice if verified or sampler.greedy else sampled
        return ExitDrafts(self.exits, self.thresholds(config), choose, ended, config.max_draft if verified else None)

    def _verdicts(self, rows: Rows, judged: int, check_late: bool, sampler: Sampler,
                  meter: Meter) -> tuple[Rows, Sequence[Choice | torch.Tensor], list[int]]:
        """Compute what the full model chooses, from the newest rows after the last layer.

        Args:
            rows: the rows of a pass after the last layer (1, N, D).
            judged: number of rows at the end of `rows` that predict a token that is not final yet.
            check_late: also compute the full model's choices at the earlier rows.

        Returns three values: the judged rows after the final norm (1, judged, D); for each judged row, a `Choice` if
        greedy, or logits (V,) if sampled; and the full model's choices at the earlier rows, or [] without `check_late`.
        """
        n, most = rows.shape[1], self.model.layers.max_rows
        together = min(n, most) if check_late else judged           # rows do not depend on each other up to `most`
        head = self.exits.full_head if sampler.greedy else self.model.head
        normed = self.model.layers.norm(rows if n == together else rows[:, -together:])
        verdicts = head.choices(normed) if sampler.greedy else head.logits(normed)[0]
        meter.add(head.nbytes)
        late = together - judged
        if not late:
            return normed, verdicts, []
        checked = []
        for a in range(0, n - together, most):
            part = rows[:, a:min(a + most, n - together)]
            checked += self.exits.full_head.argmax(self.model.layers.norm(part))
            meter.add(self.exits.full_head.nbytes)
        checked += [v.token for v in verdicts[:late]] if sampler.greedy else verdicts[:late].argmax(-1).tolist()
        return normed[:, late:], verdicts[late:], checked

    def sampler(self, config: DecodeConfig) -> Sampler:
        """Make the sampler of a run. It chooses tokens and judges drafts."""
        return Sampler(config.temperature, config.top_p, config.seed, self.model.vocab_size, self.model.device,
                       config.tolerance)

    # -- after a run ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def full_choices(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        """Return the token that the full model would choose greedily at each position of `token_ids`.

        At each position the full model reads the prompt and the earlier tokens of `token_ids`, not its own choices.
        Agreement is the share of `token_ids` that equal the choices. The text is finished, so one pass computes many
        positions. A pass has at most `max_rows` rows, and up to this number a row's result does not depend on the other
        rows. So for a text that greedy `full` wrote, the choices are exactly that text.

        Raises ValueError for an empty prompt and for token ids outside the vocabulary.
        """
        self.model.check_prompt(prompt_ids)
        self.model.check_ids(token_ids)
        if not token_ids:
            return []
        stairs, _ = self.begin(prompt_ids, len(token_ids))
        rows, most = [prompt_ids[-1], *token_ids[:-1]], self.model.layers.max_rows
        choices = []
        for a in range(0, len(rows), most):
            *_, top = stairs.prefill(rows[a:a + most])
            choices += self.exits.full_head.argmax(self.model.layers.norm(top))
        return choices


class _Stopwatch:
    """Measures engine time in seconds. It is paused while the caller handles the events that were yielded."""

    def __init__(self, synchronize: Callable[[], None]):
        self._synchronize = synchronize
        self._spent, self._since = 0.0, time.perf_counter()

    def read(self) -> float:
        self._synchronize()
        return self._spent + time.perf_counter() - self._since

    def pause(self) -> None:
        self._spent = self.read()

    def resume(self) -> None:
        self._since = time.perf_counter()


def _parents(drafts: Sequence[Draft]) -> list[int] | None:
    """Return the parent of each row of a verification pass, as `LayerStack.run` needs it.

    Row 0 is the newest token of the text, with parent -1. Draft i is row i + 1. Returns None if each draft follows the
    draft before it.
    """
    parents = [-1, *(draft.parent + 1 for draft in drafts)]
    return None if parents == list(range(-1, len(drafts))) else parents


def _judge(drafts: Sequence[Draft], verdicts: Sequence[Choice | torch.Tensor], sampler: Sampler, confirmed: int,
           ended: Callable[[int, int], bool]) -> tuple[list[int], int | None]:
    """Accept drafts one after another, as long as the full model's choice is among the drafts at that position.

    Args:
        verdicts: the full model's choice or logits after the newest token of the text, and then after each draft.
        confirmed: length of the text before the drafts.
        ended: function that returns True if the text is complete. Its arguments are the length of the text and its
            newest token.

    Returns the indices of the accepted drafts, in the order of the text, and the token that the full model adds after
    them. This token is None if an accepted draft ends the text.
    """
    path, at = [], -1
    while not (path and ended(confirmed + len(path), drafts[at].token)):
        offered = {d.token: i for i, d in enumerate(drafts) if d.parent == at}
        token = sampler.judge(list(offered), verdicts[at + 1])
        if token not in offered:
            return path, token
        at = offered[token]
        path.append(at)
    return path, None
