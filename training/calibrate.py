"""Calibrate a cascade: measure how often it disagrees with the full model at each threshold, and certify a bound.

    python -m training.calibrate --exits runs/smollm2 --data data/policy data/policy2

`DecodeConfig.target_disagreement` and the page's quality slider use the result. The prompts are those of the test
documents (all before the last reply), which neither adapters nor estimators were trained on. For each prompt and
threshold the engine decodes a text (greedily, closed loop), and the full model reads it. The loss of a prompt is the
share of tokens that the full model would not have chosen. `calibration.json` in the exits folder then holds, for each
threshold, the mean loss and an upper bound of its expectation on such prompts (Learn then Test with Hoeffding-Bentkus
bounds, see `cascadeexit.calibration`). The bound does not cover other kinds of prompts, or much longer replies. The
same command continues an interrupted run.
"""

import random
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
    """Return all tokens before the last reply."""
    first = len(document.ids)
    while first and document.chosen[first - 1]:
        first -= 1
    return tuple(document.ids[:first])


def prompts_of(documents: list[Document], count: int, seed: int) -> list[Prompt]:
    """Pick at most `count` different prompts of test documents, in an order that the seed decides."""
    prompts = sorted({prompt_of(d) for d in documents if d.split == Split.TEST and any(d.chosen)} - {()})
    random.Random(seed).shuffle(prompts)
    return prompts[:count]


def measure(engine: Engine, prompt: Prompt, threshold: float, tokens: int) -> dict:
    """Decode one prompt at one threshold. Returns the share of tokens that differ from the full model, and the cost."""
    config = DecodeConfig(thresholds=threshold, max_new_tokens=min(tokens, engine.model.max_positions - len(prompt)))
    run = engine.run(prompt, config)
    return {"loss": 1 - agreement(run.token_ids, engine.full_choices(prompt, run.token_ids)), "cost": run.stats.cost}


def measure_all(engine: Engine, prompts: list[Prompt], thresholds: list[float], tokens: int,
                partial: ResumableRows) -> dict[float, list[dict]]:
    """Measure every prompt at every threshold, the highest first, except what an interrupted run measured already."""
    done = {(row["threshold"], *row["prompt"]): row for row in partial.rows}
    wanted = [(t, prompt) for t in sorted(thresholds, reverse=True) for prompt in prompts]
    for threshold, prompt in tqdm(wanted, unit="run", desc="calibrate"):
        if (threshold, *prompt) not in done:
            row = {"threshold": threshold, "prompt": prompt} | measure(engine, prompt, threshold, tokens)
            done[threshold, *prompt] = row
            partial.append(row)
    return {t: [done[t, *prompt] for prompt in prompts] for t in thresholds}


def main() -> None:
    parser = command_parser(__doc__)
    add_exits_and_data(parser, exits="exits folder with trained estimators")
    parser.add_argument("--prompts", type=int, default=300, help="number of prompts, at most; more make tighter bounds")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4],
                        help="thresholds of the first exit; those of the other exits follow from it")
    parser.add_argument("--delta", type=float, default=0.1, help="probability that the bound does not hold")
    add_seed(parser, help="decides which prompts are measured")
    args = parser.parse_args()
    engine, _ = load(args.model or read_config(args.exits).base_model, args.exits)
    prompts = prompts_of(load_documents(args.data), args.prompts, args.seed)
    if not prompts:
        raise ValueError("no test document has a prompt: write more data with python -m training.data policy (1 in 25 "
                         "documents is a test document)")
    exits = engine.bank.fingerprint()
    partial = ResumableRows(args.exits / "calibration.partial.jsonl", key=[exits, args.tokens])
    rows = measure_all(engine, prompts, args.thresholds, args.tokens, partial)
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
