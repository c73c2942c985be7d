"""A drafter changes drafts only: text and exits stay the same. Training computes the same states as decoding."""

import pytest
import torch

from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.model import SegmentedModel
from tests.helpers import tiny_store
from tests.tiny_models import tiny_base, tiny_engine
from training.drafter import DraftRows, WhitenedDrafter

PROMPTS = ([5], [5, 6, 7], [9, 3] * 12)
SHAPE = dict(adapter="carry", layers=(0, 2, 4), drafter_width=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verified_equals_full_whatever_the_drafter_drafts(family, dtype, monkeypatch):
    engine = tiny_engine(family, dtype=dtype, **SHAPE)
    # Its drafts are poor: let none be too expensive, anywhere.
    monkeypatch.setattr(engine.model.layers, "row_cost", lambda rows: 0.01)
    for prompt in PROMPTS:
        full = engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=60)).token_ids
        for max_draft in (1, 4, 16):
            run = engine.run(prompt, DecodeConfig(mode="verified", max_new_tokens=60, max_draft=max_draft))
            assert run.token_ids == full, max_draft
            assert any(e.exit == 0 for e in run.events), "it was never asked"


def test_its_context_is_the_row_that_produced_the_newest_token(monkeypatch):
    """In every pass, the context has the states at the other exits that a plain pass over the text gives."""
    engine = tiny_engine("qwen3", dtype=torch.bfloat16, **SHAPE)
    engine.bank.drafter.context.weight.data.mul_(0.1)
    read, context, tensor = [], engine.exits.context, engine.model.layers.tensor

    def listen(states, row):
        read.append(torch.cat([tensor(rows)[0, row:row + 1] for rows in states], -1))
        return context(states, row)

    monkeypatch.setattr(engine.exits, "context", listen)
    text = [5, 6, 7] + engine.run([5, 6, 7], DecodeConfig(mode="verified", max_new_tokens=40)).token_ids
    with torch.inference_mode():
        layers = engine.model.layers
        passed = layers.run(range(engine.model.num_segments), layers.embed(text), layers.new_cache(64))
        states = [tensor(rows)[0] for rows in passed]
    true = torch.cat(states[1:-1], -1).float()
    places = [int((true - deep.float()).abs().amax(1).argmin()) for deep in read]
    for place, deep in zip(places, read):
        torch.testing.assert_close(deep[0].float(), true[place], atol=2e-2, rtol=2e-2)
    assert places[0] == 1 and places == sorted(places) and len(set(places)) > 10


def test_the_exits_are_the_same_exits_with_a_drafter_and_without():
    engine = tiny_engine(**SHAPE)
    bank, memory = engine.bank, engine.exits.memory_bytes
    exits, drafter = bank.fingerprint(), bank.drafter_fingerprint()
    size = sum(p.nbytes for p in bank.drafter.parameters())
    assert drafter and engine.exits.context_bytes == 2 * 32 * 32 * 4
    bank.drafter = None
    without = Engine(engine.model, bank).exits
    assert bank.fingerprint() == exits and bank.drafter_fingerprint() is None
    assert without.memory_bytes == memory - size and without.context_bytes == 0


def test_its_context_is_counted_once_a_pass():
    engine = tiny_engine(dtype=torch.bfloat16, **SHAPE)
    plain = tiny_engine(dtype=torch.bfloat16, **SHAPE | {"drafter_width": 0})
    config = DecodeConfig(mode="verified", max_new_tokens=1, max_draft=1)
    read = [sum(e.weight_bytes for e in each.run([5, 6, 7], config).events) for each in (engine, plain)]
    assert read[0] - read[1] == engine.exits.context_bytes


@pytest.mark.parametrize("layers", [(2, 4), (0,)])
def test_it_needs_an_exit_before_the_first_layer_and_a_deeper_one(layers):
    with pytest.raises(ValueError, match="a drafter needs an exit before the first layer and a deeper one"):
        ExitBank.untrained(SegmentedModel(tiny_base(), layers), drafter_width=8)


def test_chains_in_training_are_those_of_decoding(tmp_path):
    """After `fold`, plain rows token by token give the same states; the context is that of the last confirmed token."""
    engine = tiny_engine(**SHAPE)
    store = tiny_store(engine, tmp_path, 8)
    drafter, rows = engine.bank.drafter, DraftRows([store[0], store[1]])
    weights = {name: value.clone() for name, value in drafter.state_dict().items()}
    with torch.no_grad():
        inputs = WhitenedDrafter(drafter, store, range(8))
        chain = inputs.chain(rows, 3)
        inputs.fold()
        for name, value in drafter.state_dict().items():
            torch.testing.assert_close(value, weights[name], atol=1e-3, rtol=1e-3, msg=f"fold changed {name}")
        for at in (3, 9, 25, 39):                                       # of two documents of 20 tokens each
            carried, context = rows.top[at - 3:at - 2], drafter.context(rows.deep[at - 3:at - 2])
            for own, place in enumerate(range(at - 2, at + 1)):
                carried = drafter(rows.h[place:place + 1], carried, context)
                torch.testing.assert_close(chain[own][place:place + 1], carried, atol=2e-3, rtol=2e-3)


def test_a_loaded_engine_keeps_its_drafter(tmp_path):
    engine = tiny_engine(**SHAPE)
    engine.bank.save(tmp_path)
    again = Engine(SegmentedModel(tiny_base(), SHAPE["layers"]), ExitBank.load(tmp_path))
    assert again.bank.drafter_fingerprint() == engine.bank.drafter_fingerprint()
