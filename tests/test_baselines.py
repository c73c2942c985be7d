"""The uncached loops are oracles: whatever the engine caches, skips or rolls back, its texts equal theirs."""

import pytest

from cascadeexit.config import DecodeConfig
from tests.tiny_models import tiny_engine
from training import baselines

PROMPTS = ([5], [11, 3, 60, 22, 9, 41, 77, 30, 2])
TOKENS = 24


def test_full_equals_the_uncached_loop(engine):
    for prompt in PROMPTS:
        run = engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=TOKENS))
        assert run.token_ids == baselines.standard(engine, prompt, TOKENS)


@pytest.mark.parametrize("thresholds", [(0.3, 0.3, 0.3), (0.7, 0.5, 0.2), (0.9, 0.8, 0.7)], ids=str)
def test_cascade_equals_the_uncached_cascade(engine, thresholds):
    for prompt in PROMPTS:
        run = engine.run(prompt, DecodeConfig(mode="cascade", max_new_tokens=TOKENS, thresholds=thresholds))
        assert run.token_ids == baselines.cascade(engine, prompt, TOKENS, thresholds)


@pytest.mark.parametrize("exit, max_draft", [(0, 3), (1, 5), (2, 7), (2, 1)])
def test_uncached_self_speculation_equals_the_full_model(engine, exit, max_draft):
    for prompt in PROMPTS:
        full = baselines.standard(engine, prompt, TOKENS)
        assert baselines.self_speculation(engine, prompt, TOKENS, exit, max_draft) == full


def test_uncached_loops_stop_at_the_end_of_sequence_token():
    engine = tiny_engine()
    full = baselines.standard(engine, PROMPTS[1], TOKENS)
    engine.model.eos_ids = frozenset([full[5]])
    expected = full[:full.index(full[5]) + 1]
    assert baselines.standard(engine, PROMPTS[1], TOKENS) == expected
    assert baselines.self_speculation(engine, PROMPTS[1], TOKENS, 1, 4) == expected
