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
    written: list[list[float]]                  # (N, S); probability of the written token; 0.0: not in the exit's head
    ranks: list[list[int]]                      # (N, S); rank of the written token, 1 the likeliest; 0: not in the head

    @property
    def full_choices(self) -> list[int]:
        """The full model's first choice at each position, given the text before it."""
        return [readings[-1][0] for readings in self.token_ids]

    def card(self, tokenizer, i: int) -> dict:
        """Candidates at position i, and what each reading gave the written token, as plain JSON.

        {readings: [{confidence, top: [{id, text, p}]}], lens: [{p, rank}]}: `p` and `rank` as in `written` and `ranks`.
        """
        return {"readings": [{"confidence": self._confidence(i, s), "top": [
            {"id": token, "text": tokenizer.decode([token]), "p": round(p, 4)}
            for token, p in zip(ids, probabilities)]}
            for s, (ids, probabilities) in enumerate(zip(self.token_ids[i], self.probabilities[i]))],
            "lens": [{"p": round(p, 4), "rank": rank} for p, rank in zip(self.written[i], self.ranks[i])]}

    def map(self, tokenizer, start: int, count: int) -> dict:
        """First choices of all exits and the full model at `count` positions from `start` on, as plain JSON.

        {start, total, columns: [[{id, text, p}, ...], ...]}: a column for each position, p as in `card`.
        """
        stop = min(start + count, len(self.token_ids))
        return {"start": start, "total": len(self.token_ids), "columns": [
            [{"id": token, "text": tokenizer.decode([token]), "p": self._confidence(i, s)}
             for s, (token, *_) in enumerate(self.token_ids[i])] for i in range(start, stop)]}

    def moments(self, tokenizer, final: Sequence[TokenEvent], count: int = 20) -> list[dict]:
        """Positions where the text departs furthest from the full model's choice, as plain JSON, the furthest first.

        [{i, said, full, p_said, p_full, id}, ...]: texts of the written token and of the full model's choice, the full
        model's probabilities of both, and the id of its choice. They are ordered by p_full - p_said.

        Args:
            final: the final events of the run.
            count: the most positions.
        """
        differing = [(self.probabilities[i][-1][0] - self.written[i][-1], i)
                     for i, (event, choice) in enumerate(zip(final, self.full_choices, strict=True))
                     if event.token_id != choice]
        differing.sort(key=lambda moment: -moment[0])
        return [{"i": i, "said": tokenizer.decode([final[i].token_id]),
                 "full": tokenizer.decode([self.token_ids[i][-1][0]]), "p_said": round(self.written[i][-1], 4),
                 "p_full": round(self.probabilities[i][-1][0], 4), "id": self.token_ids[i][-1][0]}
                for _, i in differing[:count]]

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
        parts.append(_read(engine, columns, copied[part], normed, top, [event.token_id for event in final[part]]))
        yield min(1.0, (a + layers.max_rows) / len(text))
    if not parts:
        yield Inspection([], [], [], [], [])
        return
    yield Inspection(*(torch.cat(column).tolist() for column in zip(*parts)))


def _read(engine: Engine, hidden: list[Tensor], copied: list[tuple[int, int]], normed: Rows, top: int,
          token_ids: Sequence[int]) -> tuple[Tensor, ...]:
    """Compute the fields of an `Inspection` for n positions, as tensors in their order.

    Args:
        hidden: adapted rows of each exit (n, D).
        copied: as for `ExitRuntime.confidence`.
        normed: the full model's rows after the final norm (1, n, D).
        top: K.
        token_ids: the n written tokens.
    """
    exits, full = engine.exits, engine.model.head.logits(normed)[0]
    words = torch.arange(full.shape[-1], device=full.device)
    own = words if engine.bank.head_ids is None else engine.bank.head_ids
    tables = [(exits.logits(s, h), own) for s, h in enumerate(hidden)] + [(full, words)]
    written = torch.tensor(token_ids, device=full.device)
    best, probabilities, standings = [], [], []
    for logits, ids_of in tables:
        # Equal logits are common in bf16: decoding takes the first of them, so it leads here too.
        first = logits.argmax(-1, keepdim=True)
        ids = logits.scatter(1, first, torch.inf).topk(top, dim=-1).indices
        best.append(ids_of[ids])
        all_probabilities = logits.float().softmax(-1)
        probabilities.append(all_probabilities.gather(1, ids))
        standings.append(_standing(logits, all_probabilities, ids_of[:logits.shape[1]] == written[:, None]))
    confidences = [exits.confidence(s, h, copied, hidden[s - 1] if s else None) for s, h in enumerate(hidden)]
    return (torch.stack(best, 1), torch.stack(probabilities, 1),
            torch.tensor(confidences).T if confidences else torch.zeros(normed.shape[1], 0),
            *(torch.stack(column, 1) for column in zip(*standings)))


def _standing(logits: Tensor, probabilities: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Find the probability and the rank of one word in each row: (n,) each, 0 in a row without the word.

    Args:
        logits, probabilities: (n, K).
        at: True at the word's place (n, K).
    """
    known, place = at.any(1), at.int().argmax(1, keepdim=True)
    logit, order = logits.gather(1, place), torch.arange(logits.shape[1], device=logits.device)
    # Of equal logits the first leads, as in decoding.
    before = (logits > logit) | ((logits == logit) & (order < place))
    return probabilities.gather(1, place)[:, 0] * known, (before.sum(1) + 1) * known
