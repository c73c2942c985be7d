"""Train a drafter, the small network that proposes drafts for mode `verified`.

    python -m training.drafter --exits runs/my-llama --data data/my-llama
    python -m training.drafter --exits runs/my-llama --data data/more --out runs/further --go-on
    torchrun --nproc-per-node 2 -m training.drafter ...

Without a drafter, the exit before the first layer proposes the drafts. The drafter starts with the weights of that
exit. It is trained on chains of its own drafts, as in decoding: its output for one token is the carried state of the
next token (training-time test of EAGLE-3, Li et al. 2025). It also reads a context: the hidden states at the
deeper exits, for the newest confirmed token (`cascadeexit.exits.Drafter`).

The exits do not change, so results measured with them stay valid; only the speed of `verified` depends on the drafter.
With --go-on, the drafter that the exits already have is trained further. The same command continues an interrupted run
from its last checkpoint.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn import functional as F

from cascadeexit.exits import Drafter, ExitBank
from cascadeexit.hub import load_model
from cascadeexit.model import SegmentedModel
from training.batches import batches
from training.checkpoint import RunFolder
from training.command import run_command
from training.documents import Split
from training.features import Features, FeatureStore, prepared_store
from training.inputs import whitening
from training.json_files import read_json, save_json
from training.loop import CHECK_DOCUMENTS, train
from training.loss import exit_loss
from training.options import add_exits_and_data, add_features, add_loop, command_parser
from training.provenance import provenance
from training.vocabulary import SampledHead

_SHARES = (1.0, 0.5, 0.3)       # share of the rows that are trained after 0, 1, 2 drafts: few chains get that long
_REPORTED = 4                   # agreement is reported after 0, 1, 2 and 3 drafts


class DraftRows:
    """Inputs and labels of the drafter for a few documents, one after another. Together they have N positions.

    Letters: D hidden size, E exits, n positions that `Features.wanted` selects.

    Attributes:
        h: hidden states before the first layer (N, D).
        deep: hidden states at the other exits (N, (E - 1) D).
        top: the full model's last hidden states after the final norm (N, D).
        wanted: the selected positions (n,).
        choices: token ids that the full model chooses after each position (N,).
    """

    def __init__(self, features: list[Features]):
        exits, self.top, wanted, choices = (torch.cat([getattr(f, name) for f in features])
                                            for name in ("exits", "top", "wanted", "choices"))
        self.h, self.deep, self.top = exits[:, 0].float(), exits[:, 1:].flatten(1).float(), self.top.float()
        self.wanted, self.choices = wanted.nonzero()[:, 0], choices.long()
        self._places = torch.cat([torch.arange(len(f.ids)) for f in features]).to(exits.device)

    def back(self, rows: Tensor, tokens: int) -> Tensor:
        """Shift rows (N, ...) to later positions. Returns a tensor of the same shape.

        The row of position i moves to position i + `tokens`. The first `tokens` positions of each document get zeros.
        """
        return rows.roll(tokens, 0) * (self._places >= tokens)[:, None]


class WhitenedDrafter:
    """A drafter with whitened inputs, for training (see `training.inputs`).

    The constructor changes the weights of `drafter` so that it reads whitened inputs. Call `fold` after training: then
    the drafter reads inputs that are not whitened.

    Args:
        documents: indices of the documents from which the whitening is computed.
    """

    def __init__(self, drafter: Drafter, store: FeatureStore, documents: list[int]):
        self.drafter, moments, count = drafter, [0.0, 0.0], 0
        for i in documents:
            rows = DraftRows([store[i]])
            x = torch.cat([rows.h, rows.back(rows.top, 1)], -1)[rows.wanted]
            for j, read in enumerate((x, rows.deep[rows.wanted])):
                moments[j] = moments[j] + read.T @ read
            count += len(x)
        self.shallow, self.deep = (whitening(part / count) for part in moments)
        self._transform(*(torch.linalg.inv(part.double()).float() for part in (self.shallow, self.deep)))

    @torch.no_grad()
    def _transform(self, shallow: Tensor, deep: Tensor) -> None:
        adapter = self.drafter.adapter
        for projection, change in ((adapter.linear, shallow), (adapter.gate, shallow), (adapter.down, shallow),
                                   (self.drafter.context, deep)):
            projection.weight.copy_(projection.weight @ change.T)

    @torch.no_grad()
    def fold(self) -> None:
        """Move the whitening into the drafter's weights. After this, the drafter reads inputs that are not whitened."""
        self._transform(self.shallow, self.deep)

    def chain(self, rows: DraftRows, length: int) -> list[Tensor]:
        """Run the drafter at every position, after chains of 0, 1, ... drafts.

        Returns a list of `length` tensors (N, D) with the drafter's output at each position. For tensor 0, the drafter
        reads the carried states of the full model. For tensor i, the carried state at position j is row j - 1 of tensor
        i - 1.
        """
        context = F.linear(rows.deep, self.drafter.context.weight @ self.deep.T)
        out, carried = [], rows.back(rows.top, 1)
        for own in range(length):
            x = torch.cat([rows.h, carried + rows.back(context, own + 1)], -1) @ self.shallow
            out.append(self.drafter.adapter(*x.chunk(2, -1)))
            carried = rows.back(out[-1], 1)
        return out


class DrafterLearner:
    """Connects the drafter to the training loop, as a `training.loop.Learner`.

    Args:
        head: vocabulary head of the words that may be drafted. It decides the measured agreement.
        words: the vocabulary head that the loss uses in training.
        training: indices of the training documents.
        held_out: indices of the documents on which agreement is measured.
        args: options of the command.
    """

    name = "drafter"

    def __init__(self, inputs: WhitenedDrafter, store: FeatureStore, head: SampledHead, words: SampledHead,
                 training: list[int], held_out: list[int], accelerator: Accelerator, args: argparse.Namespace):
        self.inputs, self.store, self.head, self.words = inputs, store, head, words
        self.training, self.held_out, self.accelerator, self.args = training, held_out, accelerator, args
        self.module, self.weights = inputs.drafter, list(inputs.drafter.parameters())

    def plan(self) -> list[list[int]]:
        """Choose the documents of each training step. Returns a list of document numbers for each step."""
        args = self.args
        return batches({i: self.store.rows(i) for i in self.training}, args.batch, args.epochs, args.seed)

    def gradients(self, step: int, parts: list[list[int]], rows: int) -> Tensor:
        """Compute the gradients of one step, and add them to the `grad` of the weights. See `Learner.gradients`.

        Returns a tensor (2,) with two sums over this process's rows: the loss, and the number of rows where the first
        draft of a chain equals the full model's choice.
        """
        sums, seed = torch.zeros(2, device=self.accelerator.device), step * 64 + self.accelerator.process_index
        for part in parts:
            sums += self._backward(DraftRows([self.store[i] for i in part]), rows, seed)
        return sums

    def _backward(self, rows: DraftRows, total: int, seed: int) -> Tensor:
        """Compute the gradients of one micro-batch, and add them to the `grad` of the weights.

        Args:
            rows: the documents of the micro-batch.
            total: number of rows of the whole step, by which the loss is divided.
            seed: decides which words and which positions are sampled.

        Returns the sums of this micro-batch (2,), as `gradients` does.
        """
        weight, added = self.words.sample(self.args.seed * 1009 + seed)
        generator = torch.Generator().manual_seed(seed)
        at, device = rows.wanted, weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16"):
            hiddens = self.inputs.chain(rows, len(_SHARES))
        with torch.no_grad():
            full = (F.linear(rows.top[at].to(weight.dtype), weight).float() + added).softmax(-1)
        loss, labels, agreed = 0.0, self.words.local[rows.choices[at]], 0
        for hidden, share in zip(hiddens, _SHARES):
            some = (torch.rand(len(at), generator=generator) < share).to(device)
            logits = F.linear(hidden[at[some]].to(weight.dtype), weight).float() + added
            loss = loss + exit_loss(logits, full[some], labels[some], hard=self.args.hard)[0]
            if share == 1:
                agreed = (logits.detach().argmax(-1) == labels).sum()
        (loss / total).backward()
        return torch.stack([loss.detach(), agreed])

    def record(self, means: Tensor) -> dict:
        loss, agreed = means.tolist()
        return {"loss": loss, "agreement": agreed}

    def progress(self, record: dict) -> str:
        return f"loss {record['loss']:.2f}, agree {record['agreement']:.0%}"

    def check(self) -> list[float]:
        return self.agreement(self.held_out[:CHECK_DOCUMENTS])

    @torch.no_grad()
    def agreement(self, documents: list[int]) -> list[float]:
        """Measure how often the drafter's choice equals the full model's choice after 0, 1, 2 and 3 drafts in a row.

        The drafter chooses only among the words that may be drafted. If the full model chooses another word, the
        drafter's choice counts as wrong. Each process reads a part of the documents, so all processes must call this.

        Returns one share in [0, 1] for each number of drafts.
        """
        hits = torch.zeros(_REPORTED + 1, dtype=torch.float64, device=self.accelerator.device)
        for i in documents[self.accelerator.process_index::self.accelerator.num_processes]:
            rows, own = DraftRows([self.store[i]]), self.head.own
            labels = self.head.local[rows.choices[rows.wanted]]
            for place, hidden in enumerate(self.inputs.chain(rows, _REPORTED)):
                hits[place] += (F.linear(hidden[rows.wanted].to(own.dtype), own).argmax(-1) == labels).sum()
            hits[-1] += len(labels)
        *hits, count = self.accelerator.reduce(hits).tolist()
        return [hit / max(1, count) for hit in hits]


# -- before and after training ----------------------------------------------------------------------------------------


def load_exits(args: argparse.Namespace) -> ExitBank:
    """Load the exits for which a drafter is trained, from the folder --exits.

    Raises ValueError if there is no `carry` exit before the first layer. With --go-on, it also raises ValueError if
    the folder has no drafter.
    """
    bank = ExitBank.load(args.exits)
    if bank.config.layers[:1] != (0,) or bank.config.adapter != "carry":
        raise ValueError(f"{args.exits} has '{bank.config.adapter}' exits after layers {bank.config.layers}; a drafter "
                         "starts from a 'carry' exit before the first layer: train exits with --exits 0,...")
    if args.go_on and not bank.drafter:
        raise ValueError(f"{args.exits} has no drafter to train further: train one without --go-on first")
    return bank


def first_drafter(bank: ExitBank, go_on: bool) -> Drafter:
    """Make the drafter from which training starts.

    Args:
        go_on: True copies the drafter of `bank`. False copies the weights of the exit before the first layer.
    """
    config, exit = bank.config, bank.adapters[0]
    width = config.drafter_width if go_on else exit.gate.out_features
    drafter = Drafter(config.hidden_size, width, len(config.layers) - 1, config.norm_eps)
    if go_on:
        drafter.load_state_dict(bank.drafter.state_dict())
    else:
        drafter.adapter.load_state_dict(exit.state_dict())
    return drafter


def drafted_words(bank: ExitBank, model: SegmentedModel, tail: int) -> tuple[SampledHead, SampledHead]:
    """Choose the words (entries of the vocabulary) that may be drafted. Returns two heads with these words.

    These are the first `draft_size` words of the exits' head, or with `draft_size` 0 all words of the first exit. The
    first head is for measurements. The second is for the loss: its `sample` adds `tail` other words at each step.
    """
    config, weight = bank.config, model.head_weight.detach()
    ids = torch.arange(config.vocab_size) if bank.head_ids is None else bank.head_ids
    ids = ids[:config.draft_size or config.words(0)].to(model.device)
    return SampledHead(weight, ids, 0), SampledHead(weight, ids, tail)


def split_documents(store: FeatureStore) -> tuple[list[int], list[int]]:
    """Return the indices of the training documents and of the test documents. Only text that the model wrote is used.

    Raises ValueError if either list is empty.
    """
    training, held_out = (store.of(split, policy_only=True) for split in (Split.TRAIN, Split.TEST))
    if not training or not held_out:
        raise ValueError(f"{len(training)} training and {len(held_out)} held-out documents that the model wrote are "
                         "too few: write more with python -m training.data policy")
    return training, held_out


def settings_of(bank: ExitBank, store: FeatureStore, args: argparse.Namespace) -> dict:
    """Return the settings that affect the result, {name: value}. A checkpoint with other settings is not continued.

    Args:
        args: options of the command.
    """
    names = ("hard", "tail", "epochs", "batch", "lr", "fit_documents", "seed")
    return {"documents": store.fingerprint(),
            "start": bank.drafter_fingerprint() if args.go_on else bank.fingerprint()
            } | {name: getattr(args, name) for name in names}


def save_with_drafter(bank: ExitBank, drafter: Drafter, dtype: torch.dtype, args: argparse.Namespace) -> None:
    """Save the exits and this drafter in the folder --out. `bank` gets the drafter, and its adapters get `dtype`.

    JSON reports in --exits are copied to --out, except those that --out already has.
    """
    bank.config = dataclasses.replace(bank.config, drafter_width=drafter.adapter.gate.out_features)
    bank.drafter = drafter.to(dtype)
    bank.adapters.to(dtype)                     # the estimators stay in fp32
    bank.save(args.out)
    for path in args.exits.glob("*.json"):
        if not (args.out / path.name).exists():
            shutil.copy(path, args.out)


# -- command ----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = command_parser(__doc__)
    add_exits_and_data(p, exits="exits folder; one of its exits is before the first layer")
    p.add_argument("--out", type=Path, help="folder for the exits with the drafter; default: EXITS itself")
    p.add_argument("--go-on", action="store_true", help="train the drafter of EXITS further, instead of starting from "
                   "the exit before the first layer")
    p.add_argument("--tail", type=int, default=1024, help="how many of the words that are not drafted are sampled at "
                   "each step")
    p.add_argument("--hard", type=float, default=0.33, help="weight of the cross-entropy; KL has the rest")
    add_loop(p, epochs=1.0, lr=7e-4, fit_documents=300, checkpoint="OUT/drafter")
    add_features(p, "EXITS/features")
    return p


def main() -> None:
    args = parser().parse_args()
    args.out = args.out or args.exits
    work = args.out / "drafter"                 # log and checkpoint
    work.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    bank, earlier = load_exits(args), read_json(args.exits / "drafter.json") if args.go_on else None
    base, _, name = load_model(args.model or bank.config.base_model, device=str(accelerator.device))
    model = SegmentedModel(base, bank.config.layers, name=name)
    del base                                    # the backend keeps what it needs
    store = prepared_store(model, args.data, args.features or args.exits / "features", args.feature_gb, accelerator)
    drafter = first_drafter(bank, args.go_on).to(accelerator.device)
    head, words = drafted_words(bank, model, args.tail)
    training, held_out = split_documents(store)
    inputs = WhitenedDrafter(drafter, store, training[:args.fit_documents])
    learner = DrafterLearner(inputs, store, head, words, training, held_out, accelerator, args)
    before, settings = learner.agreement(held_out), settings_of(bank, store, args)
    run = RunFolder(work, settings, args.resume, accelerator.is_main_process)
    steps = train(learner, store, learner.plan(), run, accelerator, learning_rate=args.lr,
                  micro_batch=args.micro_batch, save_every=args.save_every, fit_minutes=args.fit_minutes)
    after = learner.agreement(held_out)
    if accelerator.is_main_process:
        inputs.fold()
        save_with_drafter(bank, drafter, model.dtype, args)
        save_json(args.out / "drafter.json", {
            "went_on_from": earlier,
            "provenance": provenance(args.seed), "settings": settings, "data_note": args.data_note, "steps": steps,
            "processes": accelerator.num_processes, "rows": sum(map(store.rows, training)),
            "held_out_rows": sum(map(store.rows, held_out)), "held_out_agreement_before": before,
            "held_out_agreement": after})
        print("held-out agreement after 0, 1, ... drafts in a row, before -> after training: "
              + ", ".join(f"{b:.1%} -> {a:.1%}" for b, a in zip(before, after)))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
