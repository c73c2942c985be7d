"""Figures show the numbers of the run."""

import pytest

from cascadeexit import views
from cascadeexit.sides import CASCADE, FULL
from cascadeexit.stream import colours
from tests.helpers import run_stream
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer


def test_figures_hold_the_run():
    engine = tiny_engine(seed=3)
    stream = run_stream(engine, tiny_tokenizer(), "cascade")
    ours, theirs = (stream.sides[name].final for name in (CASCADE, FULL))
    choices = engine.full_choices([5, 6, 7], [e.token_id for e in ours])
    routing, latency, confidence = views.figures(stream, choices)
    assert sum(routing.data[0].x) == pytest.approx(1)
    assert [len(line.x) for line in latency.data] == [len(theirs) - 1, len(ours) - 1]
    assert sum(len(exit.x) for exit in confidence.data[:-1]) == sum(e.exit < engine.num_exits for e in ours)


def test_every_segment_has_a_colour_and_the_full_model_its_own():
    for num_exits in (1, 3, 6, 9):
        palette = colours(num_exits)
        assert len(palette) == num_exits + 1 and palette[-1] not in palette[:-1]
