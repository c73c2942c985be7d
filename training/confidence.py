"""Train the exits' confidence estimators, calibrate them, and say on unseen documents how well they do.

    python -m training.confidence --exits runs/smollm2 --data data/policy data/text

Two kinds. `sketch`, the default: small MLPs on facts of the exit's softmax over its most frequent words and on what
followed where the text said the same before, by themselves and beside what the exit before it thought
(`SketchConfidence`), fitted on the calibration documents, which no adapter has
seen; a small part of the head is read for it. `mlp`, as published: an MLP that sees the adapted hidden state alone. It
learns in three steps. On the training documents, by binary cross-entropy averaged over rows, to tell the largest
softmax probability of its exit's head: whether the exit is right cannot be learned there, since the adapters have seen
these documents. Then on half of the calibration documents whether the exit's choice equals the full model's; it stops
at the epoch that is best on the other half. That half then sets a scale and a shift of the logit (Platt 1999), folded
into the weights.

The test documents measure both: ECE and AUROC, beside three baselines that need all of the exit's logits: largest
probability, entropy and margin, calibrated by Platt scaling. The estimators are written into the exits folder.
"""

import argparse
import copy
import dataclasses
import functools
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cascadeexit.exits import ConfidenceHead, ExitBank, SketchConfidence, softmax_facts
from cascadeexit.hub import load_model
from cascadeexit.linear import pack
from cascadeexit.lookup import FARTHEST, Lookup
from cascadeexit.model import SegmentedModel
from training.command import run_command
from training.documents import Split, load_documents
from training.features import FeatureStore, carried_states
from training.json_files import save_json
from training.plots import reliability_plot
from training.provenance import provenance
from training.vocabulary import frequent_tokens

BINS = 15


def equal_mass_bins(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, rows) of bins that hold equally many rows."""
    order = confidence.argsort()
    parts = zip(confidence[order].tensor_split(bins), right[order].float().tensor_split(bins))
    return [(c.mean().item(), r.mean().item(), len(c)) for c, r in parts if len(c)]


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Mean |confidence - accuracy| over bins of equal size, weighted by rows (Naeini et al. 2015, equal-mass bins)."""
    return sum(abs(c - r) * n for c, r, n in equal_mass_bins(confidence, right, bins)) / len(confidence)


def auroc(score: Tensor, right: Tensor) -> float:
    """Chance that a right row scores above a wrong one; ties count half (Mann-Whitney U)."""
    values, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()         # mean rank of equal scores, from 1
    positives, negatives = right.sum().item(), (~right).sum().item()
    if not positives or not negatives:
        return float("nan")
    return ((ranks[right].sum().item() - positives * (positives + 1) / 2) / (positives * negatives))


@dataclasses.dataclass
class Rows:
    """One exit over the wanted rows of some documents."""

    hidden: Tensor      # (n, D) adapted
    copied: Tensor      # (n, 2) what the text said before, as `ExitBank.copies` has it
    right: Tensor       # (n,) its choice is the full model's
    softmax: Tensor     # (n,) largest probability of its head
    margin: Tensor      # (n,) largest minus second largest probability
    entropy: Tensor     # (n,) of its head, in nats


@functools.cache                            # every exit asks for the same
def copied_along(ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """`Lookup.copied` at each position of a text, which knows what is before it alone."""
    before, copied = Lookup(()), []
    for i, token in enumerate(ids):
        before.extend([token])
        copied.append(before.copied(ids[max(0, i - FARTHEST):i + 1]))
    return copied


@torch.no_grad()
def exit_rows(bank: ExitBank, s: int, store: FeatureStore, documents: list[int], desc: str) -> Rows:
    """Exit s read over the wanted rows of these documents."""
    parts, device = [], bank.adapters[s].norm.weight.device
    for i in tqdm(documents, unit="document", desc=desc, leave=False):
        f = store[i]
        wanted = f.wanted.to(device)
        h = bank.hidden(s, f.exits[:, s].to(device)[wanted], carried_states(f.top).to(device)[wanted])
        logits = bank.logits(s, h).float()
        picked = logits.argmax(-1) if bank.head_ids is None else bank.head_ids[logits.argmax(-1)]
        log_p = logits.log_softmax(-1)
        top = log_p.topk(2).values.exp()
        along = zip(copied_along(tuple(f.ids.tolist())), f.wanted.tolist())
        copies = bank.copies([copy for copy, asked in along if asked])
        parts.append((h, copies, picked == f.choices[f.wanted].to(picked.device), top[:, 0], top[:, 0] - top[:, 1],
                      -(log_p.exp() * log_p).sum(-1)))
    return Rows(*(torch.cat(column).cpu() for column in zip(*parts)))


def fit(head: ConfidenceHead, hidden: Tensor, target: Tensor, *, epochs: int, lr: float, weight_decay: float,
        batch: int, seed: int, check: tuple[Tensor, Tensor] | None = None) -> None:
    """Binary cross-entropy against probabilities or labels (n,); with `check`, the epoch best on it is kept."""
    steps = max(1, len(hidden) // batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    best, kept = float("inf"), None
    for _ in tqdm(range(epochs), unit="epoch", desc="estimator", leave=False):
        order = torch.randperm(len(hidden), generator=generator)
        for part in order.tensor_split(steps):
            loss = F.binary_cross_entropy_with_logits(head(hidden[part]).view(-1), target[part].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if check is not None:
            with torch.no_grad():
                now = F.binary_cross_entropy_with_logits(head(check[0]), check[1].float()).item()
            if now < best:
                best, kept = now, copy.deepcopy(head.state_dict())
    if kept is not None:
        head.load_state_dict(kept)


def platt(score: Tensor, right: Tensor, shift: bool = True) -> tuple[float, float]:
    """(a, b) for which sigmoid(a score + b) fits `right` best (Platt 1999); b stays 0 without `shift`."""
    a, b = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()), requires_grad=shift)
    optimizer = torch.optim.LBFGS([a, b] if shift else [a], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(a * score + b, right.float())
        loss.backward()
        return loss

    optimizer.step(closure)
    return a.item(), b.item()


def fit_mlp(bank: ExitBank, s: int, store: FeatureStore, train: list[int], held: list[int], width: int,
            args) -> ConfidenceHead:
    """The published estimator, in the three steps told above."""
    layer = bank.config.layers[s]
    seen = exit_rows(bank, s, store, train, f"exit {layer}, training")
    fitted, checked = (exit_rows(bank, s, store, part, f"exit {layer}, calibration")
                       for part in (held[::2], held[1::2]))
    head = ConfidenceHead(bank.config.hidden_size, width)
    fit(head, seen.hidden, seen.softmax, epochs=args.epochs, lr=1e-3, weight_decay=0.01, batch=1024, seed=args.seed)
    fit(head, fitted.hidden, fitted.right, epochs=args.calibration_epochs, lr=2e-4, weight_decay=0.1, batch=256,
        seed=args.seed, check=(checked.hidden, checked.right))
    with torch.no_grad():
        a, b = platt(head(checked.hidden), checked.right)
        head.outer.weight.mul_(a)
        head.outer.bias.mul_(a).add_(b)
    return head


def fit_sketch(facts: list[Tensor], right: Tensor, width: int, seed: int) -> SketchConfidence:
    """An estimator from facts of the exit alone (n, 5) and, where there are such, beside the exit before (n, 12)."""
    head = SketchConfidence(width)
    for net, x in zip((head.alone, head.after), facts):
        mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
        fit(net, (x - mean) / spread, right, epochs=20, lr=3e-3, weight_decay=0.01, batch=512, seed=seed)
        with torch.no_grad():                                       # the net then reads facts as they come
            net[0].weight.div_(spread)
            net[0].bias.sub_(net[0].weight @ mean)
    return head


def baselines(calibration: Rows, test: Rows) -> dict:
    """ECE, raw and after Platt scaling of its logit, and AUROC of what the exit's logits say by themselves."""
    report = {}
    scores = {"softmax": lambda r: r.softmax, "margin": lambda r: r.margin,
              "entropy": lambda r: torch.exp(-r.entropy)}
    for name, of in scores.items():
        raw, held = (of(r).clamp(1e-6, 1 - 1e-6) for r in (test, calibration))
        a, b = platt(held.logit(), calibration.right)
        report[name] = {"auroc": auroc(raw, test.right), "ece": expected_calibration_error(raw, test.right),
                        "ece_calibrated": expected_calibration_error((a * raw.logit() + b).sigmoid(), test.right)}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="bundled name, Hub id or local folder; default the one the exits were made for")
    parser.add_argument("--exits", type=Path, required=True, help="exits folder written by training.distill")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the folders given to training.distill")
    parser.add_argument("--feature-gb", type=float, default=20.0, help="disk for hidden states")
    parser.add_argument("--features", type=Path, help="folder for hidden states; default EXITS/features")
    parser.add_argument("--kind", choices=("sketch", "mlp"), default="sketch", help="mlp as published")
    parser.add_argument("--words", type=int, default=2048, help="sketch: most frequent words it reads")
    parser.add_argument("--width", type=int, help="inner width; default 48, mlp 256 as published")
    parser.add_argument("--epochs", type=int, default=4, help="mlp: passes over the training rows, first step")
    parser.add_argument("--calibration-epochs", type=int, default=12, help="mlp: most passes over calibration rows")
    parser.add_argument("--train-rows", type=int, default=400_000, help="mlp: rows of the first step, at most")
    parser.add_argument("--device-map", help="as for training.distill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    bank = ExitBank.load(args.exits)
    base, _, name = load_model(args.model or bank.config.base_model, device_map=args.device_map)
    model = SegmentedModel(base, bank.config.layers, name=name)
    store = FeatureStore(model, load_documents(args.data), args.features or args.exits / "features", args.feature_gb)
    store.prepare()
    store.open()
    bank.attach(model)
    train, taken = [], 0
    for i in store.of(Split.TRAIN):
        if taken < args.train_rows:
            train.append(i)
            taken += store.rows(i)
    held = store.of(Split.CALIBRATION, policy_only=True) or store.of(Split.CALIBRATION)
    tests = store.of(Split.TEST, policy_only=True) or store.of(Split.TEST)
    if len(held) < 4 or not tests:
        raise SystemExit(f"{len(held)} calibration and {len(tests)} test documents are too few: 2 in 25 and 1 in 25 of "
                         "all documents are set aside, so about 100 documents are needed. Write more data.")
    report, heads = [], nn.ModuleList()
    width = args.width or (256 if args.kind == "mlp" else 48)
    shape = dict(confidence=args.kind, confidence_width=width, sketch_size=0)
    bank.sketch(None)
    if args.kind == "sketch":
        words = bank.head_ids            # the most frequent first; an exit that is taken finds them read already
        if words is None:
            words = frequent_tokens(store.choices(store.of(Split.TRAIN)), model.vocab_size, model.eos_ids)
        shape["sketch_size"] = min(args.words, len(words))
        bank.sketch(words[:shape["sketch_size"]].to(model.device).clone())          # a tensor of its own, to be saved
        facts = softmax_facts(pack(model.head_weight.detach()[bank.sketch_ids].cpu(), eight_bits=True))

    @torch.no_grad()
    def seen_by(rows: Rows, before: Rows | None) -> list[Tensor]:
        """What the estimator may read: by itself, and beside the exit before."""
        if args.kind == "mlp":
            return [rows.hidden]
        parts = list(zip(rows.hidden.split(4096), rows.copied.split(4096)))
        alone = torch.cat([facts(*part) for part in parts])
        if before is None:
            return [alone]
        return [alone, torch.cat([facts(*part, then) for part, then in zip(parts, before.hidden.split(4096))])]

    before = None, None
    for s, layer in enumerate(bank.config.layers):
        calibration, test = (exit_rows(bank, s, store, part, f"exit {layer}, {what}")
                             for part, what in ((held, "calibration"), (tests, "test")))
        if args.kind == "sketch":
            head = fit_sketch(seen_by(calibration, before[0]), calibration.right, width, args.seed)
        else:
            head = fit_mlp(bank, s, store, train, held, width, args)
        with torch.no_grad():
            alone, *beside = [head(x).sigmoid() for x in seen_by(test, before[1])]
        confidence = beside[0] if beside else alone
        before = calibration, test
        heads.append(head.requires_grad_(False))
        bins = equal_mass_bins(confidence, test.right)
        report.append({
            "layer": layer, "agreement": test.right.float().mean().item(),
            "ece": expected_calibration_error(confidence, test.right), "auroc": auroc(confidence, test.right),
            "ece_alone": expected_calibration_error(alone, test.right), "auroc_alone": auroc(alone, test.right),
            "bins": {"confidence": [c for c, _, _ in bins], "right": [r for _, r, _ in bins]},
            "baselines": baselines(calibration, test)})
        print(json.dumps({k: v for k, v in report[-1].items() if k != "bins"}))
    bank.confidence_heads = heads
    bank.config = dataclasses.replace(bank.config, trained=True, **shape)
    bank.save(args.exits)
    reliability_plot(report, args.exits / "reliability.html")
    save_json(args.exits / "confidence.json", {
        "provenance": provenance(args.seed), "kind": args.kind, "exits": report,
        "rows": {"calibration": len(calibration.right), "test": len(test.right)}})


if __name__ == "__main__":
    run_command(main)
