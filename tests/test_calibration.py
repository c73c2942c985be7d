"""Certified bounds hold with the probability that they state, and a target without calibration is refused."""

import json
import logging
import random

import pytest

from cascadeexit.calibration import CALIBRATION_FILE, Calibration, p_value, upper_bound
from cascadeexit.config import DecodeConfig
from cascadeexit.exits import ExitBank
from tests.tiny_models import tiny_engine
from training.calibrate import prompt_of, prompts_of
from training.documents import Document


def calibration(exits: str = "", **losses: float) -> Calibration:
    """Calibration with 400 prompts that have equal losses: _9=0.01 is a loss of 0.01 at threshold 0.9."""
    losses = {int(name[1:]) / 10: [loss] * 400 for name, loss in losses.items()}
    return Calibration.of(losses, dict.fromkeys(losses, 1.0), exits=exits, tokens=64, delta=0.1)


def test_bounds_are_the_published_ones():
    # Without losses, Hoeffding's bound is the exact one, 1 - delta ** (1 / n); Bentkus' has a factor e.
    assert upper_bound(0.0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-6)
    assert p_value(0.1, 50, 0.05) == 1.0 and p_value(0.02, 50, 1.0) == 0.0
    risks = [upper_bound(0.05, n, 0.1) for n in (20, 100, 500, 4000)]
    assert risks == sorted(risks, reverse=True) and 0.05 < risks[-1] < 0.06 < 0.15 < risks[0]


@pytest.mark.parametrize("risk, spread", [(0.05, 0.02), (0.05, 0.5), (0.2, 1.0)])
def test_bounds_fail_at_most_as_often_as_stated(risk, spread):
    """Losses are 0 or `spread` with mean `risk`: over many calibrations the bound is rarely below the true mean."""
    draw, spread = random.Random(0), max(risk, spread)
    failed = sum(upper_bound(sum(spread * (draw.random() < risk / spread) for _ in range(60)) / 60, 60, 0.1) < risk
                 for _ in range(400))
    assert failed <= 400 * 0.1


def test_the_loosest_threshold_that_keeps_the_target_is_taken_and_none_after_a_failure():
    measured = calibration(_9=0.0, _8=0.02, _7=0.3, _6=0.0)
    assert [p.threshold for p in measured.points] == [0.9, 0.8, 0.7, 0.6]
    assert measured.threshold(0.1) == 0.8 and measured.threshold(0.5) == 0.6
    assert measured.threshold(0.001) is None
    assert measured.points[3].at_most == measured.points[2].at_most > 0.3


def test_a_target_becomes_thresholds_or_is_refused_with_the_reason(tmp_path):
    engine = tiny_engine()
    with pytest.raises(ValueError, match="training.calibrate"):
        engine.run([5, 6], DecodeConfig(target_disagreement=0.1))
    engine.bank.calibration = calibration(_8=0.01, _5=0.2)
    assert engine.thresholds(DecodeConfig(target_disagreement=0.1)) == engine.thresholds(DecodeConfig(thresholds=0.8))
    strict = DecodeConfig(target_disagreement=0.001, max_new_tokens=12)
    assert engine.run([5, 6], strict).token_ids == engine.run([5, 6], DecodeConfig("full", 12)).token_ids
    for wrong in ({"mode": "verified"}, {"temperature": 0.5}, {"thresholds": 0.5}):
        with pytest.raises(ValueError, match="target_disagreement goes with"):
            DecodeConfig(target_disagreement=0.1, **wrong)
    for wrong in (0, 1, -0.1):
        with pytest.raises(ValueError, match=r"in \(0, 1\)"):
            DecodeConfig(target_disagreement=wrong)


def test_a_calibration_applies_only_to_the_exits_it_was_made_with(tmp_path, caplog):
    bank = tiny_engine().bank
    bank.save(tmp_path)
    made = calibration(bank.fingerprint(), _8=0.01)
    content = {"provenance": {}, "exits": made.exits, "prompts": 400, "tokens": 64, "delta": 0.1,
            "points": [vars(point) for point in made.points]}
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(content))
    assert ExitBank.load(tmp_path).calibration == made
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(content | {"exits": "others"}))
    with caplog.at_level(logging.WARNING):
        assert ExitBank.load(tmp_path).calibration is None
    assert "training.calibrate" in caplog.text
    (tmp_path / CALIBRATION_FILE).write_text("{}")
    with pytest.raises(ValueError, match="holds no calibration"):
        ExitBank.load(tmp_path)


POINT = dict(threshold=0.8, disagreement=0.01, at_most=0.05, cost=0.9)


@pytest.mark.parametrize("change, words", [
    ({"exits": 5}, "exits must be text, got 5"), ({"prompts": "many"}, "prompts must be a whole number"),
    ({"tokens": 6.5}, "tokens must be a whole number"), ({"delta": float("nan")}, "delta must be a number"),
    ({"points": {}}, "points must be a list"), ({"points": []}, "points must be a list of 1 to"),
    ({"points": [5]}, r"points\[0\] must be an object, got 5"), ({"points": [{}]}, "the key 'threshold' is missing"),
    ({"points": [POINT | {"at_most": "0.1"}]}, r"at_most of points\[0\] must be a number from 0 to 1, got '0.1'"),
    ({"points": [POINT | {"cost": -1}]}, "cost of points"), ({"points": [POINT | {"x": 1}]}, "the key 'x' is unknown"),
    ({"points": [POINT, POINT]}, "must descend")])
def test_a_damaged_calibration_is_refused_with_file_and_key(tmp_path, change, words):
    content = dict(exits="", prompts=9, tokens=64, delta=0.1, points=[POINT])
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(content))
    assert Calibration.load(tmp_path).points[0].at_most == 0.05
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=f"{CALIBRATION_FILE} holds no calibration: .*{words}.*training.calibrate"):
        Calibration.load(tmp_path)


def test_prompts_are_the_text_before_the_last_reply_of_test_documents():
    assert prompt_of(Document([1, 2, 3, 4, 5], [0, 1, 0, 1, 1])) == (1, 2, 3)
    documents = [Document([i % 7 + 1, 2, 9], [0, 0, 1], key) for i, key in enumerate(range(0, 25 * 20, 25))]
    documents += [Document([50, 2, 9], [0, 0, 1], 3), Document([60, 61], [0, 0], 0), Document([70, 71], [1, 1], 0)]
    assert sorted(prompts_of(documents, 99, 0)) == [(i, 2) for i in range(1, 8)]
    assert prompts_of(documents, 3, 0) == prompts_of(documents, 99, 0)[:3] != prompts_of(documents, 3, 1)
