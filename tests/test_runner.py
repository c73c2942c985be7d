"""The runner: one way to run a model for page, evaluation and endpoints, here or in a worker process."""

import gc
import math
import pickle
import weakref
from dataclasses import replace

import pytest
import torch

from cascadeexit import runner as module
from cascadeexit.config import DecodeConfig
from cascadeexit.inspection import inspect
from cascadeexit.library import Library
from cascadeexit.page import Page
from cascadeexit.race import race
from cascadeexit.runner import Batch, Check, RunFailed, Runner, Task, events_of
from cascadeexit.settings import Settings
from cascadeexit.sides import CASCADE, FULL, SECOND
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


def tasks_of(ours: DecodeConfig, theirs: DecodeConfig | None = None, ids=IDS) -> dict[str, Task]:
    return {CASCADE: Task(ids, ours)} | ({FULL: Task(ids, theirs)} if theirs else {})


def raced(runner, ours: DecodeConfig, theirs: DecodeConfig | None = None, check=Check.NOTHING) -> list[Batch]:
    return list(runner.race("llama-untied", tasks_of(ours, theirs), check))


def tokens(batches: list[Batch], side: str) -> list[int]:
    return [e.token_id for batch in batches for name, e in batch.events if name == side and e.final]


def test_both_sides_write_what_they_write_alone(runner, engine):
    batches = raced(runner, OURS, THEIRS)
    for side, config in ((CASCADE, OURS), (FULL, THEIRS)):
        assert tokens(batches, side) == engine.run(IDS, config).token_ids


def test_the_last_batch_has_what_was_read_after_the_race(runner, engine):
    run = engine.run(IDS, OURS)
    choices = {CASCADE: engine.full_choices(IDS, run.token_ids)}
    *events, last = raced(runner, OURS, THEIRS, Check.CHOICES)
    assert last == Batch(choices=choices) and not any(batch.choices for batch in events)
    last = raced(runner, OURS, THEIRS, Check.INSPECTION)[-1]
    assert last == Batch(choices=choices, inspections={CASCADE: inspect(engine, IDS, run.events)})
    assert raced(runner, OURS, THEIRS)[-1].over, "nothing is read that was not asked for"


def test_three_sides_race_and_each_text_with_exits_is_checked(runner, engine):
    exact = DecodeConfig(mode="verified", max_new_tokens=40)
    tasks = tasks_of(OURS, THEIRS) | {SECOND: Task(IDS, exact)}
    batches = list(runner.race("llama-untied", tasks, Check.INSPECTION))
    for side, config in ((CASCADE, OURS), (SECOND, exact), (FULL, THEIRS)):
        assert tokens(batches, side) == engine.run(IDS, config).token_ids
    assert {*batches[-1].inspections} == {CASCADE, SECOND}
    assert batches[-1].inspections[SECOND].full_choices == tokens(batches, FULL)


def test_what_was_written_before_is_continued_or_only_checked(runner, engine):
    run = engine.run(IDS, OURS)
    begun = [e for e in run.events if e.final][:5]
    ids = [e.token_id for e in begun]
    task = Task(IDS, DecodeConfig(thresholds=0.5, max_new_tokens=7), begun)
    batches = list(runner.race("llama-untied", {CASCADE: task}, Check.INSPECTION))
    assert tokens(batches, CASCADE) == engine.run([*IDS, *ids], task.config).token_ids
    assert len(batches[-1].inspections[CASCADE].token_ids) == 5 + 7
    *others, last = runner.race("llama-untied", {CASCADE: Task(IDS, events=begun)}, Check.INSPECTION)
    assert last.inspections == {CASCADE: inspect(engine, IDS, begun)} and not any(batch.events for batch in others)


def test_one_batch_says_that_the_race_is_over(runner, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 1e9)
    batches = runner.race("llama-untied", tasks_of(OURS, THEIRS), Check.INSPECTION)
    events = list(events_of(batches))
    assert sum(event.final for _, event in events) == 80
    assert next(batches).inspections and next(batches, None) is None


def test_the_check_of_long_texts_reports_progress(runner, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.0)
    long = DecodeConfig(thresholds=0.5, max_new_tokens=200)
    batches = runner.race("llama-untied", {CASCADE: Task(IDS, long), SECOND: Task(IDS, long)}, Check.INSPECTION)
    list(events_of(batches))
    *progress, last = batches
    shares = [batch.progress for batch in progress]
    assert len(shares) > 2 and shares == sorted(shares) and shares[-1] == 1 and {*last.inspections} == {CASCADE, SECOND}


def test_all_that_passes_between_processes_is_plain(runner):
    def plain(value) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (bool, int, float, str))

    tasks = tasks_of(OURS, THEIRS)
    assert pickle.loads(pickle.dumps((tasks, Check.CHOICES))) == (tasks, Check.CHOICES)
    batches = raced(runner, DecodeConfig(mode="verified", max_new_tokens=20), THEIRS, Check.INSPECTION)
    assert pickle.loads(pickle.dumps(batches)) == batches
    for batch in batches:
        for side, event in batch.events:
            assert plain((side, [getattr(event, name) for name in event.__slots__]))
    assert plain(list(vars(batches[-1].inspections[CASCADE]).values())) and plain(batches[-1].choices[CASCADE])


def test_a_run_that_cannot_work_is_refused_before_any_worker_starts(engine):
    runner = Runner(Library.of(engine, tiny_tokenizer()), lambda compute, seconds: pytest.fail)
    for ids, config in (([], OURS), ([5], DecodeConfig(max_new_tokens=100_000)), ([97], OURS)):
        with pytest.raises(ValueError):
            runner.race("llama-untied", tasks_of(config, THEIRS, ids))


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
    batches = runner.race("llama-untied", tasks_of(OURS, THEIRS))
    next(batches), next(batches), next(batches)
    batches.close()
    assert sorted(closed) == ["cascade", "full"]


def test_the_time_to_ask_for_follows_the_length_and_the_measured_speed(runner):
    def seconds(tokens: int, theirs=None) -> int:
        return runner.seconds("llama-untied", tasks_of(DecodeConfig(max_new_tokens=tokens), theirs))

    assert module.START_SECONDS < seconds(10) < seconds(1000) < seconds(1000, THEIRS)
    batches = raced(runner, OURS, THEIRS)
    clocks = {side: event.seconds for batch in batches for side, event in batch.events}
    measured = sum(clocks.values()) / 80                            # by the engine's clock, for each token
    assert seconds(1000) == math.ceil(module.START_SECONDS + module.MARGIN * 1000 * measured)


# -- turns ----------------------------------------------------------------------------------------------------------

def test_races_take_turns_in_the_order_in_which_they_began(runner):
    first, second, third = (runner.race("llama-untied", tasks_of(OURS)) for _ in range(3))
    assert next(first).events
    assert next(second) == next(third) == next(second) == Batch(), "they wait"
    first.close()
    assert next(third) == Batch(), "the second race is before it"
    assert tokens(list(second), CASCADE) == tokens(list(third), CASCADE)


def test_a_race_that_gives_up_waiting_leaves_the_queue(runner):
    first, second, third = (runner.race("llama-untied", tasks_of(OURS)) for _ in range(3))
    next(first), next(second), next(third)
    second.close()
    first.close()
    assert next(third).events


def test_a_race_that_breaks_off_ends_its_turn(runner, engine, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(engine, "generate", lambda ids, config: (1 / 0 for _ in range(1)))
        list(runner.race("llama-untied", tasks_of(OURS)))
    assert next(runner.race("llama-untied", tasks_of(OURS))).events


def test_races_with_a_gpu_each_run_at_the_same_time(engine):
    runner = Runner(Library.of(engine, tiny_tokenizer()), at_once=2)
    first, second, third = (runner.race("llama-untied", tasks_of(OURS)) for _ in range(3))
    assert next(first).events and next(second).events and next(third) == Batch()


def test_a_model_is_loaded_between_two_races(runner, monkeypatch):
    running = runner.race("llama-untied", tasks_of(OURS))
    next(running)
    assert list(runner.load("llama-untied")) == [], "it is in memory"
    monkeypatch.setattr(runner.library, "ready", lambda label: False)
    monkeypatch.setattr(runner.library, "load", lambda label: iter(["loading"]))
    loading = runner.load("llama-untied")
    assert next(loading).startswith("Waiting")
    running.close()
    assert list(loading) == ["loading"]


def test_scores_are_the_full_models_probabilities(runner, engine):
    run = engine.run(IDS, OURS)
    inspection = inspect(engine, IDS, run.events)
    task = Task(IDS, events=run.events)
    *_, last = runner.race("llama-untied", {CASCADE: task}, Check.SCORES)
    scores = last.scores[CASCADE]
    assert [math.exp(p) for p in scores.logprobs] == pytest.approx([row[-1] for row in inspection.written], rel=1e-4)
    assert [ids[:5] for ids in scores.top_ids] == [row[-1] for row in inspection.token_ids]
    *_, last = runner.race("llama-untied", {CASCADE: replace(task, whole=True)}, Check.SCORES)
    assert last.scores[CASCADE].logprobs[len(IDS) - 1:] == pytest.approx(scores.logprobs, abs=1e-5)
    assert len(last.scores[CASCADE].logprobs) == len(IDS) - 1 + 40
    assert pickle.loads(pickle.dumps(last)) == last


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
