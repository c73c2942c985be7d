"""Inspection: what every exit, and the full model, would have said at every position of a finished text.

The text is read once more in the passes that decoding makes, so the full model's choices are those of decoding. Where
an exit carries the last hidden state on, each position gets the one that it had in the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascadeexit.engine import Engine
from cascadeexit.events import Status, TokenEvent
from cascadeexit.lookup import Lookup
from cascadeexit.states import tensor_of


@dataclass(frozen=True)
class Inspection:
    """Readings of N positions by S - 1 exits and, last, the full model; the K likeliest tokens of each."""

    token_ids: Tensor       # (N, S, K)
    probabilities: Tensor   # (N, S, K); of an exit, over the words of its own head
    confidences: Tensor     # (N, S - 1) of the exits, in [0, 1], asked or not

    @property
    def full_choices(self) -> list[int]:
        """The full model's first choice at each position, given the text before it."""
        return self.token_ids[:, -1, 0].tolist()

    def card(self, tokenizer, i: int) -> dict:
        """Candidates at position i as plain JSON: {readings: [{confidence, top: [{id, text, p}]}]}."""
        return {"readings": [{"confidence": self._confidence(i, s), "top": [
            {"id": token, "text": tokenizer.decode([token]), "p": round(p, 4)}
            for token, p in zip(ids.tolist(), probabilities.tolist())]}
            for s, (ids, probabilities) in enumerate(zip(self.token_ids[i], self.probabilities[i]))]}

    def map(self, tokenizer, start: int, count: int) -> dict:
        """What each exit and the full model would have said at `count` positions from `start` on, as plain JSON."""
        stop = min(start + count, len(self.token_ids))
        return {"start": start, "total": len(self.token_ids), "columns": [
            [{"id": token, "text": tokenizer.decode([token]), "p": self._confidence(i, s)}
             for s, token in enumerate(self.token_ids[i, :, 0].tolist())] for i in range(start, stop)]}

    def _confidence(self, i: int, s: int) -> float:
        """Of an exit its estimate, of the full model the probability of its first choice."""
        sure = self.confidences[i, s] if s < self.confidences.shape[1] else self.probabilities[i, s, 0]
        return round(sure.item(), 4)


@torch.inference_mode()
def inspect(engine: Engine, prompt_ids: Sequence[int], events: Sequence[TokenEvent], top: int = 5) -> Inspection:
    """Read the final tokens of a run again, all segments for all of them.

    Args:
        events: of one run of this engine for this prompt; drafts and rejections are left out.
        top: K, candidates kept of each reading.

    Raises ValueError for an empty prompt and for token ids outside the vocabulary.
    """
    final = [e for e in events if e.final]
    if len(prompt_ids) == 0:
        raise ValueError("the prompt is empty: give at least one token")
    engine.model.check_ids((*prompt_ids, *(e.token_id for e in final)))
    text = [prompt_ids[-1], *(e.token_id for e in final[:-1])] if final else []
    stairs, passed = engine.begin(prompt_ids, len(final))
    said = tensor_of(engine.last_said(passed))
    written, before, copied, parts = list(prompt_ids), Lookup(prompt_ids), [], []
    for event in final:
        copied.append(before.copied(written))
        written.append(event.token_id)
        if event.status is Status.EMITTED:                      # until then there were drafts, which nobody copies
            before.extend(written[len(before):])
    for a in range(0, len(text), engine.model.max_verify_rows):
        part = slice(a, a + engine.model.max_verify_rows)
        rows = [tensor_of(after) for after in stairs.prefill(text[part])]
        named = engine.model.norm(rows[-1][0])                                                  # (n, D)
        hidden = []
        for i, event in enumerate(final[part]):
            hidden.append([engine.bank.hidden(s, rows[s][0, i:i + 1], said) for s in range(engine.num_exits)])
            said = hidden[-1][event.exit] if 0 <= event.exit < engine.num_exits else named[i:i + 1]
        parts.append(_read(engine, [torch.cat(column) for column in zip(*hidden)], copied[part], rows[-1], top))
    if not parts:
        return Inspection(torch.zeros(0, engine.num_exits + 1, top, dtype=torch.long),
                          torch.zeros(0, engine.num_exits + 1, top), torch.zeros(0, engine.num_exits))
    return Inspection(*(torch.cat(column).cpu() for column in zip(*parts)))


def _read(engine: Engine, hidden: list[Tensor], copied: list[tuple[int, int]], rows: Tensor,
          top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates (n, S, K), their probabilities, and confidences (n, S - 1) of adapted rows and the full model's.

    copied: as for `ExitBank.confidence`.
    """
    bank = engine.bank
    tables = [(bank.logits(s, h), bank.head_ids) for s, h in enumerate(hidden)] + [(engine.model.logits(rows)[0], None)]
    best, probabilities = [], []
    for logits, words in tables:
        # Equal logits are common in bf16: decoding takes the first of them, so it leads here too.
        first = logits.argmax(-1, keepdim=True)
        ids = logits.scatter(1, first, torch.inf).topk(top, dim=-1).indices
        best.append(ids if words is None else words[ids])
        probabilities.append(logits.float().softmax(-1).gather(1, ids))
    confidences = [bank.confidence(s, h, copied, hidden[s - 1] if s else None) for s, h in enumerate(hidden)]
    return (torch.stack(best, 1), torch.stack(probabilities, 1),
            torch.tensor(confidences).T if confidences else torch.zeros(rows.shape[1], 0))
