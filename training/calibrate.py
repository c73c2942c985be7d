"""Measure which thresholds keep a cascade's disagreement below a bound: what `target_disagreement` relies on.

    python -m training.calibrate --exits runs/smollm2 --data data/policy data/policy2

Prompts are those of the test documents, which neither adapters nor estimators have seen: all that comes before the last
reply in them. The engine decodes each at every threshold, by itself (closed loop, greedy), and the full model reads the
result: a prompt's loss is the part of the tokens that it would not have chosen. `calibration.json` in the exits folder
then holds, for each threshold, the mean loss and an upper bound of its expectation on such prompts (Learn then Test
with Hoeffding-Bentkus bounds, see `cascadeexit.calibration`). Other prompts, or much longer replies, are another
matter. Started again, a run goes on where it was interrupted.
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from cascadeexit.calibration import CALIBRATION_FILE, Calibration
from cascadeexit.engine import DecodeConfig, Engine
from cascadeexit.exits import read_config
from cascadeexit.hub import load
from cascadeexit.metrics import agreement
from training.command import run_command
from training.documents import Document, Split, load_documents
from training.provenance import provenance, read_lines, save_json


def prompt_of(document: Document) -> tuple[int, ...]:
    """All tokens before the last reply."""
    first = len(document.ids)
    while first and document.chosen[first - 1]:
        first -= 1
    return tuple(document.ids[:first])


def prompts_of(documents: list[Document], count: int, seed: int) -> list[tuple[int, ...]]:
    """Different prompts of test documents, in an order of their own, at most `count`."""
    prompts = sorted({prompt_of(d) for d in documents if d.split == Split.TEST and any(d.chosen)} - {()})
    random.Random(seed).shuffle(prompts)
    return prompts[:count]


def measure(engine: Engine, prompt: tuple[int, ...], threshold: float, tokens: int) -> dict:
    """Of one prompt at one threshold: the part of the tokens that differ, and the cost."""
    config = DecodeConfig(thresholds=threshold, max_new_tokens=min(tokens, engine.model.max_positions - len(prompt)))
    run = engine.run(prompt, config)
    return {"loss": 1 - agreement(run.token_ids, engine.full_choices(prompt, run.token_ids)), "cost": run.stats.cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="bundled name, Hub id or local folder; default the one the exits were made for")
    parser.add_argument("--exits", type=Path, required=True, help="exits folder with trained estimators")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders written by training.data")
    parser.add_argument("--prompts", type=int, default=300, help="at most; more make tighter bounds")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4],
                        help="of the first exit, from which the others follow")
    parser.add_argument("--delta", type=float, default=0.1, help="chance that the guarantee fails")
    parser.add_argument("--seed", type=int, default=0, help="which prompts")
    args = parser.parse_args()
    engine, _ = load(args.model or read_config(args.exits).base_model, args.exits)
    prompts = prompts_of(load_documents(args.data), args.prompts, args.seed)
    if not prompts:
        raise ValueError("no test document has a prompt: write more data with python -m training.data policy (1 "
                         "in 25 documents tests)")
    partial, key = args.exits / "calibration.partial.jsonl", [engine.bank.fingerprint(), args.tokens]
    done = {(row["threshold"], *row["prompt"]): row for row in read_lines(partial) if row["key"] == key}
    partial.write_text("".join(json.dumps(row) + "\n" for row in done.values()), encoding="utf-8")
    wanted = [(t, prompt) for t in sorted(args.thresholds, reverse=True) for prompt in prompts]
    with partial.open("a", encoding="utf-8") as file:
        for threshold, prompt in tqdm(wanted, unit="run", desc="calibrate"):
            if (threshold, *prompt) not in done:
                row = {"key": key, "threshold": threshold, "prompt": prompt}
                done[threshold, *prompt] = row | measure(engine, prompt, threshold, args.tokens)
                file.write(json.dumps(done[threshold, *prompt]) + "\n")
                file.flush()
    rows = {t: [done[t, *prompt] for prompt in prompts] for t in args.thresholds}
    calibration = Calibration.of({t: [row["loss"] for row in of] for t, of in rows.items()},
                                 {t: sum(row["cost"] for row in of) / len(of) for t, of in rows.items()},
                                 exits=engine.bank.fingerprint(), tokens=args.tokens, delta=args.delta)
    save_json(args.exits / CALIBRATION_FILE, {"provenance": provenance(args.seed), **asdict(calibration)})
    partial.unlink()
    for point in calibration.points:
        print(f"threshold {point.threshold:g}: disagreement {point.disagreement:.1%}, at most {point.at_most:.1%} with "
              f"{1 - args.delta:.0%} confidence; {point.cost:.0%} of the full model's weight bytes")


if __name__ == "__main__":
    run_command(main)
