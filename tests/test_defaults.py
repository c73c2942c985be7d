"""The command that measures settings of the page: their names, its figures, and that a run can be continued."""

import argparse

import pytest

from cascadeexit.config import Mode
from cascadeexit.examples import EXAMPLES
from cascadeexit.prompts import Prompt
from cascadeexit.settings import DEFAULT_THRESHOLD, PRESETS, thresholds_at
from cascadeexit.shape import Shape
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer
from training.defaults import EXAMPLE, FULL, config_of, measure_all, summarize
from training.json_files import ResumableRows, read_json
from training.results import ROOT

SHAPE = Shape("m", 30, (0, 9, 17, 24), True)


def test_a_setting_is_decoded_as_the_page_does():
    assert config_of("0.8", SHAPE, 200).thresholds == thresholds_at(0.8, SHAPE)[:4]
    assert config_of("0.9,no,0.8,1", SHAPE, 200).thresholds == (0.9, None, 0.8, 1)
    verified = config_of("tolerance=0.3", SHAPE, 200)
    assert (verified.mode, verified.tolerance, verified.max_new_tokens) == (Mode.VERIFIED, 0.3, 200)
    with pytest.raises(ValueError):
        config_of("fast", SHAPE, 200)


def test_every_prompt_is_decoded_once_at_every_setting(tmp_path, monkeypatch):
    engine, prompts = tiny_engine(), [Prompt("example", "a b"), Prompt("facts", "c"), Prompt("facts", "a b")]
    args, key = argparse.Namespace(settings=["0.5", "tolerance=0.3"], tokens=40), {"exits": "these"}
    rows = measure_all(engine, tiny_tokenizer(), prompts, args, ResumableRows(tmp_path / "rows", key))
    assert [(r["kind"], r["prompt"], r["setting"]) for r in rows] == [
        (p.kind, p.text, name) for p in prompts for name in (FULL, *args.settings)]
    for row in rows:
        assert row["copied_share"] + sum(row["routing_share"]) == pytest.approx(1) and 0 <= row["agreement"] <= 1
        assert row["setting"] != FULL or row["agreement"] == row["cost"] == 1
    monkeypatch.setattr(engine, "run", None)
    assert measure_all(engine, tiny_tokenizer(), prompts, args, ResumableRows(tmp_path / "rows", key)) == rows


def test_a_loop_counts_unless_the_full_model_loops_too():
    def row(prompt: str, setting: str, agreement: float, shares: list[float], loops: bool) -> dict:
        loop = {"start": 0, "period": 1, "share": 0.9} if loops else None
        return dict(prompt=prompt, setting=setting, agreement=agreement, routing_share=shares, loop=loop, cost=0.5)

    figures = summarize([row("a", FULL, 1, [0, 0, 1], True), row("a", "0.5", 0.9, [0.2, 0.3, 0.5], True),
                         row("b", FULL, 1, [0, 0, 1], False), row("b", "0.5", 1.0, [0, 0.5, 0.5], True)])
    assert figures["0.5"] == {"prompts": 2, "agreement": 0.95, "least_agreement": 0.9, "routing_share": [0.1, 0.4, 0.5],
                              "every_exit": 1, "loops": 2, "new_loops": 1, "cost": 0.5}
    assert list(figures) == [FULL, "0.5"] and figures[FULL]["new_loops"] == 0


def test_the_page_opens_with_a_setting_that_was_measured_good_on_every_example():
    made = read_json(ROOT / "assets" / "results" / "defaults.json")
    assert {row["prompt"] for row in made["rows"] if row["kind"] == EXAMPLE} == set(EXAMPLES.values())
    assert {f"{threshold:g}" for threshold in PRESETS.values()} <= set(made["examples"])
    assert made["examples"][FULL]["loops"] == 0, "replace an example that the full model itself answers with a loop"
    default = made["examples"][f"{DEFAULT_THRESHOLD:g}"]
    assert default["least_agreement"] >= 0.95 and default["new_loops"] == 0
    assert default["every_exit"] == default["prompts"] == len(EXAMPLES)
