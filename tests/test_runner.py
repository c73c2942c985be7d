"""The runner: one way to run a model for page, evaluation and endpoints, here or in a worker process."""

import gc
import math
import pickle
import weakref

import pytest
import torch

from cascadeexit import runner as module
from cascadeexit.config import DecodeConfig
from cascadeexit.inspection import inspect
from cascadeexit.library import Library
from cascadeexit.page import Page
from cascadeexit.race import race
from cascadeexit.runner import Batch, RunFailed, Runner, events_of
from cascadeexit.settings import Settings
from cascadeexit.stream import CASCADE, FULL
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer

IDS = [5, 6, 7]
OURS, THEIRS = DecodeConfig(thresholds=0.5, max_new_tokens=40), DecodeConfig(mode="full", max_new_tokens=40)


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(seed=3)


@pytest.fixture
def runner(engine):
    return Runner(Library.of(engine, tiny_tokenizer()))


def raced(runner, *args, **options) -> list[Batch]:
    return list(runner.race("llama-untied", IDS, *args, **options))


def tokens(batches: list[Batch], side: str) -> list[int]:
    return [e.token_id for batch in batches for name, e in batch.events if name == side and e.final]


def test_both_sides_write_what_they_write_alone(runner, engine):
    batches = raced(runner, OURS, THEIRS)
    for side, config in ((CASCADE, OURS), (FULL, THEIRS)):
        assert tokens(batches, side) == engine.run(IDS, config).token_ids


def test_the_last_batch_has_what_was_read_after_the_race(runner, engine):
    run = engine.run(IDS, OURS)
    choices = engine.full_choices(IDS, run.token_ids)
    *events, last = raced(runner, OURS, THEIRS)
    assert last == Batch(choices=choices) and all(batch.choices is None for batch in events)
    assert raced(runner, OURS, THEIRS, inspected=True)[-1] == Batch(choices=choices,
                                                                    inspection=inspect(engine, IDS, run.events))
    sampled = [DecodeConfig(mode=c.mode, max_new_tokens=9, temperature=0.8) for c in (OURS, THEIRS)]
    assert raced(runner, *sampled)[-1] == raced(runner, OURS)[-1] == Batch(), "nothing to compare with"


def test_one_batch_says_that_the_race_is_over(runner):
    batches = runner.race("llama-untied", IDS, OURS, THEIRS, inspected=True)
    events = list(events_of(batches))
    assert sum(event.final for _, event in events) == 80
    assert next(batches).inspection is not None and next(batches, None) is None


def test_all_that_passes_between_processes_is_plain(runner):
    def plain(value) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (bool, int, float, str))

    assert pickle.loads(pickle.dumps((OURS, THEIRS))) == (OURS, THEIRS)
    batches = raced(runner, DecodeConfig(mode="verified", max_new_tokens=20), THEIRS, inspected=True)
    assert pickle.loads(pickle.dumps(batches)) == batches
    for batch in batches:
        for side, event in batch.events:
            assert plain((side, [getattr(event, name) for name in event.__slots__]))
    assert plain(list(vars(batches[-1].inspection).values())) and plain(batches[-1].choices)


def test_a_run_that_cannot_work_is_refused_before_any_worker_starts(engine):
    runner = Runner(Library.of(engine, tiny_tokenizer()), lambda compute, seconds: pytest.fail)
    for ids, config in (([], OURS), ([5], DecodeConfig(max_new_tokens=100_000)), ([97], OURS)):
        with pytest.raises(ValueError):
            runner.race("llama-untied", ids, config, THEIRS)


def test_closing_a_race_closes_both_runs(runner, engine, monkeypatch):
    closed = []
    generate = engine.generate

    def watched(ids, config):
        try:
            yield from generate(ids, config)
        finally:
            closed.append(config.mode)
    monkeypatch.setattr(engine, "generate", watched)
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.0)
    kept = []                   # kept alive, so that garbage collection cannot close what was forgotten
    monkeypatch.setattr(module, "race", lambda sides: kept.append(race(sides)) or kept[-1])
    batches = runner.race("llama-untied", IDS, OURS, THEIRS)
    next(batches), next(batches), next(batches)
    batches.close()
    assert sorted(closed) == ["cascade", "full"]


def test_the_time_to_ask_for_follows_the_length_and_the_measured_speed(runner):
    def seconds(tokens: int, *rest) -> int:
        return runner.seconds("llama-untied", IDS, DecodeConfig(max_new_tokens=tokens), *rest)

    assert module.START_SECONDS < seconds(10) < seconds(1000) < seconds(1000, THEIRS)
    batches = raced(runner, OURS, THEIRS)
    clocks = {side: event.seconds for batch in batches for side, event in batch.events}
    measured = sum(clocks.values()) / 80                            # by the engine's clock, for each token
    assert seconds(1000) == math.ceil(module.START_SECONDS + module.MARGIN * 1000 * measured)


# -- out of memory ---------------------------------------------------------------------------------------------------

@pytest.fixture
def scarce(engine, monkeypatch):
    """A device with memory for one cache: lists weak references to caches while the others cannot be allocated."""
    made, new_cache = [], engine.model.layers.new_cache

    def allocate(capacity: int, batch: int = 1):
        if sum(cache() is not None for cache in made):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        cache = new_cache(capacity, batch)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(engine.model.layers, "new_cache", allocate)
    return made


def test_a_run_without_enough_memory_ends_frees_it_and_the_next_one_works(runner, engine, scarce, caplog):
    gc.collect()
    with pytest.raises(RunFailed, match="too little free memory .* shorter text") as failed:
        raced(runner, OURS, THEIRS)                                     # both sides at once need two caches
    assert failed.value.title == "Out of memory" and "2.00 GiB" in caplog.text
    assert len(scarce) == 1 and scarce[0]() is None, "the cache of the side that had one is free again"
    assert tokens(raced(runner, OURS), CASCADE), "one side alone has room"


def test_a_visitor_reads_that_memory_is_short_and_can_run_again(engine, runner, scarce):
    page, short = Page(runner), Settings(model="llama-untied", prompt="hello", chat=False, max_new_tokens=8,
                                           thresholds=(0.5, 0.5, 0.5))
    frames = list(page.respond(short))
    assert [f.notice.title for f in frames if f.notice] == ["Out of memory"]
    assert "too little free memory" in frames[-1].stream
    scarce.clear()
    engine.model.layers.new_cache = type(engine.model.layers).new_cache.__get__(engine.model.layers)
    assert not [f.notice for f in page.respond(short) if f.notice]
