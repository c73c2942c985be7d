"""Exits: published sizes, identity at the start, and an artifact that is loaded or refused with the reason."""

import json
import logging
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascadeexit.backends.torch.linear import can_pack
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ADAPTERS, ExitBank, ExitConfig
from cascadeexit.exits import bank as bank_module
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


def saved(folder, **shape):
    """Save exits with every part that can be: a trimmed head, a sketch and a drafter. Returns their config, as a dict.
    """
    shape = dict(adapter="carry", confidence="sketch", sketch_size=30, head_size=64, head_sizes=(32, 64, 64),
                 layers=(0, 2, 5), drafter_width=8) | shape
    tiny_engine(**shape).bank.save(folder)
    return json.loads((folder / "config.json").read_text())


def refused(folder) -> str:
    """Return the message with which these exits are refused: one sentence or two, without a line break."""
    with pytest.raises(ValueError) as caught:
        ExitBank.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300 + len(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("change, words", [
    ({"format": 99}, "format 99"), ({"layers": [0, 5, 3]}, "exit layers must ascend"),
    ({"confidence": "guess"}, "got 'guess'"),
    ({"colour": "red"}, "the key 'colour' is unknown"), ({"k" * 9999: 1}, "is unknown"),
    ({"adapter": "magic"}, "got 'magic'"),
    ({"adapter": ["carry"]}, "adapter must be text, got ['carry']"), ({"sketch_size": 0}, "sketch_size must be above"),
    ({"confidence": "mlp"}, "sketch_size"), ({"head_size": 98}, "head_size must be at most 97"),
    ({"width": "8"}, "width must be a whole number from 1 to 65,536, got '8'"), ({"width": 8.0}, "width must be"),
    ({"width": True}, "width must be"), ({"width": 10**9}, "width must be"), ({"hidden_size": -1}, "hidden_size must"),
    ({"num_layers": 10**6}, "num_layers must be"), ({"vocab_size": 10**9}, "vocab_size must be"),
    ({"vocab_size": None}, "vocab_size must be"), ({"layers": "025"}, "layers must be a list"),
    ({"layers": [0.5]}, "each of layers must be"), ({"layers": {}}, "layers must be"), ({"layers": []}, "at least one"),
    ({"layers": list(range(10**5))}, "layers must be"), ({"head_sizes": [32, 64]}, "head_sizes must have a number for"),
    ({"head_sizes": ["a"] * 3}, "each of head_sizes must be"), ({"head_sizes": 5}, "head_sizes must be a list"),
    ({"norm_eps": "small"}, "norm_eps must be a number from 0 to 1, got 'small'"), ({"norm_eps": -1}, "norm_eps must"),
    ({"norm_eps": float("nan")}, "norm_eps must be"), ({"trained": 1}, "trained must be true or false, got 1"),
    ({"base_model": 5}, "base_model must be text, got 5"), ({"head_fingerprint": None}, "head_fingerprint must be"),
    ({"drafter_width": -8}, "drafter_width must be"), ({"draft_size": 7}, "draft_size must be a multiple of 32"),
])
def test_a_config_that_does_not_fit_is_refused_with_file_and_key(tmp_path, change, words):
    config = saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    message = refused(tmp_path)
    assert words in message and str(tmp_path / "config.json") in message


@pytest.mark.parametrize("key", ["base_model", "hidden_size", "num_layers", "vocab_size", "layers"])
def test_a_missing_key_is_named(tmp_path, key):
    config = saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != key}))
    assert f"the key '{key}' is missing" in refused(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("content, words", [
    (b"", "is not JSON"), (b"{", "is not JSON"), (b"\xff\xfe{}", "is not JSON"), (b"[" * 10**5, "is not JSON"),
    (b"[1]", "must hold a JSON object, got [1]"), (b"null", "must hold a JSON object"), (POINTER, "Git LFS pointer"),
    (b"{}", "the key 'base_model' is missing")])
def test_a_broken_config_is_refused_by_name(tmp_path, content, words):
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    message = refused(tmp_path)
    assert words in message and str(tmp_path / "config.json") in message


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("adapters.0.up.weight"), "has no tensor 'adapters.0.up.weight'"),
    (lambda t: t.pop("head_ids"), "has no tensor 'head_ids'"), (lambda t: t.clear(), "has no tensor"),
    (lambda t: t.update(extra=torch.zeros(1)), "a tensor that the config does not know: 'extra'"),
    (lambda t: t.update(head_ids=t["head_ids"][:3]), "'head_ids' must have the shape (64,), which the config gives"),
    (lambda t: t.update(head_ids=t["head_ids"].float()), "'head_ids' must have one of the types I64, I32, got F32"),
    (lambda t: t.update({"adapters.1.norm.weight": torch.ones(32, dtype=torch.int64)}), "got I64"),
    (lambda t: t["adapters.2.gate.weight"].fill_(float("nan")), "'adapters.2.gate.weight' hold NaN or infinity"),
    (lambda t: t["confidence_heads.0.alone.0.bias"][:1].fill_(float("inf")), "'confidence_heads.0.alone.0.bias'"),
    (lambda t: t["drafter.context.weight"][0, :1].fill_(-float("inf")), "'drafter.context.weight' hold NaN"),
])
def test_weights_that_do_not_fit_are_refused_with_file_and_tensor(tmp_path, change, words):
    saved(tmp_path)
    path = tmp_path / "exits.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    message = refused(tmp_path)
    assert words in message and str(path) in message


def test_weights_of_another_size_are_refused_before_memory_is_allocated(tmp_path, monkeypatch):
    config = saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(hidden_size=65_536, width=65_536)))
    monkeypatch.setattr(bank_module, "load_file", lambda path: pytest.fail("weights were read"))
    began = time.perf_counter()
    assert "must have the shape" in refused(tmp_path)
    assert time.perf_counter() - began < 2, "17 GB for each matrix would take longer"


@pytest.mark.parametrize("name", ["head_ids", "sketch_ids"])
@pytest.mark.parametrize("bad", [-1, 97, 2**40])
def test_words_outside_the_vocabulary_are_refused(tmp_path, name, bad):
    """Kernels read a row of the head for each of them."""
    bank = tiny_engine(adapter="carry", confidence="sketch", sketch_size=30, head_size=60).bank
    getattr(bank, name)[3] = bad
    bank.save(tmp_path)
    with pytest.raises(ValueError, match=rf"exits.safetensors: {name} must be token ids in 0\.\.96, got \[{bad}\]"):
        ExitBank.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 0.02, 0.5, 0.999])
def test_a_truncated_weights_file_is_refused_by_name(tmp_path, keep):
    saved(tmp_path)
    content = (tmp_path / "exits.safetensors").read_bytes()
    (tmp_path / "exits.safetensors").write_bytes(content[:int(keep * len(content))])
    assert f"{tmp_path / 'exits.safetensors'} is not a complete safetensors file" in refused(tmp_path)


def test_a_pointer_instead_of_weights_is_called_a_pointer(tmp_path):
    saved(tmp_path)
    (tmp_path / "exits.safetensors").write_bytes(POINTER)
    assert "exits.safetensors is a Git LFS pointer" in refused(tmp_path)


def test_a_bank_without_exits_is_refused():
    with pytest.raises(ValueError, match="at least one exit layer"):
        ExitBank.untrained(SegmentedModel(tiny_base(), ()))
