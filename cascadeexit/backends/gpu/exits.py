"""GpuExits: runs adapters, confidence estimators and the drafter with the help of our Triton kernels.

Letters: N rows, D hidden size. A row's carried state is the hidden state that produced the newest token before it.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cascadeexit.backends.exits import Exits
from cascadeexit.backends.gpu.launches import ROWS, Counts
from cascadeexit.backends.gpu.layers import gated, linear, rms_norm
from cascadeexit.backends.gpu.recording import Hidden, Late, Passes, tensor_of
from cascadeexit.exits.adapters import CarryAdapter, ExitAdapter
from cascadeexit.exits.bank import ExitBank
from cascadeexit.exits.confidence import read_copies

log = logging.getLogger(__name__)
_DRAFTS = "drafts"              # name of the recording of a level of drafts


class GpuExits(Exits):
    """Runs the trained exits of a model with Triton kernels. `base.ExitRuntime` describes the methods.

    If passes are recorded as CUDA graphs, the constructor also records each pass together with the exit after it. Such
    a recording runs the pass, and then the exit's adapter, its confidence estimator and its vocabulary head.
    """

    def __init__(self, bank: ExitBank, backend):
        super().__init__(bank, backend)
        self._embed, self._counts = backend.layers.embed, backend.layers.counts
        self._adapters = [GpuAdapter(adapter, self._counts) if type(adapter) in (ExitAdapter, CarryAdapter)
                          else ModuleAdapter(adapter) for adapter in bank.adapters]
        self._draft = GpuAdapter(bank.drafter.adapter, self._counts) if bank.drafter else self._adapters[0]
        self._passes: Passes | None = backend.layers.passes
        if self._passes and self._passes.usable:
            with torch.inference_mode():
                self._record()
                self._record_drafts()
            if not self._passes.usable:
                log.warning("These exits cannot be recorded as CUDA graphs, so everything runs kernel by kernel: %s",
                            self._passes.recorder.error)

    def _record(self) -> None:
        """Record each exit together with the segments below it, once for each segment at which a pass may begin.

        If the exits have `SketchConfidence` estimators, each exit except the first is recorded twice: without and with
        the adapter output of the previous exit.
        """
        like = self._passes.x[:1]
        self._carried, self._before = torch.zeros_like(like), torch.zeros_like(like)            # (1, D) each
        self._copies = torch.zeros(1, 2, device=like.device)
        for s in range(len(self._adapters)):
            for after in (False, True) if s and self._sketch else (False,):
                def asked(rows: Tensor, s: int = s, after: bool = after) -> tuple[Tensor, Tensor]:
                    hidden = self._adapters[s](self._passes.last_row(rows), self._carried)
                    chance = self._chance(s, hidden, self._copies, self._before if after else None)
                    return hidden, torch.cat([chance.double(), self._heads[s].launch(hidden)[1].double()])

                for first in range(s + 1):
                    self._passes.record_span((first, s + 1), (first, s, after), asked)

    def hidden(self, s: int, rows: Hidden, carried: Hidden) -> Hidden:
        ends = rows.ends if isinstance(rows, Late) else None
        if ends is not None and len(rows.shape) == 2 and ends.waits and ends.span[1] == s + 1:
            return AskedExit(self._adapters[s], rows, carried)
        return self._adapters[s](tensor_of(rows), tensor_of(carried))

    def confidence(self, s: int, hidden: Hidden, copied: Sequence[tuple[int, int]],
                   before: Hidden | None = None) -> list[float]:
        if isinstance(hidden, AskedExit) and (chance := self._ask(s, hidden, copied, before)) is not None:
            return [chance]
        copies = torch.tensor(read_copies(copied, self._places), device=self._device) if self._sketch else None
        return self._chance(s, tensor_of(hidden), copies, None if before is None else tensor_of(before)).tolist()

    def choice(self, s: int, hidden: Hidden) -> int:
        if isinstance(hidden, AskedExit) and hidden.word is not None:
            return hidden.word if self._ids is None else self._ids[hidden.word]
        return super().choice(s, hidden)

    def _ask(self, s: int, asked: "AskedExit", copied: Sequence[tuple[int, int]],
             before: Hidden | None) -> float | None:
        """Run exit s, and the postponed pass below it, in one recording. Returns the exit's confidence.

        Returns None if the pass has already run, or if there is no such recording.
        """
        after = before is not None and self._sketch is not None
        if not asked.waits:
            return None
        name, carried = (asked.source.span[0], s, after), tensor_of(asked.carried)
        before = tensor_of(before) if after else None               # first: may run the postponed pass

        def fill() -> None:
            self._carried.copy_(carried)
            if after:
                self._before.copy_(before)
            if self._sketch:
                self._copies.copy_(torch.tensor(read_copies(copied, self._places)))

        with self._passes.turn:
            if not asked.waits or name not in self._passes.recorder:
                return None
            rows, (hidden, answer) = self._passes.run(asked.source, name, fill)
            asked.source.take(rows)
            asked.keep(hidden.clone())
            asked.carried = None
            chance, word = answer.tolist()                          # the one synchronisation
        asked.word = int(word)
        return chance

    def _chance(self, s: int, hidden: Tensor, copies: Tensor | None, before: Tensor | None) -> Tensor:
        """Compute the confidences (N,) of exit s from outputs of its adapter (N, D).

        Args:
            copies: n-gram copies from `read_copies`, (N, 2). Only a `SketchConfidence` estimator reads them.
            before: adapter outputs of the previous exit (N, D); None if that exit did not run. Only a
                `SketchConfidence` estimator reads them.
        """
        estimators = self._bank.confidence_heads
        if estimators is None:
            return self._heads[s].logits(hidden).softmax(-1).amax(-1)
        if self._sketch is None:
            return estimators[s].chance(hidden)
        return estimators[s](self._sketch.softmax_facts(hidden, copies, before)).sigmoid()

    def context(self, states: Sequence[Hidden], row: int) -> Tensor | None:
        if self._bank.drafter is None:
            return None
        x = torch.cat([tensor_of(rows)[0, row:row + 1] for rows in states], dim=-1)
        weight = self._bank.drafter.context.weight
        return linear(x, weight, self._counts(1), x.new_empty(1, len(weight))).float()           # (1, D)

    def drafts(self, tokens: Sequence[int], carried: Sequence[Hidden], k: int, temperature: float,
               context: Tensor | None = None) -> list[tuple[Tensor, list[float], list[int]]]:
        n, k = len(tokens), min(k, self._draft_head.words)
        states = torch.cat([tensor_of(state) for state in carried])
        if self._passes and _DRAFTS in self._passes.recorder and n <= ROWS and k <= self._most_drafts:
            hidden, answer = self._replay_drafts(tokens, states, temperature, context)
        else:
            ids = torch.as_tensor(tokens, device=self._device)
            hidden, answer = self._drafted(ids, states, context, temperature, k, self._counts(n))
        each = [(row[:k], row[len(row) // 2:][:k]) for row in answer.tolist()]
        return [(state, probs, list(map(int, ids))) for state, (probs, ids) in zip(hidden[:, None], each)]

    def _drafted(self, tokens: Tensor, states: Tensor, context: Tensor | None, temperature: float | Tensor, k: int,
                 count: Tensor) -> tuple[Tensor, Tensor]:
        """Draft the k likeliest next tokens after each of N tokens.

        Returns two tensors: the adapter's outputs (N, D), and (N, 2 k) with each token's k probabilities followed by
        the k token ids.

        Args:
            states: carried states of the tokens (N, D).
            count: number of real tokens, as a tensor (1,) in device memory. The tokens after these are padding.
        """
        if context is not None:
            states = (states + context).to(states.dtype)
        hidden = self._draft(tensor_of(self._embed(tokens))[0], states, count)
        logits = self._draft_head.launch(hidden, count)[0]
        probs, words = (logits / temperature).softmax(-1).topk(k, dim=-1)
        ids = words if self._bank.head_ids is None else self._bank.head_ids[words]
        return hidden, torch.cat([probs.double(), ids.double()], dim=-1)

    def _record_drafts(self) -> None:
        """Record one call of `_drafted` as a CUDA graph, for up to 16 tokens."""
        like = self._passes.x
        self._most_drafts = min(ROWS, self._draft_head.words)
        self._draft_tokens = torch.zeros(ROWS, dtype=torch.int64, device=like.device)
        self._draft_states, self._draft_count = torch.zeros_like(like), self._counts(1).clone()
        self._draft_context = torch.zeros(1, like.shape[1], device=like.device) if self._bank.drafter else None
        self._temperature = torch.ones(1, device=like.device)
        self._passes.recorder.record(_DRAFTS, lambda: self._drafted(
            self._draft_tokens, self._draft_states, self._draft_context, self._temperature, self._most_drafts,
            self._draft_count))

    @torch.inference_mode()
    def _replay_drafts(self, tokens: Sequence[int], states: Tensor, temperature: float,
                       context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Replay the recording of `_drafted` for N tokens and their carried states (N, D).

        Returns two tensors: the adapter's outputs (N, D), and (N, 2 k) with each token's k probabilities followed by
        the k token ids. Here k is `_most_drafts`, the number for which the call was recorded.
        """
        n = len(tokens)
        with self._passes.turn:
            self._draft_tokens[:n].copy_(torch.tensor(tokens))
            self._draft_states[:n].copy_(states)
            self._draft_count.fill_(n)
            self._temperature.fill_(temperature)
            if self._draft_context is not None:
                self._draft_context.zero_() if context is None else self._draft_context.copy_(context)
            hidden, answer = self._passes.recorder.replay(_DRAFTS)
            return hidden[:n].clone(), answer[:n].clone()


class AskedExit(Late):
    """The output (1, D) of an exit's adapter, computed when it is first read.

    If the pass below the exit is still postponed, `GpuExits.confidence` runs the pass and the exit in one recording
    (CUDA graph).

    Args:
        adapter: the adapter of the exit.
        rows: the hidden state at the exit's layer (1, D).
        carried: the carried state (1, D).

    Attributes:
        word: index of the largest logit of the exit's head; None if the exit has not run in a recording.
    """

    __slots__ = "carried", "word"

    def __init__(self, adapter: "GpuAdapter", rows: Late, carried: Hidden):
        super().__init__(rows.shape, lambda: adapter(rows.tensor(), tensor_of(carried)), rows.ends)
        self.carried, self.word = carried, None


class ModuleAdapter:
    """Runs an exit's adapter in PyTorch. It is used if the Triton kernels do not support the adapter's type.

    A call takes rows (..., D) and their carried states (..., D), and returns the adapter's output (..., D).
    """

    def __init__(self, adapter: nn.Module):
        self._adapter = adapter

    def __call__(self, rows: Tensor, carried: Tensor, count: Tensor | None = None) -> Tensor:
        """Apply the adapter to all rows. `count` is ignored: the rows after the first `count` are computed, too."""
        return self._adapter(rows, carried)


class GpuAdapter:
    """Runs an exit's adapter with Triton kernels.

    A call takes rows (..., D) and their carried states (..., D), and returns the adapter's output (..., D).

    Args:
        adapter: an `ExitAdapter` or a `CarryAdapter`. Its weights are not copied.
    """

    def __init__(self, adapter: nn.Module, counts: Counts):
        self._adapter, self._counts = adapter, counts

    def __call__(self, rows: Tensor, carried: Tensor, count: Tensor | None = None) -> Tensor:
        """Apply the adapter to rows (..., D) and their carried states (..., D).

        count: how many of the first rows to compute, as a tensor (1,) in device memory; None for all rows.
        """
        a, flat = self._adapter, rows.reshape(-1, rows.shape[-1])
        count, straight = self._counts(len(flat)) if count is None else count, flat
        x = flat.to(a.gate.weight.dtype).contiguous()
        if a.linear is not None:
            x = torch.cat([x, carried.reshape(x.shape).to(x.dtype)], dim=-1)
            straight = linear(x, a.linear.weight, count, x.new_empty(flat.shape))
        inner = gated(x, a.gate.weight, a.down.weight, count, x.new_empty(len(x), len(a.gate.weight)))
        out = linear(inner, a.up.weight, count, straight.new_empty(flat.shape), residual=straight.contiguous())
        return rms_norm(out, a.norm.weight, a.norm.eps, count).view(rows.shape)
