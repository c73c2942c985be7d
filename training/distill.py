"""Train the exits' adapters: each learns to say, from its own layer, what the frozen model says at the top.

    python -m training.distill --preset smollm2-135m-instruct --data data/policy data/text --out runs/smollm2
    python -m training.distill --model ./my-llama --exits 0.3,0.57,0.8 --data data/my-llama --out runs/my-llama
    torchrun --nproc-per-node 4 -m training.distill ...         # processes on CPUs, or GPUs

Loss per exit, in nats per token: (1 - hard) T^2 KL(full || exit) + hard * cross-entropy, summed over words, averaged
over tokens (Hinton et al. 2015). The base model is frozen; only the adapters and their norms learn. With a trimmed
head the words outside it are not forgotten: a fresh sample of them stands in for all at every step. Started again, a
run goes on from its last checkpoint and ends as if it had not been interrupted.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from cascadeexit.exits import ADAPTERS, ExitBank
from cascadeexit.hub import DEFAULT_MODEL, exit_layers, load_model
from cascadeexit.model import SegmentedModel
from training.command import run_command
from training.documents import Split, load_documents
from training.features import Features, FeatureStore
from training.json_files import read_lines, save_json
from training.plots import loss_plot
from training.provenance import provenance

PRESETS = {
    # Hyper-parameters of the published exits for Llama-3.2-3B; the loss is per token here, theirs summed over the text.
    "published": dict(model="meta-llama/Llama-3.2-3B", exits="8,16,22", adapter="swiglu", width=512, head_size=[0],
                      train_words=0, hard=0.5, labels="text", temperature=2.0, epochs=3.0, batch=16 * 512, lr=3e-4),
    "smollm2-135m-instruct": dict(model=DEFAULT_MODEL, exits="0,9,17,24", head_size=[8192, 8192, 8192, 49152]),
}
DEEPEST = 3             # tokens of an exit in a row that training makes believe
_BLOCK = 512            # rows whose logits exist at the same time


# -- the loss ---------------------------------------------------------------------------------------------------------


class _ExitLoss(torch.autograd.Function):
    """The loss with its gradient in closed form: autograd would walk over the (n, K) tables five times as often."""

    @staticmethod
    def forward(ctx, logits: Tensor, p: Tensor, labels: Tensor, hard: float, temperature: float, loss: str):
        log_q = F.log_softmax(logits / temperature, -1)
        kl = torch.xlogy(p, p).sum(-1) - torch.linalg.vecdot(p, log_q)
        q, known = log_q.exp(), (labels >= 0).nonzero()[:, 0]
        distance, gradient = temperature ** 2 * kl, temperature * (q - p)
        if loss != "kl":
            sign = (q - p).sign_()
            tv, tv_gradient = 0.5 * torch.linalg.vecdot(sign, q - p), sign.sub_(torch.linalg.vecdot(sign, q)[:, None])
            tv_gradient.mul_(q).mul_(0.5 / temperature)
            share = torch.exp(-3 * (1 - tv)) if loss == "hybrid" else torch.zeros_like(tv)
            distance = share * distance + (1 - share) * tv
            gradient = share[:, None] * gradient + (1 - share)[:, None] * tv_gradient
        gradient *= 1 - hard
        ce = logits.new_zeros(())
        if hard:
            log_q = log_q if temperature == 1 else F.log_softmax(logits, -1)
            ce = -log_q[known, labels[known]].sum()
            gradient[known] += hard * (q if temperature == 1 else log_q.exp())[known]
            gradient[known, labels[known]] -= hard
        ctx.save_for_backward(gradient)
        kl = kl.sum()
        ctx.mark_non_differentiable(kl, ce)
        return (1 - hard) * distance.sum() + hard * ce, kl, ce

    @staticmethod
    def backward(ctx, weight: Tensor, *_):
        return weight * ctx.saved_tensors[0], None, None, None, None, None


def exit_loss(logits: Tensor, full_probs: Tensor, labels: Tensor, *, hard: float, temperature: float = 1.0,
              loss: str = "kl") -> tuple[Tensor, Tensor, Tensor]:
    """(loss, KL from the full model, cross-entropy), each summed over rows; the loss alone has a gradient.

    Args:
        logits: the exit's (n, K); full_probs: the full model's softmax at this temperature, over the same words.
        labels: index of the right word (n,), -1 where it is not among the K: such rows have no cross-entropy.
        hard: weight of the cross-entropy; the distance to the full model has 1 - hard.
        loss: 'kl'; 'tv', total variation: 1 - the chance that a draft is accepted (Leviathan et al. 2023); 'hybrid',
            both: KL gains weight, exp(-3 (1 - acceptance)), as the two agree.
    """
    return _ExitLoss.apply(logits, full_probs, labels, hard, temperature, loss)


class ExitHead:
    """The words an exit is trained on: its own head, and a sample of the rest weighted to stand for all of them."""

    def __init__(self, weight: Tensor, ids: Tensor | None, tail: int):
        self.full, self.ids = weight, ids
        self.own = weight if ids is None else weight[ids]
        vocab = torch.arange(len(weight), device=weight.device)
        self.local = vocab.clone()                                  # token id -> row of the exit's head, -1 = none
        self._rest, self._tail = vocab[:0], 0
        if ids is not None:
            self.local.fill_(-1)[ids] = torch.arange(len(ids), device=weight.device)
            self._rest = vocab[self.local < 0]
            self._tail = min(tail, len(self._rest))

    def sample(self, seed: int) -> tuple[Tensor, Tensor]:
        """Rows (K + tail, D) and what to add to their logits (K + tail,): log(1 / chance of being sampled)."""
        added = self.own.new_zeros(len(self.own) + self._tail, dtype=torch.float32)
        if not self._tail:
            return self.own, added
        picked = torch.randperm(len(self._rest), generator=torch.Generator().manual_seed(seed))[:self._tail]
        added[len(self.own):] = math.log(len(self._rest) / self._tail)
        return torch.cat([self.own, self.full[self._rest[picked.to(self._rest.device)]]]), added


def backward(hiddens: list[Tensor], top: Tensor, labels: Tensor, choices: Tensor, head: ExitHead, seed: int,
             rows: int, args) -> Tensor:
    """Gradients of the mean loss over `rows` rows into the adapters, block by block, so that logits stay small.

    Args:
        hiddens: adapted rows of each exit (n, D); top: the full model's (n, D).
        labels: the token ids that the cross-entropy asks for; choices: those that count as agreement (n,).

    Returns sums over these rows for each exit: KL, cross-entropy, agreeing rows (E, 3).
    """
    weight, added = head.sample(seed)
    sums = torch.zeros(len(hiddens), 3, device=top.device)
    gradients = [torch.empty_like(h) for h in hiddens]
    for a in range(0, len(top), _BLOCK):
        part = slice(a, a + _BLOCK)
        with torch.no_grad():
            full_logits = F.linear(top[part].to(weight.dtype), weight).float() + added
            full_probs = (full_logits / args.temperature).softmax(-1)
        for s, hidden in enumerate(hiddens):
            x = hidden[part].detach().requires_grad_()
            logits = F.linear(x.to(weight.dtype), weight).float() + added
            loss, kl, ce = exit_loss(logits, full_probs, head.local[labels[part]], hard=args.hard,
                                     temperature=args.temperature, loss=args.loss)
            (loss / rows).backward()
            gradients[s][part] = x.grad
            agreed = logits[:, :len(head.own)].argmax(-1) == head.local[choices[part]]
            sums[s] += torch.stack([kl, ce, agreed.sum()])
    for hidden, gradient in zip(hiddens, gradients):
        if hidden.requires_grad:
            hidden.backward(gradient)
    return sums


# -- exits before training --------------------------------------------------------------------------------------------


def frequent_tokens(choices: Tensor, vocab_size: int, always: frozenset[int]) -> Tensor:
    """All tokens, those that the full model chooses most often first; those in `always` lead: (V,)."""
    counts = torch.bincount(choices, minlength=vocab_size).double()
    counts[list(always)] = math.inf
    # Among tokens never chosen the lower id goes first: byte-pair ids are ordered by frequency of their merges.
    return torch.argsort(counts, descending=True, stable=True)


def whitening(moments: Tensor) -> Tensor:
    """The map x -> x M (D, D) that whitens rows whose second moments, the mean of x^T x, are these (D, D)."""
    values, vectors = torch.linalg.eigh(moments.double())
    values = values + 0.03 * values.mean()     # 0.001 to 0.3 tried: the best on held-out text
    return (vectors * values.rsqrt() @ vectors.T).float()


class Inputs:
    """What adapters see in training: rows brought to one scale, undone in their weights at the end (`fold`).

    Hidden states have a few directions hundreds of times as strong as the rest, and gradient steps crawl along the
    weak ones. A `carry` adapter, linear in its input, is trained on whitened rows and starts from the ridge regression
    of the full model's last hidden state; a `swiglu` adapter, which adds its input to its output, only on scaled ones.
    """

    def __init__(self, bank: ExitBank, store: FeatureStore, documents: Sequence[int], final_norm: Tensor,
                 total: Callable[[Tensor], Tensor] = lambda sums: sums):
        """documents: this process's share of them; total: adds up what all processes have."""
        self.carry = bank.config.adapter == "carry"
        self.maps: list[Tensor | float] = []
        device, D = final_norm.device, len(final_norm)
        for s, adapter in enumerate(bank.adapters):
            if not self.carry:
                rms = [store[i].exits[:, s].float().pow(2).mean().sqrt().item() for i in documents]
                added, number = total(torch.tensor([sum(rms), len(rms)], device=device)).tolist()
                self.maps.append(2.0 ** round(math.log2(added / number)))      # dividing bf16 rows by it loses nothing
                adapter.rescale(1 / self.maps[s], 1.0)
                continue
            rows, xx, xy = (torch.zeros(shape, device=device) for shape in ((), (2 * D, 2 * D), (2 * D, D)))
            for f in map(store.__getitem__, documents):
                x = torch.cat([f.exits[:, s], carried(f)], -1)[f.wanted].to(device).float()     # (n, 2 D)
                y = f.top[f.wanted].to(device).float() / final_norm
                xx, xy, rows = xx + x.T @ x, xy + x.T @ y, rows + len(x)
            xx, xy, rows = total(xx), total(xy), total(rows)
            self.maps.append(whitening(xx / rows))
            # Ridge regression: (X^T X + lambda I)^-1 X^T Y, in whitened coordinates W X^T Y.
            adapter.linear.weight.data.copy_((self.maps[s] @ (xy / rows)).T)

    def __call__(self, s: int, h: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        if not self.carry:
            return h / self.maps[s], said
        with torch.autocast(h.device.type, enabled=False):
            return (torch.cat([h, said], -1) @ self.maps[s]).chunk(2, -1)

    @torch.no_grad()
    def adopt(self, bank: ExitBank, trained: ExitBank) -> list[int]:
        """Go on from exits trained before, where they sit after the same layer; the layers they were taken for.

        Raises ValueError when their adapters have another shape.
        """
        shared = [layer for layer in bank.config.layers if layer in trained.config.layers]
        for layer in shared:
            s = bank.config.layers.index(layer)
            adapter, before = bank.adapters[s], trained.adapters[trained.config.layers.index(layer)]
            try:
                adapter.load_state_dict(before.state_dict())
            except RuntimeError as error:
                raise ValueError(f"the exits to start from have adapters of another shape: {error}") from error
            if not self.carry:
                adapter.rescale(1 / self.maps[s], 1.0)
                continue
            back = torch.linalg.inv(self.maps[s].double()).float()
            for projection in (adapter.linear, adapter.gate, adapter.down):
                projection.weight.copy_(projection.weight @ back.T)
        return shared

    @torch.no_grad()
    def fold(self, bank: ExitBank) -> None:
        """Make the adapters read rows as they come."""
        for adapter, change in zip(bank.adapters, self.maps):
            if not self.carry:
                adapter.rescale(change, 1.0)
                continue
            for projection in (adapter.linear, adapter.gate, adapter.down):
                projection.weight.copy_(projection.weight @ change.T)


def carried(features: Features) -> Tensor:
    """The full model's hidden state that named each token: that of the position before it (T, D), zero at first."""
    return torch.cat([torch.zeros_like(features.top[:1]), features.top[:-1]])


# -- training ---------------------------------------------------------------------------------------------------------


def batches(rows: dict[int, int], batch: int, epochs: float, seed: int,
            repeats: dict[int, int] | None = None) -> list[list[int]]:
    """Documents of each step: every epoch its own order, cut where `batch` rows are reached.

    repeats: how often an epoch passes over a document, 1 where it does not say.
    """
    order, numbers = [], [i for i in sorted(rows) for _ in range((repeats or {}).get(i, 1))]
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(seed * 1009 + epoch)
        order += [numbers[i] for i in torch.randperm(len(numbers), generator=generator)]
    steps, waiting = [], 0
    for number in order[:round(epochs * len(numbers))]:
        if not waiting:
            steps.append([])
        steps[-1].append(number)
        waiting = waiting + rows[number]
        waiting = 0 if waiting >= batch else waiting
    return steps


def micro_batches(documents: list[int], lengths: dict[int, int], tokens: int) -> list[list[int]]:
    """These documents in parts of at most `tokens` tokens, or of one document."""
    parts, room = [], 0
    for number in documents:
        room -= lengths[number]
        if room < 0:
            parts.append([])
            room = tokens - lengths[number]
        parts[-1].append(number)
    return parts


def adapted(bank: ExitBank, inputs: Inputs, features: list[Features], own: float = 0.0,
            generator: torch.Generator | None = None, deepest: int = DEEPEST,
            learn: list[int] | None = None) -> list[Tensor]:
    """Rows that are wanted of these documents, after the adapters of the exits in `learn`, None = all: (n, D) each.

    own: share of them whose token counts as named by an exit, so that its adapted hidden state, instead of the full
        model's, is what is carried on to them; up to `deepest` tokens in a row. An exit drawn at random named them;
        what the exit before the first layer reads, itself did, since it drafts whole chains.
    """
    device = bank.adapters[0].norm.weight.device
    h = torch.cat([f.exits for f in features]).to(device)                                       # (N, E, D)
    said = torch.cat([carried(f) for f in features]).to(device)                                 # (N, D)
    places = torch.cat([torch.arange(len(f.ids)) for f in features]).to(device)                 # in their documents
    rows = torch.cat([f.wanted for f in features]).to(device).nonzero()[:, 0]                   # (n,)
    every, out = list(range(len(bank.adapters))), []
    carry = handed_on(bank, inputs, h, said, places, rows, own, every, generator, deepest)
    for s in every if learn is None else learn:
        alone = bank.config.layers[s] == 0
        handed = handed_on(bank, inputs, h, said, places, rows, own, [s], generator, deepest) if alone else carry
        out.append(bank.hidden(s, *inputs(s, h[rows, s].float(), handed)))
    return out


@torch.no_grad()
def handed_on(bank: ExitBank, inputs: Inputs, h: Tensor, said: Tensor, places: Tensor, rows: Tensor, own: float,
              exits: list[int], generator: torch.Generator | None, deepest: int) -> Tensor:
    """What is carried to these rows (n, D): the full model's state, or for a share `own` that of one of these exits.

    Half of the latter follow one token of an exit, the others more, each a token less often, up to `deepest`.
    """
    carry = said[rows].float()
    if not own or not inputs.carry:
        return carry
    draw = torch.rand(3, len(rows), generator=generator).to(rows.device)
    who = (draw[0] * len(exits)).long()
    depth = (-draw[2].log2().floor().long()).clamp(1, deepest)                           # 1, 2, 3 ... by halves
    depth = torch.minimum(depth.masked_fill(draw[1] >= own, 0), places[rows])
    for back in range(deepest, 0, -1):
        for i, s in enumerate(exits):
            here = (depth >= back) & (who == i)
            at = rows[here] - back
            before = torch.where((depth[here] == back)[:, None], said[at].float(), carry[here])
            carry[here] = bank.hidden(s, *inputs(s, h[at, s].float(), before)).float()
    return carry


def labels_of(features: Features, kind: str) -> Tensor:
    """What the cross-entropy asks for: the full model's choice, or the next token of the text."""
    return features.choices if kind == "choice" else features.ids.roll(-1)


@torch.no_grad()
def agreement(bank: ExitBank, inputs, store: FeatureStore, documents: list[int], head: ExitHead,
              accelerator: Accelerator, own: float = 0.0, learn: list[int] | None = None) -> list[float]:
    """Top-1 agreement with the full model over these documents, at the exits in `learn`; arguments as for `adapted`.

    Each process reads its part of them, so all have to call.
    """
    exits = list(range(len(bank.adapters))) if learn is None else learn
    sums = torch.zeros(len(exits) + 1, dtype=torch.float64, device=accelerator.device)      # and the rows
    for number in documents[accelerator.process_index::accelerator.num_processes]:
        f, generator = store[number], torch.Generator().manual_seed(number)
        choices = f.choices[f.wanted].to(accelerator.device)
        with accelerator.autocast():
            hidden = adapted(bank, inputs, [f], own, generator, deepest=1, learn=exits)
        for i, (s, rows) in enumerate(zip(exits, hidden)):
            words = head.own[:bank.config.words(s)]
            sums[i] += (F.linear(rows.to(words.dtype), words).argmax(-1) == head.local[choices]).sum()
        sums[-1] += len(choices)
    *hits, rows = accelerator.reduce(sums).tolist()
    return [hit / max(1, rows) for hit in hits]


class Run:
    """What is kept between steps: the log and the checkpoint, both cut back to the same step on resume."""

    def __init__(self, folder: Path, key: dict, resume: bool, main: bool):
        self.log_file, self.checkpoint, self.key, self.main = folder / "log.jsonl", folder / "checkpoint.pt", key, main
        self.state = None
        if resume and self.checkpoint.exists():
            self.state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            before = self.state["key"]
            if "config" in key:                                                 # what older ones did not know
                before = {"only": [], "text_repeats": 1} | before
                before["config"] = {"head_sizes": (), "drafter_width": 0} | before["config"]
            changed = {k: (before.get(k), key.get(k)) for k in before | key if before.get(k) != key.get(k)}
            if changed:
                raise SystemExit(f"{self.checkpoint} was made with other settings, before and now: {changed}. Give "
                                 "the same ones, another --out, or --no-resume to start anew.")
        if main:
            records = self.records() if self.state else []
            self.log_file.write_text("".join(json.dumps(r) + "\n" for r in records if r["step"] <= self.state["step"]))

    def records(self) -> list[dict]:
        return read_lines(self.log_file)

    def log(self, **record) -> None:
        if self.main:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, step: int, **state) -> None:
        if self.main:
            torch.save({"step": step, "key": self.key} | state, self.checkpoint.with_suffix(".tmp"))
            self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)


def optimizer_for(weights: list[Tensor], rate: float, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW whose rate rises over a twentieth of the steps and falls as a cosine."""
    optimizer, warm_up = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01), max(1, steps // 20)
    return optimizer, LambdaLR(optimizer, lambda step: min(
        (step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))))


def update(weights: list[Tensor], optimizer: torch.optim.Optimizer, schedule: LambdaLR,
           accelerator: Accelerator) -> None:
    """One step along the gradients of all processes."""
    if accelerator.num_processes > 1:
        for weight in weights:
            weight.grad = accelerator.reduce(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def learning(bank: ExitBank, args) -> list[int]:
    """The exits that are to learn."""
    return [s for s, layer in enumerate(bank.config.layers) if not args.only or layer in args.only]


def train(bank: ExitBank, inputs: Inputs, store: FeatureStore, head: ExitHead, words: ExitHead, run: Run,
          accelerator: Accelerator, args) -> int:
    """Train the adapters in place; returns the number of steps they have had.

    head: the one the exits will have; words: those they are trained on.
    """
    learn = learning(bank, args)
    lengths = {i: len(d.ids) for i, d in enumerate(store.documents)}
    training, own = store.of(Split.TRAIN), set(store.of(Split.TRAIN, policy_only=True))
    plan = batches({i: store.rows(i) for i in training}, args.batch, args.epochs, args.seed,
                   {i: args.text_repeats for i in training if i not in own})
    held_out = store.of(Split.TEST, policy_only=True) or store.of(Split.TEST)
    weights = [w for s in learn for w in bank.adapters[s].parameters()]
    optimizer, schedule = optimizer_for(weights, args.lr, len(plan))
    first = 0
    if run.state:
        first = run.state["step"]
        bank.adapters.load_state_dict(run.state["adapters"])
        optimizer.load_state_dict(run.state["optimizer"])
        schedule.load_state_dict(run.state["schedule"])

    def keep(step: int) -> None:
        run.save(step, adapters=bank.adapters.state_dict(), optimizer=optimizer.state_dict(),
                 schedule=schedule.state_dict())

    if accelerator.num_processes > 1:
        broadcast([weight.data for weight in weights])      # regressions on several GPUs differ in their last bits
    mine = [step[accelerator.process_index::accelerator.num_processes] for step in plan]
    started, tokens = time.perf_counter(), 0
    bar = tqdm(range(first, len(plan)), initial=first, total=len(plan), unit="step", desc="distill",
               disable=not accelerator.is_main_process)
    for step in bar:
        late = torch.tensor(float(accelerator.is_main_process and time.perf_counter() - started > args.minutes * 60))
        if accelerator.reduce(late.to(accelerator.device)).item():      # one clock for all processes
            bar.write(f"stopped by --minutes at step {step} of {len(plan)}; the same command goes on")
            keep(step)
            return step
        rows, sums = sum(store.rows(i) for i in plan[step]), 0
        generator = torch.Generator().manual_seed((args.seed * 1009 + step) * 64 + accelerator.process_index)
        store.expect(mine[step + 1] if step + 1 < len(plan) else [])
        for part in micro_batches(mine[step], lengths, args.micro_batch):
            features = [store[i] for i in part]
            top, labels, choices = (torch.cat([kind(f)[f.wanted] for f in features]).to(accelerator.device) for kind in
                                    (lambda f: f.top, lambda f: labels_of(f, args.labels), lambda f: f.choices))
            with accelerator.autocast():
                hiddens = adapted(bank, inputs, features, args.own_share, generator, learn=learn)
            sums = sums + backward(hiddens, top, labels, choices, words, args.seed * 1009 + step, rows, args)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(torch.zeros(len(learn), 3, device=accelerator.device) + sums)
        update(weights, optimizer, schedule, accelerator)
        tokens += rows
        kl, ce, agreed = (sums / rows).T.tolist()
        run.log(step=step + 1, rows=rows, kl=kl, ce=ce, agreement=agreed, lr=schedule.get_last_lr()[0])
        bar.set_postfix_str(f"kl {'/'.join(f'{x:.2f}' for x in kl)}, agree {'/'.join(f'{x:.0%}' for x in agreed)}, "
                            f"{tokens / (time.perf_counter() - started):.0f} tokens/s")
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            keep(step + 1)
            rates = agreement(bank, inputs, store, held_out[:60], head, accelerator, learn=learn)
            run.log(step=step + 1, held_out_agreement=rates)
            if accelerator.is_main_process:
                bar.write(f"step {step + 1}: held-out agreement " + " / ".join(f"{r:.1%}" for r in rates))
    return len(plan)


# -- command ----------------------------------------------------------------------------------------------------------


def _report(exits: Path | None) -> dict | None:
    """How these exits were trained, where they say so."""
    path = exits / "distill.json" if exits else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="settings of a known model; options given beside it win")
    p.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
    p.add_argument("--data", type=Path, nargs="+", required=True, help="folders written by training.data")
    p.add_argument("--out", type=Path, required=True, help="folder for the artifact, log and checkpoint")
    p.add_argument("--continue-from", type=Path, help="exits folder to go on from; layers it does not have start anew, "
                   "and an exit that agrees less on the calibration documents in the end stays as it was there")
    p.add_argument("--only", type=lambda text: sorted({int(part) for part in text.split(",")}), default=[],
                   help="with --continue-from: the exit layers that learn (0,24); the others stay as they are")
    p.add_argument("--data-note", default="", help="what the data is, in words, for the model card")
    p.add_argument("--exits", help="exit layers (0,9,17,24; 0 is before the first) or parts of the depth "
                   "(default 0,0.3,0.57,0.8)")
    p.add_argument("--adapter", choices=tuple(ADAPTERS), default="carry", help="kind of adapter: swiglu as published")
    p.add_argument("--width", type=int, default=512, help="inner width of the adapters")
    p.add_argument("--own-share", type=float, default=0.3, help="carry: share of tokens that count as named by an exit")
    p.add_argument("--head-size", type=lambda text: [int(part) for part in text.split(",")], default=[16384],
                   help="words in the exits' head, one number, 0 = all, or one for each exit (8192,8192,49152)")
    p.add_argument("--draft-size", type=int, default=4096, help="of these, the most frequent, from which drafts are "
                   "made; 0 = all that the first exit reads")
    p.add_argument("--train-words", type=int, default=6144, help="most frequent words, in the loss of every step; 0 = "
                   "all")
    p.add_argument("--tail", type=int, default=4096, help="of the other words, as many are sampled at each step")
    p.add_argument("--loss", choices=("kl", "tv", "hybrid"), default="kl", help="distance to the full model")
    p.add_argument("--temperature", type=float, default=1.0, help="of the distance")
    p.add_argument("--hard", type=float, default=0.33, help="weight of the cross-entropy; the distance has the rest")
    p.add_argument("--labels", choices=("choice", "text"), default="choice", help="what the cross-entropy asks for: "
                   "the full model's choice, or the text's next token")
    p.add_argument("--epochs", type=float, default=3.0, help="passes over the training documents")
    p.add_argument("--text-repeats", type=int, default=1, help="passes of one epoch over text that the model did not "
                   "write")
    p.add_argument("--batch", type=int, default=1024, help="training rows a step, over all processes")
    p.add_argument("--micro-batch", type=int, default=8192, help="tokens in one backward pass; a step may have several")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--fit-documents", type=int, default=1500, help="documents that set the scale of the rows and the "
                   "first weights")
    p.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; the same command goes on")
    p.add_argument("--feature-gb", type=float, default=20.0, help="disk for hidden states; what does not fit is "
                   "computed again in every epoch")
    p.add_argument("--features", type=Path, help="folder for hidden states; default OUT/features")
    p.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16", help="of the adapters")
    p.add_argument("--device-map", help="'auto' spreads a model that is too big for one device over all of them, "
                   "main memory and disk; for one process")
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                   help="go on from the last checkpoint in --out")
    p.add_argument("--seed", type=int, default=0)
    return p


def main() -> None:
    command = parser()
    preset = command.parse_known_args()[0].preset
    command.set_defaults(**PRESETS.get(preset, {}))
    args = command.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.cuda.is_available())
    say = accelerator.print

    base, _, name = load_model(args.model, device=str(accelerator.device), device_map=args.device_map)
    layers = exit_layers(args.exits, base.config.num_hidden_layers)
    trained = ExitBank.load(args.continue_from) if args.continue_from else None
    if args.only and not (set(args.only) <= set(layers) <= set(trained.config.layers if trained else ())):
        raise SystemExit(f"--only {args.only} must name some of --exits {list(layers)}, and --continue-from must have "
                         "all of these: those that do not learn stay as they are there")
    model = SegmentedModel(base, layers, name=name)
    store = FeatureStore(model, load_documents(args.data), args.features or args.out / "features", args.feature_gb)
    store.prepare(accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    store.open()

    args.head_size = [min(size, model.vocab_size) for size in args.head_size]
    head_size = max(args.head_size)
    bank = ExitBank.untrained(model, width=args.width, head_size=head_size, adapter=args.adapter,
                              head_sizes=args.head_size if len(args.head_size) > 1 else (),
                              draft_size=min(args.draft_size, args.head_size[0]) // 32 * 32)
    bank.attach(model, trainable=True)
    bank.adapters.float()
    training, weight = store.of(Split.TRAIN), model.head_weight
    words = ExitHead(weight, None, 0)
    if head_size:
        ranked = frequent_tokens(store.choices(training), model.vocab_size, model.eos_ids).to(model.device)
        bank.head_ids.copy_(ranked[:head_size])
        if args.train_words:
            words = ExitHead(weight, ranked[:args.train_words], args.tail)
    head = ExitHead(weight, bank.head_ids, 0)
    held_out = store.of(Split.TEST, policy_only=True) or store.of(Split.TEST)
    at = head.local[store.choices(held_out).to(head.local.device)]
    covered = [((at >= 0) & (at < bank.config.words(s))).float().mean().item() for s in range(len(layers))]
    say(f"{len(store)} documents, {sum(map(store.rows, training))} training rows; features of {store.kept} documents "
        f"are kept; the exits' heads cover {' / '.join(f'{c:.2%}' for c in covered)} of the held-out choices")
    before = agreement(bank, lambda s, h, said: (h, said), store, held_out, head, accelerator)
    share = training[:args.fit_documents][accelerator.process_index::accelerator.num_processes]
    final_norm = model.norm_weight.to(model.device).float()         # a model in parts may have it elsewhere
    inputs = Inputs(bank, store, share, final_norm, accelerator.reduce)
    stays: list[int] = []           # layers whose exits are those of --continue-from in the end, to the bit
    if trained:
        shared = inputs.adopt(bank, trained)
        say(f"going on from {args.continue_from} after layers {shared}")
        begun, again = copy.deepcopy(bank.adapters), [s for s in learning(bank, args) if layers[s] in shared]
        check = store.of(Split.CALIBRATION, policy_only=True) or store.of(Split.CALIBRATION)
        first = agreement(bank, inputs, store, check, head, accelerator, learn=again)

    key = {"config": {k: v for k, v in asdict(bank.config).items() if k != "layers"}, "layers": list(layers),
           "documents": store.fingerprint(), "start": trained.fingerprint() if trained else None}
    key |= {k: getattr(args, k) for k in ("loss", "temperature", "hard", "labels", "epochs", "batch", "lr", "own_share",
                                          "train_words", "tail", "fit_documents", "seed", "only", "text_repeats")}
    run = Run(args.out, key, args.resume, accelerator.is_main_process)
    steps = train(bank, inputs, store, head, words, run, accelerator, args)
    if trained:
        now = agreement(bank, inputs, store, check, head, accelerator, learn=again)
        worse = {layers[s] for s, old, new in zip(again, first, now) if new < old}
        stays = sorted(worse | {layer for layer in shared if args.only and layer not in args.only})
        for layer in worse:
            bank.adapters[layers.index(layer)].load_state_dict(begun[layers.index(layer)].state_dict())
        say("agreement on calibration documents, before -> after: "
            + ", ".join(f"layer {layers[s]} {old:.2%} -> {new:.2%}" for s, old, new in zip(again, first, now))
            + "".join(f"; the exit after layer {layer} stays as it was" for layer in sorted(worse)))
    after, drafting = (agreement(bank, inputs, store, held_out, head, accelerator, own) for own in (0.0, 1.0))
    if accelerator.is_main_process:
        inputs.fold(bank)
        for layer in stays:
            bank.adapters[layers.index(layer)].load_state_dict(
                trained.adapters[trained.config.layers.index(layer)].state_dict())
        if trained and trained.drafter and trained.config.layers == layers:      # it knows nothing of the exits
            bank.drafter = trained.drafter
            bank.config = replace(bank.config, drafter_width=trained.config.drafter_width)
        bank.to(model.dtype).save(args.out)
        loss_plot(run.records(), args.only or layers, args.out / "loss.html")
        save_json(args.out / "distill.json", {
            "provenance": provenance(args.seed), "settings": key, "data_note": args.data_note, "steps": steps,
            "stays": stays, "processes": accelerator.num_processes, "documents": len(store),
            "rows": sum(map(store.rows, training)), "held_out_rows": sum(map(store.rows, held_out)),
            "head_coverage": covered, "untrained_agreement": before, "held_out_agreement": after,
            "held_out_agreement_after_exits": drafting, "went_on_from": _report(args.continue_from)})
        say("held-out agreement, untrained -> trained (after a token that an exit named): "
            + ", ".join(f"{b:.1%} -> {a:.1%} ({d:.1%})" for b, a, d in zip(before, after, drafting)))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
