"""Metrics, each defined once: pure functions over TokenEvents. Page, benchmark and evaluation share them.

Only final events (emitted or accepted) are tokens; drafts and rejections count for acceptance alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from cascadeexit.costs import Costs
from cascadeexit.events import COPIED, Status, TokenEvent


@dataclass(frozen=True)
class RunStats:
    """One run in numbers. Shares and rates are in [0, 1], times in seconds; None where nothing was measured."""

    tokens: int
    routing_share: tuple[float, ...]    # part of the tokens each segment produced
    copied_share: float                 # part of the tokens copied from earlier in the text; with the shares above, 1
    average_depth: float | None         # mean depth of the segment that produced each token, layers only; copied: 0
    cost: float | None                  # weight bytes read per token / the full model's; heads and exits included
    drafted: int
    acceptance: float | None            # accepted / judged drafts
    tokens_per_verification: float | None
    first_token_seconds: float | None
    token_seconds_p50: float | None
    token_seconds_p90: float | None
    token_seconds_p99: float | None
    tokens_per_second: float | None     # decode only: after the first token


@dataclass(frozen=True)
class Match:
    """A text beside the full model's own output for the same prompt."""

    positional: float                   # part of the positions, over the longer text, that hold the same token
    first_divergence: int | None        # index of the first difference; None when the texts are identical
    sequence: bool                      # identical from start to end


def summarize(events: Sequence[TokenEvent], costs: Costs) -> RunStats:
    """All numbers that the events of one run hold."""
    final = [e for e in events if e.final]
    accepted = sum(e.status is Status.ACCEPTED for e in events)
    rejected = sum(e.status is Status.REJECTED for e in events)
    drafted = sum(e.status is Status.DRAFT for e in events)
    gaps = token_seconds(final)
    decoding = final[-1].seconds - final[0].seconds if len(final) > 1 else 0.0
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
        tokens_per_second=(len(final) - 1) / decoding if decoding > 0 else None,
    )


def routing_share(events: Sequence[TokenEvent], num_segments: int) -> tuple[float, ...]:
    """Part of the final tokens that each segment produced: (S,), zeros when there are none."""
    final = [e for e in events if e.final]
    return tuple(sum(e.exit == s for e in final) / max(1, len(final)) for s in range(num_segments))


def copied_share(events: Sequence[TokenEvent]) -> float:
    """Part of the final tokens that no segment produced, but `Lookup`; 0 when there are none."""
    final = [e for e in events if e.final]
    return sum(e.exit == COPIED for e in final) / max(1, len(final))


def verifications(events: Sequence[TokenEvent]) -> int:
    """Passes of the full model in a verified run: each adds one token of its own, but for one that ends on a draft."""
    final = [e for e in events if e.final]
    return sum(e.status is Status.EMITTED for e in final) + (bool(final) and final[-1].status is Status.ACCEPTED)


def token_seconds(final: Sequence[TokenEvent]) -> list[float]:
    """Time from each final token to the next one, in seconds; accepted drafts arrive together."""
    return [b.seconds - a.seconds for a, b in zip(final, final[1:])]


def agreement(token_ids: Sequence[int], full_choices: Sequence[int]) -> float | None:
    """Teacher-forced: part of the tokens that the full model would have chosen given the same text before them."""
    return _mean([a == b for a, b in zip(token_ids, full_choices, strict=True)])


def match(token_ids: Sequence[int], full_ids: Sequence[int]) -> Match:
    """Compare with the full model's free-running output."""
    same = [a == b for a, b in zip(token_ids, full_ids)]
    longest = max(len(token_ids), len(full_ids))
    first = next((i for i, equal in enumerate(same) if not equal), len(same) if len(same) < longest else None)
    return Match(sum(same) / longest if longest else 1.0, first, first is None)


def percentile(values: Sequence[float], p: int) -> float | None:
    """The p-th percentile, linearly interpolated between order statistics."""
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=100, method="inclusive")[p - 1]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
