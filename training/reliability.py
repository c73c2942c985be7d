"""Reliability of confidences: calibration error, ranking, and scaling, on rows that are right or wrong."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS = 15


def equal_mass_bins(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Divide rows (n,), sorted by confidence, into bins of equal size.

    Returns for each bin its mean confidence, the share of its rows that are right, and the number of its rows.
    """
    order = confidence.argsort()
    parts = zip(confidence[order].tensor_split(bins), right[order].float().tensor_split(bins))
    return [(c.mean().item(), r.mean().item(), len(c)) for c, r in parts if len(c)]


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Compute the mean |confidence - accuracy| over bins of equal size, weighted by rows.

    Source: Naeini et al. 2015, with equal-mass bins.
    """
    return sum(abs(c - r) * n for c, r, n in equal_mass_bins(confidence, right, bins)) / len(confidence)


def auroc(score: Tensor, right: Tensor) -> float:
    """Compute the probability that a right row scores higher than a wrong one; ties count half (Mann-Whitney U).

    Returns NaN when no row is right or no row is wrong.
    """
    values, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()         # mean rank of equal scores, from 1
    positives, negatives = right.sum().item(), (~right).sum().item()
    if not positives or not negatives:
        return float("nan")
    return ((ranks[right].sum().item() - positives * (positives + 1) / 2) / (positives * negatives))


def platt(score: Tensor, right: Tensor) -> tuple[float, float]:
    """Fit sigmoid(a score + b) to `right` (Platt 1999). Returns (a, b)."""
    a, b = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.LBFGS([a, b], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(a * score + b, right.float())
        loss.backward()
        return loss

    optimizer.step(closure)
    return a.item(), b.item()
