"""Calibration: thresholds of a cascade that keep its disagreement with the full model below a target.

The method is Learn then Test (Angelopoulos et al. 2021). The loss of a prompt is the share of its tokens that differ
from the full model's choice after the same text. The mean loss over n prompts gives a certified bound: the expected
loss on prompts of the same kind exceeds it with a probability of at most `delta`. Thresholds are tested from the
strictest on, and the test ends at the first that fails, so the bound also holds for the threshold that is chosen.
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
    """Measurements at one threshold."""

    threshold: float            # of the first exit; thresholds of deeper exits follow from it
    disagreement: float         # mean over prompts
    at_most: float              # certified bound of the expected disagreement, here and at all stricter thresholds
    cost: float                 # weight bytes read per token, relative to the full model; mean over prompts


@dataclass(frozen=True)
class Calibration:
    """Measured thresholds of one bank of exits, the strictest first."""

    exits: str                  # fingerprint of the bank
    prompts: int
    tokens: int                 # most tokens of one prompt's reply
    delta: float                # probability that the bound for a target is wrong
    points: tuple[Point, ...]

    def threshold(self, target_disagreement: float) -> float | None:
        """Loosest threshold that is certified to keep this target; None when no measured threshold does."""
        kept = [point.threshold for point in self.points if point.at_most <= target_disagreement + 1e-12]
        return kept[-1] if kept else None

    @classmethod
    def of(cls, losses: dict[float, Sequence[float]], costs: dict[float, float], *, exits: str, tokens: int,
           delta: float) -> Self:
        """Calibration from the losses at each threshold, in [0, 1], over the same prompts."""
        points, at_most = [], 0.0
        for threshold in sorted(losses, reverse=True):
            mean, n = sum(losses[threshold]) / len(losses[threshold]), len(losses[threshold])
            at_most = max(at_most, upper_bound(mean, n, delta))
            points.append(Point(threshold, mean, at_most, costs[threshold]))
        return cls(exits, n, tokens, delta, tuple(points))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Calibration in an exits folder; None without one. Raises ValueError when the file cannot be read."""
        path = folder / CALIBRATION_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["exits"], content["prompts"], content["tokens"], content["delta"],
                       tuple(Point(**point) for point in content["points"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no calibration: {error!r}. Write it with python -m training.calibrate, or "
                             "delete it.") from error


def p_value(mean: float, n: int, risk: float) -> float:
    """P-value of the hypothesis that the expected loss exceeds `risk`, given the mean of n losses in [0, 1].

    Hoeffding-Bentkus: min(exp(-n KL(min(mean, risk) || risk)), e P(Bin(n, risk) <= ceil(n mean))) (Bates et al. 2021).
    """
    if risk >= 1:
        return 0.0
    if risk <= 0:
        return 1.0
    a = min(mean, risk)
    divergence = (a * math.log(a / risk) if a else 0.0) + (1 - a) * math.log((1 - a) / (1 - risk))
    # Rounded first, because 0.07 * 100 is a little more than 7.
    return min(1.0, math.exp(-n * divergence), math.e * _binomial(math.ceil(round(n * mean, 9)), n, risk))


def upper_bound(mean: float, n: int, delta: float) -> float:
    """Certified bound: the smallest risk at which `p_value` is at most delta."""
    low, high = mean, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(mean, n, middle) <= delta else (middle, high)
    return high


def _binomial(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= k)."""
    return math.fsum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                              + i * math.log(p) + (n - i) * math.log1p(-p)) for i in range(min(k, n) + 1))
