"""Library: the models that a page offers.

Only one model at a time is in memory. After `load_all`, all of them are in memory.
"""

import gc
import itertools
import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from cascadeexit import hub
from cascadeexit.backends.memory import give_back
from cascadeexit.calibration import Calibration
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.shape import Shape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offer:
    """One model that the page offers in its menu."""

    label: str
    model: str | None               # Hub id or local folder; None: the bundled model
    exits: Path | None = None       # folder of trained exits; None: those that ship for the model


def _warm_up(engine: Engine) -> None:
    """Make short runs that reach every segment, so that one-time work does not slow down the first visitor's run."""
    prompt = [0] * 9
    runs = [engine.generate(prompt, DecodeConfig(mode=mode, max_new_tokens=8)) for mode in Mode]
    for _ in itertools.zip_longest(*runs):                          # interleaved, as in a race
        pass
    for s in range(engine.num_exits):
        thresholds = {s - 1: 1.0, s: 0.0}                           # 1: runs, but is hardly ever taken; 0: always taken
        engine.run(prompt, DecodeConfig(thresholds=[thresholds.get(k) for k in range(engine.num_exits)],
                                        max_new_tokens=4))


class Library:
    """Loads models when they are needed. A request for a model that is not in memory waits until it is loaded.

    Args:
        offers: the models to offer, with different labels.
        device, dtype, device_map: as for `hub.load`.

    Raises the error of `hub.describe` for the first offer whose model is not available.
    """

    def __init__(self, offers: Sequence[Offer], *, device: str | None = None, dtype=None,
                 device_map: str | None = None):
        self.shapes = {offer.label: hub.describe(offer.model, offer.exits) for offer in offers}
        self._offers = {offer.label: offer for offer in offers}
        self._place = dict(device=device, dtype=dtype, device_map=device_map)
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Engine, object]] = {}
        self._fingerprints: dict[str, str] = {}

    @classmethod
    def of(cls, engine: Engine, tokenizer) -> Self:
        """Make a library of one model that is already loaded."""
        library, shape = cls(()), Shape.of(engine)
        library.shapes[shape.name], library._held[shape.name] = shape, (engine, tokenizer)
        return library

    @property
    def labels(self) -> list[str]:
        return list(self.shapes)

    def fingerprint(self, label: str) -> str:
        """Return the fingerprint of the exits of the model with this label, without loading the model.

        Untrained exits have no file. Their fingerprint is "" unless the model is in memory.
        """
        if label in self._fingerprints:
            return self._fingerprints[label]
        bank = self._bank(label)
        return bank.fingerprint() if bank else ""

    def calibration(self, label: str) -> Calibration | None:
        """Return the calibration of the exits of the model with this label, without loading the model.

        Returns None if the exits were not calibrated.
        """
        bank = self._bank(label)
        return bank.calibration if bank else None

    def first_mode(self, label: str) -> Mode:
        """Return the mode with which the page opens for the model with this label, without loading the model.

        The mode is `cascade` if any exit saves time (`Payoff.paying`). Otherwise it is `verified`, because `cascade`
        would only be as fast as `full`. If the model is not in memory, trained exits count as saving time.
        """
        if self.ready(label):
            found = self.get(label)[0].payoff
            return Mode.CASCADE if found is None or any(found.paying) else Mode.VERIFIED
        return Mode.CASCADE if self.shapes[label].trained else Mode.VERIFIED

    def _bank(self, label: str) -> ExitBank | None:
        if self.ready(label):
            return self._held[label][0].bank
        folder = hub.find_exits(self.shapes[label].name, self._offers[label].exits)
        return ExitBank.load(folder) if folder else None

    def ready(self, label: str) -> bool:
        """Return True if the model with this label is in memory."""
        return label in self._held

    def get(self, label: str, progress: hub.Progress | None = None) -> tuple[Engine, object]:
        """Return the engine and the tokenizer of the model with this label. If it is not in memory, load it first.

        Raises KeyError for an unknown label, and the errors of `hub.load`.
        """
        if held := self._held.get(label):       # without the lock: in a forked process it might never be released
            return held
        with self._lock:
            if not self.ready(label):
                offer = self._offers[label]
                self._held.clear()                              # free it first: two models might not fit
                gc.collect()                                    # CUDA graphs and their model refer to each other
                give_back()
                engine, tokenizer = hub.load(offer.model, offer.exits, progress=progress, **self._place)
                _warm_up(engine)
                self._held[label] = engine, tokenizer
            return self._held[label]

    def source(self, label: str) -> str:
        """Return what `hub.load` gets for the model with this label: a Hub id, a folder, a file or the bundled name."""
        return self._offers[label].model or os.environ.get("CASCADEEXIT_MODEL") or hub.DEFAULT_MODEL

    def use_exits(self, label: str, exits: Path) -> None:
        """Use other exits for the model with this label from now on. The model is loaded anew when it is needed.

        exits: folder of trained exits.

        Raises the errors of `hub.describe` for these exits.
        """
        offer = replace(self._offers[label], exits=exits)
        shape = hub.describe(offer.model, exits)
        with self._lock:
            self._offers[label], self.shapes[label] = offer, shape
            self._held.pop(label, None)
            self._fingerprints.pop(label, None)

    def load_all(self, progress: hub.Progress | None = None) -> None:
        """Load all models and keep them in memory, so that this process can be forked and its forks can run the models.

        No layer runs here, because neither a CUDA context nor OpenMP threads survive a fork. Fingerprints of the exits
        are computed here, because the weights may not be readable later (ZeroGPU moves them to disk at launch).

        Raises the errors of `hub.load`.
        """
        for label, offer in self._offers.items():
            engine, tokenizer = hub.load(offer.model, offer.exits, progress=progress, compute=False, **self._place)
            self._fingerprints[label] = engine.bank.fingerprint()
            self._held[label] = engine, tokenizer

    def load(self, label: str) -> Iterator[str]:
        """Load the model with this label. Yields lines of text about the progress.

        Raises the errors of `get`.
        """
        lines: queue.Queue = queue.Queue()

        def work() -> None:
            try:
                self.get(label, lines.put)
                lines.put(None)
            except Exception as error:      # raised in the caller's thread
                lines.put(error)

        threading.Thread(target=work, daemon=True).start()
        yield f"Loading {label} …"
        while (line := lines.get()) is not None:
            if isinstance(line, Exception):
                raise line
            yield line
