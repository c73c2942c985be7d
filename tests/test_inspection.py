"""Inspection of a finished text gives the choices and confidences of decoding."""

import pytest
import torch

from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.inspection import inspect
from cascadeexit.model import SegmentedModel
from tests.tiny_models import EXIT_LAYERS, tiny_base, tiny_engine
from tests.tiny_text import tiny_tokenizer

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


def test_the_written_token_has_a_probability_and_a_rank_in_every_reading(engine):
    """Those of the candidates where it is one of them; else it ranks after them, with less probability."""
    run = engine.run(PROMPT, DecodeConfig(mode="cascade", max_new_tokens=48, thresholds=0.5))
    seen, among = inspect(engine, PROMPT, run.events), 0
    assert torch.tensor(seen.written).shape == torch.tensor(seen.ranks).shape == (len(run.token_ids), 4)
    for i, event in enumerate(run.events):
        assert seen.ranks[i][event.exit] == 1
        for s, ids in enumerate(seen.token_ids[i]):
            p, rank, listed = seen.written[i][s], seen.ranks[i][s], seen.probabilities[i][s]
            if event.token_id in ids:
                among += 1
                assert rank == ids.index(event.token_id) + 1 and p == listed[rank - 1]
            else:
                assert rank > len(ids) and 0 < p <= listed[-1]
    assert among > len(run.events)
    card = seen.card(tiny_tokenizer(), 3)
    assert [(reading["p"], reading["rank"]) for reading in card["lens"]] == [
        (round(p, 4), rank) for p, rank in zip(seen.written[3], seen.ranks[3])]


def test_a_word_that_an_exits_head_lacks_has_no_rank():
    engine = tiny_engine(head_size=20)
    engine.bank.head_ids.copy_(torch.arange(20) * 4)
    engine = Engine(engine.model, engine.bank)
    run = engine.run(PROMPT, DecodeConfig(mode="full", max_new_tokens=30))
    seen = inspect(engine, PROMPT, run.events)
    for token, written, ranks in zip(run.token_ids, seen.written, seen.ranks):
        held = token % 4 == 0 and token < 80
        assert [rank > 0 for rank in ranks] == [p > 0 for p in written] == [held] * 3 + [True]
    assert 0 < sum(ranks[0] > 0 for ranks in seen.ranks) < len(run.token_ids)


def test_the_worst_moments_are_the_largest_losses_of_probability(engine):
    run = engine.run(PROMPT, DecodeConfig(mode="cascade", max_new_tokens=48, thresholds=0.3))
    seen, tokenizer = inspect(engine, PROMPT, run.events), tiny_tokenizer()
    moments = seen.moments(tokenizer, run.events)
    differing = [i for i, (a, b) in enumerate(zip(run.token_ids, seen.full_choices)) if a != b]
    assert len(moments) == min(20, len(differing)) > 3 and {m["i"] for m in moments} <= set(differing)
    losses = [m["p_full"] - m["p_said"] for m in moments]
    assert all(a >= b - 2e-4 for a, b in zip(losses, losses[1:])) and min(losses) >= 0
    for m in moments:
        assert m["id"] == seen.full_choices[m["i"]] and m["full"] == tokenizer.decode([m["id"]])
        assert m["said"] == tokenizer.decode([run.token_ids[m["i"]]])
    assert seen.moments(tokenizer, run.events, count=2) == moments[:2]
    faithful = engine.run(PROMPT, DecodeConfig(mode="full", max_new_tokens=10))
    assert inspect(engine, PROMPT, faithful.events).moments(tokenizer, faithful.events) == []


def test_of_equal_logits_the_one_that_decoding_takes_leads():
    base = tiny_base("llama-untied")
    base.lm_head.weight.data[7:] = base.lm_head.weight.data[:7].repeat(13, 1)[:90]     # every word has equals
    model = SegmentedModel(base, EXIT_LAYERS)
    engine = Engine(model, ExitBank.untrained(model))
    run = engine.run(PROMPT, DecodeConfig(mode="full", max_new_tokens=20))
    seen = inspect(engine, PROMPT, run.events, top=3)
    assert seen.full_choices == run.token_ids
    assert all(ranks[-1] == 1 for ranks in seen.ranks)
    assert all(len(set(ids)) == 3 for readings in seen.token_ids for ids in readings)


def test_an_empty_text_and_a_prompt_of_one_token(engine):
    assert inspect(engine, PROMPT, []).full_choices == []
    run = engine.run([7], DecodeConfig(mode="cascade", max_new_tokens=5, thresholds=0.3))
    seen = inspect(engine, [7], run.events)
    assert [readings[e.exit][0] for readings, e in zip(seen.token_ids, run.events)] == run.token_ids
