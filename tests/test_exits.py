"""Exits: published sizes, identity at the start, and an artifact that is loaded or refused with the reason."""

import json
import logging

import pytest
import torch

from cascadeexit.backends.torch.linear import can_pack
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ADAPTERS, ExitBank, ExitConfig
from cascadeexit.lookup import NOTHING_COPIED
from cascadeexit.model import SegmentedModel
from tests.tiny_models import EXIT_LAYERS, tiny_base, tiny_engine

PUBLISHED = ExitConfig(base_model="Llama-3.2-3B", hidden_size=3072, num_layers=28, vocab_size=128256,
                       layers=(8, 16, 22))


def nothing(rows: int) -> list[tuple[int, int]]:
    """N-gram copies for rows whose text repeats nothing: none."""
    return [NOTHING_COPIED] * rows


def segmented(**kwargs) -> SegmentedModel:
    return SegmentedModel(tiny_base(**kwargs), EXIT_LAYERS, name="tiny")


def test_published_widths_give_the_published_parameter_count():
    with torch.device("meta"):
        bank = ExitBank(PUBLISHED)
    assert sum(p.numel() for p in bank.parameters()) == 16_525_827


def test_untrained_adapters_are_the_logit_lens(family, adapter):
    model = segmented(family=family)
    engine = Engine(model, ExitBank.untrained(model, adapter=adapter))
    h = torch.randn(2, 5, model.hidden_size)
    for s in range(len(EXIT_LAYERS)):
        torch.testing.assert_close(engine.exits.hidden(s, h, torch.randn_like(h)), model.layers.norm(h))
    assert not engine.bank.config.trained


def test_untrained_confidence_is_the_largest_probability_of_the_head():
    model = segmented()
    exits = Engine(model, ExitBank.untrained(model)).exits
    hidden = exits.hidden(0, torch.randn(5, model.hidden_size), torch.randn(5, model.hidden_size))
    sure = torch.tensor(exits.confidence(0, hidden, nothing(5)))
    torch.testing.assert_close(sure, exits.logits(0, hidden).softmax(-1).amax(-1))


def test_a_sketch_of_the_whole_vocabulary_knows_the_exits_probabilities():
    model = segmented()
    bank = ExitBank.untrained(model, confidence="sketch", sketch_size=model.vocab_size, confidence_width=4)
    exits = Engine(model, bank).exits
    hidden, before = (exits.hidden(s, torch.randn(5, model.hidden_size), torch.zeros(5, model.hidden_size))
                      for s in (1, 0))
    (p, best), (other, their_best) = ((x, x.argmax(-1, keepdim=True)) for x in
                                      (exits.logits(0, h).log_softmax(-1) for h in (hidden, before)))
    mine, theirs = (torch.cat([x.topk(2).values, -(x * x.exp()).sum(-1, keepdim=True)], -1) for x in (p, other))
    words = best[:, 0].tolist()
    copied = [(words[0], 1), (words[1], 32), (words[2] - 1, 5), (words[3] + 1, 2), NOTHING_COPIED]
    copy = torch.tensor([[2, 1], [33, 1], [1, 6], [1, 3], [1, 1]]).log()       # of agreeing copies, of others
    head = bank.confidence_heads[1]
    alone = head.alone(torch.cat([mine, copy], 1))[:, 0].sigmoid()
    torch.testing.assert_close(torch.tensor(exits.confidence(1, hidden, copied)), alone)
    cosine = torch.nn.functional.cosine_similarity(hidden, before)[:, None]
    facts = torch.cat([mine, theirs, (best == their_best).float(), other.gather(1, best).clamp(min=-15),
                       p.gather(1, their_best).clamp(min=-15), cosine, copy], 1)
    sure = torch.tensor(exits.confidence(1, hidden, copied, before))
    torch.testing.assert_close(sure, head.after(facts)[:, 0].sigmoid())
    read = sum(p.nbytes for p in (*bank.adapters[0].parameters(), *bank.confidence_heads[0].parameters()))
    assert exits.try_bytes(0) == read + model.head.nbytes


@pytest.mark.parametrize("shape", [{}, {"head_size": 20}, {"head_size": 90, "head_sizes": (32, 64, 90)},
                                   {"adapter": "carry"},
                                   {"adapter": "carry", "confidence": "sketch", "sketch_size": 30},
                                   {"adapter": "carry", "layers": (0, 2, 5), "drafter_width": 8}],
                         ids=["whole-head", "trimmed-head", "heads-of-their-own", "carry", "sketch", "drafter"])
def test_saved_exits_decode_the_same_when_loaded(tmp_path, shape):
    engine = tiny_engine(**shape)
    engine.bank.save(tmp_path)
    again = Engine(SegmentedModel(tiny_base(), engine.model.exit_layers), ExitBank.load(tmp_path))
    for config in (DecodeConfig(mode="cascade", max_new_tokens=30, thresholds=0.4),
                   DecodeConfig(mode="verified", max_new_tokens=30)):
        a, b = engine.run([5, 6, 7], config), again.run([5, 6, 7], config)
        assert [(e.token_id, e.confidences) for e in a.events] == [(e.token_id, e.confidences) for e in b.events]
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "exits.safetensors"}
    assert engine.bank.fingerprint() == again.bank.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_exit_reads_the_first_words_of_the_head_that_are_its_own(dtype):
    model = segmented(dtype=dtype)
    whole, own = (ExitBank.untrained(model, head_size=90, **sizes) for sizes in ({}, {"head_sizes": (32, 64, 90)}))
    for bank in (whole, own):
        bank.head_ids.copy_(torch.arange(90).flip(0))
    config, (whole, own) = own.config, (Engine(model, bank).exits for bank in (whole, own))
    hidden = torch.randn(4, model.hidden_size).to(dtype)
    for s, words in enumerate((32, 64, 90)):
        assert config.words(s) == words
        torch.testing.assert_close(own.logits(s, hidden), whole.logits(s, hidden)[:, :words])
        assert own.head_bytes(s) * 90 == whole.head_bytes(s) * words
    # The torch backend packs each part by itself, and shares one weight where this processor's oneDNN cannot pack it.
    copied = (32 + 64) * model.hidden_size * dtype.itemsize if can_pack(torch.empty(90, 64, dtype=dtype)) else 0
    assert own.memory_bytes == whole.memory_bytes + copied


@pytest.mark.parametrize("sizes", [(32, 64), (32, 40, 90), (32, 64, 64), (0, 64, 90)])
def test_head_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="head_sizes must have a number for each of 3 exits"):
        ExitBank.untrained(segmented(), head_size=90, head_sizes=sizes)


def test_a_rescaled_adapter_does_for_the_scaled_rows_what_it_did():
    torch.manual_seed(0)
    adapter = ADAPTERS["swiglu"](32, 16, 1e-9)
    adapter.up.weight.data.normal_()
    h, carried = torch.randn(5, 32), torch.randn(5, 32)
    before = adapter(h, carried)
    adapter.rescale(8.0)
    torch.testing.assert_close(adapter(8 * h, carried), before, atol=1e-4, rtol=1e-4)


def test_confidence_stays_in_range_for_extreme_hidden_states(engine):
    for scale in (0.0, 1e-6, 1e4):
        for c in engine.exits.confidence(0, torch.full((3, engine.model.hidden_size), scale), nothing(3)):
            assert 0 <= c <= 1


def test_exits_of_another_architecture_are_refused(tmp_path):
    tiny_engine().bank.save(tmp_path)
    other = SegmentedModel(tiny_base(), (2, 4))
    with pytest.raises(ValueError, match="were made for"):
        Engine(other, ExitBank.load(tmp_path))


def test_exits_of_other_weights_warn_and_stay_lossless(tmp_path, caplog):
    tiny_engine().bank.save(tmp_path)
    with caplog.at_level(logging.WARNING):
        engine = Engine(segmented(seed=7), ExitBank.load(tmp_path))
    assert "other weights" in caplog.text
    full = engine.run([5, 6], DecodeConfig(mode="full", max_new_tokens=20)).token_ids
    assert engine.run([5, 6], DecodeConfig(mode="verified", max_new_tokens=20, thresholds=0)).token_ids == full


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        ExitBank.load(tmp_path)


@pytest.mark.parametrize("change", [{"format": 99}, {"layers": [5, 3]}, {"confidence": "guess"}, {"colour": "red"},
                                    {"width": 9}, {"adapter": "magic"}, {"confidence": "sketch"}, {"sketch_size": 5},
                                    {"head_size": 98}])
def test_a_config_that_does_not_fit_is_refused(tmp_path, change):
    tiny_engine().bank.save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError):
        ExitBank.load(tmp_path)


@pytest.mark.parametrize("name", ["head_ids", "sketch_ids"])
@pytest.mark.parametrize("bad", [-1, 97, 2**40])
def test_words_outside_the_vocabulary_are_refused(tmp_path, name, bad):
    """Kernels read a row of the head for each of them."""
    bank = tiny_engine(adapter="carry", confidence="sketch", sketch_size=30, head_size=60).bank
    getattr(bank, name)[3] = bad
    bank.save(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} must be token ids in 0\.\.96, got \[{bad}\]"):
        ExitBank.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 0.5], ids=["empty", "half"])
def test_a_truncated_weights_file_is_refused_by_name(tmp_path, keep):
    tiny_engine().bank.save(tmp_path)
    content = (tmp_path / "exits.safetensors").read_bytes()
    (tmp_path / "exits.safetensors").write_bytes(content[:int(keep * len(content))])
    with pytest.raises(ValueError, match=str(tmp_path)):
        ExitBank.load(tmp_path)


def test_a_bank_without_exits_is_refused():
    with pytest.raises(ValueError, match="at least one exit layer"):
        ExitBank.untrained(SegmentedModel(tiny_base(), ()))
