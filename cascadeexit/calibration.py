"""Calibration: thresholds of a cascade that keep its disagreement with the full model below what is asked.

Learn then Test (Angelopoulos et al. 2021). A cascade's loss on a prompt is the part of its tokens that the full model
would not have chosen after the same text. Its mean over n prompts gives a bound, which the expected loss on prompts of
the same kind exceeds with a chance of at most `delta`. Thresholds are tested from the strictest on, and the first that
fails ends the test, so the guarantee holds for the one that is chosen, too.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Point:
    """What was measured at one threshold."""

    threshold: float            # of the first exit, from which those of deeper ones follow
    disagreement: float         # mean over prompts
    at_most: float              # bound of its expectation, and of those at all stricter thresholds
    cost: float                 # weight bytes a token, over those of the full model; mean over prompts


@dataclass(frozen=True)
class Calibration:
    """Measured thresholds of some exits, the strictest first."""

    exits: str                  # fingerprint of the bank
    prompts: int
    tokens: int                 # the most a prompt
    delta: float                # chance that a bound is wrong, for a disagreement that is asked for
    points: tuple[Point, ...]

    def threshold(self, target_disagreement: float) -> float | None:
        """The loosest threshold that keeps to this target; None when no measured one does."""
        kept = [point.threshold for point in self.points if point.at_most <= target_disagreement + 1e-12]
        return kept[-1] if kept else None

    @classmethod
    def of(cls, losses: dict[float, Sequence[float]], costs: dict[float, float], *, exits: str, tokens: int,
           delta: float) -> Self:
        """From the losses of each threshold, in [0, 1], over the same prompts."""
        points, at_most = [], 0.0
        for threshold in sorted(losses, reverse=True):
            mean, n = sum(losses[threshold]) / len(losses[threshold]), len(losses[threshold])
            at_most = max(at_most, upper_bound(mean, n, delta))
            points.append(Point(threshold, mean, at_most, costs[threshold]))
        return cls(exits, n, tokens, delta, tuple(points))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What lies in an exits folder, None when nothing does. Raises ValueError when it cannot be read."""
        path = folder / CALIBRATION_FILE
        if not path.is_file():
            return None
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            return cls(told["exits"], told["prompts"], told["tokens"], told["delta"],
                       tuple(Point(**point) for point in told["points"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no calibration: {error!r}. Write it with python -m training.calibrate, or "
                             "delete it.") from error


def p_value(mean: float, n: int, risk: float) -> float:
    """Of the hypothesis that the expected loss is above `risk`, after a mean over n losses in [0, 1].

    Hoeffding-Bentkus: min(exp(-n KL(min(mean, risk) || risk)), e P(Bin(n, risk) <= ceil(n mean))) (Bates et al. 2021).
    """
    if risk >= 1:
        return 0.0
    if risk <= 0:
        return 1.0
    a = min(mean, risk)
    divergence = (a * math.log(a / risk) if a else 0.0) + (1 - a) * math.log((1 - a) / (1 - risk))
    # Rounded first: 0.07 * 100 is a little more than 7.
    return min(1.0, math.exp(-n * divergence), math.e * _binomial(math.ceil(round(n * mean, 9)), n, risk))


def upper_bound(mean: float, n: int, delta: float) -> float:
    """The least risk at which `p_value` is at most delta."""
    low, high = mean, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(mean, n, middle) <= delta else (middle, high)
    return high


def _binomial(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= k)."""
    return math.fsum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                              + i * math.log(p) + (n - i) * math.log1p(-p)) for i in range(min(k, n) + 1))
