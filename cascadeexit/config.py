"""DecodeConfig: the settings for decoding one text, and the threshold that each exit gets from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

CASCADE_THRESHOLD = 0.6
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
        try:
            object.__setattr__(self, "mode", Mode(self.mode))
        except ValueError:
            raise ValueError(f"mode must be one of {', '.join(Mode)}, got '{self.mode}'") from None
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.max_draft < 1:
            raise ValueError(f"max_draft must be at least 1, got {self.max_draft}")
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a number from {_LEAST_TEMPERATURE} on, got "
                             f"{self.temperature}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}")
        if self.tolerance and (self.mode is not Mode.VERIFIED or self.temperature):
            raise ValueError("tolerance goes with mode verified and temperature 0: other modes do not use it")
        if self.check_late and self.mode is not Mode.CASCADE:
            raise ValueError("check_late goes with mode cascade: in other modes the full model reads every position "
                             "anyway")
        if self.target_disagreement is not None:
            if not 0 < self.target_disagreement < 1:
                raise ValueError(f"target_disagreement must be in (0, 1), got {self.target_disagreement}")
            if self.mode is not Mode.CASCADE or self.temperature or self.thresholds is not None:
                raise ValueError("target_disagreement goes with mode cascade, temperature 0 and no thresholds: it was "
                                 "calibrated for these")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        each = [self.thresholds] if isinstance(self.thresholds, (int, float)) else list(self.thresholds or ())
        if any(t is not None and not 0 <= t <= 1 for t in each):
            raise ValueError(f"thresholds must be in [0, 1] or None, got {self.thresholds}")

    def threshold_per_exit(self, depths: Sequence[float]) -> tuple[float | None, ...]:
        """Return the confidence threshold of each exit, or None for an exit that is disabled.

        All are None if `thresholds` is None and the mode is not cascade.

        depths: for each exit, the share of the layers below it, ascending, in [0, 1); as in `Engine.exit_depths`.

        Raises ValueError if the number of thresholds is not the number of exits.
        """
        wanted = CASCADE_THRESHOLD if self.thresholds is None and self.mode is Mode.CASCADE else self.thresholds
        if wanted is None:
            return (None,) * len(depths)
        if isinstance(wanted, (int, float)):
            return graded_thresholds(wanted, depths)
        if len(wanted) != len(depths):
            raise ValueError(f"this model has {len(depths)} exits, got {len(wanted)} thresholds")
        return tuple(wanted)


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
