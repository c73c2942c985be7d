"""Library: the models that a page offers, one of them in memory at a time."""

import gc
import itertools
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from cascadeexit import hub
from cascadeexit.calibration import Calibration
from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.exits import ExitBank
from cascadeexit.shape import Shape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offer:
    """One entry: a model with its exits."""

    label: str
    model: str | None
    exits: Path | None = None


def _warm_up(engine: Engine) -> None:
    """Do once all that a run may do, from a few rows through every segment: no visitor's clock pays for it."""
    prompt = [0] * 9
    turns = [engine.generate(prompt, DecodeConfig(mode=mode, max_new_tokens=8)) for mode in Mode]
    for _ in itertools.zip_longest(*turns):                         # as in a race
        pass
    for s in range(engine.num_exits):                               # each exit after the one before it, and taken
        asked = {s - 1: 1.0, s: 0.3}
        engine.run(prompt, DecodeConfig(thresholds=[asked.get(k) for k in range(engine.num_exits)], max_new_tokens=4))


class Library:
    """Loads on demand. Whoever asks for another model than the one in memory waits for the exchange.

    Args:
        offers: at least one; labels differ.
        device, dtype: as for `hub.load`.

    Raises what `hub.describe` raises, for the first offer that cannot be had.
    """

    def __init__(self, offers: Sequence[Offer], *, device: str | None = None, dtype=None):
        self.shapes = {offer.label: hub.describe(offer.model, offer.exits) for offer in offers}
        self._offers = {offer.label: offer for offer in offers}
        self._place = dict(device=device, dtype=dtype)
        self._lock = threading.Lock()
        self._held: tuple[str, Engine, object] | None = None

    @classmethod
    def of(cls, engine: Engine, tokenizer) -> Self:
        """A library of one model that is loaded already."""
        library, shape = cls(()), Shape.of(engine)
        library.shapes[shape.name], library._held = shape, (shape.name, engine, tokenizer)
        return library

    @property
    def labels(self) -> list[str]:
        return list(self.shapes)

    def fingerprint(self, label: str) -> str:
        """Of this offer's exits, "" for untrained ones that are not in memory; needs no model."""
        bank = self._bank(label)
        return bank.fingerprint() if bank else ""

    def calibration(self, label: str) -> Calibration | None:
        """Of this offer's exits, None where there is none; needs no model."""
        bank = self._bank(label)
        return bank.calibration if bank else None

    def _bank(self, label: str) -> ExitBank | None:
        if self.ready(label):
            return self._held[1].bank
        folder = hub.find_exits(self.shapes[label].name, self._offers[label].exits)
        return ExitBank.load(folder) if folder else None

    def ready(self, label: str) -> bool:
        return self._held is not None and self._held[0] == label

    def get(self, label: str, progress: hub.Progress | None = None) -> tuple[Engine, object]:
        """Engine and tokenizer of this offer; loads them when they are not the ones in memory.

        Raises KeyError for a label that is not offered, and what `hub.load` raises.
        """
        with self._lock:
            if not self.ready(label):
                offer = self._offers[label]
                self._held = None                               # room first: both might not fit
                gc.collect()                                    # recordings and their model hold each other
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                engine, tokenizer = hub.load(offer.model, offer.exits, progress=progress, **self._place)
                _warm_up(engine)
                self._held = (label, engine, tokenizer)
            return self._held[1:]

    def load(self, label: str) -> Iterator[str]:
        """`get`, with its progress as lines to show while it works. Raises as it does."""
        said: queue.Queue = queue.Queue()

        def work() -> None:
            try:
                self.get(label, said.put)
                said.put(None)
            except Exception as error:      # handed to the caller's thread
                said.put(error)

        threading.Thread(target=work, daemon=True).start()
        yield f"Loading {label} …"
        while (line := said.get()) is not None:
            if isinstance(line, Exception):
                raise line
            yield line
