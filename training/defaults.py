"""Measure how settings of the page work on its example prompts. The default and the presets are chosen from the result.

    python -m training.defaults                                     # all settings, every example prompt
    python -m training.defaults --settings 0.8 0.9,0.85,0.85,0.95   # these only

Each prompt is decoded greedily as on the page: in the chat template, with at most 200 new tokens. First come the page's
examples, then a number (--prompts) of the project's own prompts, which show whether the examples are typical. The
result has three main figures for each setting:
- `agreement` is teacher-forced: the full model reads the text that the exits wrote.
- `routing_share` is the share of the tokens that each exit and the full model produced.
- `loops` counts texts that end in repetition (`cascadeexit.repetition`). `new_loops` counts only those
  texts where the full model's text for the same prompt does not end in repetition.

There are three forms of settings:
- One number is the threshold of the first exit. The page's sliders for the other exits follow from it.
- Numbers separated by commas are the thresholds of all exits.
- `tolerance=0.3` is mode `verified` with this tolerance, for comparison.

The thresholds of `training.calibrate` are among the default settings, because the quality slider of the page uses them.
Speed is not measured. The weight bytes per token (`cost`) are measured: they do not depend on other programs on the
machine. The same command continues an interrupted run.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.examples import EXAMPLES
from cascadeexit.hub import load
from cascadeexit.metrics import agreement
from cascadeexit.prompts import Prompt, bundled_prompts, token_ids
from cascadeexit.repetition import find_loop
from cascadeexit.settings import Settings, thresholds_at
from cascadeexit.shape import Shape
from training.command import run_command
from training.json_files import ResumableRows, save_json
from training.options import add_dtype, add_model_and_exits, add_prompts, command_parser, thresholds
from training.provenance import provenance, results_file

EXAMPLE = "example"         # kind of a prompt that the page offers
FULL = "full"               # name of the full model's row
TOLERANCE = "tolerance="
SETTINGS = ("0.4", "0.6", "0.7", "0.8", "0.85", "0.9", "0.95", "0.97", f"{TOLERANCE}0.3", f"{TOLERANCE}0.6")


def config_of(setting: str, shape: Shape, tokens: int) -> DecodeConfig:
    """Make the `DecodeConfig` for a setting that is given as text.

    Args:
        setting: "0.6" is the threshold of the first exit, from which the other thresholds follow (`thresholds_at`).
            "0.9,0.8,0.8" gives the thresholds of all exits. "tolerance=0.3" is mode `verified` with this tolerance.
            "full" is the full model.
        shape: shape of the model, which has the number of exits and their depths.
        tokens: new tokens, at most.

    Raises ValueError if `setting` is none of these.
    """
    if setting == FULL:
        return DecodeConfig(Mode.FULL, tokens)
    if setting.startswith(TOLERANCE):
        return DecodeConfig(Mode.VERIFIED, tokens, tolerance=float(setting.removeprefix(TOLERANCE)))
    wanted = thresholds(setting)
    if isinstance(wanted, float):
        wanted = thresholds_at(wanted, shape)[:shape.num_exits]
    return DecodeConfig(Mode.CASCADE, tokens, thresholds=wanted)


def measure(engine: Engine, ids: list[int], config: DecodeConfig) -> dict:
    """Decode one prompt, and measure the text.

    Returns a dict with `tokens` (number of new tokens), `agreement`, `routing_share`, `copied_share` and `cost` (as in
    `metrics.RunStats`), and `loop`. `loop` has the entries of `repetition.Loop`; it is None if the text does not end in
    repetition.
    """
    run = engine.run(ids, config)
    stats, loop = run.stats, find_loop(run.token_ids)
    return {"tokens": stats.tokens, "agreement": agreement(run.token_ids, engine.full_choices(ids, run.token_ids)),
            "routing_share": list(stats.routing_share), "copied_share": stats.copied_share, "cost": stats.cost,
            "loop": loop and loop._asdict()}


def measure_all(engine: Engine, tokenizer, prompts: list[Prompt], args: argparse.Namespace,
                partial: ResumableRows) -> list[dict]:
    """Decode every prompt at every setting and with the full model, and measure the texts.

    New results are added to `partial`. Results that an interrupted run left in `partial` are not measured again.

    Args:
        args: `tokens` and `settings` are used, with the meaning of the command's options.

    Returns a list with a dict for each prompt and setting: `kind`, `prompt`, `setting`, and the entries of `measure`.
    """
    done = {(row["prompt"], row["setting"]): row for row in partial.rows}
    configs = {name: config_of(name, Shape.of(engine), args.tokens) for name in (FULL, *args.settings)}
    wanted = [(prompt, name) for prompt in prompts for name in configs]
    for prompt, name in tqdm(wanted, unit="text"):
        if (prompt.text, name) not in done:
            row = {"kind": prompt.kind, "prompt": prompt.text, "setting": name}
            row |= measure(engine, token_ids(tokenizer, prompt.text), configs[name])
            partial.append(row)
            done[prompt.text, name] = row
    # A bundled prompt may be an example, too: it is decoded once and counts in both groups.
    return [done[prompt.text, name] | {"kind": prompt.kind} for prompt, name in wanted]


def summarize(rows: list[dict]) -> dict:
    """Compute the figures of each setting over some prompts.

    Args:
        rows: results of `measure_all`.

    Returns {setting: figures}. The figures of a setting are a dict:
    - `prompts`: number of prompts.
    - `agreement`, `routing_share`, `cost`: means over the prompts. `least_agreement`: smallest agreement of a prompt.
    - `every_exit`: number of prompts for which every exit produced at least one token.
    - `loops`: number of texts that end in repetition. `new_loops`: number of those texts where the full
      model's text for the same prompt does not end in repetition.
    """
    looping = {row["prompt"] for row in rows if row["setting"] == FULL and row["loop"]}
    summary = {}
    for name in dict.fromkeys(row["setting"] for row in rows):
        of = [row for row in rows if row["setting"] == name]
        summary[name] = {
            "prompts": len(of), "agreement": _mean(row["agreement"] for row in of),
            "least_agreement": min(row["agreement"] for row in of),
            "routing_share": [_mean(shares) for shares in zip(*(row["routing_share"] for row in of))],
            "every_exit": sum(all(row["routing_share"][:-1]) for row in of),
            "loops": sum(bool(row["loop"]) for row in of),
            "new_loops": sum(bool(row["loop"]) and row["prompt"] not in looping for row in of),
            "cost": _mean(row["cost"] for row in of)}
    return summary


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def main() -> None:
    p = command_parser(__doc__)
    add_model_and_exits(p)
    add_dtype(p)
    add_prompts(p, prompts=12, tokens=Settings.max_new_tokens)
    p.add_argument("--settings", nargs="+", default=list(SETTINGS), help="settings to measure, in the forms "
                   "described above")
    p.add_argument("--out", type=Path, help="result file; default: assets/results/defaults.json")
    args = p.parse_args()
    out = args.out or results_file(args.model, args.exits, "defaults.json")
    engine, tokenizer = load(args.model, args.exits, dtype=getattr(torch, args.dtype))
    key = {"model": engine.model.name, "exits": engine.bank.fingerprint(), "tokens": args.tokens, "dtype": args.dtype}
    partial = ResumableRows(out.with_suffix(".partial.jsonl"), key)
    examples = [Prompt(EXAMPLE, text) for text in EXAMPLES.values()]
    rows = measure_all(engine, tokenizer, [*examples, *bundled_prompts()[:args.prompts]], args, partial)
    groups = {"examples": [row for row in rows if row["kind"] == EXAMPLE],
              "bundled": [row for row in rows if row["kind"] != EXAMPLE]}
    save_json(out, {"provenance": provenance(0), **key, "layers": engine.model.exit_layers,
                    **{name: summarize(of) for name, of in groups.items()}, "rows": rows})
    partial.finish()
    print(json.dumps(summarize(groups["examples"]), indent=2))


if __name__ == "__main__":
    run_command(main)
