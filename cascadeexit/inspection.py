"""Inspection: what every exit and the full model would have chosen at every position of a finished text.

The text is read once more in the passes that decoding makes, so the full model's choices are those of decoding. Each
position gets the carried state that it had in the run.

Letters: N positions, n of them in a pass, D hidden size, S segments, K candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascadeexit.backends.base import Rows
from cascadeexit.carry import Carry
from cascadeexit.engine import Engine
from cascadeexit.events import Status, TokenEvent


@dataclass(frozen=True)
class Inspection:
    """Readings of N positions by S - 1 exits and, last, by the full model: the K likeliest tokens of each.

    Plain lists, so that a worker process can send it to the page.
    """

    token_ids: list[list[list[int]]]            # (N, S, K)
    probabilities: list[list[list[float]]]      # (N, S, K); an exit's are over the words of its own head
    confidences: list[list[float]]              # (N, S - 1) of the exits, in [0, 1], whether asked in the run or not

    @property
    def full_choices(self) -> list[int]:
        """The full model's first choice at each position, given the text before it."""
        return [readings[-1][0] for readings in self.token_ids]

    def card(self, tokenizer, i: int) -> dict:
        """Candidates at position i as plain JSON: {readings: [{confidence, top: [{id, text, p}]}]}."""
        return {"readings": [{"confidence": self._confidence(i, s), "top": [
            {"id": token, "text": tokenizer.decode([token]), "p": round(p, 4)}
            for token, p in zip(ids, probabilities)]}
            for s, (ids, probabilities) in enumerate(zip(self.token_ids[i], self.probabilities[i]))]}

    def map(self, tokenizer, start: int, count: int) -> dict:
        """First choices of all exits and the full model at `count` positions from `start` on, as plain JSON.

        {start, total, columns: [[{id, text, p}, ...], ...]}: a column for each position, p as in `card`.
        """
        stop = min(start + count, len(self.token_ids))
        return {"start": start, "total": len(self.token_ids), "columns": [
            [{"id": token, "text": tokenizer.decode([token]), "p": self._confidence(i, s)}
             for s, (token, *_) in enumerate(self.token_ids[i])] for i in range(start, stop)]}

    def _confidence(self, i: int, s: int) -> float:
        """An exit's confidence; for the full model the probability of its first choice."""
        return round([*self.confidences[i], self.probabilities[i][-1][0]][s], 4)


def inspect(engine: Engine, prompt_ids: Sequence[int], events: Sequence[TokenEvent], top: int = 5) -> Inspection:
    """Read the final tokens of a run again, through all segments and with all exits; see `inspecting`."""
    *_, inspection = inspecting(engine, prompt_ids, events, top)
    return inspection


@torch.inference_mode()
def inspecting(engine: Engine, prompt_ids: Sequence[int], events: Sequence[TokenEvent],
               top: int = 5) -> Iterator[float | Inspection]:
    """Read the final tokens of a run again, through all segments and with all exits.

    Yields the share that was read after each pass, and last the inspection.

    Args:
        events: those of one run of this engine for this prompt; drafts and rejections are left out.
        top: K, the candidates kept of each reading.

    Raises ValueError for an empty prompt and for token ids outside the vocabulary.
    """
    final = [e for e in events if e.final]
    engine.model.check_prompt(prompt_ids)
    engine.model.check_ids([e.token_id for e in final])
    text = [prompt_ids[-1], *(e.token_id for e in final[:-1])] if final else []
    stairs, passed = engine.begin(prompt_ids, len(final))
    carry, layers = Carry.after_prompt(engine.model, passed), engine.model.layers
    written, confirmed, copied, parts = list(prompt_ids), len(prompt_ids), [], []
    for event in final:
        copied.append(carry.copied(written, confirmed))
        written.append(event.token_id)
        if event.status is Status.EMITTED:                      # until then there were drafts, which are not copied
            confirmed = len(written)
    for a in range(0, len(text), layers.max_rows):
        part = slice(a, a + layers.max_rows)
        rows = stairs.prefill(text[part])
        normed = layers.norm(rows[-1])                                                          # (1, n, D)
        hidden = []
        for i, event in enumerate(final[part]):
            hidden.append([engine.exits.hidden(s, rows[s][:, i], carry.state) for s in range(engine.num_exits)])
            carry.follow(event.exit, hidden[-1], normed[:, i])
        columns = [torch.cat([layers.tensor(row) for row in column]) for column in zip(*hidden)]
        parts.append(_read(engine, columns, copied[part], normed, top))
        yield min(1.0, (a + layers.max_rows) / len(text))
    if not parts:
        yield Inspection([], [], [])
        return
    yield Inspection(*(torch.cat(column).tolist() for column in zip(*parts)))


def _read(engine: Engine, hidden: list[Tensor], copied: list[tuple[int, int]], normed: Rows,
          top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates (n, S, K), their probabilities, and confidences (n, S - 1).

    Args:
        hidden: adapted rows of each exit (n, D).
        copied: as for `ExitRuntime.confidence`.
        normed: the full model's rows after the final norm (1, n, D).
    """
    exits, words = engine.exits, engine.bank.head_ids
    tables = [(exits.logits(s, h), words) for s, h in enumerate(hidden)] + [(engine.model.head.logits(normed)[0], None)]
    best, probabilities = [], []
    for logits, ids_of in tables:
        # Equal logits are common in bf16: decoding takes the first of them, so it leads here too.
        first = logits.argmax(-1, keepdim=True)
        ids = logits.scatter(1, first, torch.inf).topk(top, dim=-1).indices
        best.append(ids if ids_of is None else ids_of[ids])
        probabilities.append(logits.float().softmax(-1).gather(1, ids))
    confidences = [exits.confidence(s, h, copied, hidden[s - 1] if s else None) for s, h in enumerate(hidden)]
    return (torch.stack(best, 1), torch.stack(probabilities, 1),
            torch.tensor(confidences).T if confidences else torch.zeros(normed.shape[1], 0))
