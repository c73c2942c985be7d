"""Train and calibrate the exits' confidence estimators, and measure them on test documents.

    python -m training.confidence --exits runs/smollm2 --data data/policy data/text

There are two kinds of estimators. `sketch`, the default, is a small MLP (`SketchConfidence`). Its inputs are facts of
the exit's softmax over the most frequent words (entries of the vocabulary), and whether n-gram lookup proposes the same
word as the exit. If the previous exit ran, the facts of its softmax are inputs, too. So a sketch estimator needs only a
small part of the vocabulary head. It is trained on the calibration documents, which no adapter has seen.

`mlp`, the kind of the original CascadeExit, is an MLP that reads only the adapted hidden state. It is trained in three
steps:
1. On the training documents it learns the largest softmax probability of its exit's head, by binary cross-entropy
   averaged over rows. It cannot learn on these documents whether the exit is right, since the adapters have seen them.
2. On one half of the calibration documents it learns whether the exit's choice equals the full model's choice. The
   weights of the epoch with the lowest loss on the other half are kept.
3. On that other half, a scale and a shift of the estimator's logit are fitted (Platt 1999). They become part of the
   weights.

ECE and AUROC are measured on the test documents. For comparison they are also measured for three confidences that need
all logits of the exit: largest probability, entropy and margin, with Platt scaling. The estimators are saved in the
exits folder.
"""

import argparse
import copy
import dataclasses
import functools
import json

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cascadeexit.carry import carried_states
from cascadeexit.engine import Engine
from cascadeexit.exits import ConfidenceHead, ExitBank, SketchConfidence
from cascadeexit.exits.confidence import read_copies
from cascadeexit.hub import load_model
from cascadeexit.lookup import MAX_MATCH, Lookup
from cascadeexit.model import SegmentedModel
from training.command import run_command
from training.documents import Split
from training.features import FeatureStore, prepared_store
from training.json_files import save_json
from training.options import add_device_map, add_exits_and_data, add_features, add_seed, command_parser
from training.plots import reliability_plot
from training.provenance import provenance
from training.reliability import auroc, equal_mass_bins, expected_calibration_error, platt
from training.vocabulary import frequent_tokens

_WIDTHS = {"sketch": 48, "mlp": 256}
_FACT_ROWS = 4096           # rows whose facts are computed at a time

# -- rows -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ExitRows:
    """Results of one exit at n rows. A row is one of the positions that `Features.wanted` selects."""

    hidden: Tensor      # (n, D) adapted hidden state
    copied: Tensor      # (n, 2) what the n-gram lookup proposes, from `read_copies`
    right: Tensor       # (n,) True if the exit's choice equals the full model's choice
    softmax: Tensor     # (n,) largest probability in the softmax over the exit's head
    margin: Tensor      # (n,) largest minus second largest probability
    entropy: Tensor     # (n,) entropy of this softmax, in nats


@functools.cache                            # the same for every exit
def copied_along(ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """Run n-gram lookup once for each position of a text, on the tokens up to this position.

    Returns the result of `Lookup.copied` for each position: the copied token and the length of the match.
    """
    lookup, copied = Lookup(()), []
    for i, token in enumerate(ids):
        lookup.extend([token])
        copied.append(lookup.copied(ids[max(0, i - MAX_MATCH):i + 1]))
    return copied


@torch.no_grad()
def exit_rows(engine: Engine, s: int, store: FeatureStore, documents: list[int], part: str) -> ExitRows:
    """Run exit s at the positions that `Features.wanted` selects. The returned tensors are in main memory.

    Args:
        documents: indices of the documents that have these positions.
        part: text for the progress bar, which says what these documents are for.
    """
    parts, device, exits, words = [], engine.model.device, engine.exits, engine.bank.head_ids
    desc = f"exit {engine.bank.config.layers[s]}, {part}"
    for i in tqdm(documents, unit="document", desc=desc, leave=False):
        f = store[i]
        wanted = f.wanted.to(device)
        h = exits.hidden(s, f.exits[:, s].to(device)[wanted], carried_states(f.top).to(device)[wanted])
        logits = exits.logits(s, h).float()
        picked = logits.argmax(-1) if words is None else words[logits.argmax(-1)]
        log_p = logits.log_softmax(-1)
        top = log_p.topk(2).values.exp()
        along = zip(copied_along(tuple(f.ids.tolist())), f.wanted.tolist())
        copies = torch.tensor(read_copies([copy for copy, asked in along if asked], engine.bank.sketch_places))
        parts.append((h, copies, picked == f.choices[f.wanted].to(picked.device), top[:, 0], top[:, 0] - top[:, 1],
                      -(log_p.exp() * log_p).sum(-1)))
    return ExitRows(*(torch.cat(column).cpu() for column in zip(*parts)))


# -- estimators -------------------------------------------------------------------------------------------------------


def fit(head: nn.Module, inputs: Tensor, target: Tensor, *, epochs: int, lr: float, weight_decay: float,
        batch: int, seed: int, check: tuple[Tensor, Tensor] | None = None) -> None:
    """Train a network in place with binary cross-entropy.

    Args:
        head: the network, inputs (n, ...) -> logits (n,) or (n, 1).
        inputs: training inputs (n, ...).
        target: probabilities or labels (n,).
        check: inputs and labels of held-out rows. If given, the network ends with the weights of the epoch with the
            lowest loss on these rows.
    """
    steps = max(1, len(inputs) // batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    best, kept = float("inf"), None
    for _ in tqdm(range(epochs), unit="epoch", desc="estimator", leave=False):
        order = torch.randperm(len(inputs), generator=generator)
        for part in order.tensor_split(steps):
            loss = F.binary_cross_entropy_with_logits(head(inputs[part]).view(-1), target[part].float())
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


class MlpEstimators:
    """Trains estimators of the kind `mlp` (`ConfidenceHead`). The docstring of this module describes the three steps.

    Args:
        calibration: indices of the calibration documents.
        width: inner width of the estimators.
        args: `train_rows`, `epochs`, `calibration_epochs` and `seed` are used, with the meaning of the command's
            options.
    """

    def __init__(self, engine: Engine, store: FeatureStore, calibration: list[int], width: int,
                 args: argparse.Namespace):
        self.engine, self.store, self.width, self.args = engine, store, width, args
        self.training, self.calibration = first_rows(store, args.train_rows), calibration
        self.shape = dict(confidence="mlp", confidence_width=width, sketch_size=0)

    def inputs(self, rows: ExitRows, before: ExitRows | None) -> list[Tensor]:
        """Return the inputs of the estimator: a list with one tensor, the adapted hidden states (n, D).

        `before` is not used.
        """
        return [rows.hidden]

    def fit(self, s: int, rows: ExitRows, before: ExitRows | None) -> ConfidenceHead:
        """Train the estimator of exit s, and return it. `rows` and `before` are not used."""
        args, head = self.args, ConfidenceHead(self.engine.model.hidden_size, self.width)
        seen = exit_rows(self.engine, s, self.store, self.training, "training")
        fitted, checked = (exit_rows(self.engine, s, self.store, half, "calibration")
                           for half in (self.calibration[::2], self.calibration[1::2]))
        fit(head, seen.hidden, seen.softmax, epochs=args.epochs, lr=1e-3, weight_decay=0.01, batch=1024, seed=args.seed)
        fit(head, fitted.hidden, fitted.right, epochs=args.calibration_epochs, lr=2e-4, weight_decay=0.1, batch=256,
            seed=args.seed, check=(checked.hidden, checked.right))
        with torch.no_grad():
            a, b = platt(head(checked.hidden), checked.right)
            head.outer.weight.mul_(a)
            head.outer.bias.mul_(a).add_(b)
        return head


class SketchEstimators:
    """Trains estimators of the kind `sketch` (`SketchConfidence`).

    These estimators read facts (such as the largest probability) of the softmax over the most frequent words of the
    vocabulary. `ExitBank.sketch_ids` has the token ids of these words.

    Args:
        width: inner width of the estimators.
        args: `seed` is used.
    """

    def __init__(self, engine: Engine, width: int, args: argparse.Namespace):
        self.width, self.seed, self._device = width, args.seed, engine.model.device
        # The same rounded weights as in decoding.
        self._head = engine.model.backend.vocab_head(engine.model.head_weight[engine.bank.sketch_ids], rounded=True)
        self.shape = dict(confidence="sketch", confidence_width=width, sketch_size=len(engine.bank.sketch_ids))

    @torch.no_grad()
    def inputs(self, rows: ExitRows, before: ExitRows | None) -> list[Tensor]:
        """Return the inputs of the estimator for n rows. `exits.confidence.softmax_facts` explains these inputs.

        Args:
            rows: the n rows of this exit.
            before: the rows of the previous exit at the same positions. None for the first exit.

        Returns a list. The first tensor (n, 5) has the facts of this exit alone. If `before` is given, a second tensor
        (n, 12) has the facts of both exits.
        """
        parts = list(zip(rows.hidden.split(_FACT_ROWS), rows.copied.split(_FACT_ROWS)))
        alone = torch.cat([self._facts(*part) for part in parts])
        if before is None:
            return [alone]
        return [alone, torch.cat([self._facts(*part, earlier)
                                  for part, earlier in zip(parts, before.hidden.split(_FACT_ROWS))])]

    def _facts(self, *rows: Tensor) -> Tensor:
        return self._head.softmax_facts(*(part.to(self._device) for part in rows)).cpu()

    def fit(self, s: int, rows: ExitRows, before: ExitRows | None) -> SketchConfidence:
        """Train the estimator of exit s on calibration documents, and return it.

        Args:
            rows: the rows of exit s.
            before: the rows of the previous exit at the same positions. None for the first exit.
        """
        head = SketchConfidence(self.width)
        for net, x in zip((head.alone, head.after), self.inputs(rows, before)):
            mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
            fit(net, (x - mean) / spread, rows.right, epochs=20, lr=3e-3, weight_decay=0.01, batch=512, seed=self.seed)
            with torch.no_grad():                                   # now the net reads facts that are not normalised
                net[0].weight.div_(spread)
                net[0].bias.sub_(net[0].weight @ mean)
        return head


def sketch_words(bank: ExitBank, store: FeatureStore, model: SegmentedModel, words: int) -> Tensor:
    """Choose the words (entries of the vocabulary) that sketch estimators read. Returns their token ids (words,).

    These are the words that the full model chooses most often in the training documents. If the exits have a trimmed
    head, they are the first words of that head, so that no second copy of their weights is needed.

    Args:
        words: how many words to choose.
    """
    ranked = bank.head_ids
    if ranked is None:
        ranked = frequent_tokens(store.choices(store.of(Split.TRAIN)), model.vocab_size, model.eos_ids)
    return ranked[:words].to(model.device).clone()              # a tensor of its own, to be saved


def first_rows(store: FeatureStore, limit: int) -> list[int]:
    """Return the indices of the first training documents: as many documents as are needed for `limit` rows.

    A row is a position that `Features.wanted` selects. If all training documents together have fewer rows than `limit`,
    the indices of all training documents are returned.
    """
    documents, taken = [], 0
    for i in store.of(Split.TRAIN):
        if taken < limit:
            documents.append(i)
            taken += store.rows(i)
    return documents


# -- reports ----------------------------------------------------------------------------------------------------------


def baselines(calibration: ExitRows, test: ExitRows) -> dict:
    """Measure three simple confidences: largest probability, margin and exp(-entropy). They need all logits of an exit.

    Args:
        calibration: rows of the exit on the calibration documents, for fitting Platt scaling.
        test: rows of the exit on the test documents, for measuring the confidences.

    Returns {name of a confidence: {"auroc": AUROC, "ece": ECE, "ece_calibrated": ECE after Platt scaling}}.
    """
    report = {}
    scores = {"softmax": lambda r: r.softmax, "margin": lambda r: r.margin,
              "entropy": lambda r: torch.exp(-r.entropy)}
    for name, of in scores.items():
        raw, held = (of(r).clamp(1e-6, 1 - 1e-6) for r in (test, calibration))
        a, b = platt(held.logit(), calibration.right)
        report[name] = {"auroc": auroc(raw, test.right), "ece": expected_calibration_error(raw, test.right),
                        "ece_calibrated": expected_calibration_error((a * raw.logit() + b).sigmoid(), test.right)}
    return report


def measure(layer: int, head: nn.Module, inputs: list[Tensor], calibration: ExitRows, test: ExitRows) -> dict:
    """Measure the estimator of one exit on test documents.

    Args:
        layer: layer of the exit.
        head: the estimator.
        inputs: inputs of the estimator, as from `SketchEstimators.inputs`.
        calibration: rows of the exit on the calibration documents, for the baselines.
        test: rows of the exit on the test documents.

    Returns a dict:
    - `layer`, `agreement`: layer of the exit, and share of the rows where its choice equals the full model's choice.
    - `ece`, `auroc`: quality of the estimator, which reads the facts of this exit and of the previous exit, if any.
    - `ece_alone`, `auroc_alone`: quality of the estimator without the previous exit.
    - `bins`: {"confidence": means, "right": shares of right choices}, one number for each of the `equal_mass_bins`.
    - `baselines`: result of the function `baselines`.
    """
    with torch.no_grad():
        alone, *beside = [head(x).sigmoid() for x in inputs]
    confidence = beside[0] if beside else alone
    bins = equal_mass_bins(confidence, test.right)
    return {"layer": layer, "agreement": test.right.float().mean().item(),
            "ece": expected_calibration_error(confidence, test.right), "auroc": auroc(confidence, test.right),
            "ece_alone": expected_calibration_error(alone, test.right), "auroc_alone": auroc(alone, test.right),
            "bins": {"confidence": [c for c, _, _ in bins], "right": [r for _, r, _ in bins]},
            "baselines": baselines(calibration, test)}


def held_out_documents(store: FeatureStore) -> tuple[list[int], list[int]]:
    """Return the indices of the calibration documents, and the indices of the test documents.

    Raises SystemExit if there are fewer than 4 calibration documents, or no test documents.
    """
    calibration, tests = store.measured(Split.CALIBRATION), store.measured(Split.TEST)
    if len(calibration) < 4 or not tests:
        raise SystemExit(f"{len(calibration)} calibration and {len(tests)} test documents are too few. 2 in 25 "
                         "documents are for calibration and 1 in 25 for tests, so about 100 documents are needed: "
                         "write more with python -m training.data")
    return calibration, tests


# -- command ----------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    p = command_parser(__doc__)
    add_exits_and_data(p, exits="exits folder written by training.distill",
                       data="the folders given to training.distill")
    add_features(p, "EXITS/features")
    p.add_argument("--kind", choices=("sketch", "mlp"), default="sketch", help="kind of estimator; mlp is the "
                   "published one")
    p.add_argument("--words", type=int, default=2048, help="sketch: how many of the most frequent words an estimator "
                   "reads")
    p.add_argument("--width", type=int, help="inner width; default: 48, or 256 for mlp as published")
    p.add_argument("--epochs", type=int, default=4, help="mlp: passes over the training rows in step 1")
    p.add_argument("--calibration-epochs", type=int, default=12, help="mlp: passes over the calibration rows in step "
                   "2, at most")
    p.add_argument("--train-rows", type=int, default=400_000, help="mlp: training rows in step 1, at most")
    add_device_map(p)
    add_seed(p)
    return p.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    bank = ExitBank.load(args.exits)
    base, _, name = load_model(args.model or bank.config.base_model, device_map=args.device_map)
    model = SegmentedModel(base, bank.config.layers, name=name)
    del base                                    # the backend keeps what it needs
    store = prepared_store(model, args.data, args.features or args.exits / "features", args.feature_gb)
    documents = held_out_documents(store)
    bank.confidence_heads = None                # the old estimators and their words
    bank.sketch_ids = sketch_words(bank, store, model, args.words) if args.kind == "sketch" else None
    engine, width = Engine(model, bank), args.width or _WIDTHS[args.kind]
    estimators = (SketchEstimators(engine, width, args) if args.kind == "sketch"
                  else MlpEstimators(engine, store, documents[0], width, args))

    report, heads, before = [], nn.ModuleList(), (None, None)
    for s, layer in enumerate(bank.config.layers):
        calibration, test = (exit_rows(engine, s, store, part, name)
                             for part, name in zip(documents, ("calibration", "test")))
        heads.append(estimators.fit(s, calibration, before[0]).requires_grad_(False))
        report.append(measure(layer, heads[s], estimators.inputs(test, before[1]), calibration, test))
        print(json.dumps({k: v for k, v in report[-1].items() if k != "bins"}))
        before = calibration, test
    bank.confidence_heads = heads
    bank.config = dataclasses.replace(bank.config, trained=True, **estimators.shape)
    bank.save(args.exits)
    reliability_plot(report, args.exits / "reliability.html")
    save_json(args.exits / "confidence.json", {
        "provenance": provenance(args.seed), "kind": args.kind, "exits": report,
        "rows": {"calibration": len(calibration.right), "test": len(test.right)}})


if __name__ == "__main__":
    run_command(main)
