"""Payoff: what does not pay is switched off, and no text of `full` or `verified` changes."""

from dataclasses import replace

import pytest

from cascadeexit import payoff
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.library import Library
from cascadeexit.page import _notice
from cascadeexit.payoff import ExitTime, Payoff
from cascadeexit.settings import Settings
from cascadeexit.shape import Shape
from tests.tiny_models import tiny_engine

PROMPT = [5, 6, 7] * 4
TRAINED = Shape("tiny", 6, (0, 3, 5), True)
FAST = Payoff(TRAINED, "./tiny", seconds=0.1, token_seconds=1.0,
              exits=(ExitTime(0.1, 0.9), ExitTime(0.1, 0.5), ExitTime(0.1, 0.4)), draft_seconds=0.1, row_share=0.1,
              row_factor=1.0)


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine(layers=(0, 3, 5), drafter_width=8)
    engine.payoff = payoff.measure(engine, "./a tiny model")
    return engine


def run(engine, **options):
    return engine.run(PROMPT, DecodeConfig(max_new_tokens=30, **options))


def test_a_measurement_times_every_part(engine):
    found = engine.payoff
    assert len(found.exits) == 3 and all(exit.asked > 0 for exit in found.exits)
    assert found.token_seconds > 0 and found.draft_seconds > 0 and found.row_factor >= 1
    assert found.seconds < 10 * payoff.SECONDS


def test_untrained_exits_are_never_asked_and_the_message_says_how_to_train(engine):
    cascade, full = run(engine), run(engine, mode="full")
    assert cascade.token_ids == full.token_ids and cascade.stats.cost == full.stats.cost
    assert all(event.confidences == (None,) * 3 for event in cascade.events)
    verified = run(engine, mode="verified")
    assert verified.token_ids == full.token_ids
    assert not any(event.exit == 0 for event in verified.events), "the untrained drafter was called"
    message, = engine.payoff.sentences()
    assert "Train exits first: python -m training.quick --model './a tiny model' (about 15 minutes on a CPU" in message


def test_an_exit_that_is_asked_for_is_used(engine):
    assert any(event.exit == 1 for event in run(engine, thresholds=[None, 0.0, None]).events)
    assert engine.thresholds(DecodeConfig(thresholds=0.6)) != (None,) * 3
    assert engine.thresholds(DecodeConfig(thresholds=0.6, only_paying=True)) == (None,) * 3


def test_a_visitor_gets_paying_exits_or_the_one_that_was_chosen(engine):
    chosen, first = (Settings(exit_choice=n, thresholds=(0.5,) * 3).decode_configs(3)[0] for n in (1, -1))
    assert engine.thresholds(chosen) == (None, 0.0, None) and engine.thresholds(first) == (None,) * 3


def test_a_dear_exit_is_switched_off_alone_and_named():
    dear = replace(FAST, exits=(*FAST.exits[:2], ExitTime(0.1, 0.1)))
    assert FAST.paying == (True,) * 3 and FAST.drafter_pays and not FAST.sentences()
    assert dear.paying == (True, True, False)
    message, = dear.sentences()
    assert "Exit 3" in message and "100.0 ms" in message
    assert not replace(FAST, draft_seconds=2.0).drafter_pays
    assert "drafter" in replace(FAST, draft_seconds=2.0).sentences()[0]


def test_a_disturbed_measurement_of_trained_exits_is_made_again(engine, monkeypatch):
    dear = replace(FAST, exits=(ExitTime(9.0, 0.1),) * 3)
    monkeypatch.setattr(engine.bank, "config", replace(engine.bank.config, trained=True))
    for results, expected in (([dear, FAST], FAST), ([dear, dear, dear], dear), ([FAST], FAST)):
        left = list(results)
        monkeypatch.setattr(payoff, "_measured", lambda *args, left=left: left.pop(0))
        assert payoff.measure(engine, "x") is expected and not left


def test_dear_rows_make_fewer_drafts_of_the_same_text(engine):
    before = engine.payoff
    engine.payoff = replace(FAST, row_factor=1000.0)
    try:
        dear, full = run(engine, mode="verified"), run(engine, mode="full")
        engine.payoff = FAST
        cheap = run(engine, mode="verified")
    finally:
        engine.payoff = before
    assert dear.token_ids == cheap.token_ids == full.token_ids
    assert dear.stats.drafted == 0 < cheap.stats.drafted


def test_the_page_opens_in_the_mode_that_pays(engine):
    library = Library.of(engine, None)
    assert library.first_mode(engine.model.name) is Mode.VERIFIED
    assert "Train exits first" in _notice(engine, Mode.CASCADE).message and _notice(engine, Mode.VERIFIED) is None
    assert Library.of(tiny_engine(), None).first_mode("llama-untied") is Mode.CASCADE, "not measured"
