"""Recordings give the results of the functions that were recorded. On a CPU a stand-in replaces CUDA graphs."""

import pytest
import torch

from cascadeexit.backends import graphs
from cascadeexit.backends.torch import recording
from cascadeexit.backends.torch.recording import Recorded
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.model import SegmentedModel
from tests.tiny_models import tiny_base, tiny_engine

PROMPT = [11, 3, 60, 22, 9, 41, 77, 30, 2]
CONFIGS = [DecodeConfig(max_new_tokens=40, **options) for options in (
    dict(mode="full"), dict(mode="full", temperature=0.9), dict(mode="cascade", thresholds=0.5),
    dict(mode="verified", thresholds=0.4, max_draft=3), dict(mode="verified"),
    dict(mode="cascade", thresholds=0.4, check_late=True))]


@pytest.fixture
def recorded(monkeypatch):
    """Recording as on CUDA: the same places are read and written each time. Lists the shapes that were recorded."""
    shapes = []

    def record(function, places):
        shapes.append([tuple(t.shape) for t in places])
        out = function(*places)
        return lambda: out.copy_(function(*places)), out

    monkeypatch.setattr(recording, "record", record)
    monkeypatch.setattr(graphs, "wanted", lambda device: True)
    return shapes


def engines(monkeypatch, **shape) -> tuple[Engine, Engine]:
    """Two engines of one model and its exits: without recordings, and with them."""
    with monkeypatch.context() as plain:
        plain.setattr(graphs, "wanted", lambda device: False)
        stock = tiny_engine(**shape)
    model = SegmentedModel(tiny_base("llama-untied"), stock.model.exit_layers)
    bank = ExitBank(stock.bank.config)
    bank.load_state_dict(stock.bank.state_dict())
    return stock, Engine(model, bank)


@pytest.mark.parametrize("shape", [{}, {"adapter": "carry", "confidence": "sketch", "sketch_size": 30, "head_size": 60,
                                        "head_sizes": (32, 32, 60)},
                                   {"adapter": "carry", "layers": (0, 2, 4)}], ids=["swiglu", "sketch", "first"])
def test_recorded_runs_write_the_same_text_as_others(recorded, monkeypatch, shape):
    stock, replayed = engines(monkeypatch, **shape)
    for config in CONFIGS:
        expected = stock.run(PROMPT, config)
        for _ in range(2):                                      # the second run takes over the cache of the first
            run = replayed.run(PROMPT, config)
            assert run.token_ids == expected.token_ids, config
            assert [(e.exit, e.checked) for e in run.events] == [(e.exit, e.checked) for e in expected.events], config
    assert recorded


def test_nothing_is_recorded_twice_and_caches_are_taken_over(recorded, monkeypatch):
    _, replayed = engines(monkeypatch)
    replayed.run(PROMPT, CONFIGS[3])
    before = len(recorded)
    replayed.run(PROMPT[:5], CONFIGS[3])
    assert len(recorded) == before > 0
    assert all(shape[0][-2] <= replayed.model.layers.row_multiple for shape in recorded)        # no prompt was recorded


def test_runs_that_take_turns_do_not_share_a_cache(recorded, monkeypatch):
    stock, replayed = engines(monkeypatch)
    prompts = [PROMPT, PROMPT[::-1]]
    expected = [stock.run(p, CONFIGS[0]).token_ids for p in prompts]
    turns = [replayed.generate(p, CONFIGS[0]) for p in prompts]
    for _ in range(2):
        got = [[], []]
        while any([(event := next(turn, None)) and tokens.append(event.token_id) is None
                   for turn, tokens in zip(turns, got)]):
            pass
        assert got == expected
        turns = [replayed.generate(p, CONFIGS[0]) for p in prompts]


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    def refuse(function, places):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recording, "record", refuse)
    double = Recorded(lambda x: 2 * x, rows=4)
    assert torch.equal(double(torch.ones(1, 3)), torch.full((1, 3), 2.0))
    assert torch.equal(double(torch.ones(1, 3)), torch.full((1, 3), 2.0))
    assert caplog.text.count("not permitted") == 1


def test_recordings_can_be_refused(monkeypatch):
    assert graphs.wanted(torch.device("cuda")) and not graphs.wanted(torch.device("cpu"))
    monkeypatch.setenv("CASCADEEXIT_GRAPHS", "0")
    assert not graphs.wanted(torch.device("cuda"))


def test_a_recording_that_finds_no_memory_is_tried_again_with_the_next_call(monkeypatch):
    tries = []

    def record(function, places):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None, function(*places)

    monkeypatch.setattr(recording, "record", record)
    double = Recorded(lambda x: 2 * x, rows=4)
    for _ in range(3):
        assert torch.equal(double(torch.ones(1, 3)), torch.full((1, 3), 2.0))
    assert len(tries) == 2


def test_idle_caches_make_room_for_one_of_another_size(recorded, monkeypatch):
    _, replayed = engines(monkeypatch)
    layers = replayed.model.layers
    layers.release(layers.new_cache(64))
    made = type(layers)._made

    def scarce(self, capacity, batch):
        if self._idle_caches:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(self, capacity, batch)

    monkeypatch.setattr(type(layers), "_made", scarce)
    cache = layers.new_cache(4096)
    assert cache.capacity >= 4096 and not layers._idle_caches
    layers.release(cache)
    monkeypatch.setattr(type(layers), "_made", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    layers._idle_caches.clear()
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        layers.new_cache(64)
