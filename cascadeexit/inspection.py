"""Inspection: finds what every exit and the full model would have chosen at every position of a finished text.

The text is read once more, in passes as in decoding, so the full model's choices are those of decoding. Each position
gets the carried state that it had in the run.

Letters: N positions, n of them in a pass, D hidden size, S segments, K candidates (the likeliest tokens).
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
    """Choices of the S - 1 exits and of the full model at each of N positions of a text.

    In the fields, the exits come first and the full model is last. K is the number of candidates, the likeliest tokens.
    The fields are plain lists, so that a worker process can send them to the page.
    """

    token_ids: list[list[list[int]]]            # (N, S, K)
    probabilities: list[list[list[float]]]      # (N, S, K); those of an exit add up to 1 over the tokens of its head
    confidences: list[list[float]]              # (N, S - 1) of the exits, in [0, 1], also if the run did not need them
    written: list[list[float]]                  # (N, S); probability of the written token; 0.0: not in the exit's head
    ranks: list[list[int]]                      # (N, S); rank of the written token, 1 the likeliest; 0: not in the head

    @property
    def full_choices(self) -> list[int]:
        """Token id that the full model finds likeliest at each position, given the text before this position."""
        return [readings[-1][0] for readings in self.token_ids]

    def card(self, tokenizer, i: int) -> dict:
        """Return the likeliest tokens of each exit and of the full model at position i.

        The result is a dict {readings: [{confidence, top: [{id, text, p}]}], lens: [{p, rank}]}. Both lists have an
        entry for each exit and, last, for the full model. `top` holds the K likeliest tokens with their probabilities
        `p`. In `lens`, `p` and `rank` describe the written token: its probability and its rank (`written` and `ranks`).
        """
        return {"readings": [{"confidence": self._confidence(i, s), "top": [
            {"id": token, "text": tokenizer.decode([token]), "p": round(p, 4)}
            for token, p in zip(ids, probabilities)]}
            for s, (ids, probabilities) in enumerate(zip(self.token_ids[i], self.probabilities[i]))],
            "lens": [{"p": round(p, 4), "rank": rank} for p, rank in zip(self.written[i], self.ranks[i])]}

    def map(self, tokenizer, start: int, count: int) -> dict:
        """Return a map of a part of the text: the likeliest token of each exit and of the full model at each position.

        The result is a dict {start, total, columns: [[{id, text, p}, ...], ...]}. There is a column for each of up to
        `count` positions from `start` on. A column has an entry for each exit and, last, for the full model. `p` is an
        exit's confidence, or the probability of the full model's likeliest token. `total` is N.
        """
        stop = min(start + count, len(self.token_ids))
        return {"start": start, "total": len(self.token_ids), "columns": [
            [{"id": token, "text": tokenizer.decode([token]), "p": self._confidence(i, s)}
             for s, (token, *_) in enumerate(self.token_ids[i])] for i in range(start, stop)]}

    def moments(self, tokenizer, final: Sequence[TokenEvent], count: int = 20) -> list[dict]:
        """Return the positions at which the text differs most from the full model's choices.

        The result is a list of dicts [{i, said, full, p_said, p_full, id}, ...], the largest p_full - p_said first.
        `i` is the position. `said` and `full` are the texts of the written token and of the full model's choice.
        `p_said` and `p_full` are their probabilities by the full model. `id` is the token id of the full model's
        choice.

        Args:
            final: the final events of the run.
            count: largest number of positions to return.
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
        """Return the confidence of exit s at position i.

        For the full model (s = S - 1), return the probability of its first choice.
        """
        return round([*self.confidences[i], self.probabilities[i][-1][0]][s], 4)


def inspect(engine: Engine, prompt_ids: Sequence[int], events: Sequence[TokenEvent], top: int = 5) -> Inspection:
    """Read the text of a finished run again, and return the `Inspection` of its tokens.

    `inspecting` explains the arguments, and the errors that are raised.
    """
    *_, inspection = inspecting(engine, prompt_ids, events, top)
    return inspection


@torch.inference_mode()
def inspecting(engine: Engine, prompt_ids: Sequence[int], events: Sequence[TokenEvent],
               top: int = 5) -> Iterator[float | Inspection]:
    """Read the text of a finished run again, through all segments and all exits.

    After each pass, yields the share of the text that was read so far, in [0, 1]. At the end, yields the `Inspection`
    of the tokens of the text.

    Args:
        events: events of one run of this engine for this prompt. Events that are not final are ignored.
        top: K, the number of candidates to keep for each exit and for the full model.

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
    """Compute the fields of an `Inspection` for n positions. Returns them as tensors, in the order of the fields.

    Args:
        hidden: for each exit, its adapted rows (n, D).
        copied: as for `ExitRuntime.confidence`.
        normed: the full model's rows after the final norm (1, n, D).
        top: K.
        token_ids: the n tokens that were written.
    """
    exits, full = engine.exits, engine.model.head.logits(normed)[0]
    words = torch.arange(full.shape[-1], device=full.device)
    own = words if engine.bank.head_ids is None else engine.bank.head_ids
    tables = [(exits.logits(s, h), own) for s, h in enumerate(hidden)] + [(full, words)]
    written = torch.tensor(token_ids, device=full.device)
    best, probabilities, standings = [], [], []
    for logits, ids_of in tables:
        ids = likeliest(logits, top)
        best.append(ids_of[ids])
        all_probabilities = logits.float().softmax(-1)
        probabilities.append(all_probabilities.gather(1, ids))
        standings.append(_standing(logits, all_probabilities, ids_of[:logits.shape[1]] == written[:, None]))
    confidences = [exits.confidence(s, h, copied, hidden[s - 1] if s else None) for s, h in enumerate(hidden)]
    return (torch.stack(best, 1), torch.stack(probabilities, 1),
            torch.tensor(confidences).T if confidences else torch.zeros(normed.shape[1], 0),
            *(torch.stack(column, 1) for column in zip(*standings)))


def likeliest(logits: Tensor, top: int) -> Tensor:
    """Return the column indices of the `top` highest logits in each row: (n, K) -> (n, top), the highest first."""
    # Equal logits are common in bf16: decoding takes the first of them, so it leads here too.
    first = logits.argmax(-1, keepdim=True)
    return logits.scatter(1, first, torch.inf).topk(top, dim=-1).indices


def _standing(logits: Tensor, probabilities: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Find the probability and the rank of one token in each of n rows: (n,) each. Rank 1 is the likeliest token.

    Both are 0 in a row that does not have the token.

    Args:
        logits, probabilities: values of the tokens in each row (n, K).
        at: True in the column of the token to find (n, K).
    """
    known, place = at.any(1), at.int().argmax(1, keepdim=True)
    logit, order = logits.gather(1, place), torch.arange(logits.shape[1], device=logits.device)
    # Of equal logits the first leads, as in decoding.
    before = (logits > logit) | ((logits == logit) & (order < place))
    return probabilities.gather(1, place)[:, 0] * known, (before.sum(1) + 1) * known
