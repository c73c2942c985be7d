"""Spread: short repeats of a run show how much its speed varies."""

import pytest

from cascadeexit import record
from cascadeexit.config import DecodeConfig
from cascadeexit.library import Library
from cascadeexit.page import GONE, Page
from cascadeexit.runner import Runner, Task
from cascadeexit.settings import Settings
from cascadeexit.sides import CASCADE, FULL
from cascadeexit.spread import REPEATS, TOKENS, speedups
from cascadeexit.wire import expand
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer

LABEL = "llama-untied"
SETTINGS = Settings(model=LABEL, prompt="sky", thresholds=(0.6,) * 3, max_new_tokens=20)


@pytest.fixture(scope="module")
def runner():
    return Runner(Library.of(tiny_engine(seed=39), tiny_tokenizer()))


def test_each_repeat_is_short_and_gives_a_speed_up(runner, monkeypatch):
    asked, race = [], runner.race

    def watched(label, tasks):
        asked.append({name: task.config.max_new_tokens for name, task in tasks.items()})
        return race(label, tasks)
    monkeypatch.setattr(runner, "race", watched)
    tasks = {CASCADE: Task([5, 6, 7], DecodeConfig(max_new_tokens=200)),
             FULL: Task([5, 6, 7], DecodeConfig(mode="full", max_new_tokens=40))}
    moments = list(speedups(runner, LABEL, tasks))
    found = [speedup for speedup in moments if speedup is not None]
    assert len(found) == REPEATS >= 3 and all(speedup > 0 for speedup in found)
    assert asked == [{CASCADE: TOKENS, FULL: 40}] * REPEATS
    assert moments[0] is None, "a caller may stop before the first repeat is over"


def test_a_text_that_ends_at_once_gives_no_speed_up(runner):
    tasks = {name: Task([5, 6, 7], DecodeConfig(mode=mode, max_new_tokens=1)) for name, mode in
             ((CASCADE, "cascade"), (FULL, "full"))}
    assert [speedup for speedup in speedups(runner, LABEL, tasks) if speedup is not None] == []


def test_the_page_writes_the_spread_to_the_run_that_it_keeps(runner):
    page = Page(runner)
    last = [frame.stream for frame in page.respond(SETTINGS) if frame.stream][-1]
    run = expand(last.splitlines()[1])["run"]
    frames = [frame for frame in page.measure(run) if frame.stream]
    assert all(frame.stream.startswith(last) for frame in frames), "the run only grows"
    found = expand(frames[-1].stream.splitlines()[-1])
    assert found["type"] == "spread" and found["side"] == CASCADE and len(found["speedups"]) == REPEATS
    assert '"spread"' in record.load(record.dump(frames[-1].stream)), "and a saved run keeps it"


def test_a_run_that_is_gone_gets_a_message(runner):
    for run in ("", "0123456789ab", None, 5, ["x"]):
        frames = list(Page(runner).measure(run))
        assert frames[-1].notice.message == GONE and '"error"' in frames[-1].stream


def test_a_record_with_a_spread_of_other_things_is_refused(runner):
    page = Page(runner)
    last = [frame.stream for frame in page.respond(SETTINGS) if frame.stream][-1]
    for value in ('["a"]', "[null]", "[true]", "[[1]]"):
        line = f'{{"type":"spread","side":"cascade","speedups":{value},"tokens":64}}\n'
        with pytest.raises(ValueError, match="speedups should be"):
            record.load(record.dump(last + line))
