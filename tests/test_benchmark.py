"""The benchmark: its ratios, the time of a token against length, and the replay with scripted exits."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.prompts import bundled_prompts, token_ids
from tests.tiny_models import tiny_base, tiny_engine
from tests.tiny_text import tiny_tokenizer
from training import benchmark, growth, replay
from training.benchmark import ratio
from training.contenders import GENERATE, Contender


def test_a_ratio_is_a_median_in_each_set_and_a_geometric_mean_over_sets():
    kinds = ["chat"] * 3 + ["code"] * 3
    ours, base = (Contender(name, None, speeds) for name, speeds in
                  (("ours", [2.0, 4.0, 99.0, 9.0, 9.0, 1.0]), ("base", [1.0] * 6)))
    assert ratio(ours, base, kinds) == pytest.approx((4 * 9) ** 0.5)


def test_the_replay_follows_its_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--replay", "--shape", "tiny", "--tokens", "60"])
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 1e9)
    benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = result["rows"]
    assert rows["full"]["routing_share"][-1] == 1.0 and rows["full"]["over_full"] == 1.0
    for share, wanted in zip(rows["cascade"]["routing_share"], (0.0, *replay.PUBLISHED_ROUTING), strict=True):
        assert share == pytest.approx(wanted, abs=0.15)
    bundled, better = (rows[name]["tokens_per_verification"] for name in ("verified", "verified, 3 tokens a pass"))
    assert 1.2 < bundled < better <= 3.5
    assert rows["cascade"]["allowed_by_bytes"] > 1.1 and "over_published" not in rows["cascade"]
    for row in rows.values():
        assert row["of_allowed"] == pytest.approx(row["over_full"] / row["allowed_by_bytes"])
        assert row["roofline_multiple"] == pytest.approx(row["tokens_per_second"] * result["weight_bytes"] / 1e9)
        assert row["bytes_ms"] == pytest.approx(1e3 * result["weight_bytes"] / 1e9 / row["allowed_by_bytes"])


def test_a_script_brings_the_tokens_and_the_routing_that_it_promises():
    script = replay.Script(0, vocab_size=50, tokens_per_pass=2.5)
    passes = []
    for _ in range(2000):
        tokens = 1
        while script.judge([7, 8]) == 7:
            tokens += 1
        passes.append(tokens)
    assert sum(passes) / len(passes) == pytest.approx(2.5, rel=0.05)
    assert all(script.judge([3, 4]) not in (4,) for _ in range(500)), "siblings are rejected"
    exits = [script.exit() for _ in range(2000)]
    assert exits.count(1) / 2000 == pytest.approx(replay.PUBLISHED_ROUTING[0], abs=0.05) and min(exits) == 1
    probabilities, words = script.drafts()
    assert sum(probabilities) <= 1 and probabilities == sorted(probabilities, reverse=True)
    assert len(set(words)) == len(probabilities)


def test_the_replay_takes_the_acceptance_from_the_committed_benchmark(monkeypatch, tmp_path):
    measured = json.loads(replay.MEASURED.read_text())["rows"]["verified"]["tokens_per_verification"]
    assert replay.bundled_tokens_per_pass() == measured
    monkeypatch.setattr(replay, "MEASURED", tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="training.benchmark"):
        replay.bundled_tokens_per_pass()


def test_a_contender_that_fails_is_left_out_unless_all_others_need_it():
    def fail(ids):
        raise RuntimeError("no compiler\nmore lines")

    good, bad = Contender("full", lambda ids: ([1, 2], None)), Contender("compiled", fail)
    benchmark.race_all([good, bad], [[5], [6, 7]], torch.device("cpu"))
    assert len(good.speeds) == 2 and not bad.speeds and bad.error == "RuntimeError: no compiler"
    with pytest.raises(RuntimeError, match="no compiler"):
        benchmark.race_all([Contender(GENERATE, fail)], [[5]], torch.device("cpu"))


def test_the_simulation_counts_what_a_token_launches_and_reads(monkeypatch, capsys):
    """At the real shape, without its weights: kernels and bytes of `full` are those that the sizes say."""
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--replay", "--simulate", "--tokens", "12"])
    benchmark.main()
    out = capsys.readouterr().out
    assert "Assumed: H100" in out and "us a kernel" in out
    result = json.loads(out.splitlines()[-1])
    config, _ = replay.SHAPES["llama-3.2-3b"]
    rows, layers = result["rows"], config["num_hidden_layers"]
    assert round(rows["full"]["kernels"]) == 6 * layers + 4, "the embedding, then norm, head and argmax"
    assert rows["full"]["replays"] == 1 < rows["cascade"]["replays"] < len(replay.PUBLISHED_ROUTING) + 1
    hidden, kv = config["hidden_size"], config["num_key_value_heads"] * config["head_dim"]
    weights = layers * (2 * hidden * (hidden + kv) + 3 * hidden * config["intermediate_size"])
    assert rows["full"]["bytes"] == pytest.approx(2 * (weights + config["vocab_size"] * hidden), rel=0.01)
    assert rows["cascade"]["bytes"] < 0.6 * rows["full"]["bytes"]
    for row in rows.values():
        assert row["expected_ms"]["H200"] < row["expected_ms"]["H100"]
        assert row["expected_ms"]["H100"] > 1e3 * row["bytes"] / result["assumed"]["bandwidth"]["H100"]


def test_the_cost_of_late_checks_is_measured_beside_the_same_cascade(monkeypatch, capsys):
    reference, engine = tiny_base(), tiny_engine(adapter="carry")       # in this order: they share one configuration
    monkeypatch.setattr(benchmark, "load", lambda *_, **__: (engine, tiny_tokenizer()))
    monkeypatch.setattr(benchmark, "load_model", lambda *_, **__: (reference, None, None))
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--check-late", "--prompts", "2", "--tokens", "8",
                                      "--cascade-thresholds", "0.4", "--tolerances", "--skip", "generate,"])
    benchmark.main()
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    plain, checked = (result["rows"][f"cascade 0.4{end}"] for end in ("", ", checked late"))
    assert result["checked_late"].keys() == {"cascade 0.4"} and "cascade 0.4, checked late: " in printed
    for name in ("agreement", "routing_share", "cost"):
        assert plain[name] == checked[name]


def test_growth_measures_every_length_that_fits(monkeypatch):
    """A fake clock: a token of `full` takes 1 ms, and 1 ms more for every 100 tokens of context."""
    engine = tiny_engine(adapter="carry")
    model = engine.model
    lengths = {"context": [], "output": []}

    def run(ids: list[int], config: DecodeConfig):
        assert config.ignore_eos, "no token ends a text"
        lengths["context" if config.max_new_tokens == 32 else "output"].append(len(ids))
        ms = (1 + len(ids) / 100) * (0.5 if config.mode is Mode.VERIFIED else 1)
        return SimpleNamespace(stats=SimpleNamespace(tokens_per_second=1e3 / ms))

    monkeypatch.setattr(engine, "run", run)
    found = growth.growth(engine, None, tiny_tokenizer(), max_draft=4, rounds=3)
    fitting = [c for c in growth.CONTEXTS if c <= model.max_positions - 64]
    assert len(fitting) > 1 and [e["context"] for e in found["context"]] == fitting
    cache, weights = model.layers.new_cache(1), engine.costs.full_token_bytes
    for entry in found["context"]:
        n = entry["context"]
        assert entry["full"] == pytest.approx(1 + n / 100) and entry["verified"] == pytest.approx(0.5 + n / 200)
        assert entry["times"] == pytest.approx((1 + n / 100) / (1 + fitting[0] / 100))
        bytes_of = [weights + n * cache.nbytes / cache.capacity for n in (n, fitting[0])]
        assert entry["allowed"] == pytest.approx(bytes_of[0] / bytes_of[1])
        assert 1 <= entry["allowed_16_bits"] <= entry["allowed"], "this model keeps 32 bits"
    prompt = token_ids(tiny_tokenizer(), bundled_prompts()[0].text)
    assert [e["output"] for e in found["output"]] == [n for n in growth.OUTPUTS if len(prompt) + n < 1024 - 64] != []
    assert len(lengths["output"]) == 3 * 2 * len(found["output"])


def test_growth_measures_every_mode_and_generate(monkeypatch):
    monkeypatch.setattr(growth, "CONTEXTS", (16, 96))
    monkeypatch.setattr(growth, "OUTPUTS", (4,))
    reference, engine = tiny_base(), tiny_engine(adapter="carry")       # in this order: they share one configuration
    found = growth.growth(engine, reference, tiny_tokenizer(), max_draft=4, rounds=1)
    for kind, lengths, modes in (("context", [16, 96], ("full", "verified", GENERATE)),
                                 ("output", [4], ("full", "verified"))):
        assert [entry[kind] for entry in found[kind]] == lengths
        assert all(math.isfinite(entry[mode]) for entry in found[kind] for mode in modes)


def test_scripted_exits_compute_what_exits_compute(monkeypatch):
    """The script decides the outcome only: every confidence that it replaces is computed, too."""
    engine, computed = replay.make_engine("tiny", torch.device("cpu")), []
    trained = engine.exits._exits
    confidence = trained.confidence
    monkeypatch.setattr(trained, "confidence", lambda *args: computed.append(args[0]) or confidence(*args))
    engine.follow(0, 1.0)
    config = DecodeConfig(mode="cascade", max_new_tokens=40, thresholds=(None, 0.5, 0.5, 0.5))
    exits = [event.exit for event in engine.run(list(range(2, 12)), config).events if event.final]
    asked = [s for exit in exits for s in range(1, min(exit, 3) + 1)]
    assert len(exits) == 40 and set(exits) >= {1, 2}
    assert computed == asked
