"""KeptRun: a run that the page keeps, so that it can ask for its cards, maps and charts, and continue it."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Generic, TypeVar

from cascadeexit.events import Status, TokenEvent
from cascadeexit.inspection import Inspection
from cascadeexit.runner import Task
from cascadeexit.sides import FORKS, FULL, Side
from cascadeexit.stream import TokenStream

MAP_COLUMNS = 64            # most positions of the layer map in one answer
T = TypeVar("T")


@dataclass
class KeptRun:
    """A run with all that the page knows about it. Methods whose arguments have no types accept any JSON.

    Attributes:
        label: the model's, in the library.
        inspections: of each side's whole text, by name; a fork's begins with the text that it continues.
        checking: True while texts are inspected; it stays True where a visitor stopped that.
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
        """Hold the run while it grows. Raises ValueError where it still grows after so many seconds."""
        if not self._lock.acquire(timeout=wait):
            raise ValueError("This run is still growing. Wait for its end, or press Stop.")
        try:
            yield
        finally:
            self._lock.release()

    def unchecked(self) -> dict[str, Task]:
        """Tasks that check the texts with exits that were not inspected; {} where a visitor stopped that."""
        return {} if self.checking else {
            name: Task([*text.prompt_ids, *text.before], events=text.final)
            for name, text in self.stream.sides.items()
            if name != FULL and name not in self.inspections and text.final}

    def fork(self, side, at, token_id) -> tuple[Side, Task]:
        """Plan a fork of a side at a position, with this token there. Raises ValueError with the reason against it."""
        text = self.stream.sides[side] if isinstance(side, str) and side in self.inspections else None
        if text is None or not (_whole(at) and _whole(token_id)) or not 0 <= at < len(text.ids):
            raise ValueError("There is no such token in a text with exits of this run.")
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
        config = replace(text.side.config, max_new_tokens=left)
        return (Side(FORKS[number], f"Fork {number + 1}, from token {at + 1}", config),
                Task([*text.prompt_ids, *text.ids[:at]], config, [chosen]))

    def inspected(self, name: str, inspection: Inspection) -> None:
        """Keep the inspection of a side's own tokens, and write the side's end."""
        text = self.stream.sides[name]
        self.stream.end(name, inspection)
        if text.before:
            inspection = _joined(self.inspections[text.of], inspection, len(text.before))
        self.inspections[name] = inspection

    def card(self, side, i) -> dict | None:
        """Candidates of the token at position i of a side; None where there is none. Arguments may be any JSON."""
        found = self.inspections.get(side) if isinstance(side, str) else None
        if found is None or not _whole(i) or not 0 <= i < len(found.token_ids):
            return None
        return found.card(self.tokenizer, i)

    def map(self, side, start, count) -> dict | None:
        """First choices at `count` positions from `start`, at most MAP_COLUMNS; None where there is none."""
        found = self.inspections.get(side) if isinstance(side, str) else None
        if found is None or not (_whole(start) and _whole(count)):
            return None
        return found.map(self.tokenizer, max(0, start), min(max(1, count), MAP_COLUMNS))


class Latest(Generic[T]):
    """The latest things of a kind, by id; the oldest ones go."""

    def __init__(self, most: int):
        self._most = most
        self._kept: OrderedDict[str, T] = OrderedDict()

    def add(self, thing: T) -> T:
        """Keep a thing, by its attribute `id`, and return it."""
        self._kept[thing.id] = thing
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return thing

    def get(self, id) -> T | None:
        """The thing with this id; None where it is not kept. The id may be any JSON."""
        return self._kept.get(id) if isinstance(id, str) else None


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _joined(before: Inspection, own: Inspection, n: int) -> Inspection:
    """The first n positions of an inspection, followed by another one."""
    return Inspection(*(getattr(before, f.name)[:n] + getattr(own, f.name) for f in fields(Inspection)))
