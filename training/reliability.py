"""Reliability of confidences: calibration error, AUROC and Platt scaling.

A row is one choice of an exit. Each row has a confidence. A row is right if the choice equals the full model's choice.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS = 15


def equal_mass_bins(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Sort an exit's choices (rows) by confidence, and divide them into bins with equal numbers of rows.

    Args:
        confidence: confidence of each row (n,).
        right: True for rows whose choice equals the full model's choice (n,).

    Returns three numbers for each bin: mean confidence, share of the rows that are right, and number of rows.
    """
    order = confidence.argsort()
    parts = zip(confidence[order].tensor_split(bins), right[order].float().tensor_split(bins))
    return [(c.mean().item(), r.mean().item(), len(c)) for c, r in parts if len(c)]


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Compute the expected calibration error (ECE) of confidences, in [0, 1].

    This is the mean of |mean confidence - share of right rows| over the `equal_mass_bins`, weighted by their numbers of
    rows (Naeini et al. 2015, but with bins of equal numbers of rows).

    Args:
        confidence: confidence of each row (n,).
        right: True for rows whose choice equals the full model's choice (n,).
    """
    return sum(abs(c - r) * n for c, r, n in equal_mass_bins(confidence, right, bins)) / len(confidence)


def auroc(score: Tensor, right: Tensor) -> float:
    """Compute the probability that a right choice has a higher score than a wrong one, both picked at random.

    Equal scores count half (Mann-Whitney U). Returns NaN if no choice is right or none is wrong.

    Args:
        score: score of each choice (n,), such as a confidence.
        right: True for choices that equal the full model's choice (n,).
    """
    values, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()         # mean rank of equal scores, from 1
    positives, negatives = right.sum().item(), (~right).sum().item()
    if not positives or not negatives:
        return float("nan")
    return ((ranks[right].sum().item() - positives * (positives + 1) / 2) / (positives * negatives))


def platt(score: Tensor, right: Tensor) -> tuple[float, float]:
    """Fit Platt scaling (Platt 1999): sigmoid(a * score + b) estimates the probability that an exit's choice is right.

    Args:
        score: score of each choice (n,), such as the logit of a confidence.
        right: True for choices that equal the full model's choice (n,).

    Returns (a, b).
    """
    a, b = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.LBFGS([a, b], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(a * score + b, right.float())
        loss.backward()
        return loss

    optimizer.step(closure)
    return a.item(), b.item()
