"""Metrics of hand-written events, whose numbers can be computed in the head."""

import pytest

from cascadeexit.costs import Costs
from cascadeexit.events import Status, TokenEvent
from cascadeexit.metrics import agreement, match, percentile, summarize

COSTS = Costs(full_token_bytes=100, depths=(0.25, 0.5, 1.0))


def event(index: int, exit: int, status: Status, seconds: float, weight_bytes: int = 0) -> TokenEvent:
    return TokenEvent(index, 7, exit, (None, None), status, seconds, weight_bytes)


def test_cascade_numbers():
    stats = summarize([event(0, 0, Status.EMITTED, 1.0, 30), event(1, 0, Status.EMITTED, 1.5, 30),
                       event(2, 1, Status.EMITTED, 2.5, 60), event(3, 2, Status.EMITTED, 5.0, 80)], COSTS)
    assert stats.tokens == 4
    assert stats.routing_share == (0.5, 0.25, 0.25)
    assert stats.average_depth == pytest.approx(0.5)
    assert stats.cost == pytest.approx(0.5)
    assert stats.first_token_seconds == 1.0
    assert stats.token_seconds_p50 == 1.0
    assert stats.tokens_per_second == pytest.approx(3 / 4)
    assert stats.acceptance is None and stats.tokens_per_verification is None


def test_verified_numbers_count_final_tokens_only():
    stats = summarize([event(0, 0, Status.DRAFT, 1.0, 40), event(1, 0, Status.DRAFT, 2.0, 40),
                       event(0, 0, Status.ACCEPTED, 3.0, 100), event(1, 0, Status.REJECTED, 3.0),
                       event(1, 2, Status.EMITTED, 3.0),
                       event(2, 1, Status.DRAFT, 4.0, 60), event(2, 1, Status.ACCEPTED, 5.0, 60)], COSTS)
    assert stats.tokens == 3 and stats.drafted == 3
    assert stats.routing_share == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert stats.acceptance == pytest.approx(2 / 3)
    assert stats.tokens_per_verification == pytest.approx(1.5)
    assert stats.cost == pytest.approx(1.0)
    assert stats.first_token_seconds == 3.0


def test_nothing_measured_is_none_not_zero():
    stats = summarize([], COSTS)
    assert stats.tokens == 0 and stats.routing_share == (0, 0, 0)
    assert stats.cost is stats.average_depth is stats.first_token_seconds is stats.tokens_per_second is None


def test_agreement_is_the_share_of_the_full_models_choices():
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert agreement([], []) is None


@pytest.mark.parametrize("ours, full, positional, first, same", [
    ([1, 2, 3], [1, 2, 3], 1.0, None, True),
    ([1, 9, 3], [1, 2, 3], 2 / 3, 1, False),
    ([1, 2], [1, 2, 3, 4], 0.5, 2, False),
    ([], [], 1.0, None, True),
])
def test_match_with_the_full_models_own_output(ours, full, positional, first, same):
    result = match(ours, full)
    assert (result.positional, result.first_divergence, result.sequence) == (positional, first, same)


def test_percentiles_interpolate_between_order_statistics():
    assert percentile([1, 2, 3, 4, 5], 50) == 3
    assert percentile([0, 10], 90) == pytest.approx(9)
    assert percentile([4], 99) == 4
    assert percentile([], 50) is None
