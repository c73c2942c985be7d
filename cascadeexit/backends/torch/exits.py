"""TorchExits: runs trained exits by calling the PyTorch modules of their bank. On CUDA, it can use CUDA graphs.

Letters: N rows, D hidden size, E exits except the first.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascadeexit.backends.exits import Exits
from cascadeexit.backends.torch.recording import Recorded
from cascadeexit.exits.bank import ExitBank
from cascadeexit.exits.confidence import read_copies


class TorchExits(Exits):
    """Runs the trained exits of a model in PyTorch. `base.ExitRuntime` describes the methods.

    Args:
        recorded: if True, calls of an exit with a single row run as CUDA graphs. This needs CUDA.
    """

    def __init__(self, bank: ExitBank, backend, *, recorded: bool = False):
        super().__init__(bank, backend)
        prepared: Callable[[Callable], Callable] = (lambda f: Recorded(f, rows=1)) if recorded else (lambda f: f)
        self._embed = backend.layers.embed
        self._adapters = [prepared(adapter) for adapter in bank.adapters]
        drafter = bank.drafter
        self._draft = prepared(drafter.adapter) if drafter else self._adapters[0]
        self._read_context = prepared(drafter.context) if drafter else None
        estimators = [self._estimator(s) for s in range(len(bank.config.layers))]
        # Without trained estimators the head answers, which is recorded by itself.
        self._estimators = estimators if bank.confidence_heads is None else list(map(prepared, estimators))

    def _estimator(self, s: int) -> Callable[..., Tensor]:
        """Make the function that computes confidences (N,) of exit s from outputs of its adapter (N, D).

        If the bank has `SketchConfidence` estimators, the function takes two more arguments: n-gram copies (N, 2), and
        the adapter outputs of the previous exit (N, D). Leave out the last argument if the previous exit did not run.
        """
        heads = self._bank.confidence_heads
        if heads is None:
            return lambda hidden: self.logits(s, hidden).float().softmax(-1).amax(-1)
        if self._sketch is None:
            return heads[s].chance
        return lambda *rows: heads[s](self._sketch.softmax_facts(*rows)).sigmoid()

    def hidden(self, s: int, rows: Tensor, carried: Tensor) -> Tensor:
        return self._adapters[s](rows, carried)

    def confidence(self, s: int, hidden: Tensor, copied: Sequence[tuple[int, int]],
                   before: Tensor | None = None) -> list[float]:
        if self._sketch is None:
            return self._estimators[s](hidden).tolist()
        copies = torch.tensor(read_copies(copied, self._places), device=self._device)
        return self._estimators[s](hidden, copies, *([] if before is None else [before])).tolist()

    def context(self, states: Sequence[Tensor], row: int) -> Tensor | None:
        if self._read_context is None:
            return None
        each = [rows[0, row:row + 1].to(self._device) for rows in states]
        return self._read_context(torch.cat(each, dim=-1)).float()                              # (1, D)

    def drafts(self, tokens: Sequence[int], carried: Sequence[Tensor], k: int, temperature: float,
               context: Tensor | None = None) -> list[tuple[Tensor, list[float], list[int]]]:
        states = torch.cat(list(carried)) if len(carried) > 1 else carried[0]
        if context is not None:
            states = (states + context).to(states.dtype)
        hidden = self._draft(self._embed(tokens)[0], states)
        probs, words = self._draft_head.likeliest(hidden, k, temperature)
        ids = words if self._bank.head_ids is None else self._bank.head_ids[words]
        return list(zip(hidden[:, None], probs.tolist(), ids.tolist()))
