"""The side that has used less engine time goes next, and stopping a race closes both sides."""

from cascadeexit.config import DecodeConfig
from cascadeexit.events import Status, TokenEvent
from cascadeexit.race import race
from tests.tiny_models import tiny_engine


def side(step: float, count: int):
    for i in range(count):
        yield TokenEvent(i, 0, 0, (), Status.EMITTED, (i + 1) * step, 0)


def test_the_side_with_less_engine_time_goes_next():
    order = [(name, e.index) for name, e in race({"fast": side(1, 6), "slow": side(3, 2)})]
    assert order == [("fast", 0), ("slow", 0), ("fast", 1), ("fast", 2), ("fast", 3), ("slow", 1), ("fast", 4),
                     ("fast", 5)]


def test_both_sides_write_what_they_write_alone():
    engine = tiny_engine()
    configs = {mode: DecodeConfig(mode=mode, max_new_tokens=20, thresholds=0.4) for mode in ("cascade", "full")}
    alone = {mode: engine.run([5, 6], config).token_ids for mode, config in configs.items()}
    raced = {mode: [] for mode in configs}
    for mode, event in race({mode: engine.generate([5, 6], config) for mode, config in configs.items()}):
        raced[mode].append(event.token_id)
    assert raced == alone


def test_stopping_a_race_closes_both_sides():
    closed = []

    def watched(name):
        try:
            yield from side(1, 100)
        finally:
            closed.append(name)

    running = race({name: watched(name) for name in "ab"})
    next(running), next(running)
    running.close()
    assert sorted(closed) == ["a", "b"]
