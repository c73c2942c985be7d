"""DecodeConfig: the settings for decoding one text, and the threshold that each exit gets from them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real

from cascadeexit.values import flag, number, shown, whole

CASCADE_THRESHOLD = 0.6
MOST_TOKENS, MOST_DRAFTS = 10_000_000, 1_000        # largest `max_new_tokens` and `max_draft` of any model
_LEAST_TEMPERATURE = 1e-3       # below it logits overflow


class Mode(StrEnum):
    """Mode of decoding a text: by the full model, by exits, or by drafts that the full model verifies."""

    FULL = "full"           # every token from the last layer
    CASCADE = "cascade"     # every token from the first exit that is confident enough
    VERIFIED = "verified"   # drafts that the full model verifies: exactly the text of `full`


@dataclass(frozen=True)
class DecodeConfig:
    """Settings for decoding one text. Raises ValueError for a bad value or contradicting settings."""

    mode: Mode = Mode.CASCADE
    max_new_tokens: int = 256
    max_draft: int = 7
    """Only in verified mode: largest number of tokens that are drafted for one verification pass."""
    thresholds: float | Sequence[float | None] | None = None
    """Confidence in [0, 1] from which an exit is taken. One number is the threshold of the first exit;
    `graded_thresholds` computes the thresholds of deeper exits from it. A sequence has one threshold for each exit;
    `None` in the sequence disables that exit. `None` instead of numbers means the default of the mode. In cascade mode,
    the default is 0.6 for the first exit. In verified mode, the default is a draft tree from the drafter and n-gram
    lookup (`DraftTree`), as large as is likely to save more time than it costs. With thresholds, verified mode lets the
    exits draft one token after another instead."""
    target_disagreement: float | None = None
    """Only in cascade mode, at temperature 0 and without `thresholds`: largest share of the tokens, in (0, 1), that may
    differ from the full model's choice after the same text. The calibration of the exits (`cascadeexit.calibration`)
    gives the thresholds for this target."""
    only_paying: bool = False
    """True: an exit that costs more time than it saves on this machine (`Engine.payoff`) is disabled, although it has a
    threshold. Without thresholds in the config, such an exit is always disabled."""
    tolerance: float = 0.0
    """Only in verified mode at temperature 0: a draft is also accepted if its probability by the full model is at least
    (1 - tolerance) times the probability of the full model's own choice. 0 is lossless."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Sample only from the smallest set of likeliest tokens whose probabilities sum to at least this, in (0, 1]."""
    seed: int = 0
    """Seed of the random numbers for sampling. The same seed and settings give the same text."""
    ignore_eos: bool = False
    """True: do not stop at an end-of-sequence token, but generate max_new_tokens tokens. Benchmarks use this."""
    check_late: bool = False
    """Only in cascade mode. True: when the layers that tokens skipped are computed later, also compute what the full
    model would have chosen at these positions (`TokenEvent.checked`). The text does not change, but the full model's
    head reads more rows. `python -m training.benchmark --check-late` measures the cost."""

    def __post_init__(self):
        checked = dict(mode=_mode(self.mode), thresholds=_thresholds(self.thresholds),
                       max_new_tokens=whole("max_new_tokens", self.max_new_tokens, 1, MOST_TOKENS),
                       max_draft=whole("max_draft", self.max_draft, 1, MOST_DRAFTS),
                       seed=whole("seed", self.seed, -2**63, 2**63 - 1))
        checked |= {name: number(name, getattr(self, name)) for name in ("tolerance", "temperature", "top_p")}
        checked |= {name: flag(name, getattr(self, name)) for name in ("only_paying", "ignore_eos", "check_late")}
        if self.target_disagreement is not None:
            checked["target_disagreement"] = number("target_disagreement", self.target_disagreement)
        for name, value in checked.items():     # the caller's values may be numpy's, which overflow
            object.__setattr__(self, name, value)
        self._check_ranges()
        self._check_together()

    def _check_ranges(self) -> None:
        if self.temperature != 0 and self.temperature < _LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 (greedy) or a number from {_LEAST_TEMPERATURE} on, got "
                             f"{self.temperature}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}")
        if self.target_disagreement is not None and not 0 < self.target_disagreement < 1:
            raise ValueError(f"target_disagreement must be in (0, 1), got {self.target_disagreement}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def _check_together(self) -> None:
        if self.tolerance and (self.mode is not Mode.VERIFIED or self.temperature):
            raise ValueError("tolerance goes with mode verified and temperature 0: other modes do not use it")
        if self.check_late and self.mode is not Mode.CASCADE:
            raise ValueError("check_late goes with mode cascade: in other modes the full model reads every position "
                             "anyway")
        if self.target_disagreement is not None and (
                self.mode is not Mode.CASCADE or self.temperature or self.thresholds is not None):
            raise ValueError("target_disagreement goes with mode cascade, temperature 0 and no thresholds: it was "
                             "calibrated for these")

    def threshold_per_exit(self, depths: Sequence[float]) -> tuple[float | None, ...]:
        """Return the confidence threshold of each exit, or None for an exit that is disabled.

        All are None if `thresholds` is None and the mode is not cascade.

        depths: for each exit, the share of the layers below it, ascending, in [0, 1); as in `Engine.exit_depths`.

        Raises ValueError if the number of thresholds is not the number of exits.
        """
        wanted = CASCADE_THRESHOLD if self.thresholds is None and self.mode is Mode.CASCADE else self.thresholds
        if wanted is None:
            return (None,) * len(depths)
        if isinstance(wanted, float):
            return graded_thresholds(wanted, depths)
        if len(wanted) != len(depths):
            raise ValueError(f"this model has {len(depths)} exits, got {len(wanted)} thresholds")
        return tuple(wanted)


def _mode(value) -> Mode:
    try:
        return Mode(value)
    except ValueError:
        raise ValueError(f"mode must be one of {', '.join(Mode)}, got {shown(value)}") from None


def _thresholds(value) -> float | Sequence[float | None] | None:
    """Check `DecodeConfig.thresholds`, and return it with Python's own numbers. A list stays a list."""
    if value is None:
        return None
    if isinstance(value, Real):
        return number("thresholds", value, 0, 1)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"thresholds must be a number or a list of numbers, got {shown(value)}")
    each = [None if t is None else number("each of thresholds", t, 0, 1) for t in value]
    return each if isinstance(value, list) else tuple(each)


def graded_thresholds(first: float, depths: Sequence[float]) -> tuple[float, ...]:
    """Compute the threshold of each exit from the threshold of the first exit.

    Taking an exit saves the layers above the exit but risks a wrong token. An exit is taken if the risk (1 -
    confidence) is at most a constant times the share of the layers above the exit. The constant is the same for all
    exits. A deeper exit saves less, so it needs a higher confidence:
    threshold = 1 - (1 - first) (1 - depth) / (1 - depth of the first exit).

    Args:
        first: threshold of the first exit, in [0, 1].
        depths: for each exit, the share of the layers below it, ascending, in [0, 1).
    """
    return tuple(1 - (1 - first) * (1 - depth) / (1 - depths[0]) for depth in depths)
