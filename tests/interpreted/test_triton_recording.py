"""Recorded passes say what passes kernel by kernel say, with one launch and one synchronisation for each exit asked.

A CPU records nothing: a stand-in keeps the rules of memory of a CUDA graph. Its kernels read and write the same tensors
each time, and what it returned is overwritten by the next replay.
"""

import gc
import itertools
import weakref
from collections import Counter

import pytest
import torch

from cascadeexit import backends
from cascadeexit.backends.gpu import layers, recording
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ADAPTERS, CarryAdapter, ExitBank
from cascadeexit.inspection import inspect
from cascadeexit.model import SegmentedModel
from tests.interpreted.models import FAMILIES_TO_DECODE, Interpreted, engines
from tests.tiny_models import base_of

PROMPT = [11, 3, 60, 22, 9, 41]
SKETCH = dict(adapter="carry", confidence="sketch", sketch_size=40, drafter_width=8)


def tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for part in tree or () for tensor in tensors(part)]


@pytest.fixture(scope="module")
def recorder():
    """Record by a stand-in; counts the replays of each recording, by its number."""
    count, made = Counter(), []

    def capture(work, pool):
        out, number = work(), len(made)
        made.append(out)

        def replay():
            count[number] += 1
            for place, new in zip(tensors(out), tensors(work())):
                place.copy_(new)

        return replay, out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "capture", capture)
        patch.setattr(layers, "wanted", lambda device: True)
        yield count


@pytest.fixture
def replays(recorder):
    recorder.clear()
    return recorder


def recorded_engine(plain: Engine) -> Engine:
    base = base_of(FAMILIES_TO_DECODE["llama"], std=0.25)
    model = SegmentedModel(base, plain.model.exit_layers, backend=Interpreted)
    bank = ExitBank(plain.bank.config)
    bank.load_state_dict(plain.bank.state_dict())
    return Engine(model, bank)


@pytest.fixture(params=[pytest.param(dict(confidence="mlp"), marks=pytest.mark.slow), SKETCH],
                ids=["published", "sketch"], scope="module")
def pair(request, recorder):
    """Two engines of one model and its exits: without recordings, and with them."""
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(layers, "wanted", lambda device: False)
        stock, _ = engines("llama", **request.param)
    return stock, recorded_engine(stock)


def test_recorded_runs_say_what_others_say(pair, replays):
    stock, replayed = pair
    for options in (dict(mode="full"), dict(mode="cascade", thresholds=0.5), dict(mode="cascade", thresholds=0.9),
                    dict(mode="verified", thresholds=0.4, max_draft=3), dict(mode="verified")):
        config = DecodeConfig(max_new_tokens=5, ignore_eos=True, **options)
        expected, run = stock.run(PROMPT, config), replayed.run(PROMPT, config)
        assert run.token_ids == expected.token_ids, config
        assert [e.confidences for e in run.events] == [e.confidences for e in expected.events], config
    assert replays


class Own(CarryAdapter):
    """A kind of adapter that the kernels do not know."""


def test_an_adapter_of_another_kind_runs_with_and_without_recordings(replays, monkeypatch):
    monkeypatch.setitem(ADAPTERS, "own", Own)
    with monkeypatch.context() as plain:
        plain.setattr(layers, "wanted", lambda device: False)
        stock, torchs = engines("llama", **SKETCH | dict(adapter="own"))
    replayed = recorded_engine(stock)
    for options in (dict(mode="cascade", thresholds=0.0), dict(mode="verified", thresholds=0.0, max_draft=3)):
        config = DecodeConfig(max_new_tokens=5, ignore_eos=True, **options)
        expected, run = stock.run(PROMPT, config), replayed.run(PROMPT, config)
        assert run.token_ids == expected.token_ids, config
        assert [e.confidences for e in run.events] == [e.confidences for e in expected.events], config
    seen, wanted = (inspect(engine, PROMPT, run.events).confidences for engine in (replayed, torchs))
    torch.testing.assert_close(seen, wanted, atol=0.03, rtol=0.03)
    assert replays


def test_an_exit_is_one_launch_and_one_synchronisation(pair, replays, monkeypatch):
    _, replayed = pair
    config = DecodeConfig(thresholds=0.0, max_new_tokens=6, ignore_eos=True)
    synchronised = []
    originals = {name: getattr(torch.Tensor, name) for name in ("tolist", "item", "__float__", "__int__", "__bool__")}
    for name in originals:
        def counted(self, *args, name=name):
            synchronised.append((name, tuple(self.shape), self.dtype))
            return originals[name](self, *args)
        monkeypatch.setattr(torch.Tensor, name, counted)
    events = iter(replayed.generate(PROMPT, config))
    next(events)
    replays.clear()
    synchronised.clear()
    assert [event.exit for event in events] == [0] * 5, "the first exit takes every token"
    assert replays.total() == 5 and len(replays) == 1
    # Places and n-gram copies are made on the CPU; only answers (float64) come from the device.
    assert [shape for _, shape, dtype in synchronised if dtype == torch.float64] == [(2,)] * 5


def test_the_full_model_is_one_launch_for_each_token(pair, replays):
    """With its norm, its head and the choice, whether one row is asked for or a tree of drafts."""
    _, replayed = pair
    for mode in ("full", "verified"):
        events = iter(replayed.generate(PROMPT, DecodeConfig(mode=mode, max_new_tokens=5, ignore_eos=True)))
        first = next(events)
        replays.clear()
        list(events)
        drafts = replays.pop(len(replayed.model.layers.passes.recorder._recordings) - 1, 0)
        assert len(replays) == 1, "always the same recording"
        assert replays.total() == 4 if mode == "full" else replays.total() <= 5 - (first.status == "emitted")
        assert (drafts > 0) == (mode == "verified")


def test_late_checks_need_no_launch_of_their_own(pair, replays, monkeypatch):
    """Every second token exits first; the full model's pass for the next one also checks it, with the same text."""
    _, replayed = pair
    runs, launches = [], []
    for check_late in (False, True):
        asked = itertools.count()
        monkeypatch.setattr(replayed.exits, "confidence", lambda *_, asked=asked: [float(next(asked) % 2 == 0)])
        replays.clear()
        runs.append(replayed.run(PROMPT, DecodeConfig(max_new_tokens=4, ignore_eos=True, check_late=check_late,
                                                      thresholds=(0.5, *[None] * (replayed.num_exits - 1)))))
        launches.append(+replays)
    plain, late = runs
    assert late.token_ids == plain.token_ids and launches[0] == launches[1]
    choices = replayed.full_choices(PROMPT, late.token_ids)
    assert [list(event.checked) for event in late.events] == [[], choices[:1], [], choices[2:3]]
    assert [event.weight_bytes for event in late.events] == [event.weight_bytes for event in plain.events]


@torch.inference_mode()
def test_catch_up_of_many_rows_is_recorded_passes_of_16_rows(pair, replays):
    """The last of them includes the head, unless more rows are asked for than it has."""
    text, seen = list(range(2, 42)), []
    for engine in pair:
        stack, head = engine.model.layers, engine.exits.full_head
        cache, choices = stack.new_cache(64), []
        waiting = stack.join([stack.run(range(2), stack.embed(text[a:a + 16]), cache)[-1] for a in (0, 16, 32)])
        stack.tensor(waiting)
        for asked in (1, 12):
            replays.clear()
            top, = stack.run(range(2, 3), waiting, cache)
            choices += head.argmax(stack.norm(top[:, -asked:]))
            count = replays.copy()
            cache.lengths[-1] = 0
            seen.append((choices[:], stack.tensor(top), cache.keys.clone(), cache.values.clone(), count))
    plain, recorded = seen[:2], seen[2:]
    for expected, found in zip(plain, recorded):
        assert found[0] == expected[0] and all(map(torch.equal, found[1:4], expected[1:4]))
        assert found[4].total() == 3 and not expected[4]
    assert [len(found[4]) for found in recorded] == [2, 1], "the recording with the head, and the one without"


def test_every_recording_is_made_at_load(pair, replays):
    _, replayed = pair
    names = set(replayed.model.layers.passes.recorder._recordings)
    for prompt in (PROMPT, PROMPT * 4):
        replayed.run(prompt, DecodeConfig(thresholds=0.5, max_new_tokens=4))
    assert set(replayed.model.layers.passes.recorder._recordings) == names


def test_runs_that_take_turns_have_caches_of_their_own(pair):
    stock, replayed = pair
    prompts, config = [PROMPT, PROMPT[::-1]], DecodeConfig(thresholds=0.5, max_new_tokens=4, ignore_eos=True)
    expected = [stock.run(prompt, config).token_ids for prompt in prompts]
    turns, got = [replayed.generate(prompt, config) for prompt in prompts], [[], []]
    for events in zip(*turns):
        for tokens, event in zip(got, events):
            tokens.append(event.token_id)
    assert got == expected


def test_an_opening_is_copied_after_it_was_read(pair):
    stock, replayed = pair
    replayed.read_opening(PROMPT[:4])
    config = DecodeConfig(mode="full", max_new_tokens=3, ignore_eos=True)
    assert replayed.run(PROMPT, config).token_ids == stock.run(PROMPT, config).token_ids


def test_a_cache_outlives_the_pass_that_waits_to_write_it(pair):
    """A run may be dropped at any time; a pass of it that ran later would write into another run's memory."""
    layers = pair[1].model.layers
    cache = layers.new_cache(16)
    layers.run(range(1, 3), layers.embed(PROMPT), cache)
    alive = weakref.ref(cache)
    del cache
    assert alive() is not None
    layers.settle()
    gc.collect()
    assert alive() is None


def refuse(work, pool):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_model_whose_passes_cannot_be_recorded_runs_on_torch(monkeypatch, caplog):
    monkeypatch.setattr(recording, "capture", refuse)
    monkeypatch.setattr(layers, "wanted", lambda device: True)
    monkeypatch.setattr(backends, "BACKENDS", {"gpu": Interpreted, "torch": backends.BACKENDS["torch"]})
    model = SegmentedModel(base_of(FAMILIES_TO_DECODE["llama"]), (1,))
    assert model.backend.name == "torch"
    assert caplog.text.count("The backend 'interpreted' cannot be used: CUDA graphs cannot be recorded here") == 1


def test_exits_that_cannot_be_recorded_run_kernel_by_kernel(replays, monkeypatch, caplog):
    with monkeypatch.context() as plain:
        plain.setattr(layers, "wanted", lambda device: False)
        stock, _ = engines("llama", **SKETCH)
    model = SegmentedModel(base_of(FAMILIES_TO_DECODE["llama"], std=0.25), (0, 1), backend=Interpreted)
    bank = ExitBank(stock.bank.config)
    bank.load_state_dict(stock.bank.state_dict())
    monkeypatch.setattr(recording, "capture", refuse)
    engine, config = Engine(model, bank), DecodeConfig(thresholds=0.5, max_new_tokens=3, ignore_eos=True)
    assert engine.run(PROMPT, config).token_ids == stock.run(PROMPT, config).token_ids
    assert not replays and caplog.text.count("not permitted") == 1
