"""Inspection of a finished text gives the choices and confidences of decoding."""

import pytest
import torch

from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.inspection import inspect
from cascadeexit.model import SegmentedModel
from tests.tiny_models import EXIT_LAYERS, tiny_base

PROMPT = [5, 9, 33, 2, 71, 8, 15]


@pytest.mark.parametrize("mode", ["full", "cascade", "verified"])
def test_candidates_and_confidences_are_those_of_the_run(engine, mode):
    run = engine.run(PROMPT, DecodeConfig(mode=mode, max_new_tokens=48, thresholds=0.5, max_draft=3))
    seen = inspect(engine, PROMPT, run.events)
    final = [e for e in run.events if e.final]
    assert seen.full_choices == engine.full_choices(PROMPT, run.token_ids)
    assert torch.tensor(seen.token_ids).shape == (len(final), 4, 5)
    assert (torch.tensor(seen.probabilities).diff(dim=-1) <= 0).all()
    for i, event in enumerate(final):
        assert seen.token_ids[i][event.exit][0] == event.token_id
        for s, confidence in enumerate(event.confidences):
            if confidence is not None and event.exit < engine.num_exits:
                assert seen.confidences[i][s] == pytest.approx(confidence, abs=1e-4)
    if mode == "cascade":
        assert len({e.exit for e in final}) > 1


def test_of_equal_logits_the_one_that_decoding_takes_leads():
    base = tiny_base("llama-untied")
    base.lm_head.weight.data[7:] = base.lm_head.weight.data[:7].repeat(13, 1)[:90]     # every word has equals
    model = SegmentedModel(base, EXIT_LAYERS)
    engine = Engine(model, ExitBank.untrained(model))
    run = engine.run(PROMPT, DecodeConfig(mode="full", max_new_tokens=20))
    seen = inspect(engine, PROMPT, run.events, top=3)
    assert seen.full_choices == run.token_ids
    assert all(len(set(ids)) == 3 for readings in seen.token_ids for ids in readings)


def test_an_empty_text_and_a_prompt_of_one_token(engine):
    assert inspect(engine, PROMPT, []).full_choices == []
    run = engine.run([7], DecodeConfig(mode="cascade", max_new_tokens=5, thresholds=0.3))
    seen = inspect(engine, [7], run.events)
    assert [readings[e.exit][0] for readings, e in zip(seen.token_ids, run.events)] == run.token_ids
