"""Copied drafts: the token that followed the longest match, with the acceptance rate of such copies."""

import pytest
import torch

from cascadeexit.config import DecodeConfig
from cascadeexit.events import COPIED, Status
from cascadeexit.lookup import MAX_MATCH, NOTHING_COPIED, Lookup
from tests.tiny_models import tiny_engine
from training.confidence import copied_along


def test_the_copy_is_the_token_that_followed_last():
    lookup = Lookup([1, 2, 3, 9, 1, 2, 4])
    assert lookup.find([7, 1, 2])[0] == 4, "the newest place"
    assert lookup.find([1, 2, 3])[0] == 9 and lookup.find([1, 2, 3])[2] == 3, "the longest match"
    assert lookup.find([2, 4]) is None and lookup.find([2, 2]) == (4, 0.15, 1)
    lookup.extend([5, 1, 2])
    assert lookup.find([1, 2])[0] == 4, "the end of the text has no follower yet"


def test_a_copy_is_as_long_as_the_text_agrees_with_itself():
    text = [8, *range(10, 60)] * 2
    lookup = Lookup(text)
    assert lookup.copied(text) == (8, MAX_MATCH) and len(lookup) == 102
    assert lookup.copied([3, 8, 10, 11, 12]) == (13, 4), "four tokens, the fifth is another"
    assert lookup.copied([3, 9, 10]) == (11, 1) and lookup.copied([10]) == (11, 1)
    assert lookup.copied([3]) == NOTHING_COPIED and lookup.copied([]) == NOTHING_COPIED
    assert Lookup([1, 2, 1, 2]).copied([1, 2, 1, 2]) == (1, 2), "no further than the text's beginning"
    assert Lookup([5] * 9).copied([5] * 9) == (5, 8)


def test_the_text_before_counts_for_each_position():
    ids = torch.randint(0, 5, (80,)).tolist()
    assert copied_along(tuple(ids)) == [Lookup(ids[:i + 1]).copied(ids[:i + 1]) for i in range(80)]


def test_a_copys_probability_follows_its_acceptance_rate():
    lookup = Lookup([1, 2, 3])
    before = lookup.find([1, 2])[1]
    for _ in range(20):
        lookup.judged(2, True)
    assert lookup.find([1, 2])[1] > 0.85 > before
    for _ in range(60):
        lookup.judged(2, False)
    assert lookup.find([1, 2])[1] < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_text_that_repeats_itself_is_copied_and_stays_the_full_models(family, dtype):
    engine, copied = tiny_engine(family, dtype=dtype, adapter="carry", layers=(0, 3)), 0
    for prompt in ([5, 6, 7], [9, 3] * 12):
        full = engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=80)).token_ids
        for max_draft in (1, 4, 7):
            run = engine.run(prompt, DecodeConfig(mode="verified", max_new_tokens=80, max_draft=max_draft))
            assert run.token_ids == full
            copied += sum(e.exit == COPIED and e.status is Status.DRAFT for e in run.events)
            assert sum(run.stats.routing_share) <= 1
    assert copied > 0
