"""KeptRun: a run that the server keeps for the page, so that the page can ask for details later or continue the run."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Generic, TypeVar

from cascadeexit.config import DecodeConfig
from cascadeexit.events import Status, TokenEvent
from cascadeexit.inspection import Inspection
from cascadeexit.runner import Task
from cascadeexit.sides import CASCADE, FORKS, FULL, Side
from cascadeexit.stream import TokenStream

MAP_COLUMNS = 64            # most positions of the layer map in one answer
T = TypeVar("T")


@dataclass
class KeptRun:
    """A run that the server keeps for the page: its stream of records, and the inspections of its texts.

    A side is one of the texts of the run. A fork is a side that continues another side's text after one token was
    replaced. Arguments without a type annotation come from the browser and may be any JSON.

    Attributes:
        label: name of the run's model in the library.
        inspections: {name of a side: inspection of its whole text}. The text of a fork includes the part that it
            continues.
        checking: True while the texts are inspected. It stays True if the inspection did not end, for example because a
            visitor stopped it.
    """

    label: str
    tokenizer: object
    stream: TokenStream
    inspections: dict[str, Inspection] = field(default_factory=dict)
    checking: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def id(self) -> str:
        return self.stream.run

    @contextmanager
    def growing(self, wait: float = 0.0) -> Iterator[None]:
        """Lock the run while text is added to it, for a `with` block.

        Raises ValueError if other code still holds the lock after `wait` seconds.
        """
        if not self._lock.acquire(timeout=wait):
            raise ValueError("The texts of this run are still growing. Wait for their end, or press Stop.")
        try:
            yield
        finally:
            self._lock.release()

    def unchecked(self) -> dict[str, Task]:
        """Return the tasks that inspect the texts of this run: {name of the side: task}. They decode nothing.

        There is a task for each text that was decoded with exits, has a final token, and was not inspected yet. Returns
        {} if an inspection was started and did not end, for example because a visitor stopped it.
        """
        return {} if self.checking else {
            name: self._task(text.of or name, len(text.before), text.final)
            for name, text in self.stream.sides.items()
            if name != FULL and name not in self.inspections and text.final}

    def fork(self, side, at, token_id) -> tuple[Side, Task]:
        """Plan a fork: a new side that continues another side's text after one token was replaced.

        The fork has the settings of the side that it continues. If it continues the full model's text, it has those of
        the first side, and the token at `at` may stay as it is.

        Args:
            side: name of the side to continue.
            at: position of the token to replace.
            token_id: the token to put there.

        Returns the new side and the task that decodes it. The last event of the task is the token at `at`. Raises
        ValueError with the reason if this fork is not possible.
        """
        settings = CASCADE if side == FULL else side
        text = self.stream.sides[side] if isinstance(side, str) and settings in self.inspections else None
        if text is None or not (_whole(at) and _whole(token_id)) or not 0 <= at < len(text.ids):
            raise ValueError("There is no such token in a text of this run, or the texts were not checked yet.")
        number = sum(name in FORKS for name in self.stream.sides)
        if number == len(FORKS):
            raise ValueError(f"This run already has {number} forks. Run it again to make more.")
        if token_id in self.stream.eos_ids:
            raise ValueError("This token ends the text, so nothing can follow it.")
        left = text.start + text.side.config.max_new_tokens - at - 1
        if left < 1:
            raise ValueError("The text is as long as it may be. Choose a larger maximum length and run it again.")
        exits = self.stream.shape.num_exits
        chosen = TokenEvent(at, token_id, exits, (None,) * exits, Status.EMITTED, 0.0, 0)
        config = replace(self.stream.sides[settings].side.config, max_new_tokens=left)
        return (Side(FORKS[number], f"Fork {number + 1}, from token {at + 1}", config),
                self._task(side, at, [chosen], config))

    def _task(self, of: str, at: int, events: Sequence[TokenEvent], config: DecodeConfig | None = None) -> Task:
        """Return the task that decodes a text with `config` and then inspects it. None: the text is only inspected.

        A task inspects the text after its prompt. The beginning of a fork was inspected with the side that it
        continues, so it counts as prompt. The full model's text is never inspected, so a fork of it is inspected as a
        whole.

        Args:
            of: name of the side that a fork continues; for other texts, the side itself.
            at: position of the first of `events`; 0 if this is no fork.
            events: final events of the text from there on. In a fork, the first one is the token that the visitor
                chose.
        """
        text = self.stream.sides[of]
        if of == FULL:
            return Task(text.prompt_ids, config, [*text.final[:at], *events])
        return Task([*text.prompt_ids, *text.ids[:at]], config, events)

    def inspected(self, name: str, inspection: Inspection) -> None:
        """Keep the inspection of a side, and write the side's `end` record to the stream.

        inspection: the inspection of this side's final tokens. In a fork, these tokens begin with the one that the
            visitor chose. The inspection of earlier tokens is taken from the side that the fork continues, and the two
            are joined before they are kept. In a fork of the full model's text, `inspection` has the earlier tokens,
            too.
        """
        text, own = self.stream.sides[name], inspection
        if text.of == FULL:
            own = _sliced(inspection, len(text.before))
        elif text.before:
            inspection = _joined(_sliced(self.inspections[text.of], 0, len(text.before)), own)
        self.stream.end(name, own)
        self.inspections[name] = inspection

    def card(self, side, i) -> dict | None:
        """Return the likeliest tokens of each exit and of the full model at position i of a side's text.

        `Inspection.card` describes the dict. Returns None if the side was not inspected or has no such position.
        """
        found = self.inspections.get(side) if isinstance(side, str) else None
        if found is None or not _whole(i) or not 0 <= i < len(found.token_ids):
            return None
        return found.card(self.tokenizer, i)

    def map(self, side, start, count) -> dict | None:
        """Return the likeliest token of each exit and of the full model at each position in a part of a side's text.

        `Inspection.map` describes the dict. Returns None if the side was not inspected, or if its text
        ends before `start`.

        Args:
            side: name of the side.
            start: first position.
            count: number of positions. At most MAP_COLUMNS positions are returned.
        """
        found = self.inspections.get(side) if isinstance(side, str) else None
        if found is None or not (_whole(start) and _whole(count)) or start >= len(found.token_ids):
            return None
        return found.map(self.tokenizer, max(0, start), min(max(1, count), MAP_COLUMNS))


class Latest(Generic[T]):
    """Keeps the newest `most` objects that were added, and drops older ones. `get` finds an object by its `id`."""

    def __init__(self, most: int):
        self._most = most
        self._kept: OrderedDict[str, T] = OrderedDict()

    def add(self, thing: T) -> T:
        """Keep an object that has an attribute `id`, and return it."""
        self._kept[thing.id] = thing
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return thing

    def get(self, id) -> T | None:
        """Return the object with this id; None if it is not kept. The id may be any JSON."""
        return self._kept.get(id) if isinstance(id, str) else None


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sliced(inspection: Inspection, start: int, stop: int | None = None) -> Inspection:
    """Return the inspection of positions `start` to `stop` - 1; None: to the end."""
    return Inspection(*(getattr(inspection, f.name)[start:stop] for f in fields(Inspection)))


def _joined(before: Inspection, after: Inspection) -> Inspection:
    """Make one inspection of two that follow each other."""
    return Inspection(*(getattr(before, f.name) + getattr(after, f.name) for f in fields(Inspection)))
