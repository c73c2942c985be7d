"""Train the exits' adapters. An adapter learns to predict the full model's output from the hidden state at its exit.

    python -m training.distill --preset smollm2-135m-instruct --data data/policy data/text --out runs/smollm2
    python -m training.distill --model ./my-llama --exits 0.3,0.57,0.8 --data data/my-llama --out runs/my-llama
    torchrun --nproc-per-node 4 -m training.distill ...         # several processes, on CPUs or GPUs

By default the loss of an exit, in nats per token, is (1 - hard) T^2 KL(full || exit) + hard * cross-entropy, summed
over the words of the vocabulary and averaged over tokens (Hinton et al. 2015). `hard` is the option --hard, and T is
--temperature. The base model is frozen; only the adapters and their norms are trained. The loss also includes words
that are not in the exit's trimmed head. It always includes the most frequent words. A random sample, new at every step,
represents all other words.

The same command continues an interrupted run from its last checkpoint. The result equals the result of an uninterrupted
run.
"""

import argparse
import copy
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from cascadeexit.exits import ADAPTERS, ExitBank
from cascadeexit.exits.config import WORD_BLOCK
from cascadeexit.hub import DEFAULT_MODEL, exit_layers, load_model
from cascadeexit.model import SegmentedModel
from training.batches import batches
from training.checkpoint import RunFolder
from training.command import run_command
from training.documents import Split
from training.features import Features, FeatureStore, prepared_store
from training.forward import adapted_states, agreement, plain_inputs
from training.inputs import AdapterInputs
from training.json_files import read_json, save_json
from training.loop import CHECK_DOCUMENTS, train
from training.loss import backward
from training.options import add_data, add_device_map, add_features, add_loop, add_model, command_parser
from training.plots import loss_plot
from training.provenance import provenance
from training.vocabulary import SampledHead, frequent_tokens

PRESETS = {
    # Hyper-parameters of the published exits for Llama-3.2-3B; the loss is per token here, theirs summed over the text.
    "published": dict(model="meta-llama/Llama-3.2-3B", exits="8,16,22", adapter="swiglu", width=512, head_size=[0],
                      train_words=0, hard=0.5, labels="text", temperature=2.0, epochs=3.0, batch=16 * 512, lr=3e-4),
    "smollm2-135m-instruct": dict(model=DEFAULT_MODEL, exits="0,9,17,24", head_size=[8192, 8192, 8192, 49152]),
}
_SETTINGS = ("loss", "temperature", "hard", "labels", "epochs", "batch", "lr", "own_share", "train_words", "tail",
             "fit_documents", "seed", "only", "text_repeats")      # options that decide the result


# -- what is trained --------------------------------------------------------------------------------------------------


class AdapterLearner:
    """Connects the adapters to the training loop, as a `training.loop.Learner`.

    Args:
        bank: the exits. Training changes their adapters in place.
        head: the vocabulary head that the exits have in decoding. It decides the measured agreement.
        words: the vocabulary head that the loss uses in training.
        args: options of the command.
    """

    name = "adapters"

    def __init__(self, bank: ExitBank, inputs: AdapterInputs, store: FeatureStore, head: SampledHead,
                 words: SampledHead, accelerator: Accelerator, args: argparse.Namespace):
        self.bank, self.inputs, self.store, self.head, self.words = bank, inputs, store, head, words
        self.accelerator, self.args, self.module = accelerator, args, bank.adapters
        self.exits = [s for s, layer in enumerate(bank.config.layers) if not args.only or layer in args.only]
        self.weights = [w for s in self.exits for w in bank.adapters[s].parameters()]

    def plan(self) -> list[list[int]]:
        """Choose the documents of each training step. Returns a list of document numbers for each step."""
        training, own = self.store.of(Split.TRAIN), set(self.store.of(Split.TRAIN, policy_only=True))
        return batches({i: self.store.rows(i) for i in training}, self.args.batch, self.args.epochs, self.args.seed,
                       {i: self.args.text_repeats for i in training if i not in own})

    def gradients(self, step: int, parts: list[list[int]], rows: int) -> Tensor:
        """Compute the gradients of one step, and add them to the `grad` of the weights. See `Learner.gradients`.

        Returns a tensor (E, 3) with three sums over this process's rows for each of the E trained exits: KL,
        cross-entropy, and the number of rows where the exit's choice equals the full model's.
        """
        args, sums = self.args, torch.zeros(len(self.exits), 3, device=self.accelerator.device)
        seed = args.seed * 1009 + step
        generator = torch.Generator().manual_seed(seed * 64 + self.accelerator.process_index)
        for part in parts:
            features = [self.store[i] for i in part]
            top, labels, choices = (
                torch.cat([values(f)[f.wanted] for f in features]).to(self.accelerator.device)
                for values in (lambda f: f.top, lambda f: labels_of(f, args.labels), lambda f: f.choices))
            with self.accelerator.autocast():
                hiddens = adapted_states(self.bank, self.inputs, features, args.own_share, generator, exits=self.exits)
            sums = sums + backward(hiddens, top, labels, choices, self.words, seed, rows, hard=args.hard,
                                   temperature=args.temperature, loss=args.loss)
        return sums

    def record(self, means: Tensor) -> dict:
        kl, ce, agreed = means.T.tolist()
        return {"kl": kl, "ce": ce, "agreement": agreed}

    def progress(self, record: dict) -> str:
        kl, agreed = ("/".join(format(x, form) for x in record[name])
                      for name, form in (("kl", ".2f"), ("agreement", ".0%")))
        return f"kl {kl}, agree {agreed}"

    def check(self) -> list[float]:
        return self.agreement(self.store.measured(Split.TEST)[:CHECK_DOCUMENTS], exits=self.exits)

    def agreement(self, documents: list[int], own_share: float = 0.0, exits: list[int] | None = None) -> list[float]:
        """Measure the exits' top-1 agreement with the full model on these documents. Returns one share for each exit.

        `training.forward.agreement` explains the arguments.
        """
        return agreement(self.bank, self.inputs, self.store, documents, self.head, self.accelerator, own_share, exits)


def labels_of(features: Features, kind: str) -> Tensor:
    """Return the labels of the cross-entropy for one document, as token ids (T,).

    Args:
        kind: "choice" gives the full model's choices. "text" gives the next tokens of the document.
    """
    return features.choices if kind == "choice" else features.ids.roll(-1)


class StartingExits:
    """The exits of --continue-from, from which training starts. Training must not make them worse.

    The constructor copies their adapters into the bank of `learner`, and measures their agreement with the full model
    on the calibration documents. After training, call `restore_worse`, then `copy_into`.

    Args:
        exits: the exits of --continue-from.
    """

    def __init__(self, exits: ExitBank, learner: AdapterLearner):
        bank = learner.bank
        self.exits, self.learner = exits, learner
        self.layers = learner.inputs.adopt(bank, exits)
        learner.accelerator.print(f"continuing from {learner.args.continue_from} after layers {self.layers}")
        self._weights = copy.deepcopy(bank.adapters)
        self._trained = [s for s in learner.exits if bank.config.layers[s] in self.layers]
        self._agreement = self._measure()

    def _measure(self) -> list[float]:
        documents = self.learner.store.measured(Split.CALIBRATION)
        return self.learner.agreement(documents, exits=self._trained)

    def restore_worse(self) -> list[int]:
        """Give the old weights back to exits that agree less with the full model than before training.

        Returns the layers of the exits of --continue-from whose weights are now the same as before training. These are
        the exits that got the old weights back, and the exits that --only excluded from training.
        """
        bank, say, now = self.learner.bank, self.learner.accelerator.print, self._measure()
        layers, only = bank.config.layers, self.learner.args.only
        worse = {layers[s] for s, old, new in zip(self._trained, self._agreement, now) if new < old}
        for s in map(layers.index, worse):
            bank.adapters[s].load_state_dict(self._weights[s].state_dict())
        say("agreement on calibration documents, before -> after: "
            + ", ".join(f"layer {layers[s]} {old:.2%} -> {new:.2%}"
                        for s, old, new in zip(self._trained, self._agreement, now))
            + "".join(f"; the exit after layer {layer} stays as it was" for layer in sorted(worse)))
        return sorted(worse | {layer for layer in self.layers if only and layer not in only})

    def copy_into(self, bank: ExitBank, layers: list[int]) -> None:
        """Change `bank`: the exit after each of these layers gets exactly the weights that it has in --continue-from.

        Args:
            layers: result of `restore_worse`.

        If `bank` has exits after the same layers as --continue-from, it also gets the drafter of --continue-from. This
        drafter stays valid after training, because it does not depend on the adapters.
        """
        config = self.exits.config
        for layer in layers:
            original = self.exits.adapters[config.layers.index(layer)]
            bank.adapters[bank.config.layers.index(layer)].load_state_dict(original.state_dict())
        if self.exits.drafter and config.layers == bank.config.layers:
            bank.drafter = self.exits.drafter
            bank.config = replace(bank.config, drafter_width=config.drafter_width)


# -- before training --------------------------------------------------------------------------------------------------


def load_models(args: argparse.Namespace, device: str) -> tuple[SegmentedModel, ExitBank | None]:
    """Load the frozen model and the exits of --continue-from. Without --continue-from, the exits are None.

    Args:
        args: `model`, `device_map`, `exits`, `continue_from` and `only` are used, with the meaning of the options.

    Raises SystemExit if --only names a layer that is not in --exits. With --only, it also raises SystemExit if a layer
    of --exits has no exit in --continue-from.
    """
    base, _, name = load_model(args.model, device=device, device_map=args.device_map)
    layers = exit_layers(args.exits, base.config.num_hidden_layers)
    exits = ExitBank.load(args.continue_from) if args.continue_from else None
    if args.only and not (set(args.only) <= set(layers) <= set(exits.config.layers if exits else ())):
        raise SystemExit(f"--only {args.only} must name layers of --exits {list(layers)}, and --continue-from must "
                         "have an exit after each of these layers: the exits that are not trained are taken from it")
    return SegmentedModel(base, layers, name=name), exits


def untrained_exits(model: SegmentedModel, args: argparse.Namespace) -> ExitBank:
    """Make untrained exits with the sizes that the options give. Their adapters are in fp32, ready for training.

    Args:
        args: `head_size`, `width`, `adapter` and `draft_size` are used, with the meaning of the options. Entries of
            `head_size` that exceed the vocabulary are replaced by its size.
    """
    args.head_size = [min(size, model.vocab_size) for size in args.head_size]
    bank = ExitBank.untrained(model, width=args.width, head_size=max(args.head_size), adapter=args.adapter,
                              head_sizes=args.head_size if len(args.head_size) > 1 else (),
                              draft_size=min(args.draft_size, args.head_size[0]) // WORD_BLOCK * WORD_BLOCK)
    bank.prepare(model).requires_grad_(True)
    bank.adapters.float()
    return bank


def choose_words(bank: ExitBank, model: SegmentedModel, store: FeatureStore,
                 args: argparse.Namespace) -> tuple[SampledHead, SampledHead]:
    """Choose the words (entries of the vocabulary) of the exits' head and of the training loss. Returns two heads.

    The first is the exits' head: the words that the full model chooses most, or all words if `bank` has no trimmed
    head. These words are also stored in `bank`. The second is the head of the loss: the --train-words most frequent
    words, with a sample of the other words. The second head has all words if the first has all words, or with
    --train-words 0.
    """
    weight, head_size = model.head_weight, bank.config.head_size        # a backend may make the weight for each call
    words = SampledHead(weight, None, 0)
    if head_size:
        choices = store.choices(store.of(Split.TRAIN))
        ranked = frequent_tokens(choices, model.vocab_size, model.eos_ids).to(model.device)
        bank.head_ids.copy_(ranked[:head_size])
        if args.train_words:
            words = SampledHead(weight, ranked[:args.train_words], args.tail)
    return SampledHead(weight, bank.head_ids, 0), words


def head_coverage(bank: ExitBank, store: FeatureStore, head: SampledHead) -> list[float]:
    """Measure, on the test documents, which share of the full model's choices is in the vocabulary head of each exit.

    Args:
        head: the head of the exits.

    Returns a share in [0, 1] for each exit.
    """
    at = head.local[store.choices(store.measured(Split.TEST)).to(head.local.device)]
    return [((at >= 0) & (at < bank.config.words(s))).float().mean().item() for s in range(len(bank.config.layers))]


def fitted_inputs(bank: ExitBank, model: SegmentedModel, store: FeatureStore, accelerator: Accelerator,
                  documents: int) -> AdapterInputs:
    """Compute the normalisation of the adapters' inputs from training documents. Returns the `AdapterInputs`.

    The adapters of `bank` are changed to read normalised inputs. All processes must call this.

    Args:
        documents: how many training documents are read. Each of several processes reads a part of them.
    """
    share = store.of(Split.TRAIN)[:documents][accelerator.process_index::accelerator.num_processes]
    final_norm = model.norm_weight.to(model.device).float()         # a model in parts may have it elsewhere
    return AdapterInputs(bank, store, share, final_norm, accelerator.reduce)


def settings_of(bank: ExitBank, store: FeatureStore, start: ExitBank | None, args: argparse.Namespace) -> dict:
    """Return the settings that affect the result, {name: value}. A checkpoint with other settings is not continued.

    Args:
        start: the exits of --continue-from; None without this option.
        args: options of the command.
    """
    return {"config": {k: v for k, v in asdict(bank.config).items() if k != "layers"},
            "layers": list(bank.config.layers), "documents": store.fingerprint(),
            "start": start.fingerprint() if start else None} | {k: getattr(args, k) for k in _SETTINGS}


# -- command ----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = command_parser(__doc__)
    p.add_argument("--preset", choices=PRESETS, help="settings for a known model; options on the command line override "
                   "them")
    add_model(p)
    add_data(p)
    p.add_argument("--out", type=Path, required=True, help="folder for the exits, the log and the checkpoint")
    p.add_argument("--continue-from", type=Path, help="exits folder to start from. Exits that it lacks start "
                   "untrained. An exit that agrees less with the full model after training, on the calibration "
                   "documents, gets its old weights back")
    p.add_argument("--only", type=lambda text: sorted({int(part) for part in text.split(",")}), default=[],
                   help="with --continue-from: layers of the exits to train (0,24); the other exits do not change")
    p.add_argument("--exits", help="exit layers (0,9,17,24; 0 is before the first layer) or shares of the depth "
                   "(default: 0,0.3,0.57,0.8)")
    p.add_argument("--adapter", choices=tuple(ADAPTERS), default="carry", help="kind of adapter; swiglu is the "
                   "published one")
    p.add_argument("--width", type=int, default=512, help="inner width of the adapters")
    p.add_argument("--own-share", type=float, default=0.3, help="for carry adapters: share of the tokens whose carried "
                   "state comes from an exit instead of the full model")
    p.add_argument("--head-size", type=lambda text: [int(part) for part in text.split(",")], default=[16384],
                   help="words (entries of the vocabulary) in the exits' head: one number, 0 = all, or one for each "
                   "exit (8192,8192,49152)")
    p.add_argument("--draft-size", type=int, default=4096, help="how many words of this head may be drafted: the "
                   "most frequent ones; 0 = all words of the first exit")
    p.add_argument("--train-words", type=int, default=6144, help="how many of the most frequent words the loss of "
                   "every step includes; 0 = all words")
    p.add_argument("--tail", type=int, default=4096, help="how many of the other words are sampled at each step")
    p.add_argument("--loss", choices=("kl", "tv", "hybrid"), default="kl", help="distance to the full model: KL "
                   "divergence, total variation, or a mix of both")
    p.add_argument("--temperature", type=float, default=1.0, help="temperature of both softmaxes in the distance")
    p.add_argument("--hard", type=float, default=0.33, help="weight of the cross-entropy; the distance has the rest")
    p.add_argument("--labels", choices=("choice", "text"), default="choice", help="labels of the cross-entropy: the "
                   "full model's choice, or the next token of the text")
    p.add_argument("--text-repeats", type=int, default=1, help="how often an epoch reads text that the model did not "
                   "write")
    p.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; the same command continues")
    add_loop(p, epochs=3.0, lr=1e-3, fit_documents=1500, checkpoint="OUT")
    add_features(p, "OUT/features")
    add_device_map(p)
    return p


def parse_args() -> argparse.Namespace:
    """Read the command line. Its options override those of --preset, which override the defaults."""
    command = parser()
    preset = command.parse_known_args()[0].preset
    command.set_defaults(**PRESETS.get(preset, {}))
    return command.parse_args()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.cuda.is_available())
    model, old = load_models(args, str(accelerator.device))
    store = prepared_store(model, args.data, args.features or args.out / "features", args.feature_gb, accelerator)
    bank = untrained_exits(model, args)
    head, words = choose_words(bank, model, store, args)
    coverage, held_out = head_coverage(bank, store, head), store.measured(Split.TEST)
    rows = sum(map(store.rows, store.of(Split.TRAIN)))
    accelerator.print(f"{len(store)} documents, {rows} training rows; the features of {store.kept} documents are kept "
                      f"on disk; the exits' heads contain {' / '.join(f'{c:.2%}' for c in coverage)} of the full "
                      "model's choices in test documents")
    untrained = agreement(bank, plain_inputs, store, held_out, head, accelerator)
    inputs = fitted_inputs(bank, model, store, accelerator, args.fit_documents)
    learner = AdapterLearner(bank, inputs, store, head, words, accelerator, args)
    start = StartingExits(old, learner) if old else None
    settings = settings_of(bank, store, old, args)
    run = RunFolder(args.out, settings, args.resume, accelerator.is_main_process)
    steps = train(learner, store, learner.plan(), run, accelerator, learning_rate=args.lr,
                  micro_batch=args.micro_batch, save_every=args.save_every, minutes=args.minutes,
                  fit_minutes=args.fit_minutes)
    stays = start.restore_worse() if start else []
    trained, after_exits = (learner.agreement(held_out, own_share) for own_share in (0.0, 1.0))
    if accelerator.is_main_process:
        inputs.fold(bank)
        if start:
            start.copy_into(bank, stays)
        bank.to(model.dtype).save(args.out)
        loss_plot(run.records(), args.only or bank.config.layers, args.out / "loss.html")
        save_json(args.out / "distill.json", {
            "provenance": provenance(args.seed), "settings": settings, "data_note": args.data_note, "steps": steps,
            "stays": stays, "processes": accelerator.num_processes, "documents": len(store), "rows": rows,
            "held_out_rows": sum(map(store.rows, held_out)), "head_coverage": coverage,
            "untrained_agreement": untrained, "held_out_agreement": trained,
            "held_out_agreement_after_exits": after_exits,
            "went_on_from": read_json(args.continue_from / "distill.json") if old else None})
        accelerator.print("held-out agreement, untrained -> trained (after a token of an exit): " + ", ".join(
            f"{b:.1%} -> {a:.1%} ({e:.1%})" for b, a, e in zip(untrained, trained, after_exits)))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
