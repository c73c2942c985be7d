"""Metrics: functions that compute numbers from TokenEvents. Page, benchmark and evaluation all use these functions.

Only final events (emitted or accepted) count as tokens. Drafts and rejections count in `drafted` and `acceptance`. The
bytes of weights that were read for drafts count in `cost`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from cascadeexit.costs import Costs
from cascadeexit.events import COPIED, Status, TokenEvent


@dataclass(frozen=True)
class RunStats:
    """Statistics of one run. Shares and rates are in [0, 1], times in seconds. None means not measured."""

    tokens: int
    routing_share: tuple[float, ...]    # share of the tokens that each segment produced
    copied_share: float                 # share of the tokens copied from earlier in the text; all shares add up to 1
    average_depth: float | None         # mean share of the model's layers that a token ran before its exit; copied: 0
    cost: float | None                  # weight bytes read per token, relative to full; heads and exits included
    drafted: int
    acceptance: float | None            # accepted drafts / verified drafts
    tokens_per_verification: float | None       # mean number of tokens that one verification pass added
    first_token_seconds: float | None
    token_seconds_p50: float | None     # percentile of the time between two tokens, like the next two
    token_seconds_p90: float | None
    token_seconds_p99: float | None
    tokens_per_second: float | None     # decode only: after the first token


@dataclass(frozen=True)
class Match:
    """Result of comparing a text with the full model's own output for the same prompt."""

    positional: float                   # share of the positions, over the longer text, that hold the same token
    first_divergence: int | None        # index of the first difference; None when the texts are identical
    sequence: bool                      # identical from start to end


def summarize(events: Sequence[TokenEvent], costs: Costs) -> RunStats:
    """Compute the statistics of one run from all its events, drafts included.

    costs: what the full model reads for each token, from `Engine.costs_for`.
    """
    final = [e for e in events if e.final]
    accepted = sum(e.status is Status.ACCEPTED for e in events)
    rejected = sum(e.status is Status.REJECTED for e in events)
    drafted = sum(e.status is Status.DRAFT for e in events)
    gaps = token_seconds(final)
    return RunStats(
        tokens=len(final),
        routing_share=routing_share(final, len(costs.depths)),
        copied_share=copied_share(final),
        average_depth=_mean([0.0 if e.exit == COPIED else costs.depths[e.exit] for e in final]),
        cost=sum(e.weight_bytes for e in events) / (len(final) * costs.full_token_bytes) if final else None,
        drafted=drafted,
        acceptance=accepted / (accepted + rejected) if accepted + rejected else None,
        tokens_per_verification=len(final) / verifications(events) if drafted and final else None,
        first_token_seconds=final[0].seconds if final else None,
        token_seconds_p50=percentile(gaps, 50),
        token_seconds_p90=percentile(gaps, 90),
        token_seconds_p99=percentile(gaps, 99),
        tokens_per_second=tokens_per_second(final),
    )


def routing_share(events: Sequence[TokenEvent], num_segments: int) -> tuple[float, ...]:
    """Compute the share of the final tokens that each segment produced, in [0, 1].

    Segment s ends at exit s, and the last segment at the last layer. All shares are 0 if there are no tokens.

    events: events of a run. Tokens that were emitted or accepted count as final.
    """
    final = [e for e in events if e.final]
    return tuple(sum(e.exit == s for e in final) / max(1, len(final)) for s in range(num_segments))


def copied_share(events: Sequence[TokenEvent]) -> float:
    """Compute the share of the final tokens that were copied by n-gram lookup, in [0, 1]; 0 if there are no tokens.

    events: events of a run. Tokens that were emitted or accepted count as final.
    """
    final = [e for e in events if e.final]
    return sum(e.exit == COPIED for e in final) / max(1, len(final))


def verifications(events: Sequence[TokenEvent]) -> int:
    """Count the verification passes of a run in the mode `verified`, from all its events.

    Each pass emits one token of the full model, except a last pass whose drafts end the text.
    """
    final = [e for e in events if e.final]
    return sum(e.status is Status.EMITTED for e in final) + (bool(final) and final[-1].status is Status.ACCEPTED)


def tokens_per_second(final: Sequence[TokenEvent]) -> float | None:
    """Compute the speed of decoding in tokens per second, without the time until the first token.

    Returns None for fewer than two tokens.

    final: the final events of a run.
    """
    decoding = final[-1].seconds - final[0].seconds if len(final) > 1 else 0.0
    return (len(final) - 1) / decoding if decoding > 0 else None


def token_seconds(final: Sequence[TokenEvent]) -> list[float]:
    """Compute the seconds between each token and the next one: N final events of a run give N - 1 numbers.

    Drafts that one verification pass accepted have about 0 s between them.
    """
    return [b.seconds - a.seconds for a, b in zip(final, final[1:])]


def agreement(token_ids: Sequence[int], full_choices: Sequence[int]) -> float | None:
    """Compute the share of tokens that equal the full model's choice after the same text; None if there are no tokens.

    This is teacher-forced agreement. Raises ValueError if the sequences have different lengths.
    """
    return _mean([a == b for a, b in zip(token_ids, full_choices, strict=True)])


def match(token_ids: Sequence[int], full_ids: Sequence[int]) -> Match:
    """Compare a text with the full model's own output for the same prompt.

    Args:
        token_ids: the tokens of the text, without the prompt.
        full_ids: the tokens of the full model's output.
    """
    same = [a == b for a, b in zip(token_ids, full_ids)]
    longest = max(len(token_ids), len(full_ids))
    first = next((i for i, equal in enumerate(same) if not equal), len(same) if len(same) < longest else None)
    return Match(sum(same) / longest if longest else 1.0, first, first is None)


def percentile(values: Sequence[float], p: int) -> float | None:
    """Compute the p-th percentile, interpolated linearly between neighbouring values; None if there are no values.

    p: from 1 to 99; 50 is the median.
    """
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=100, method="inclusive")[p - 1]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
