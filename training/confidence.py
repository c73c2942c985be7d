"""Train the exits' confidence estimators, calibrate them, and say on unseen documents how well they do.

    python -m training.confidence --exits runs/smollm2 --data data/policy data/text

The estimator learns in two steps, by binary cross-entropy averaged over rows. First, on the training documents, to
tell the largest softmax probability of its exit's head without computing it: whether the exit is right cannot be
learned there, since the adapters have seen these documents. Then, on the calibration documents, which no adapter has
seen, whether the exit's choice equals the full model's. The test documents measure it: ECE and AUROC, beside the
softmax probability as a baseline. The estimators are written into the exits folder.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cascadeexit.exits import ConfidenceHead, ExitBank
from cascadeexit.hub import DEFAULT_MODEL, load_model
from cascadeexit.model import SegmentedModel
from training.data import Split, load_documents
from training.distill import full_choices
from training.features import Features, compute
from training.provenance import provenance, save_json


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """Mean |confidence - accuracy| over bins of equal size, weighted by rows (Naeini et al. 2015, equal-mass bins)."""
    order = confidence.argsort()
    return sum(abs(c.mean() - r.float().mean()).item() * len(c)
               for c, r in zip(confidence[order].tensor_split(bins), right[order].tensor_split(bins)) if len(c)
               ) / len(confidence)


def auroc(score: Tensor, right: Tensor) -> float:
    """Chance that a right row scores above a wrong one; ties count half (Mann-Whitney U)."""
    values, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()         # mean rank of equal scores, from 1
    positives, negatives = right.sum().item(), (~right).sum().item()
    if not positives or not negatives:
        return float("nan")
    return ((ranks[right].sum().item() - positives * (positives + 1) / 2) / (positives * negatives))


@torch.no_grad()
def adapted(bank: ExitBank, s: int, features: Features, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exit s over all rows: adapted hidden (n, D), whether its choice is the full model's (n,), its softmax (n,)."""
    hidden, right, softmax = [], [], []
    for rows, truth in zip(features.exits[:, s].split(4096), choices.split(4096)):
        h = bank.hidden(s, rows)
        logits = bank.logits(h)
        picked = logits.argmax(-1) if bank.head_ids is None else bank.head_ids[logits.argmax(-1)]
        hidden.append(h)
        right.append(picked == truth)
        softmax.append(logits.float().softmax(-1).amax(-1))
    return torch.cat(hidden), torch.cat(right), torch.cat(softmax)


def fit(head: ConfidenceHead, hidden: Tensor, target: Tensor, rows: Tensor, *, epochs: float, lr: float,
        weight_decay: float, batch: int, seed: int) -> None:
    """Binary cross-entropy against a probability or a label (n,), over these rows; AdamW with a cosine schedule."""
    steps = max(1, round(epochs * len(rows) / batch))
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), unit="step", desc="estimator", leave=False):
        part = rows[torch.randint(len(rows), (batch,), generator=generator)]
        loss = F.binary_cross_entropy_with_logits(head(hidden[part]), target[part].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
    parser.add_argument("--exits", type=Path, required=True, help="exits folder written by training.distill")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the folders given to training.distill")
    parser.add_argument("--feature-gb", type=float, default=6.0, help="disk and memory budget for hidden states")
    parser.add_argument("--epochs", type=float, default=6, help="passes over the training rows, first step")
    parser.add_argument("--calibration-epochs", type=float, default=2, help="passes over the calibration rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    base, _, name = load_model(args.model)
    bank = ExitBank.load(args.exits)
    model = SegmentedModel(base, bank.config.layers, name=name)
    features = compute(model, load_documents(args.data), args.exits / "features", args.feature_gb)
    choices = full_choices(features.top, model.head_weight)
    bank.attach(model)
    splits = {"train": features.rows(Split.TRAIN), "calibration": features.rows(Split.CALIBRATION, policy_only=True),
              "test": features.rows(Split.TEST, policy_only=True)}
    report = []
    for s, layer in enumerate(bank.config.layers):
        hidden, right, softmax = adapted(bank, s, features, choices)
        head = ConfidenceHead(bank.config.hidden_size, bank.config.confidence_width)
        fit(head, hidden, softmax, splits["train"], epochs=args.epochs, lr=1e-3, weight_decay=0.01, batch=1024,
            seed=args.seed)
        fit(head, hidden, right, splits["calibration"], epochs=args.calibration_epochs, lr=1e-4, weight_decay=0.1,
            batch=256, seed=args.seed)
        bank.confidence_heads[s] = head.requires_grad_(False)
        test = splits["test"]
        with torch.no_grad():
            confidence = head(hidden[test]).sigmoid()
        report.append({
            "layer": layer, "agreement": right[test].float().mean().item(),
            "ece": expected_calibration_error(confidence, right[test]), "auroc": auroc(confidence, right[test]),
            "softmax_ece": expected_calibration_error(softmax[test], right[test]),
            "softmax_auroc": auroc(softmax[test], right[test])})
        print(json.dumps(report[-1]))
    bank.config = dataclasses.replace(bank.config, trained=True)
    bank.save(args.exits)
    save_json(args.exits / "confidence.json", {
        "provenance": provenance(args.seed), "rows": {k: len(v) for k, v in splits.items()}, "exits": report})


if __name__ == "__main__":
    main()
