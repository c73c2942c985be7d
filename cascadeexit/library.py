"""Library: the models that a page offers. One model is in memory at a time, or all after `load_all`."""

import gc
import itertools
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """One entry of the model menu."""

    label: str
    model: str | None               # Hub id or local folder; None: the bundled model
    exits: Path | None = None       # folder of trained exits; None: those that ship for the model


def _warm_up(engine: Engine) -> None:
    """Make short runs that reach every segment, so that one-time work does not slow the first visitor's run."""
    prompt = [0] * 9
    runs = [engine.generate(prompt, DecodeConfig(mode=mode, max_new_tokens=8)) for mode in Mode]
    for _ in itertools.zip_longest(*runs):                          # interleaved, as in a race
        pass
    for s in range(engine.num_exits):
        thresholds = {s - 1: 1.0, s: 0.0}                           # 1: runs, but is hardly ever taken; 0: always taken
        engine.run(prompt, DecodeConfig(thresholds=[thresholds.get(k) for k in range(engine.num_exits)],
                                        max_new_tokens=4))


class Library:
    """Loads models on demand. A request for a model that is not in memory waits until that model is loaded.

    Args:
        offers: at least one, with different labels.
        device, dtype, device_map: as for `hub.load`.

    Raises what `hub.describe` raises, for the first offer that is not available.
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
        """Return the fingerprint of this offer's exits, without loading the model.

        It is "" for untrained exits of a model that is not in memory.
        """
        if label in self._fingerprints:
            return self._fingerprints[label]
        bank = self._bank(label)
        return bank.fingerprint() if bank else ""

    def calibration(self, label: str) -> Calibration | None:
        """Return the calibration of this offer's exits, without loading the model; None if there is none."""
        bank = self._bank(label)
        return bank.calibration if bank else None

    def _bank(self, label: str) -> ExitBank | None:
        if self.ready(label):
            return self._held[label][0].bank
        folder = hub.find_exits(self.shapes[label].name, self._offers[label].exits)
        return ExitBank.load(folder) if folder else None

    def ready(self, label: str) -> bool:
        """Tell whether this offer is in memory."""
        return label in self._held

    def get(self, label: str, progress: hub.Progress | None = None) -> tuple[Engine, object]:
        """Return engine and tokenizer of this offer. If they are not in memory, load them first.

        Raises KeyError for a label that is not offered, and what `hub.load` raises.
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

    def load_all(self, progress: hub.Progress | None = None) -> None:
        """Load all offers and keep them in memory. The process can then be forked, and forks run the models.

        No layer runs here, because neither a CUDA context nor OpenMP threads survive a fork. Fingerprints are computed
        now, because weights may not be readable later (ZeroGPU moves them to disk at launch).

        Raises what `hub.load` raises.
        """
        for label, offer in self._offers.items():
            engine, tokenizer = hub.load(offer.model, offer.exits, progress=progress, compute=False, **self._place)
            self._fingerprints[label] = engine.bank.fingerprint()
            self._held[label] = engine, tokenizer

    def load(self, label: str) -> Iterator[str]:
        """Load this offer, and yield progress lines meanwhile. Raises what `get` raises."""
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
