"""The benchmark: ratios as it says they are, the replay follows its script, lengths grow on a tiny model."""

import json
import sys

import pytest
import torch
from conftest import tiny_base, tiny_engine

from tests.browser.tiny_text import tiny_tokenizer
from training import benchmark, growth, replay
from training.benchmark import Contender, ratio


def test_a_ratio_is_a_median_in_each_set_and_a_geometric_mean_over_sets():
    kinds = ["chat"] * 3 + ["code"] * 3
    ours, base = (Contender(name, None, speeds) for name, speeds in
                  (("ours", [2.0, 4.0, 99.0, 9.0, 9.0, 1.0]), ("base", [1.0] * 6)))
    assert ratio(ours, base, kinds) == pytest.approx((4 * 9) ** 0.5)


def test_the_replay_leaves_where_its_script_says(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--replay", "--shape", "tiny", "--tokens", "60"])
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 1e9)
    benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = result["rows"]
    assert rows["full"]["routing_share"][-1] == 1.0 and rows["full"]["over_full"] == 1.0
    for share, wanted in zip(rows["cascade"]["routing_share"], replay.PUBLISHED_ROUTING):
        assert share == pytest.approx(wanted, abs=0.15)
    drafts = [rows[f"verified, {a}% right"]["routing_share"][0] for a in (50, 70, 90)]
    assert drafts == sorted(drafts) and drafts[-1] > drafts[0] + 0.2
    assert rows["cascade"]["allowed_by_bytes"] > 1 and "over_published" not in rows["cascade"]


def test_cost_against_length_is_measured_for_every_length_that_fits():
    reference, engine, eos = tiny_base(), tiny_engine(adapter="carry"), frozenset([1])
    engine.model.eos_ids = eos
    found = growth.growth(engine, reference, tiny_tokenizer(), 4, rounds=1)
    fitting = [c for c in growth.CONTEXTS if c <= engine.model.max_positions - 64]
    assert fitting and [e["context"] for e in found["context"]] == fitting
    assert found["context"][0]["allowed"] == 1.0 and all(e["full"] > 0 for e in found["context"] + found["output"])
    assert all(e["times"] > 0 for e in found["context"])
    assert engine.model.eos_ids == eos


def test_scripted_exits_are_exits():
    engine = replay.make_engine("tiny", torch.device("cpu"))
    assert engine.num_exits == 3 and engine.bank.config.adapter == "carry"
