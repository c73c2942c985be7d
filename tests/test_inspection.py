"""Reading a text again says what decoding said."""

import pytest
import torch

from cascadeexit.engine import DecodeConfig
from cascadeexit.inspection import inspect

PROMPT = [5, 9, 33, 2, 71, 8, 15]


@pytest.mark.parametrize("mode", ["full", "cascade", "verified"])
def test_candidates_and_confidences_are_those_of_the_run(engine, mode):
    run = engine.run(PROMPT, DecodeConfig(mode=mode, max_new_tokens=48, thresholds=0.5, max_draft=3))
    seen = inspect(engine, PROMPT, run.events)
    final = [e for e in run.events if e.final]
    assert seen.full_choices == engine.full_choices(PROMPT, run.token_ids)
    assert seen.token_ids.shape == (len(final), 4, 5) and (seen.probabilities.diff(dim=-1) <= 0).all()
    for i, event in enumerate(final):
        assert seen.token_ids[i, event.exit, 0] == event.token_id
        for s, confidence in enumerate(event.confidences):
            if confidence is not None and event.exit < engine.num_exits:
                assert seen.confidences[i, s].item() == pytest.approx(confidence, abs=1e-4)
    if mode == "cascade":
        assert len({e.exit for e in final}) > 1


def test_an_empty_text_and_a_prompt_of_one_token(engine):
    assert inspect(engine, PROMPT, []).full_choices == []
    run = engine.run([7], DecodeConfig(mode="cascade", max_new_tokens=5, thresholds=0.3))
    seen = inspect(engine, [7], run.events)
    assert torch.equal(seen.token_ids[range(5), [e.exit for e in run.events], 0], torch.tensor(run.token_ids))
