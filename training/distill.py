"""Train the exits' adapters: each learns to say, from its own layer, what the frozen model says at the top.

    python -m training.distill --data data/policy data/text --out runs/smollm2

Loss per exit, in nats per token: KL(full || exit) summed over the vocabulary of the exits' head and averaged over
tokens, plus --hard times the cross-entropy of the full model's first choice. The base model is frozen; only the
adapters and their norms learn. A checkpoint is written every --save-every steps and found again by --resume.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cascadeexit.exits import ExitBank
from cascadeexit.hub import DEFAULT_MODEL, default_exit_layers, load_model
from cascadeexit.model import SegmentedModel
from training.data import Split, load_documents
from training.features import Features, compute
from training.provenance import provenance, save_json


@torch.no_grad()
def full_choices(top: Tensor, head: Tensor, block: int = 4096) -> Tensor:
    """The full model's first choice at each row: (n, D), (V, D) -> (n,) token ids."""
    return torch.cat([F.linear(rows, head).argmax(-1) for rows in top.split(block)])


def frequent_tokens(choices: Tensor, vocab_size: int, size: int, always: frozenset[int]) -> Tensor:
    """The `size` tokens that the full model chooses most often, ascending; those in `always` are among them."""
    counts = torch.bincount(choices, minlength=vocab_size).double()
    counts[list(always)] = math.inf
    # Among tokens never chosen the lower id goes first: byte-pair ids are ordered by frequency of their merges.
    order = torch.argsort(counts, descending=True, stable=True)
    return order[:size].sort().values


def exit_loss(logits: Tensor, target: Tensor, hard_target: Tensor, hard: float) -> tuple[Tensor, Tensor]:
    """(KL(full || exit), cross-entropy of the full model's choice), both summed over words, averaged over tokens.

    Args:
        logits: the exit's (n, K); target: the full model's log-probabilities over the same words (n, K).
        hard_target: index of the full model's choice among the K words (n,), -1 where it is not among them.
    """
    log_q = F.log_softmax(logits.float(), -1)
    kl = F.kl_div(log_q, target, log_target=True, reduction="none").sum(-1).mean()
    known = hard_target >= 0
    ce = F.nll_loss(log_q[known], hard_target[known]) if hard and known.any() else kl.new_zeros(())
    return kl, ce


@torch.no_grad()
def agreement(bank: ExitBank, head: Tensor, features: Features, rows: Tensor, choices: Tensor) -> list[float]:
    """Top-1 agreement with the full model at each exit, over these rows."""
    hits = torch.zeros(len(bank.adapters))
    for part in rows.split(2048):
        for s in range(len(hits)):
            picked = F.linear(bank.hidden(s, features.exits[part, s].float()).to(head.dtype), head).argmax(-1)
            picked = picked if bank.head_ids is None else bank.head_ids[picked]
            hits[s] += (picked == choices[part]).sum()
    return (hits / max(1, len(rows))).tolist()


def rescale(bank: ExitBank, scales: list[float]) -> None:
    """Train on h / scale, save for h: the norm behind the adapter cancels the scale of the sum."""
    for adapter, scale in zip(bank.adapters, scales):
        for linear, factor in ((adapter.gate, 1 / scale), (adapter.down, 1 / scale), (adapter.up, scale)):
            linear.weight.data.mul_(factor)


def train(bank: ExitBank, head: Tensor, features: Features, choices: Tensor, args, log) -> int:
    """Train the adapters in place; returns the number of steps they have had."""
    train_rows, held_out = features.rows(Split.TRAIN), features.rows(Split.TEST, policy_only=True)
    local = torch.full((int(choices.max()) + 1 if bank.head_ids is None else bank.config.vocab_size,), -1)
    ids = torch.arange(len(local)) if bank.head_ids is None else bank.head_ids
    local[ids] = torch.arange(len(ids))                               # token id -> index in the exits' head
    steps = max(1, round(args.epochs * len(train_rows) / args.batch))
    optimizer = torch.optim.AdamW(bank.adapters.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))))
    checkpoint, first = args.out / "checkpoint.pt", 0
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        bank.load_state_dict(state["bank"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]

    def save(step: int) -> None:
        torch.save({"bank": bank.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "step": step}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)

    bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", desc="distill")
    started = time.perf_counter()
    for step in bar:
        if time.perf_counter() - started > args.minutes * 60:
            bar.write(f"stopped by --minutes at step {step} of {steps}; --resume goes on")
            save(step)
            return step
        # Rows depend on seed and step alone, so a resumed run sees what an uninterrupted one would.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        part = train_rows[torch.randint(len(train_rows), (args.batch,), generator=generator)].sort().values
        with torch.no_grad():
            target = F.log_softmax(F.linear(features.top[part], head).float(), -1)                  # (n, K)
        hard_target = local[choices[part]]
        optimizer.zero_grad()
        terms = []
        for s in range(len(bank.adapters)):
            hidden = bank.hidden(s, features.exits[part, s].float())
            kl, ce = exit_loss(F.linear(hidden.to(head.dtype), head), target, hard_target, args.hard)
            (kl + args.hard * ce).backward()
            terms.append((kl.item(), ce.item()))
        torch.nn.utils.clip_grad_norm_(bank.adapters.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            log(step=step, kl=[t[0] for t in terms], ce=[t[1] for t in terms], lr=schedule.get_last_lr()[0])
            bar.set_postfix(kl="/".join(f"{t[0]:.2f}" for t in terms), tokens=f"{step * args.batch / 1e6:.2f}M")
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save(step + 1)
            rates = agreement(bank, head, features, held_out[:8000], choices)
            log(step=step, held_out_agreement=rates)
            bar.write(f"step {step + 1}: held-out agreement " + " / ".join(f"{r:.1%}" for r in rates))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders written by training.data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the artifact, log and checkpoint")
    parser.add_argument("--data-note", default="", help="what the data is, in words, for the model card")
    parser.add_argument("--layers", type=int, nargs="+", help="exit layers; default 30, 57 and 80%% of the depth")
    parser.add_argument("--width", type=int, default=512, help="inner width of the adapters")
    parser.add_argument("--head-size", type=int, default=8192, help="words in the exits' head; 0 = all")
    parser.add_argument("--hard", type=float, default=0.5, help="weight of the cross-entropy term")
    parser.add_argument("--epochs", type=float, default=6, help="passes over the training rows")
    parser.add_argument("--batch", type=int, default=1024, help="rows a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; go on with --resume")
    parser.add_argument("--feature-gb", type=float, default=6.0, help="disk and memory budget for hidden states")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    base, _, name = load_model(args.model)
    model = SegmentedModel(base, args.layers or default_exit_layers(base.config.num_hidden_layers), name=name)
    documents = load_documents(args.data)
    features = compute(model, documents, args.out / "features", args.feature_gb)
    choices = full_choices(features.top, model.head_weight)
    bank = ExitBank.untrained(model, confidence="mlp", width=args.width, head_size=args.head_size)
    if args.head_size:
        train_choices = choices[features.rows(Split.TRAIN)]
        bank.head_ids.copy_(frequent_tokens(train_choices, model.vocab_size, args.head_size, model.eos_ids))
    head = model.head_weight if bank.head_ids is None else model.head_weight[bank.head_ids]
    held_out = features.rows(Split.TEST, policy_only=True)
    covered = 1.0 if bank.head_ids is None else torch.isin(choices[held_out], bank.head_ids).float().mean().item()
    print(f"{len(features.top)} rows, {len(held_out)} held out; the exits' head covers {covered:.2%} of their choices")

    # Powers of two near the root mean square: dividing bf16 rows by them loses nothing.
    scales = [2.0 ** features.exits[:20_000, s].float().pow(2).mean().sqrt().log2().round().item()
              for s in range(len(bank.adapters))]
    features.exits /= torch.tensor(scales, dtype=features.exits.dtype)[:, None]
    with open(args.out / "log.jsonl", "a" if args.resume else "w", encoding="utf-8") as file:
        def log(**record):
            file.write(json.dumps(record) + "\n")
            file.flush()
        before = agreement(bank, head, features, held_out[:8000], choices)
        log(step=-1, held_out_agreement=before, head_coverage=covered, scales=scales)
        steps = train(bank, head, features, choices, args, log)
    after = agreement(bank, head, features, held_out, choices)
    rescale(bank, scales)
    bank.save(args.out)
    save_json(args.out / "distill.json", {
        "provenance": provenance(args.seed), "rows": len(features.rows(Split.TRAIN)), "held_out_rows": len(held_out),
        "documents": len(documents), "data_note": args.data_note, "steps": steps, "batch": args.batch,
        "hard": args.hard, "head_coverage": covered, "untrained_agreement": before, "held_out_agreement": after})
    changes = ", ".join(f"{b:.1%} -> {a:.1%}" for b, a in zip(before, after))
    print(f"held-out agreement, untrained -> trained: {changes}")


if __name__ == "__main__":
    main()
