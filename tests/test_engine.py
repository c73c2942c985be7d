"""Guarantees of the engine, on tiny random models: exact caches, lossless `verified`, `full` equals transformers."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cascadeexit.backends.base import Choice
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.drafting import worth_running
from cascadeexit.engine import Engine
from cascadeexit.events import Status
from cascadeexit.exits import ExitBank
from cascadeexit.inspection import inspect
from cascadeexit.metrics import summarize
from cascadeexit.model import SegmentedModel
from cascadeexit.sampling import Sampler
from cascadeexit.staircase import Staircase
from tests.tiny_models import logits_of, tiny_base, tiny_engine

PROMPTS = ([5], [5, 6, 7], [11, 3, 60, 22, 9, 41, 77, 30, 2])
TOKENS = 32


def generate(base, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    return base.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)[0, len(prompt):].tolist()


def final_ids(events) -> list[int]:
    return [e.token_id for e in events if e.final]


# -- full ------------------------------------------------------------------------------------------------------------


def test_full_equals_transformers_greedy_generate(family):
    base, engine = tiny_base(family), tiny_engine(family)
    for prompt in PROMPTS:
        assert engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids == generate(base, prompt)


def test_cached_equals_uncached(family):
    base, engine = tiny_base(family), tiny_engine(family)
    stairs = Staircase(engine.model, 128)
    tokens = list(PROMPTS[2])
    with torch.inference_mode():
        for chunk in (tokens[:4], tokens[4:5], tokens[5:]):
            h = stairs.prefill(chunk)[-1]
        ours, theirs = logits_of(engine.model, h)[0, -1], base(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_full_stops_at_end_of_sequence():
    base, engine = tiny_base(), tiny_engine()
    eos = engine.run(PROMPTS[1], DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids[7]
    base.generation_config.eos_token_id = eos
    engine.model.eos_ids = frozenset([eos])
    out = engine.run(PROMPTS[1], DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
    assert out == generate(base, PROMPTS[1]) and out[-1] == eos and len(out) <= 8


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_text_of_more_rows_than_a_pass_takes_goes_through_in_parts(mode, dtype, monkeypatch):
    """This holds for prompts, and for rows that wait for catch-up."""
    engine = tiny_engine(adapter="carry", confidence="sketch", sketch_size=40, dtype=dtype)
    prompt = [(7 * i) % 60 + 20 for i in range(45)]
    config = DecodeConfig(mode=mode, max_new_tokens=TOKENS, max_draft=15, thresholds=0.02)
    at_once = engine.run(prompt, config)
    monkeypatch.setattr("cascadeexit.staircase._MAX_ROWS", 8)
    assert engine.run(prompt, config).token_ids == at_once.token_ids
    assert mode is not Mode.VERIFIED or at_once.stats.drafted, "nothing waited"


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("read", [1, 16, 17, 38, 39, 40, None])
def test_an_opening_that_was_read_before_changes_nothing_but_the_work(mode, read):
    """The opening has `read` of the 40 prompt tokens; None: tokens of another prompt. At least one is left to read."""
    engine = tiny_engine(adapter="carry", confidence="sketch", sketch_size=40, dtype=torch.bfloat16)
    prompt = [(7 * i) % 60 + 20 for i in range(40)]
    opening = [3] * 10 if read is None else prompt[:read]
    config = DecodeConfig(mode=mode, max_new_tokens=TOKENS)

    def story():
        run = engine.run(prompt, config)
        return [replace(event, seconds=0) for event in run.events], engine.full_choices(prompt, run.token_ids)

    plain = story()
    engine.read_opening(opening)
    assert story() == plain
    with torch.inference_mode():
        rows = engine.begin(prompt, TOKENS)[1][0].shape[1]
    assert rows == (39 - read if engine.model.layers.row_multiple == 1 and read and read < 39 else 39)
    engine.read_opening([])
    assert story() == plain


def test_full_choices_of_a_full_text_are_that_text(engine):
    for prompt in PROMPTS:
        out = engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
        assert engine.full_choices(prompt, out) == out
    assert engine.full_choices([5], []) == []


# -- verified --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verified_equals_full_for_every_threshold_and_draft_length(family, dtype, adapter):
    engine = tiny_engine(family, dtype=dtype, adapter=adapter)
    for prompt, drafts in ((PROMPTS[2], (1, 3, 7)), (PROMPTS[0], (7,))):
        full = engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
        for threshold, max_draft in itertools.product((0, 0.3, 0.6, 0.9, (None, 0, None), (0.9, 0.5, 0)), drafts):
            config = DecodeConfig(mode="verified", max_new_tokens=TOKENS, thresholds=threshold, max_draft=max_draft)
            assert engine.run(prompt, config).token_ids == full, (threshold, max_draft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [(0,), (0, 3)], ids=str)
def test_an_exit_before_the_first_layer_drafts_and_decodes(layers, dtype):
    engine = tiny_engine("qwen3", dtype=dtype, adapter="carry", layers=layers)
    full = engine.run(PROMPTS[2], DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
    for threshold, max_draft in itertools.product((0, 0.5), (1, 4)):
        run = engine.run(PROMPTS[2], DecodeConfig(mode="verified", max_new_tokens=TOKENS, thresholds=threshold,
                                                  max_draft=max_draft))
        assert run.token_ids == full
    run = engine.run(PROMPTS[2], DecodeConfig(mode="cascade", max_new_tokens=TOKENS, thresholds=0))
    assert run.stats.routing_share[0] == 1.0 and run.stats.average_depth == 0.0


def test_a_tolerated_draft_is_nearly_as_likely_as_the_full_models_choice():
    """Every token has at least (1 - tolerance) of the best probability given the text before; 0 tolerates nothing."""
    engine, loose = tiny_engine(adapter="carry", layers=(0, 3)), 0
    for prompt, tolerance in itertools.product(PROMPTS, (0.0, 0.3, 0.9)):
        config = DecodeConfig(mode="verified", thresholds=0, max_new_tokens=TOKENS, tolerance=tolerance)
        out = engine.run(prompt, config).token_ids
        stairs, text = Staircase(engine.model, 128), prompt + out
        with torch.inference_mode():
            logits = logits_of(engine.model, stairs.prefill(text[:-1])[-1])[0, len(prompt) - 1:].log_softmax(-1)
        lost = logits.amax(-1) - logits[range(len(out)), out]
        assert (lost.exp() <= 1 / (1 - tolerance) + 1e-3).all()
        loose += int((lost > 1e-3).sum())
        assert tolerance or not (lost > 1e-3).any()
    assert loose > 0


def test_verified_equals_full_with_a_trimmed_head():
    engine = tiny_engine(head_size=20)
    engine.bank.head_ids.copy_(torch.arange(20) * 4)
    engine = Engine(engine.model, engine.bank)
    full = engine.run(PROMPTS[1], DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
    run = engine.run(PROMPTS[1], DecodeConfig(mode="verified", max_new_tokens=TOKENS, thresholds=0))
    assert run.token_ids == full
    assert all(e.token_id % 4 == 0 and e.token_id < 80 for e in run.events if e.status is Status.DRAFT)


def test_verified_logits_are_bitwise_those_of_full():
    """One row in a bucket of four gives bitwise what it gives among more rows, whatever they hold."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_engine(dtype=dtype).model
        tokens = [7, 3, 9, 12, 50, 44, 8, 21, 33, 5, 6]
        with torch.inference_mode():
            one, many = Staircase(model, 128), Staircase(model, 128)
            for stairs in (one, many):
                stairs.prefill(tokens[:3])
            single = torch.cat([logits_of(model, one.prefill([t])[-1]) for t in tokens[3:]], 1)
            together = logits_of(model, many.prefill(tokens[3:])[-1])
        assert torch.equal(single, together)


def test_end_of_sequence_inside_a_draft():
    engine = tiny_engine()
    full = engine.run(PROMPTS[2], DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
    for eos in set(full):
        engine.model.eos_ids = frozenset([eos])
        expected = full[:full.index(eos) + 1]
        for max_draft in (1, 2, 5):
            config = DecodeConfig(mode="verified", max_new_tokens=TOKENS, thresholds=0, max_draft=max_draft)
            assert engine.run(PROMPTS[2], config).token_ids == expected


@pytest.mark.parametrize("limit", range(1, 9))
def test_token_limit_inside_a_draft(engine, limit):
    full = engine.run(PROMPTS[2], DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
    config = DecodeConfig(mode="verified", max_new_tokens=limit, thresholds=0, max_draft=5)
    assert engine.run(PROMPTS[2], config).token_ids == full[:limit]


@pytest.mark.parametrize("shift, acceptance", [(0, 1.0), (1, 0.0)], ids=["always-right", "never-right"])
def test_scripted_exits_are_accepted_or_rejected(shift, acceptance):
    """Exits that always (never) agree with the full model: the text is the same, the acceptance rate 1 (0)."""
    engine = tiny_engine()
    full = engine.run(PROMPTS[2], DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
    position = 0

    def scripted_logits(s, hidden):
        return torch.nn.functional.one_hot(torch.tensor([(full[position] + shift) % 97]), 97).float()

    engine.exits.choice = lambda s, hidden: int(scripted_logits(s, hidden).argmax())
    events = []
    for event in engine.generate(PROMPTS[2], DecodeConfig(mode="verified", max_new_tokens=TOKENS, thresholds=0)):
        events.append(event)
        position = min(event.index + (event.status is not Status.REJECTED), TOKENS - 1)
    assert final_ids(events) == full
    assert summarize(events, engine.costs).acceptance == acceptance


# -- cascade ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_cache_after_a_cascade_equals_a_plain_prefill(family, threshold, monkeypatch):
    """Each layer's cache is exact for the positions it has filled: no hole, no approximation."""
    engine, caches = tiny_engine(family), []
    new_cache = engine.model.layers.new_cache
    monkeypatch.setattr(engine.model.layers, "new_cache",
                        lambda capacity: caches.append(new_cache(capacity)) or caches[-1])
    run = engine.run(PROMPTS[2], DecodeConfig(mode="cascade", max_new_tokens=TOKENS, thresholds=threshold))
    plain, text = Staircase(engine.model, 128), PROMPTS[2] + run.token_ids
    with torch.inference_mode():
        plain.prefill(text)
    cascade, filled = caches[0], caches[0].lengths
    assert all(a >= b for a, b in zip(filled, filled[1:])) and filled[0] >= len(text) - 1
    for layer, n in enumerate(filled):
        for ours, theirs in ((cascade.keys, plain.cache.keys), (cascade.values, plain.cache.values)):
            torch.testing.assert_close(ours[layer, ..., :n, :], theirs[layer, ..., :n, :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["cascade", "verified"])
def test_an_exit_gets_the_state_that_produced_the_newest_token(mode, monkeypatch):
    """The head's choice for the carried state is the newest token, after exits, corrections and the prompt."""
    engine, text, exits, handed = tiny_engine(adapter="carry"), [], set(), []
    hidden = engine.exits.hidden

    def recorded(s, h, carried):
        if text:
            handed.append((engine.exits.logits(0, carried).argmax().item(), text[-1]))
        return hidden(s, h, carried)

    monkeypatch.setattr(engine.exits, "hidden", recorded)
    config = DecodeConfig(mode=mode, max_new_tokens=TOKENS, thresholds=(0.7, 0.5, 0.2), max_draft=3)
    for event in engine.generate(PROMPTS[2], config):
        exits.add(event.exit)
        if event.status is Status.REJECTED:
            del text[event.index:]
        else:
            text[event.index:] = [event.token_id]
    assert exits == {0, 1, 2, 3} and len(handed) > TOKENS / 2
    assert all(choice == newest for choice, newest in handed)


def test_cascade_with_disabled_exits_is_full(engine):
    full = engine.run(PROMPTS[1], DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids
    config = DecodeConfig(mode="cascade", max_new_tokens=TOKENS, thresholds=(None, None, None))
    assert engine.run(PROMPTS[1], config).token_ids == full


def test_cascade_at_threshold_zero_leaves_at_the_first_enabled_exit(engine):
    config = DecodeConfig(mode="cascade", max_new_tokens=TOKENS, thresholds=(None, 0, 0))
    assert {e.exit for e in engine.run(PROMPTS[1], config).events} == {1}


def test_one_threshold_is_the_first_exits_and_deeper_ones_rise_as_less_is_saved(engine):
    assert engine.exit_depths == pytest.approx((2 / 6, 3 / 6, 5 / 6))
    assert DecodeConfig(thresholds=0.2).threshold_per_exit((0, 0.25, 0.5)) == pytest.approx((0.2, 0.4, 0.6))
    assert DecodeConfig(thresholds=0.6).threshold_per_exit(engine.exit_depths) == pytest.approx((0.6, 0.7, 0.9))
    for end in (0.0, 1.0):
        assert DecodeConfig(thresholds=end).threshold_per_exit(engine.exit_depths)[0] == end
    assert DecodeConfig(thresholds=1).threshold_per_exit(engine.exit_depths) == (1, 1, 1)
    assert DecodeConfig(thresholds=(0.5, None, 0.4)).threshold_per_exit(engine.exit_depths) == (0.5, None, 0.4)


def test_identity_exits_of_the_last_layer_but_one_read_as_the_logit_lens():
    base = tiny_base()
    model = SegmentedModel(tiny_base(), (5,))
    engine = Engine(model, ExitBank.untrained(model))
    run = engine.run(PROMPTS[2], DecodeConfig(mode="cascade", max_new_tokens=1, thresholds=0))
    with torch.inference_mode():
        hidden = base(torch.tensor([PROMPTS[2]]), output_hidden_states=True).hidden_states[5]
        expected = base.lm_head(base.model.norm(hidden))[0, -1].argmax()
    assert run.token_ids == [expected]


# -- late checks -----------------------------------------------------------------------------------------------------


def timeless(events) -> list:
    """Events without their times and late checks."""
    return [replace(event, seconds=0, checked=()) for event in events]


def checked_run(engine, monkeypatch, config: DecodeConfig, confidences, check_late: bool):
    """Decode with exits whose confidences are these, again and again."""
    script = itertools.cycle(confidences)
    monkeypatch.setattr(engine.exits, "confidence", lambda *_: [next(script)])
    return engine.run(PROMPTS[2], replace(config, check_late=check_late))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_late_checks_are_the_full_models_choices_and_change_nothing(family, dtype, temperature, monkeypatch):
    """Up to the last token of the full model, each token is the full model's own or was checked."""
    engine = tiny_engine(family, dtype=dtype, adapter="carry")
    config = DecodeConfig(max_new_tokens=TOKENS, thresholds=(0.5,) * 3, temperature=temperature, ignore_eos=True)
    script = (1.0, 0.4, 1.0, 0.4, 0.4, 0.4, 1.0, 0.4, 0.4, 1.0, 0.4, 0.4, 0.4)      # exits 0, 1, full, 0, 2, full
    plain, late = (checked_run(engine, monkeypatch, config, script, wanted) for wanted in (False, True))
    assert [event.exit for event in late.events[:6]] == [0, 1, 3, 0, 2, 3]
    assert [replace(e, seconds=0, checked=()) for e in late.events] == [replace(e, seconds=0) for e in plain.events]
    choices, known = engine.full_choices(PROMPTS[2], late.token_ids), 0
    for event in late.events:
        if event.exit == engine.num_exits:
            assert list(event.checked) == choices[known:event.index]
            known = event.index + 1
        else:
            assert not event.checked


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_late_rows_than_a_pass_takes_are_checked_in_parts(dtype, temperature, monkeypatch):
    """Only then is the head read again."""
    engine = tiny_engine(dtype=dtype)
    rows = 2 * engine.model.layers.max_rows + 5
    config = DecodeConfig(max_new_tokens=2 * rows, thresholds=(0.5, None, None), temperature=temperature,
                          ignore_eos=True)
    script = [1.0] * (rows - 1) + [0.0]
    plain, late = (checked_run(engine, monkeypatch, config, script, wanted) for wanted in (False, True))
    assert [e.exit for e in late.events].count(engine.num_exits) == 2
    assert late.token_ids == plain.token_ids
    choices = engine.full_choices(PROMPTS[2], late.token_ids)
    for a, b in zip(late.events, plain.events):
        again = 0
        if a.exit == engine.num_exits:
            assert list(a.checked) == choices[a.index - rows + 1:a.index]
            again = 2 * engine.exits.full_head.nbytes
        assert a.weight_bytes == b.weight_bytes + again


# -- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_repeats_with_its_seed(engine):
    for mode in Mode:
        runs = [engine.run(PROMPTS[1], DecodeConfig(mode=mode, max_new_tokens=TOKENS, temperature=1.0, top_p=0.9,
                                                    seed=seed, thresholds=0.4)).token_ids for seed in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("thresholds", [0, 0.5, None])
def test_verified_sampling_is_that_of_full_for_the_same_seed(engine, thresholds):
    for prompt, seed in itertools.product(PROMPTS, range(5)):
        options = dict(max_new_tokens=TOKENS, temperature=0.9, top_p=0.95, seed=seed)
        full = engine.run(prompt, DecodeConfig(mode="full", **options)).token_ids
        assert engine.run(prompt, DecodeConfig(mode="verified", thresholds=thresholds, **options)).token_ids == full


def test_drafts_do_not_change_what_the_full_model_chooses():
    """Drafts change neither draws nor generator. With a tolerance (greedy), the best draft within it is accepted."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    alone, offered = (Sampler(1.0, 1.0, 0, 4, torch.device("cpu")) for _ in range(2))
    assert [alone.choose(logits) for _ in range(50)] == [offered.judge([3, 1], logits) for _ in range(50)]
    greedy, loose = (Sampler(0.0, 1.0, 0, 4, torch.device("cpu"), tolerance=t) for t in (0.0, 0.7))
    choice = Choice(0, logits.__getitem__)
    assert greedy.judge([1, 2], choice) == 0 and loose.judge([2, 1], choice) == 1
    assert loose.judge([2], choice) == 0, "e^-2 of the best is below 0.3 of it"
    assert loose.judge([], choice) == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    sampler = Sampler(1.0, 0.6, 0, 4, torch.device("cpu"))
    probs = sampler.distribution(torch.tensor([0.1, 0.5, 0.3, 0.1]).log())
    torch.testing.assert_close(probs, torch.tensor([0, 0.625, 0.375, 0]))


# -- events and time -------------------------------------------------------------------------------------------------


def test_final_positions_arrive_in_order_and_time_never_runs_back(engine):
    for mode in Mode:
        config = DecodeConfig(mode=mode, max_new_tokens=TOKENS, thresholds=0.4, max_draft=3)
        run = engine.run(PROMPTS[2], config)
        assert [e.index for e in run.events if e.final] == list(range(len(run.token_ids)))
        assert all(a.seconds <= b.seconds for a, b in zip(run.events, run.events[1:]))


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_spans_tell_which_segments_ran_over_how_many_positions(engine, mode):
    """When a segment's end gives a token, that segment and all below it have run over every position before it."""
    run = engine.run(PROMPTS[2], DecodeConfig(mode=mode, max_new_tokens=60, thresholds=0.5, check_late=mode != "full"))
    ran = [0] * engine.model.num_segments
    for event in run.events:
        for first, end, rows in event.spans:
            ran[first:end] = [n + rows for n in ran[first:end]]
        assert ran[:event.exit + 1] == [event.index + 1] * (event.exit + 1)
    spans = [span for event in run.events for span in event.spans]
    assert any(span.rows > 1 for span in spans) == (mode == "cascade")
    if mode == "full":
        assert spans == [(0, engine.model.num_segments, 1)] * len(run.events)


@pytest.mark.parametrize("thresholds", [0.3, None])
def test_spans_of_a_verification_pass_come_with_its_first_verdict(thresholds):
    engine = tiny_engine("qwen3", dtype=torch.bfloat16, adapter="carry", layers=(0, 3))
    config = DecodeConfig(mode="verified", max_new_tokens=40, thresholds=thresholds, max_draft=5)
    events, prompt, ran = [], [9, 3] * 12, []
    for event in engine.generate(prompt, config):
        first = not events or events[-1].status is Status.DRAFT or events[-1].status is Status.EMITTED
        if event.status is not Status.DRAFT:
            assert bool(event.spans) == first
        ran += [span for span in event.spans if span.end == engine.model.num_segments]
        events.append(event)
    drafts = sum(event.status is Status.DRAFT for event in events)
    assert drafts and sum(span.rows for span in ran) == drafts + len(ran)


# -- reading a long prompt -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("opening", [0, 13])
def test_a_long_prompt_is_read_chunk_by_chunk_to_the_same_result(mode, opening, monkeypatch):
    engine = tiny_engine(adapter="carry", confidence="sketch", sketch_size=40, dtype=torch.bfloat16)
    prompt, config = [(7 * i) % 60 + 20 for i in range(40)], DecodeConfig(mode=mode, max_new_tokens=TOKENS)
    at_once = engine.run(prompt, config)
    assert not any(event.status is Status.READING for event in at_once.events)
    engine.read_opening(prompt[:opening])
    known = len(engine.opening)
    monkeypatch.setattr("cascadeexit.staircase._MAX_ROWS", 8)
    run = engine.run(prompt, config)
    reading, others = ([e for e in run.events if (e.status is Status.READING) == wanted] for wanted in (True, False))
    assert run.token_ids == at_once.token_ids
    assert [(e.index, e.token_id, e.exit, e.confidences) for e in others] == [
        (e.index, e.token_id, e.exit, e.confidences) for e in at_once.events]
    ends = range(known + 8, 39, 8)
    assert run.events[:len(ends)] == reading and [e.index for e in reading] == [end - 40 for end in ends]
    assert [e.token_id for e in reading] == [prompt[end - 1] for end in ends]
    assert all(not e.final and e.weight_bytes == 0 and e.spans == () for e in reading)
    assert run.stats == summarize(others, engine.costs)
    assert engine.full_choices(prompt, run.token_ids) == inspect(engine, prompt, run.events).full_choices


def test_a_run_can_be_interrupted_between_the_chunks_of_its_prompt(engine, monkeypatch):
    monkeypatch.setattr("cascadeexit.staircase._MAX_ROWS", 8)
    passes, through = [], engine.model.layers.run
    monkeypatch.setattr(engine.model.layers, "run", lambda *args: passes.append(args[1].shape[1]) or through(*args))
    events = engine.generate(list(range(2, 40)), DecodeConfig())
    assert [next(events).status for _ in range(2)] == ["reading"] * 2
    events.close()
    assert passes == [8, 8]


def test_waiting_for_the_consumer_is_not_engine_time(engine):
    stream = engine.generate(PROMPTS[1], DecodeConfig(mode="full", max_new_tokens=3))
    first = next(stream)
    time.sleep(0.5)
    assert next(stream).seconds - first.seconds < 0.4


def test_runs_may_interleave(engine):
    config = DecodeConfig(mode="cascade", max_new_tokens=TOKENS, thresholds=0.5)
    alone = [engine.run(p, config).token_ids for p in PROMPTS[1:]]
    together = list(zip(*(engine.generate(p, config) for p in PROMPTS[1:])))        # to the end of the shortest
    assert len(together) == min(map(len, alone))
    assert [final_ids(events) for events in zip(*together)] == [ids[:len(together)] for ids in alone]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, config, message", [
    ([], {}, "empty"),
    ([97], {}, "token ids"),
    ([-1], {}, "token ids"),
    ([5] * 1012, {"max_new_tokens": 13}, "1024"),
    ([5], {"thresholds": (0.5, 0.5)}, "3 exits"),
    ([5], {"mode": "verified", "max_draft": 32}, "max_draft"),
    ([5], {"mode": "cascade", "max_draft": 10**9}, "max_draft"),
    ([5], {"mode": "full", "max_new_tokens": 10**9}, "max_new_tokens"),
    ([1.5], {}, r"whole numbers, got \[1.5\]"),
    ([5, True], {}, r"whole numbers, got \[True\]"),
    ([None], {}, "whole numbers"),
    (["12"], {}, "whole numbers"),
    ([[5]], {}, "whole numbers"),
    ("12", {}, "encode text with the tokenizer"),
    (b"ab", {}, "encode text with the tokenizer"),
    (5, {}, "must be a list"),
    (torch.tensor([[5, 6]]), {}, "whole numbers"),
    (np.array([1.5]), {}, "whole numbers"),
])
def test_bad_input_is_refused_before_any_work(engine, prompt, config, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompt, DecodeConfig(**config))


def test_arrays_and_tensors_of_token_ids_are_prompts(engine):
    config = DecodeConfig(max_new_tokens=8)
    expected = engine.run([5, 6, 7], config).token_ids
    for prompt in ((5, 6, 7), np.array([5, 6, 7], np.int8), [np.int64(i) for i in (5, 6, 7)], torch.tensor([5, 6, 7]),
                   iter([5, 6, 7])):
        assert engine.run(prompt, config).token_ids == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [-1, 97, 2**40, 1.5, "5"])
def test_token_ids_outside_the_vocabulary_are_refused_wherever_a_text_enters(dtype, bad):
    """Kernels read a row of the embedding for each id: another id would be another's memory."""
    engine = tiny_engine("llama-tied", dtype=dtype)
    run = engine.run([5, 6], DecodeConfig(mode="full", max_new_tokens=3))
    wrong = [replace(run.events[0], token_id=bad), *run.events[1:]]
    for call in (*[lambda: engine.generate([5, bad], DecodeConfig())] * isinstance(bad, int),
                 lambda: engine.read_opening([5, bad]),
                 lambda: engine.full_choices([5, bad], [6]), lambda: engine.full_choices([5], [bad, 6]),
                 lambda: inspect(engine, [5, bad], run.events), lambda: inspect(engine, [5], wrong)):
        with pytest.raises(ValueError, match=r"token ids must be in 0\.\.96"):
            call()
    for call in (lambda: engine.full_choices([], [5]), lambda: inspect(engine, [], run.events)):
        with pytest.raises(ValueError, match="the prompt is empty"):
            call()


@pytest.mark.parametrize("config", [
    {"mode": "fast"}, {"max_new_tokens": 0}, {"max_draft": 0}, {"temperature": -1}, {"temperature": float("nan")},
    {"temperature": float("inf")}, {"temperature": 1e-40}, {"top_p": 0}, {"thresholds": 1.5},
    {"tolerance": 1}, {"tolerance": 0.3}, {"mode": "verified", "tolerance": 0.3, "temperature": 1},
    {"mode": "full", "check_late": True}, {"mode": "verified", "check_late": True},
    *({name: value} for name in ("max_new_tokens", "max_draft", "seed")
      for value in (None, True, 5.0, "5", float("nan"), float("inf"), [5], 10**30)),
    *({name: value} for name in ("temperature", "top_p", "tolerance", "target_disagreement", "thresholds")
      for value in (True, "0.5", float("nan"), float("inf"), -float("inf"), 10**400)),
    {"max_draft": 1_001, "mode": "full"}, {"max_new_tokens": 10**8}, {"seed": 2**64}, {"temperature": 1e-38},
    {"temperature": None}, {"top_p": None}, {"tolerance": None}, {"thresholds": [0.5, float("nan")]},
    {"thresholds": b"5"}, {"thresholds": ["0.5"]}, {"thresholds": [True]},
    {"ignore_eos": 1}, {"check_late": "no"}, {"only_paying": None}, {"mode": []}, {"mode": None},
])
def test_contradictory_configs_are_refused(config):
    with pytest.raises(ValueError):
        DecodeConfig(**config)


def test_numbers_of_numpy_become_pythons_own():
    given = dict(max_new_tokens=np.int8(100), max_draft=np.uint8(7), seed=np.int64(3), temperature=np.float32(0.5),
                 top_p=np.float64(0.9), thresholds=np.float32(0.5))
    config = DecodeConfig(**given)
    assert {name: type(getattr(config, name)) for name in given} == dict(
        max_new_tokens=int, max_draft=int, seed=int, temperature=float, top_p=float, thresholds=float)
    assert config == DecodeConfig(max_new_tokens=100, max_draft=7, seed=3, temperature=0.5, top_p=0.9, thresholds=0.5)
    assert DecodeConfig(thresholds=np.array([0.5, 0.25])).thresholds == (0.5, 0.25)
    assert DecodeConfig(thresholds=[None, np.float32(0.5)]).thresholds == [None, 0.5]


@pytest.mark.parametrize("config", [{"mode": "w" * 10**6}, {"seed": "s" * 10**6}, {"thresholds": ["t" * 10**6]},
                                    {"max_draft": 10**5000}, {"temperature": ["x"] * 10**5}])
def test_the_message_about_a_long_value_is_short_and_names_the_field(config):
    with pytest.raises(ValueError, match=[*config][0]) as caught:
        DecodeConfig(**config)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_the_longest_run_that_fits_is_right():
    base, engine = tiny_base(), tiny_engine()
    prompt = [3 + i % 90 for i in range(500)]
    out = engine.run(prompt, DecodeConfig(mode="verified", max_new_tokens=12, thresholds=0.3)).token_ids
    assert out == generate(base, prompt, 12)


def test_an_exit_with_low_confidence_skips_the_next_but_not_the_deepest():
    engine = tiny_engine()
    wanted = (0.6,) * engine.num_exits
    assert [worth_running(s, wanted, None) for s in range(engine.num_exits + 1)] == [True] * 3 + [False]
    assert [worth_running(s, wanted, 0.2) for s in (1, 2)] == [False, True]
    assert worth_running(1, wanted, 0.5) and not worth_running(1, (0.6, None, 0.6), 0.5)
