"""Spread: measures how much the speed-up of a run varies from one short repeat of the run to the next."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from cascadeexit.events import TokenEvent
from cascadeexit.metrics import tokens_per_second
from cascadeexit.runner import Runner, Task
from cascadeexit.sides import CASCADE, FULL

REPEATS, TOKENS = 3, 64         # tokens of each repeat, at most: a few seconds for all of them on a CPU


def speedups(runner: Runner, label: str, tasks: Mapping[str, Task]) -> Iterator[float | None]:
    """Decode two texts of a run again in a race, `REPEATS` times, with at most `TOKENS` tokens each.

    The texts are the sides `CASCADE` and `FULL`. Yields the speed-up in each repeat: the speed of `CASCADE` divided by
    the speed of `FULL`. Before each speed-up, None is yielded several times, so that the caller can stop in the middle
    of a repeat. A repeat in which a text has fewer than two tokens gives no speed-up.

    Args:
        label: name of the model in the runner's library.
        tasks: the tasks of `CASCADE` and `FULL`, {name of the side: its task}.

    Raises ValueError and RunFailed as `Runner.race` does.
    """
    short = {name: replace(task, config=replace(task.config, max_new_tokens=min(TOKENS, task.config.max_new_tokens)))
             for name, task in tasks.items()}
    for _ in range(REPEATS):
        final: dict[str, list[TokenEvent]] = {CASCADE: [], FULL: []}
        batches = runner.race(label, short)
        try:
            for batch in batches:
                for side, event in batch.events:
                    if event.final:
                        final[side].append(event)
                yield None
        finally:
            batches.close()
        ours, theirs = (tokens_per_second(final[side]) for side in (CASCADE, FULL))
        if ours and theirs:
            yield ours / theirs
