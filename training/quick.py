"""Quick exits: train exits, a drafter and estimators for a model that has none, and calibrate them, in a given time.

    python -m training.quick --model Qwen/Qwen2.5-Coder-0.5B-Instruct
    python -m training.quick --model my-model.gguf --out runs/my-model --minutes 30
    python -m training.quick --model my-model --prompts questions.jsonl      # user turns like those of your users

This takes 15 minutes on a CPU and 5 on a GPU, or as long as --minutes says. The parts are the commands of the full
recipe (training/run.sh), each with a share of the time. The model writes conversations, and its hidden states are
kept for training. The exits start as ridge regressions on whitened hidden states, and are trained for as many steps as
the time allows. Then a drafter and confidence estimators are trained. At the end, other prompts, which were not used in
training, serve to calibrate the exits and to measure the speed of each mode.

If the command is interrupted, start it again: it continues. The exits are in OUT/exits, for `--exits` of the page and
of the other commands. The full recipe can go on from there with more text:

    MODEL=my-model OUT=runs/more DISTILL="--continue-from runs/my-model/exits" training/run.sh
"""

import argparse
import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.hub import DEFAULT_MODEL, describe, load
from cascadeexit.payoff import QUICK_GPU_MINUTES, QUICK_MINUTES
from training.calibrate import prompts_of
from training.command import run_command
from training.documents import load_documents
from training.json_files import read_json, save_json
from training.options import add_model, add_seed, command_parser
from training.provenance import provenance
from training.questions import questions
from training.steps import ROOT, ended

QUESTIONS = "questions.jsonl"   # in --out: user turns of `training.questions`
STATE = "quick.json"            # in --out: settings, the parts that are done, and what they took
_START = 0.15                   # minutes that the process of a part takes to start; later parts correct an error
_LAST_LINES = 12                # lines of output that are shown for a part that failed
_MEASURED_PROMPTS, _MEASURED_TOKENS = 6, 64


@dataclass(frozen=True)
class Part:
    """One command of the recipe.

    Attributes:
        name: name that the user sees while the part runs.
        share: share of the whole time that the part gets, in [0, 1].
        command: function that takes the part's time limit in minutes, not counting the start of its process. It
            returns the words of the command after `python -m`.
    """

    name: str
    share: float
    command: Callable[[float], list[str]]


@dataclass(frozen=True)
class Progress:
    """Progress of the training: name of the part that runs, and share of the whole training that is done, in [0, 1]."""

    part: str
    done: float


def parts_of(args: argparse.Namespace) -> list[Part]:
    """Return the parts of the training in the order in which they run. `args` has the options of the command."""
    out, seed = args.out, ["--seed", str(args.seed)]
    data, held_out, exits, features = (str(out / name) for name in ("data", "held-out", "exits", "features"))
    model, store = ["--model", args.model], ["--features", features]
    made = ["--exits", exits, *model]
    prompts = args.prompts or [out / QUESTIONS]
    write = ["training.data", "policy", *model, *seed, *_files("--prompts", prompts), *_files("--texts", args.texts)]
    batch = ["--batch", str(args.batch)]
    # Rows of a step: few, because there are few rows, and each step must count.
    train = ["--batch", "768", "--data", data, *seed, *store]
    return [
        Part("preparing the model", 0.02, lambda minutes: [
            "cascadeexit", "run", "Hello", "--max-new-tokens", "1", *model]),
        Part("writing text", 0.34, lambda minutes: [
            *write, "--out", data, *batch, "--steps", str(args.length), "--tokens", "100000000",
            "--minutes", f"{minutes:.3f}", *store, *_exits(args)]),
        Part("writing prompts", 0.03, lambda minutes: [
            *write, "--out", held_out, *batch, "--steps", "160", "--tokens", "1", "--held-out",
            "--own-share", "0", "--plain-share", "0"]),
        Part("training exits", 0.24, lambda minutes: [
            "training.distill", *model, *train, "--out", exits, "--epochs", "6", "--fit-minutes", f"{minutes:.3f}",
            "--width", str(args.width), *_exits(args), "--fit-documents", "100000"]),
        Part("training the drafter", 0.17, lambda minutes: [
            "training.drafter", *made, *train, "--epochs", "4", "--fit-minutes", f"{minutes:.3f}"]),
        Part("training estimators", 0.04, lambda minutes: ["training.confidence", *made, "--data", data, *seed,
                                                           *store]),
        Part("calibrating", 0.16, lambda minutes: [
            "training.calibrate", *made, "--data", held_out, *seed, "--tokens", "32", "--minutes", f"{minutes:.3f}",
            "--thresholds", "0.9", "0.75", "0.55"]),
    ]


def _files(option: str, files: Sequence[Path]) -> list[str]:
    return [option, *map(str, files)] if files else []


def _exits(args: argparse.Namespace) -> list[str]:
    return ["--exits", args.exits] if args.exits else []


class Quick:
    """A training run in a folder. `run` runs the parts that are not done. `speeds` measures the trained exits.

    Args:
        args: options of the command.

    Raises ValueError if the folder has a training with other settings.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.parts, self._log = args, parts_of(args), args.out / "quick.log"
        settings = {name: str(getattr(args, name)) for name in
                    ("model", "exits", "width", "batch", "length", "prompts", "texts", "seed")}
        self.state = read_json(args.out / STATE) or {"settings": settings, "parts": {}}
        changed = {k: (old, settings[k]) for k, old in self.state["settings"].items() if settings[k] != old}
        if changed:
            raise ValueError(f"{args.out} holds a training with other settings, (old, new): {changed}. Give the old "
                             "settings, or another --out.")

    def run(self) -> Iterator[Progress]:
        """Run the parts that are not done, each in a process of its own. Yields the progress about once a second.

        Raises ValueError if a part fails. The message has the last lines of the part's output.
        """
        self.args.out.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps({"prompt": turn}) + "\n" for turn in questions(self.args.seed))
        (self.args.out / QUESTIONS).write_text(rows, encoding="utf-8")
        done, left = 0.0, 60 * self.args.minutes - sum(p["seconds"] for p in self.state["parts"].values())
        for number, part in enumerate(self.parts):
            record = self.state["parts"].setdefault(part.name, {"seconds": 0.0, "done": False})
            if not record["done"]:
                share = part.share / sum(other.share for other in self.parts[number:])
                for passed in self._do(part, max(left, 0) * share / 60, record):
                    yield Progress(part.name, done + part.share * passed)
                left -= record["seconds"]
            done += part.share
            yield Progress(part.name, done)

    def _do(self, part: Part, minutes: float, record: dict) -> Iterator[float]:
        """Run one part. Yields the share of its time that has passed. Writes the state at the end, also after an error.

        Args:
            minutes: time for the part, the start of its process included.
            record: the part's entry in the state; this function updates it.
        """
        began, before = time.monotonic(), record["seconds"]
        words = part.command(max(minutes - _START, 0.05))
        try:
            with self._log.open("a", encoding="utf-8") as log:
                print(f"\n$ python -m {' '.join(words)}", file=log, flush=True)
                process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, stdin=subprocess.DEVNULL,
                                           stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                with ended(process):
                    while process.poll() is None:
                        yield min((time.monotonic() - began) / 60 / max(minutes, 0.05), 0.99)
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(1)
            if process.returncode:
                lines = re.split(r"[\r\n]+", self._log.read_text(encoding="utf-8").strip())[-_LAST_LINES:]
                raise ValueError(f"{part.name} failed:\n" + "\n".join(lines) + f"\nAll output: {self._log}. The same "
                                 "command tries it again.")
            record["done"] = True
        finally:
            record["seconds"] = before + time.monotonic() - began
            save_json(self.args.out / STATE, self.state)

    def sentence(self, result: dict) -> str:
        """Describe the result of `speeds` in words, with the command that starts the page with these exits."""
        kept = ("certified: the full model would choose at least 90% of its tokens, on average"
                if result["certified"] else "not certified")
        return (f"Trained in {result['minutes']:.1f} minutes. Speed relative to the full model: verified "
                f"{result['verified']:.2f}x (the same text for {result['same']:.0%} of {_MEASURED_PROMPTS} prompts), "
                f"cascade {result['cascade']:.2f}x ({kept}). Use these exits with: python app.py --model "
                f"{shlex.quote(self.args.model)} --exits {shlex.quote(str(self.args.exits_folder))}")

    def speeds(self) -> dict:
        """Measure the speed of each mode on the held-out prompts, and save it in OUT/exits/quick.json.

        Returns a dict that can be saved as JSON:
        - `full`, `verified`, `cascade`: speed of the mode / speed of `full`, as medians over the prompts.
        - `full_tokens_per_second`: speed of `full`.
        - `same`: share of the prompts for which `verified` and `full` wrote the same text.
        - `certified`: True if the calibration certifies that `cascade` disagrees with `full` on at most 10% of tokens.
        - `minutes`: time that the training took.
        """
        engine, _ = load(self.args.model, self.args.exits_folder)
        prompts = prompts_of(load_documents([self.args.out / "held-out"]), 10**6, self.args.seed)
        result = measured(engine, prompts[-_MEASURED_PROMPTS:], _MEASURED_TOKENS)
        result["minutes"] = sum(part["seconds"] for part in self.state["parts"].values()) / 60
        save_json(self.args.exits_folder / STATE, {"provenance": provenance(self.args.seed), **result})
        return result


def trained_exits(model: str) -> Iterator[Progress]:
    """Train exits for a model with the default options, for the page. Yields the progress.

    A call with the same model continues a training that was interrupted.

    The generator returns (folder of the exits, a sentence about the result). Raises ValueError if a part fails, and the
    errors of `hub.load`.
    """
    quick = Quick(parse_args(["--model", model]))
    yield from quick.run()
    yield Progress("measuring the speed", 1.0)
    return quick.args.exits_folder, quick.sentence(quick.speeds())


def measured(engine: Engine, prompts: list[tuple[int, ...]], tokens: int) -> dict:
    """Decode the prompts with `full`, `verified` and `cascade` in turns, and compare their speeds.

    If the calibration certifies a disagreement of at most 10%, `cascade` decodes with this target. Else it has its
    default threshold. Returns the dict that `Quick.speeds` describes, without `minutes`.

    Args:
        prompts: token ids of each prompt.
        tokens: new tokens for each prompt.
    """
    certified = engine.bank.calibration and engine.bank.calibration.threshold(0.1) is not None
    configs = {mode: DecodeConfig(mode=mode, max_new_tokens=tokens, ignore_eos=True) for mode in Mode}
    if certified:
        configs[Mode.CASCADE] = DecodeConfig(target_disagreement=0.1, max_new_tokens=tokens, ignore_eos=True)
    runs = [{mode: engine.run(prompt, config) for mode, config in configs.items()}
            for prompt in tqdm([prompts[0], *prompts], desc="speed", leave=False)][1:]          # the first warms up
    speed = {mode: statistics.median(run[mode].stats.tokens_per_second / run[Mode.FULL].stats.tokens_per_second
                                     for run in runs) for mode in configs}
    return {mode.value: ratio for mode, ratio in speed.items()} | {
        "full_tokens_per_second": statistics.median(run[Mode.FULL].stats.tokens_per_second for run in runs),
        "same": sum(run[Mode.VERIFIED].token_ids == run[Mode.FULL].token_ids for run in runs) / len(runs),
        "certified": bool(certified)}


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    p = command_parser(__doc__)
    add_model(p)
    p.add_argument("--out", type=Path, help="folder for text, hidden states and exits; default: runs/MODEL-quick")
    p.add_argument("--minutes", type=float, default=QUICK_GPU_MINUTES if torch.cuda.is_available() else QUICK_MINUTES,
                   help="time for all parts (default: %(default)s)")
    p.add_argument("--exits", help="exit layers or shares of the depth (default: 0,0.3,0.57,0.8)")
    p.add_argument("--width", type=int, default=512, help="inner width of the adapters (default: %(default)s)")
    p.add_argument("--prompts", type=Path, nargs="*", default=[], help='JSONL files with rows {"prompt": ...} that the '
                   "model answers; without such files it answers plain questions, and invents others")
    p.add_argument("--texts", type=Path, nargs="*", default=[], help="text files; the model continues passages of them")
    p.add_argument("--batch", type=int, default=48, help="documents written at once (default: %(default)s)")
    p.add_argument("--length", type=int, default=256, help="longest document, in tokens (default: %(default)s)")
    add_seed(p)
    args = p.parse_args(words)
    shape = describe(None if args.model == DEFAULT_MODEL else args.model)
    args.out = (args.out or Path("runs") / f"{shape.name}-quick").resolve()
    args.prompts, args.texts = ([file.resolve() for file in files] for files in (args.prompts, args.texts))
    args.model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    args.exits_folder = args.out / "exits"
    return args


def main() -> None:
    args = parse_args()
    quick = Quick(args)
    print(f"{args.model}: about {args.minutes:g} minutes, in {args.out}. Ctrl-C stops; the same command continues.")
    with tqdm(total=100, bar_format="{desc:<22}{percentage:3.0f}%|{bar}| {elapsed}") as bar:
        for progress in quick.run():
            bar.set_description_str(progress.part)
            bar.update(100 * progress.done - bar.n)
    print(quick.sentence(quick.speeds()))


if __name__ == "__main__":
    run_command(main)
