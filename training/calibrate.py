"""Calibrate a cascade: measure its disagreement with the full model at several thresholds, and certify a bound.

    python -m training.calibrate --exits runs/smollm2 --data data/policy data/policy2

`DecodeConfig.target_disagreement` and the page's quality slider use the result. The prompts come from the test
documents, on which neither adapters nor estimators were trained. A prompt is all text of a document before the last
reply. At each threshold, the cascade decodes every prompt greedily. Then the full model reads this text. The loss of a
prompt is the share of its new tokens that the full model would not have chosen.

The result is `calibration.json` in the exits folder. For each threshold, the file holds the mean loss, and an upper
bound of the expected loss on prompts like these (Learn then Test with Hoeffding-Bentkus bounds, see
`cascadeexit.calibration`). The bound does not cover other kinds of prompts, or much longer replies. The same command
continues an interrupted run.
"""

import argparse
import math
import random
import time
from dataclasses import asdict

from tqdm import tqdm

from cascadeexit.calibration import CALIBRATION_FILE, Calibration
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import read_config
from cascadeexit.hub import load
from cascadeexit.metrics import agreement
from training.command import run_command
from training.documents import Document, Split, load_documents
from training.json_files import ResumableRows, save_json
from training.options import add_exits_and_data, add_seed, command_parser
from training.provenance import provenance

Prompt = tuple[int, ...]        # token ids


def prompt_of(document: Document) -> Prompt:
    """Return the prompt of a document: all tokens before the last reply that the model wrote."""
    first = len(document.ids)
    while first and document.chosen[first - 1]:
        first -= 1
    return tuple(document.ids[:first])


def prompts_of(documents: list[Document], count: int, seed: int) -> list[Prompt]:
    """Choose at most `count` different prompts from the test documents that the model wrote.

    The seed decides which prompts are chosen, and their order.
    """
    prompts = sorted({prompt_of(d) for d in documents if d.split == Split.TEST and any(d.chosen)} - {()})
    random.Random(seed).shuffle(prompts)
    return prompts[:count]


def measure(engine: Engine, prompt: Prompt, threshold: float, tokens: int) -> dict:
    """Decode one prompt with the cascade at one threshold.

    Args:
        threshold: threshold of the first exit. The thresholds of the other exits follow from it.
        tokens: new tokens, at most.

    Returns a dict: `loss` is the share of the new tokens that the full model would not have chosen. `cost` is the
    weight bytes read per token, relative to the full model.
    """
    config = DecodeConfig(thresholds=threshold, max_new_tokens=min(tokens, engine.model.max_positions - len(prompt)))
    run = engine.run(prompt, config)
    return {"loss": 1 - agreement(run.token_ids, engine.full_choices(prompt, run.token_ids)), "cost": run.stats.cost}


def measure_all(engine: Engine, prompts: list[Prompt], thresholds: list[float], tokens: int,
                partial: ResumableRows, minutes: float = math.inf) -> dict[float, list[dict]]:
    """Measure prompt after prompt, each at every threshold. New results are added to `partial`.

    Results that an interrupted run left in `partial` are not measured again.

    Args:
        minutes: time limit. When it is over, no further prompt is begun, but at least one is measured.

    Returns {threshold: results of `measure`, one for each prompt that was measured}.
    """
    done = {(row["threshold"], *row["prompt"]): row for row in partial.rows}
    measured, end = [], time.monotonic() + 60 * minutes
    with tqdm(total=len(prompts) * len(thresholds), unit="run", desc="calibrate") as bar:
        for prompt in prompts:
            if measured and time.monotonic() > end:
                bar.write(f"stopped by --minutes after {len(measured)} of {len(prompts)} prompts")
                break
            for threshold in thresholds:
                if (threshold, *prompt) not in done:
                    row = {"threshold": threshold, "prompt": prompt} | measure(engine, prompt, threshold, tokens)
                    done[threshold, *prompt] = row
                    partial.append(row)
                bar.update()
            measured.append(prompt)
    return {t: [done[t, *prompt] for prompt in measured] for t in thresholds}


def parser() -> argparse.ArgumentParser:
    p = command_parser(__doc__)
    add_exits_and_data(p, exits="exits folder with trained estimators")
    p.add_argument("--prompts", type=int, default=300, help="number of prompts, at most; more make tighter bounds")
    p.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    p.add_argument("--thresholds", type=float, nargs="+", default=[0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4],
                        help="thresholds of the first exit; those of the other exits follow from it")
    p.add_argument("--minutes", type=float, default=math.inf, help="begin no further prompt after this long")
    p.add_argument("--delta", type=float, default=0.1, help="probability that the bound does not hold")
    add_seed(p, help="decides which prompts are measured")
    return p


def main() -> None:
    args = parser().parse_args()
    engine, _ = load(args.model or read_config(args.exits).base_model, args.exits)
    prompts = prompts_of(load_documents(args.data), args.prompts, args.seed)
    if not prompts:
        raise ValueError("no test document has a prompt: write more data with python -m training.data policy (1 in 25 "
                         "documents is a test document)")
    exits = engine.bank.fingerprint()
    partial = ResumableRows(args.exits / "calibration.partial.jsonl", key=[exits, args.tokens])
    rows = measure_all(engine, prompts, args.thresholds, args.tokens, partial, args.minutes)
    calibration = Calibration.of({t: [row["loss"] for row in of] for t, of in rows.items()},
                                 {t: sum(row["cost"] for row in of) / len(of) for t, of in rows.items()},
                                 exits=exits, tokens=args.tokens, delta=args.delta)
    save_json(args.exits / CALIBRATION_FILE, {"provenance": provenance(args.seed), **asdict(calibration)})
    partial.finish()
    for point in calibration.points:
        print(f"threshold {point.threshold:g}: disagreement {point.disagreement:.1%}, at most {point.at_most:.1%} with "
              f"{1 - args.delta:.0%} confidence; reads {point.cost:.0%} of the full model's weight bytes")


if __name__ == "__main__":
    run_command(main)
