"""Check the promises and measure the exits on the real model.

    python -m training.evaluate exits --text test.txt --data data/policy    # top-1, top-5, perplexity of each exit
    python -m training.evaluate decode                                      # routing, agreement, acceptance
    python -m training.evaluate lossless --dtype bfloat16     # verified = full, for every threshold and draft length

`exits` reads whole texts in one pass (teacher-forced): plain text in windows, and the test documents of data folders.
An exit that carries the last hidden state on is read twice: after a token that the full model named, and after one
that the exit itself named. Top-1 and top-5 count the full model's first choice, through the exit's own trimmed head;
perplexity is that of the text's next token, through the whole head.

`decode` runs the engine on the project's prompts (closed loop): the cascade at several thresholds, and drafts of one
exit alone at threshold 0, K at a time, as the published self-speculation.

`lossless` decodes the project's own prompts with `full` and with `verified` at every combination of threshold and
draft length, and counts tokens that differ: the promise is none. The first --reference prompts are also compared
with transformers' greedy `generate` (its own shapes and cache): equal in fp32; in bf16 the first difference and the
full model's margin between its two best tokens there are reported. Finished prompts are kept: the same command goes
on where it was interrupted.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.hub import DEFAULT_MODEL, load, load_model
from cascadeexit.metrics import agreement, match
from cascadeexit.prompts import bundled_prompts, token_ids
from training.command import run_command
from training.distill import carried
from training.documents import Document, Split, load_documents
from training.features import Features, FeatureStore
from training.provenance import provenance, read_lines, results_file, save_json


def lossless_prompt(engine: Engine, ids: list[int], args, reference) -> dict:
    """One prompt: tokens of `full`, and how many differ in each verified run and in transformers' generate."""
    full = engine.run(ids, DecodeConfig(mode=Mode.FULL, max_new_tokens=args.tokens))
    row = {"tokens": full.stats.tokens, "verified": {}}
    for threshold, max_draft in itertools.product(args.thresholds, args.max_draft):
        config = DecodeConfig(mode=Mode.VERIFIED, max_new_tokens=args.tokens, thresholds=threshold, max_draft=max_draft)
        run = engine.run(ids, config)
        row["verified"][f"{'own rule' if threshold is None else f'{threshold:g}'}/{max_draft}"] = {
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
    out = args.out or results_file(args.model, args.exits, f"lossless-{engine.model.device.type}-{args.dtype}.json")
    partial = out.with_suffix(".partial.jsonl")
    # Rows of an interrupted run count only if they were made for the same exits and the same question.
    key = {"model": engine.model.name, "exits": engine.bank.fingerprint(), "tokens": args.tokens,
           "thresholds": args.thresholds, "max_draft": args.max_draft, "dtype": args.dtype}
    asked = {"key": key | {"reference": args.reference}}
    rows = [{k: v for k, v in row.items() if k != "key"} for row in read_lines(partial) if row["key"] == asked["key"]]
    prompts = [(p.kind, p.text) for p in bundled_prompts()[:args.prompts]]
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(row | asked) + "\n" for row in rows), encoding="utf-8")
    for index in tqdm(range(len(rows), len(prompts)), initial=len(rows), total=len(prompts), unit="prompt"):
        name, prompt = prompts[index]
        row = {"set": name, "prompt": prompt} | lossless_prompt(
            engine, token_ids(tokenizer, prompt), args, reference if index < args.reference else None)
        rows.append(row)
        with partial.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | asked) + "\n")
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


# -- exits, teacher-forced ---------------------------------------------------------------------------------------------


class Tally:
    """Hits and log-likelihood of the exits (and, last, of the full model) over rows."""

    def __init__(self, readers: int):
        self.rows, self.top1, self.top5, self.nll = 0, [0] * readers, [0] * readers, [0.0] * readers

    def report(self, layers: list[int]) -> dict:
        perplexity = [math.exp(nll / self.rows) for nll in self.nll]
        return {"rows": self.rows, "full_perplexity": perplexity[-1],
                "exits": [{"layer": layer, "top1": self.top1[s] / self.rows, "top5": self.top5[s] / self.rows,
                           "perplexity": perplexity[s], "perplexity_ratio": perplexity[s] / perplexity[-1]}
                          for s, layer in enumerate(layers)]}


@torch.inference_mode()
def read_document(engine: Engine, f: Features, tallies: dict[str, Tally]) -> None:
    """Count every exit's rows of one document; `tallies` by who named the token before: 'full', 'exit'."""
    bank, project = engine.bank, engine.model.head
    wanted = f.wanted.clone()
    wanted[-1] = False                                       # nothing follows the last token
    following, truth = f.ids.roll(-1)[wanted].long(), f.choices[wanted].long()
    for name, tally in tallies.items():
        said = carried(f)
        tally.rows += len(truth)
        for s in range(engine.num_exits):
            hidden = bank.hidden(s, f.exits[:, s], said)
            if name == "exit":
                hidden = bank.hidden(s, f.exits[:, s], torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]]))
            hidden = hidden[wanted]
            best = bank.logits(s, hidden).topk(5, dim=-1).indices
            hits = (best if bank.head_ids is None else bank.head_ids[best]) == truth[:, None]
            tally.top1[s] += hits[:, 0].sum().item()
            tally.top5[s] += hits.any(-1).sum().item()
            tally.nll[s] += F.cross_entropy(project(hidden).float(), following, reduction="sum").item()
        tally.nll[-1] += F.cross_entropy(project(f.top[wanted]).float(), following, reduction="sum").item()


def windows(tokenizer, path: Path, window: int, tokens: int) -> list[Document]:
    """The first `tokens` tokens of a text file, cut into windows that follow each other."""
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"][:tokens]
    return [Document(ids[a:a + window], [0] * len(ids[a:a + window])) for a in range(0, len(ids) - 1, window)]


def exits(args) -> None:
    out = args.out or results_file(args.model, args.exits, "exits.json")
    engine, tokenizer = load(args.model, args.exits)
    sources = {f"{path.parent.name}/{path.name}": windows(tokenizer, path, args.window, args.tokens)
               for path in args.text}
    if args.data:
        sources["held-out"] = [d for d in load_documents(args.data) if d.split == Split.TEST and any(d.chosen)]
    sources = {name: documents for name, documents in sources.items() if documents}
    if not sources:
        raise SystemExit("nothing to read: give --text FILE, or --data FOLDER with test documents")
    report = {}
    for name, documents in sources.items():
        store = FeatureStore(engine.model, documents, Path(), budget_gb=0)
        kinds = ("full", "exit") if engine.bank.config.adapter == "carry" else ("full",)
        tallies = {kind: Tally(engine.num_exits + 1) for kind in kinds}
        for i in tqdm(range(len(store)), unit="text", desc=name):
            read_document(engine, store[i], tallies)
        report[name] = {f"after_{kind}": tally.report(list(engine.model.exit_layers))
                        for kind, tally in tallies.items()}
        for kind, tally in tallies.items():
            for row in tally.report(list(engine.model.exit_layers))["exits"]:
                print(f"{name}, after {kind}: layer {row['layer']}: top-1 {row['top1']:.1%}, top-5 {row['top5']:.1%}, "
                      f"perplexity {row['perplexity']:.2f} = {row['perplexity_ratio']:.2f}x")
    save_json(out, {
        "provenance": provenance(0), "model": engine.model.name, "exits": engine.bank.fingerprint(),
        "adapter": engine.bank.config.adapter,
        "head_sizes": [engine.bank.config.words(s) for s in range(engine.num_exits)],
        "exit_parameters": sum(p.numel() for p in engine.bank.adapters.parameters()) // engine.num_exits,
        "window": args.window, "texts": report})


# -- decoding, closed loop ---------------------------------------------------------------------------------------------


def decode(args) -> None:
    out = args.out or results_file(args.model, args.exits, "decode.json")
    engine, tokenizer = load(args.model, args.exits)
    prompts = [token_ids(tokenizer, prompt.text) for prompt in bundled_prompts()[:args.prompts]]
    fulls = [engine.run(ids, DecodeConfig(mode=Mode.FULL, max_new_tokens=args.tokens)).token_ids
             for ids in tqdm(prompts, unit="prompt", desc="full")]
    cascade = []
    for threshold in tqdm(args.thresholds, unit="threshold", desc="cascade"):
        config = DecodeConfig(mode=Mode.CASCADE, thresholds=threshold, max_new_tokens=args.tokens)
        cascade.append({"threshold": threshold} | decode_cascade(engine, prompts, fulls, config))
        print(json.dumps(cascade[-1]))
    drafting = []
    for exit, max_draft in tqdm(list(itertools.product(range(engine.num_exits), args.max_draft)), desc="drafts"):
        alone = tuple(0.0 if s == exit else None for s in range(engine.num_exits))
        config = DecodeConfig(mode=Mode.VERIFIED, thresholds=alone, max_draft=max_draft, max_new_tokens=args.tokens)
        drafting.append({"layer": engine.model.exit_layers[exit], "max_draft": max_draft}
                        | decode_drafts(engine, prompts, fulls, config))
        print(json.dumps(drafting[-1]))
    save_json(out, {
        "provenance": provenance(0), "model": engine.model.name, "exits": engine.bank.fingerprint(),
        "prompts": len(prompts), "tokens": args.tokens, "cascade": cascade, "self_speculation": drafting})


def decode_cascade(engine: Engine, prompts: list[list[int]], fulls: list[list[int]], config: DecodeConfig) -> dict:
    """Routing and quality over all tokens of these prompts."""
    runs = [engine.run(ids, config) for ids in prompts]
    total = sum(r.stats.tokens for r in runs)

    def mean(values) -> float:
        """Over tokens."""
        return sum(v * r.stats.tokens for v, r in zip(values, runs)) / total

    share = [mean(r.stats.routing_share[s] for r in runs) for s in range(engine.model.num_segments)]
    matches = [match(r.token_ids, full) for r, full in zip(runs, fulls)]
    return {"routing_share": share, "early": 1 - share[-1],
            "agreement": mean(agreement(r.token_ids, engine.full_choices(ids, r.token_ids))
                              for ids, r in zip(prompts, runs)),
            "positional_match": sum(m.positional for m in matches) / len(matches),
            "sequence_match": sum(m.sequence for m in matches) / len(matches),
            "average_depth": mean(r.stats.average_depth for r in runs), "cost": mean(r.stats.cost for r in runs)}


def decode_drafts(engine: Engine, prompts: list[list[int]], fulls: list[list[int]], config: DecodeConfig) -> dict:
    """Acceptance over all drafts of these prompts."""
    runs = [engine.run(ids, config) for ids in prompts]
    drafted, tokens = sum(r.stats.drafted for r in runs), sum(r.stats.tokens for r in runs)
    passes = sum(r.stats.tokens / r.stats.tokens_per_verification for r in runs if r.stats.tokens_per_verification)
    return {"acceptance": sum(r.stats.acceptance * r.stats.drafted for r in runs if r.stats.drafted) / drafted,
            "tokens_per_verification": tokens / passes,
            "identical": sum(r.token_ids == full for r, full in zip(runs, fulls)) / len(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="{exits,decode,lossless}")
    read = kinds.add_parser("exits", help="top-1, top-5 and perplexity of each exit, teacher-forced")
    read.add_argument("--text", type=Path, nargs="*", default=[], help="plain text, such as WikiText-2's test.txt")
    read.add_argument("--data", type=Path, nargs="*", default=[], help="folders of training.data: their test documents")
    read.add_argument("--window", type=int, default=512, help="tokens of a text read at once")
    read.add_argument("--tokens", type=int, default=100_000, help="tokens read of each text file, at most")
    read.set_defaults(run=exits)
    loop = kinds.add_parser("decode", help="routing, agreement and acceptance of the engine, closed loop")
    loop.add_argument("--prompts", type=int, default=20)
    loop.add_argument("--tokens", type=int, default=96, help="new tokens a prompt")
    loop.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    loop.add_argument("--max-draft", type=int, nargs="+", default=[3, 5, 7])
    loop.set_defaults(run=decode)
    check = kinds.add_parser("lossless", help="verified = full = transformers' generate, token for token")
    for kind in (read, loop, check):
        kind.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
        kind.add_argument("--exits", type=Path, help="exits folder; default the shipped ones")
        kind.add_argument("--out", type=Path, help="default assets/results/KIND.json")
    check.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    check.add_argument("--prompts", type=int, default=50)
    check.add_argument("--reference", type=int, default=20, help="prompts also decoded by transformers' generate")
    check.add_argument("--tokens", type=int, default=128, help="new tokens a prompt")
    check.add_argument("--thresholds", type=lambda text: None if text == "own" else float(text), nargs="+",
                       default=[0, 0.3, 0.6, 0.9, None], help="numbers, or own: the mode's own rule")
    check.add_argument("--max-draft", type=int, nargs="+", default=[1, 3, 7])
    check.set_defaults(run=lossless)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
