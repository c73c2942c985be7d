"""Train a drafter: what makes the drafts that `verified` judges, in place of the exit before the first layer.

    python -m training.drafter --exits runs/my-llama --data data/my-llama
    python -m training.drafter --exits runs/my-llama --data data/more --out runs/further --go-on
    torchrun --nproc-per-node 2 -m training.drafter ...

It begins as the exit before the first layer, and learns on chains: its own rows are carried on to the tokens after
(EAGLE-3's training-time test, Li et al. 2025), beside a context that it also has while decoding (`Drafter`). The exits
stay as they are, so what was measured of them holds; only the speed of `verified` depends on the drafter. With
--go-on the drafter that they have learns further. Started again, a run goes on from its last checkpoint.
"""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cascadeexit.exits import Drafter, ExitBank
from cascadeexit.hub import load_model
from cascadeexit.model import SegmentedModel
from training.command import run_command
from training.distill import ExitHead, Run, batches, exit_loss, micro_batches, optimizer_for, update, whitening
from training.documents import Split, load_documents
from training.features import Features, FeatureStore
from training.json_files import save_json
from training.provenance import provenance

_SHARES = (1.0, 0.5, 0.3)       # of the rows, learned from at each place of a chain: deep ones are seldom reached
_JUDGED = 4                     # places of a chain in reports


class Rows:
    """Positions of a few documents, one after another (N)."""

    def __init__(self, features: list[Features]):
        exits, self.top, wanted, choices = (torch.cat([getattr(f, name) for f in features])
                                            for name in ("exits", "top", "wanted", "choices"))
        self.h, self.deep, self.top = exits[:, 0].float(), exits[:, 1:].flatten(1).float(), self.top.float()
        self.wanted, self.choices = wanted.nonzero()[:, 0], choices.long()
        self._places = torch.cat([torch.arange(len(f.ids)) for f in features]).to(exits.device)

    def back(self, rows: Tensor, tokens: int) -> Tensor:
        """At each position the row of so many tokens before it in its document, zero before its start."""
        return rows.roll(tokens, 0) * (self._places >= tokens)[:, None]


class Whitened:
    """What the drafter sees in training, as for `training.distill.Inputs`; `fold` undoes it in its weights."""

    def __init__(self, drafter: Drafter, store: FeatureStore, documents: list[int]):
        self._drafter, moments, count = drafter, [0.0, 0.0], 0
        for i in documents:
            rows = Rows([store[i]])
            x = torch.cat([rows.h, rows.back(rows.top, 1)], -1)[rows.wanted]
            for j, seen in enumerate((x, rows.deep[rows.wanted])):
                moments[j] = moments[j] + seen.T @ seen
            count += len(x)
        self.near, self.deep = (whitening(part / count) for part in moments)
        self._change(*(torch.linalg.inv(part.double()).float() for part in (self.near, self.deep)))

    @torch.no_grad()
    def _change(self, near: Tensor, deep: Tensor) -> None:
        adapter = self._drafter.adapter
        for projection, change in ((adapter.linear, near), (adapter.gate, near), (adapter.down, near),
                                   (self._drafter.context, deep)):
            projection.weight.copy_(projection.weight @ change.T)

    @torch.no_grad()
    def fold(self) -> None:
        """Make the drafter read rows as they come."""
        self._change(self.near, self.deep)

    def chain(self, rows: Rows, length: int) -> list[Tensor]:
        """The drafter's rows (N, D) at each position, after 0, 1, ... tokens of its own on the way there."""
        context = F.linear(rows.deep, self._drafter.context.weight @ self.deep.T)
        out, said = [], rows.back(rows.top, 1)
        for own in range(length):
            x = torch.cat([rows.h, said + rows.back(context, own + 1)], -1) @ self.near
            out.append(self._drafter.adapter(*x.chunk(2, -1)))
            said = rows.back(out[-1], 1)
        return out


def learn(inputs: Whitened, rows: Rows, words: ExitHead, total: int, generator: torch.Generator, args) -> Tensor:
    """Gradients of the mean loss over `total` rows. Returns sums of loss and of right rows at the first place (2,)."""
    weight, added = words.sample(args.seed * 1009 + generator.initial_seed())
    at, device = rows.wanted, weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        hiddens = inputs.chain(rows, len(_SHARES))
    with torch.no_grad():
        full = (F.linear(rows.top[at].to(weight.dtype), weight).float() + added).softmax(-1)
    loss, labels, agreed = 0.0, words.local[rows.choices[at]], 0
    for hidden, share in zip(hiddens, _SHARES):
        some = (torch.rand(len(at), generator=generator) < share).to(device)
        logits = F.linear(hidden[at[some]].to(weight.dtype), weight).float() + added
        loss = loss + exit_loss(logits, full[some], labels[some], hard=args.hard)[0]
        if share == 1:
            agreed = (logits.detach().argmax(-1) == labels).sum()
    (loss / total).backward()
    return torch.stack([loss.detach(), agreed])


@torch.no_grad()
def agreement(inputs: Whitened, store: FeatureStore, documents: list[int], head: ExitHead,
              accelerator: Accelerator) -> list[float]:
    """Top-1 agreement with the full model after 0, 1, ... tokens of its own, of the words that are drafted."""
    hits = torch.zeros(_JUDGED + 1, dtype=torch.float64, device=accelerator.device)
    for i in documents[accelerator.process_index::accelerator.num_processes]:
        rows = Rows([store[i]])
        labels = head.local[rows.choices[rows.wanted]]
        for place, hidden in enumerate(inputs.chain(rows, _JUDGED)):
            hits[place] += (F.linear(hidden[rows.wanted].to(head.own.dtype), head.own).argmax(-1) == labels).sum()
        hits[-1] += len(labels)
    *hits, count = accelerator.reduce(hits).tolist()
    return [hit / max(1, count) for hit in hits]


def train(inputs: Whitened, drafter: Drafter, store: FeatureStore, training: list[int], held_out: list[int],
          head: ExitHead, words: ExitHead, run: Run, accelerator: Accelerator, args) -> int:
    """Train in place; returns the number of steps."""
    lengths = {i: len(d.ids) for i, d in enumerate(store.documents)}
    plan = batches({i: store.rows(i) for i in training}, args.batch, args.epochs, args.seed)
    weights = list(drafter.parameters())
    optimizer, schedule = optimizer_for(weights, args.lr, len(plan))
    first = 0
    if run.state:
        first = run.state["step"]
        for part, name in ((drafter, "drafter"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(run.state[name])
    if accelerator.num_processes > 1:
        broadcast([weight.data for weight in weights])
    mine = [step[accelerator.process_index::accelerator.num_processes] for step in plan]
    started, tokens = time.perf_counter(), 0
    bar = tqdm(range(first, len(plan)), initial=first, total=len(plan), unit="step", desc="drafter",
               disable=not accelerator.is_main_process)
    for step in bar:
        total, sums = sum(store.rows(i) for i in plan[step]), torch.zeros(2, device=accelerator.device)
        store.expect(mine[step + 1] if step + 1 < len(plan) else [])
        for part in micro_batches(mine[step], lengths, args.micro_batch):
            generator = torch.Generator().manual_seed(step * 64 + accelerator.process_index)
            sums += learn(inputs, Rows([store[i] for i in part]), words, total, generator, args)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums)
        update(weights, optimizer, schedule, accelerator)
        tokens += total
        loss, agreed = (sums / total).tolist()
        run.log(step=step + 1, rows=total, loss=loss, agreement=agreed, lr=schedule.get_last_lr()[0])
        speed = tokens / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {loss:.2f}, agree {agreed:.0%}, {speed:.0f} tokens/s")
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save(step + 1, drafter=drafter.state_dict(), optimizer=optimizer.state_dict(),
                     schedule=schedule.state_dict())
            rates = agreement(inputs, store, held_out[:60], head, accelerator)
            run.log(step=step + 1, held_out_agreement=rates)
            if accelerator.is_main_process:
                bar.write(f"step {step + 1}: held-out agreement " + " / ".join(f"{rate:.1%}" for rate in rates))
    return len(plan)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="bundled name, Hub id or local folder; default the one the exits were made for")
    p.add_argument("--exits", type=Path, required=True, help="exits folder, with an exit before the first layer")
    p.add_argument("--data", type=Path, nargs="+", required=True, help="folders written by training.data")
    p.add_argument("--out", type=Path, help="folder for the exits with the drafter; default EXITS, which gain it")
    p.add_argument("--go-on", action="store_true", help="train the drafter that EXITS have further, instead of "
                   "beginning one as the exit before the first layer")
    p.add_argument("--data-note", default="", help="what the data is, in words")
    p.add_argument("--tail", type=int, default=1024, help="words that are not drafted, sampled at each step")
    p.add_argument("--hard", type=float, default=0.33, help="weight of the cross-entropy; KL has the rest")
    p.add_argument("--epochs", type=float, default=1.0, help="passes over the training documents")
    p.add_argument("--batch", type=int, default=1024, help="training rows a step, over all processes")
    p.add_argument("--micro-batch", type=int, default=8192, help="tokens in one backward pass; a step may have several")
    p.add_argument("--lr", type=float, default=7e-4)
    p.add_argument("--fit-documents", type=int, default=300, help="documents that set the scale of the rows")
    p.add_argument("--feature-gb", type=float, default=20.0, help="disk for hidden states; what does not fit is "
                   "computed again in every epoch")
    p.add_argument("--features", type=Path, help="folder for hidden states; default EXITS/features")
    p.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16")
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                   help="go on from the last checkpoint in OUT/drafter")
    p.add_argument("--seed", type=int, default=0)
    return p


def main() -> None:
    args = parser().parse_args()
    args.out = args.out or args.exits
    work = args.out / "drafter"                 # log and checkpoint
    work.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    bank = ExitBank.load(args.exits)
    if bank.config.layers[:1] != (0,) or bank.config.adapter != "carry":
        raise ValueError(f"{args.exits} has '{bank.config.adapter}' exits after layers {bank.config.layers}; a drafter "
                         "goes on from a 'carry' exit before the first layer: train exits with --exits 0,...")
    if args.go_on and not bank.drafter:
        raise ValueError(f"{args.exits} has no drafter that could go on: train one without --go-on first")
    base, _, name = load_model(args.model or bank.config.base_model, device=str(accelerator.device))
    model = SegmentedModel(base, bank.config.layers, name=name)
    store = FeatureStore(model, load_documents(args.data), args.features or args.exits / "features", args.feature_gb)
    store.prepare(accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    store.open()

    c, first = bank.config, bank.adapters[0]
    width = c.drafter_width if args.go_on else first.gate.out_features
    drafter = Drafter(c.hidden_size, width, len(c.layers) - 1, c.norm_eps).to(accelerator.device)
    if args.go_on:
        drafter.load_state_dict(bank.drafter.state_dict())
    else:
        drafter.adapter.load_state_dict(first.state_dict())
    drafted = torch.arange(c.vocab_size) if bank.head_ids is None else bank.head_ids[:c.draft_size or c.words(0)]
    drafted, weight = drafted.to(accelerator.device), model.head_weight.detach()
    head, words = ExitHead(weight, drafted, 0), ExitHead(weight, drafted, args.tail)
    training = store.of(Split.TRAIN, policy_only=True)
    held_out = store.of(Split.TEST, policy_only=True)
    if not training or not held_out:
        raise ValueError(f"{len(training)} training and {len(held_out)} held-out documents that the model wrote are "
                         "too few: write more with python -m training.data policy")
    inputs = Whitened(drafter, store, training[:args.fit_documents])
    before = agreement(inputs, store, held_out, head, accelerator)
    key = {"documents": store.fingerprint(),
           "start": bank.drafter_fingerprint() if args.go_on else bank.fingerprint()}
    key |= {k: getattr(args, k) for k in ("hard", "tail", "epochs", "batch", "lr", "fit_documents", "seed")}
    run = Run(work, key, args.resume, accelerator.is_main_process)
    steps = train(inputs, drafter, store, training, held_out, head, words, run, accelerator, args)
    after = agreement(inputs, store, held_out, head, accelerator)
    if accelerator.is_main_process:
        inputs.fold()
        bank.config = dataclasses.replace(c, drafter_width=width)
        bank.drafter = drafter.to(model.dtype)
        bank.adapters.to(model.dtype)           # as they were saved; estimators stay in fp32
        bank.save(args.out)
        for path in args.exits.glob("*.json"):
            if not (args.out / path.name).exists():
                shutil.copy(path, args.out)
        before_it = args.exits / "drafter.json"
        save_json(args.out / "drafter.json", {
            "went_on_from": json.loads(before_it.read_text()) if args.go_on and before_it.exists() else None,
            "provenance": provenance(args.seed), "settings": key, "data_note": args.data_note, "steps": steps,
            "processes": accelerator.num_processes, "rows": sum(map(store.rows, training)),
            "held_out_rows": sum(map(store.rows, held_out)), "held_out_agreement_before": before,
            "held_out_agreement": after})
        print("held-out agreement after 0, 1, ... tokens of its own, before -> after: "
              + ", ".join(f"{b:.1%} -> {a:.1%}" for b, a in zip(before, after)))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
