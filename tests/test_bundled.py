"""Equality of the modes on the bundled model with its shipped exits: a fast sample of `training.evaluate lossless`."""

import logging

import pytest
import torch

from cascadeexit import hub
from cascadeexit.backends.cpu import build
from cascadeexit.config import DecodeConfig
from cascadeexit.inspection import inspect
from cascadeexit.prompts import bundled_prompts, opening_ids, token_ids

pytestmark = pytest.mark.bundled
TOKENS = 24


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def loaded(request):
    return hub.load(hub.DEFAULT_MODEL, dtype=request.param, device="cpu")


def test_the_self_check_passes_with_room_to_spare(loaded):
    check = loaded[0].self_check
    assert check.passed and not loaded[0].notice and (check.error or 0) < 0.8, check


def test_verified_equals_full_bitwise(loaded):
    engine, tokenizer = loaded
    drafted = 0
    for prompt in [p.text for p in bundled_prompts()[:2]]:
        ids = token_ids(tokenizer, prompt)
        greedy = engine.run(ids, DecodeConfig(mode="full", max_new_tokens=TOKENS))
        full = greedy.token_ids
        assert inspect(engine, ids, greedy.events).full_choices == engine.full_choices(ids, full) == full
        for threshold, max_draft in ((0, 7), (0.6, 3), (None, 7), (None, 16)):
            config = DecodeConfig(mode="verified", max_new_tokens=TOKENS, thresholds=threshold, max_draft=max_draft)
            run = engine.run(ids, config)
            assert run.token_ids == full, (prompt, threshold, max_draft)
            drafted += run.stats.drafted
        sampled = dict(max_new_tokens=TOKENS, temperature=0.8, seed=3)
        runs = [engine.run(ids, DecodeConfig(mode=mode, **sampled)) for mode in ("full", "verified")]
        assert runs[0].token_ids == runs[1].token_ids, prompt
        assert greedy.stats.cost == runs[0].stats.cost == 1, "a full token is the measure, sampled or not"
    assert drafted > 0
    if engine.model.backend.name == "cpu":      # an exit has all words in 8 bits: its screen reads half of the bytes
        assert engine.exits.full_head.nbytes < 0.51 * engine.model.head.nbytes
        if build.library().ce_coded_bytes(16, 16):        # and layers are kept in 12 bits
            assert engine.model.pass_bytes < 0.76 * (engine.model.weight_bytes - engine.model.head.nbytes)


def test_a_tolerance_is_the_same_with_and_without_a_screen(loaded, monkeypatch):
    engine, tokenizer = loaded
    ids, screened = token_ids(tokenizer, bundled_prompts()[1].text), engine.exits.full_head
    config, texts = DecodeConfig(mode="verified", tolerance=0.6, max_new_tokens=2 * TOKENS), []
    for head in (screened, engine.model.head):
        monkeypatch.setattr(engine.exits, "full_head", head)
        texts.append(engine.run(ids, config).token_ids)
    assert texts[0] == texts[1]


def test_the_opening_of_the_chat_template_is_read_at_loading():
    engine, tokenizer = hub.load(hub.DEFAULT_MODEL, device="cpu")
    prompts = [token_ids(tokenizer, p.text) for p in bundled_prompts()]
    opening = opening_ids(tokenizer)
    assert "system" in tokenizer.decode(opening) and all(ids[:len(opening)] == opening for ids in prompts)
    with torch.inference_mode():
        rows = engine.begin(prompts[0], 8)[1][0].shape[1]
    assert rows == len(prompts[0]) - 1 - (engine.model.layers.row_multiple == 1) * len(opening)


def test_full_equals_transformers_generate_in_fp32():
    engine, tokenizer = hub.load(hub.DEFAULT_MODEL, dtype=torch.float32, device="cpu")
    base, _, _ = hub.load_model(hub.DEFAULT_MODEL, dtype=torch.float32, device="cpu")
    for prompt in [p.text for p in bundled_prompts()[:2]]:
        ids = token_ids(tokenizer, prompt)
        expected = base.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids):].tolist()
        assert engine.run(ids, DecodeConfig(mode="full", max_new_tokens=TOKENS)).token_ids == expected


def test_shipped_exits_belong_to_the_bundled_model(caplog):
    with caplog.at_level(logging.WARNING):
        engine, _ = hub.load(hub.DEFAULT_MODEL, device="cpu")
    assert "other weights" not in caplog.text
    assert engine.bank.config.trained and engine.model.exit_layers == (0, 9, 17, 24)


def test_a_cascade_of_the_shipped_exits_uses_several_of_them(loaded):
    engine, tokenizer = loaded
    ids = token_ids(tokenizer, "Explain why the sky is blue.")
    run = engine.run(ids, DecodeConfig(mode="cascade", max_new_tokens=64))
    assert len({e.exit for e in run.events}) >= 3
