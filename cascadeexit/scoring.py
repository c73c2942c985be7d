"""Scoring: computes the full model's log probability of every token of a finished text.

The text is read once more, in passes as in decoding, so the numbers are those of decoding. Logarithms are computed
from logits, because a probability below 1e-45 would be rounded to 0.

Letters: N positions, n of them in a pass, K candidates (the likeliest tokens).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cascadeexit.engine import Engine
from cascadeexit.inspection import likeliest

TOP = 20            # candidates of each position


@dataclass(frozen=True)
class Scores:
    """Log probabilities by the full model at N positions of a text: natural logarithms, at temperature 1.

    K is the number of candidates, the likeliest tokens at a position.

    The fields are plain lists, so that a worker process can send them to the page's process.
    """

    logprobs: list[float]               # (N,), of the tokens of the text
    top_ids: list[list[int]]            # (N, K), the likeliest token first
    top_logprobs: list[list[float]]     # (N, K)


@torch.inference_mode()
def scoring(engine: Engine, token_ids: Sequence[int], start: int, top: int = TOP) -> Iterator[float | Scores]:
    """Read a text, and compute the log probability of each token from position `start` on, given the text before it.

    After each pass, yields the share of the text that was read so far, in [0, 1]. At the end, yields the `Scores`.

    Args:
        token_ids: the whole text: a prompt, and the tokens written after it.
        start: first position to score, at least 1: nothing comes before the token at position 0.
        top: K, the number of candidates to keep at each position.

    Raises ValueError for a text without tokens and for token ids outside the vocabulary.
    """
    engine.model.check_prompt(token_ids)
    stairs, _ = engine.begin(token_ids[:start], len(token_ids) - start)
    layers, parts = engine.model.layers, []
    for a in range(start, len(token_ids), layers.max_rows):
        scored = token_ids[a:a + layers.max_rows]
        *_, rows = stairs.prefill(token_ids[a - 1:a - 1 + len(scored)])
        logits = engine.model.head.logits(layers.norm(rows))[0]                                 # (n, V)
        logprobs = logits.float().log_softmax(-1)
        ids = likeliest(logits, top)
        parts.append((logprobs.gather(1, torch.tensor(scored, device=logits.device)[:, None])[:, 0], ids,
                      logprobs.gather(1, ids)))
        yield (a - start + len(scored)) / (len(token_ids) - start)
    yield Scores(*(torch.cat(column).tolist() for column in zip(*parts))) if parts else Scores([], [], [])
