"""Calibration: finds thresholds that keep the disagreement of mode `cascade` below a target.

Disagreement is the share of a reply's tokens that differ from the full model's choice after the same text. The method
is Learn then Test (Angelopoulos et al. 2021). The loss of a prompt is the disagreement of the reply to it. The mean
loss over n prompts gives a certified bound: with a probability of at least 1 - `delta`, the expected loss on prompts of
the same kind is not above this bound. Thresholds are tested one after another, from the highest to the lowest. Testing
ends at the first threshold that fails. Therefore the bound also holds for the threshold that is chosen.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from cascadeexit.artifact import check_keys, read_object
from cascadeexit.values import number, shown, whole

CALIBRATION_FILE = "calibration.json"
MOST_POINTS, MOST_COST = 10_000, 1_000


@dataclass(frozen=True)
class Point:
    """Results of a calibration at one threshold of the first exit."""

    threshold: float            # of the first exit; thresholds of deeper exits follow from it
    disagreement: float         # mean over prompts
    at_most: float              # certified bound of the expected disagreement, here and at all stricter thresholds
    cost: float                 # weight bytes read per token, relative to the full model; mean over prompts


@dataclass(frozen=True)
class Calibration:
    """Results of a calibration: one `Point` for each threshold that was measured, from the highest to the lowest.

    `threshold` chooses a threshold for a target. `of` makes a calibration from measurements, and `load` reads a file.
    """

    exits: str                  # fingerprint of the bank
    prompts: int                # number of prompts that were measured
    tokens: int                 # most tokens of one prompt's reply
    delta: float                # probability that the bound for a target is wrong
    points: tuple[Point, ...]

    def threshold(self, target_disagreement: float) -> float | None:
        """Return the lowest measured threshold whose certified bound is at most `target_disagreement`.

        The result is a threshold for the first exit. Returns None if every measured threshold has a higher bound.
        """
        kept = [point.threshold for point in self.points if point.at_most <= target_disagreement + 1e-12]
        return kept[-1] if kept else None

    @classmethod
    def of(cls, losses: dict[float, Sequence[float]], costs: dict[float, float], *, exits: str, tokens: int,
           delta: float) -> Self:
        """Make a calibration from losses and costs that were measured on the same prompts at each threshold.

        Args:
            losses: {threshold: the loss of each prompt, in [0, 1]}.
            costs: {threshold: the mean cost, as in `Point.cost`}.
            exits: fingerprint of the exits.
            tokens: largest number of tokens in the reply to one prompt.
            delta: largest probability, in (0, 1), that a certified bound is wrong.
        """
        points, at_most = [], 0.0
        for threshold in sorted(losses, reverse=True):
            mean, n = sum(losses[threshold]) / len(losses[threshold]), len(losses[threshold])
            at_most = max(at_most, upper_bound(mean, n, delta))
            points.append(Point(threshold, mean, at_most, costs[threshold]))
        return cls(exits, n, tokens, delta, tuple(points))

    def save(self, folder: Path) -> None:
        """Write calibration.json to a folder of exits."""
        (folder / CALIBRATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the calibration in a folder of exits. Returns None if the folder has no calibration file.

        Raises ValueError if the file does not hold a calibration.
        """
        path = folder / CALIBRATION_FILE
        if not path.is_file():
            return None
        content = read_object(path)
        try:
            check_keys(content, [f.name for f in fields(cls)], None)
            if not isinstance(content["exits"], str):
                raise ValueError(f"exits must be text, got {shown(content['exits'])}")
            return cls(content["exits"], whole("prompts", content["prompts"], 1, 10**9),
                       whole("tokens", content["tokens"], 1, 10**9), number("delta", content["delta"], 0, 1),
                       _points(content["points"]))
        except ValueError as error:
            raise ValueError(f"{path} holds no calibration: {error}. Write it with python -m training.calibrate, or "
                             "delete it.") from None


def _points(found) -> tuple[Point, ...]:
    """Check the points of a calibration file, and return them. Raises ValueError for a wrong one."""
    if not isinstance(found, list) or not 1 <= len(found) <= MOST_POINTS:
        raise ValueError(f"points must be a list of 1 to {MOST_POINTS:,} objects, got {shown(found)}")
    points = tuple(_point(i, point) for i, point in enumerate(found))
    if any(a.threshold <= b.threshold for a, b in zip(points, points[1:])):
        raise ValueError("the thresholds of points must descend")
    return points


def _point(i: int, found) -> Point:
    """Check point number i of a calibration file, and return it. Raises ValueError for a wrong one."""
    if not isinstance(found, dict):
        raise ValueError(f"points[{i}] must be an object, got {shown(found)}")
    names = [f.name for f in fields(Point)]
    check_keys(found, names)
    return Point(**{name: number(f"{name} of points[{i}]", found[name], 0, MOST_COST if name == "cost" else 1)
                    for name in names})


def p_value(mean: float, n: int, risk: float) -> float:
    """Compute the p-value of the hypothesis that the expected loss is above `risk`.

    Args:
        mean: mean of n measured losses, each in [0, 1].
        n: number of measured losses.
        risk: the expected loss that is tested.

    This is the p-value of Hoeffding and Bentkus (Bates et al. 2021), limited to 1:
    min(exp(-n KL(min(mean, risk) || risk)), e P(Bin(n, risk) <= ceil(n mean))).
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
    """Compute the certified bound of the expected loss: the smallest risk at which `p_value` is at most `delta`.

    Args:
        mean, n: mean and number of the measured losses, each in [0, 1].
        delta: largest probability, in (0, 1), that the bound is wrong.
    """
    low, high = mean, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(mean, n, middle) <= delta else (middle, high)
    return high


def _binomial(k: int, n: int, p: float) -> float:
    """Compute P(Bin(n, p) <= k), the probability of at most k successes in n trials of probability p."""
    return math.fsum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                              + i * math.log(p) + (n - i) * math.log1p(-p)) for i in range(min(k, n) + 1))
