"""Check the promises on the real model.

    python -m training.evaluate lossless --dtype bfloat16     # verified = full, for every threshold and draft length

`lossless` decodes the project's own prompts with `full` and with `verified` at every combination of threshold and
draft length, and counts tokens that differ: the promise is none. The first --reference prompts are also compared
with transformers' greedy `generate` (its own shapes and cache): equal in fp32; in bf16 the first difference and the
full model's margin between its two best tokens there are reported. Finished prompts are kept: the same command goes
on where it was interrupted.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.hub import DEFAULT_MODEL, load, load_model
from cascadeexit.metrics import match
from training.prompts import chat_ids, load_prompts
from training.provenance import provenance, save_json

RESULTS = Path(__file__).parents[1] / "assets" / "results"


def lossless_prompt(engine: Engine, ids: list[int], args, reference) -> dict:
    """One prompt: tokens of `full`, and how many differ in each verified run and in transformers' generate."""
    full = engine.run(ids, DecodeConfig(mode=Mode.FULL, max_new_tokens=args.tokens))
    row = {"tokens": full.stats.tokens, "verified": {}}
    for threshold, max_draft in itertools.product(args.thresholds, args.max_draft):
        config = DecodeConfig(mode=Mode.VERIFIED, max_new_tokens=args.tokens, thresholds=threshold, max_draft=max_draft)
        run = engine.run(ids, config)
        row["verified"][f"{threshold:g}/{max_draft}"] = {
            "differing": _differing(run.token_ids, full.token_ids),
            "drafted": run.stats.drafted,
            "accepted": round((run.stats.acceptance or 0) * run.stats.drafted)}
    if reference is not None:
        ours, theirs = full.token_ids, _generate(reference, ids, args.tokens)
        first = match(ours, theirs).first_divergence
        row["reference"] = {"differing": _differing(ours, theirs), "first_difference": first,
                            "margin": None if first is None else _margin(reference, ids + theirs[:first])}
    return row


def _differing(a: list[int], b: list[int]) -> int:
    return sum(x != y for x, y in itertools.zip_longest(a, b))


def _generate(reference, ids: list[int], tokens: int) -> list[int]:
    """transformers' greedy decoding with its dynamic cache."""
    out = reference.generate(torch.tensor([ids], device=reference.device), max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids):].tolist()


@torch.inference_mode()
def _margin(reference, ids: list[int]) -> float:
    """Difference of the two largest logits after these tokens."""
    best = reference(torch.tensor([ids], device=reference.device)).logits[0, -1].float().topk(2).values
    return (best[0] - best[1]).item()


def lossless(args) -> None:
    dtype = getattr(torch, args.dtype)
    engine, tokenizer = load(args.model, args.exits, dtype=dtype)
    reference = load_model(args.model, dtype=dtype)[0] if args.reference else None
    out = args.out or RESULTS / f"lossless-{engine.model.device.type}-{args.dtype}.json"
    partial = out.with_suffix(".partial.jsonl")
    # Rows of an interrupted run count only if they were made for the same exits and the same question.
    key = {"exits": engine.bank.fingerprint(), "tokens": args.tokens, "thresholds": args.thresholds,
           "max_draft": args.max_draft, "dtype": args.dtype}
    rows = [row for row in map(json.loads, partial.open())
            if row.pop("key") == key] if partial.exists() else []
    prompts = load_prompts(count=args.prompts)
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(len(rows), len(prompts)), initial=len(rows), total=len(prompts), unit="prompt"):
        name, prompt = prompts[index]
        row = {"set": name, "prompt": prompt} | lossless_prompt(
            engine, chat_ids(tokenizer, prompt), args, reference if index < args.reference else None)
        rows.append(row)
        with partial.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"key": key}) + "\n")
    summary = summarize_lossless(rows)
    save_json(out, {"provenance": provenance(0), **key, "trained_exits": engine.bank.config.trained,
                    "minutes": round((time.perf_counter() - started) / 60, 1), **summary, "rows": rows})
    partial.unlink(missing_ok=True)
    print(json.dumps(summary, indent=2))
    if summary["verified_differing_tokens"] or (dtype == torch.float32 and summary["reference_differing_tokens"]):
        raise SystemExit("a promise is broken: tokens differ (see the file)")


def summarize_lossless(rows: list[dict]) -> dict:
    """Totals over prompts; `acceptance` by threshold/draft length."""
    runs = list(rows[0]["verified"])
    compared = [row["reference"] for row in rows if "reference" in row]
    return {
        "prompts": len(rows), "full_tokens": sum(row["tokens"] for row in rows),
        "verified_runs": len(rows) * len(runs),
        "verified_tokens": len(runs) * sum(row["tokens"] for row in rows),
        "verified_differing_tokens": sum(v["differing"] for row in rows for v in row["verified"].values()),
        "acceptance": {run: round(sum(row["verified"][run]["accepted"] for row in rows)
                                  / max(1, sum(row["verified"][run]["drafted"] for row in rows)), 4) for run in runs},
        "reference_prompts": len(compared), "reference_differing_tokens": sum(r["differing"] for r in compared),
        "reference_identical": sum(r["differing"] == 0 for r in compared),
        "reference_margins": [r["margin"] for r in compared if r["margin"] is not None],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="{lossless}")
    check = kinds.add_parser("lossless", help="verified = full = transformers' generate, token for token")
    check.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
    check.add_argument("--exits", type=Path, help="exits folder; default the shipped ones")
    check.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    check.add_argument("--prompts", type=int, default=50)
    check.add_argument("--reference", type=int, default=20, help="prompts also decoded by transformers' generate")
    check.add_argument("--tokens", type=int, default=128, help="new tokens a prompt")
    check.add_argument("--thresholds", type=float, nargs="+", default=[0, 0.3, 0.6, 0.9])
    check.add_argument("--max-draft", type=int, nargs="+", default=[1, 3, 7])
    check.add_argument("--out", type=Path, help="default assets/results/lossless-DEVICE-DTYPE.json")
    check.set_defaults(run=lossless)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
