"""GpuExits: adapters, estimators and drafter over our Triton kernels.

Letters: N rows, D hidden size, F inner size of an adapter, E exits but the first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cascadeexit.backends.exits import Exits
from cascadeexit.backends.gpu.launches import Counts
from cascadeexit.backends.gpu.layers import gated, linear, rms_norm
from cascadeexit.exits.bank import ExitBank


class GpuExits(Exits):
    """Exit runtime in Triton; the methods are those of `base.ExitRuntime`."""

    def __init__(self, bank: ExitBank, backend):
        super().__init__(bank, backend)
        self._embed, counts = backend.layers.embed, backend.layers.counts
        self._adapters = [GpuAdapter(adapter, counts) for adapter in bank.adapters]
        self._draft = GpuAdapter(bank.drafter.adapter, counts) if bank.drafter else self._adapters[0]
        self._counts = counts

    def hidden(self, s: int, rows: Tensor, carried: Tensor) -> Tensor:
        return self._adapters[s](rows, carried)

    def confidence(self, s: int, hidden: Tensor, copied: Sequence[tuple[int, int]],
                   before: Tensor | None = None) -> list[float]:
        estimators = self._bank.confidence_heads
        if estimators is None:
            return self.logits(s, hidden).softmax(-1).amax(-1).tolist()
        if self._sketch is None:
            return estimators[s].chance(hidden).tolist()
        copies = torch.tensor(self.copies(copied), device=self._device)
        return estimators[s](self._sketch.softmax_facts(hidden, copies, before)).sigmoid().tolist()

    def context(self, states: Sequence[Tensor], row: int) -> Tensor | None:
        if self._bank.drafter is None:
            return None
        x = torch.cat([rows[0, row:row + 1] for rows in states], dim=-1)
        weight = self._bank.drafter.context.weight
        return linear(x, weight, self._counts(1), x.new_empty(1, len(weight))).float()           # (1, D)

    def drafts(self, tokens: Sequence[int], carried: Sequence[Tensor], k: int, temperature: float,
               context: Tensor | None = None) -> list[tuple[Tensor, list[float], list[int]]]:
        states = torch.cat(list(carried)) if len(carried) > 1 else carried[0]
        if context is not None:
            states = (states + context).to(states.dtype)
        hidden = self._draft(self._embed(tokens)[0], states)
        probs, words = self._draft_head.likeliest(hidden, k, temperature)
        ids = words if self._bank.head_ids is None else self._bank.head_ids[words]
        return list(zip(hidden[:, None], probs.tolist(), ids.tolist()))


class GpuAdapter:
    """An adapter in Triton: rows (..., D) and carried states (..., D) -> (..., D).

    Args:
        adapter: `ExitAdapter` or `CarryAdapter`; its weights are shared.
    """

    def __init__(self, adapter: nn.Module, counts: Counts):
        self._adapter, self._counts = adapter, counts

    def __call__(self, rows: Tensor, carried: Tensor) -> Tensor:
        a, flat = self._adapter, rows.reshape(-1, rows.shape[-1])
        count, straight = self._counts(len(flat)), flat
        x = flat.to(a.gate.weight.dtype).contiguous()
        if a.linear is not None:
            x = torch.cat([x, carried.reshape(x.shape).to(x.dtype)], dim=-1)
            straight = linear(x, a.linear.weight, count, x.new_empty(flat.shape))
        inner = gated(x, a.gate.weight, a.down.weight, count, x.new_empty(len(x), len(a.gate.weight)))
        out = linear(inner, a.up.weight, count, straight.new_empty(flat.shape), residual=straight.contiguous())
        return rms_norm(out, a.norm.weight, a.norm.eps, self._counts).view(rows.shape)
