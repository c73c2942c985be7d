"""Evaluate exits on a real model: quality of each exit, quality of decoding, and whether `verified` is lossless.

    python -m training.evaluate exits --text test.txt --data data/policy    # top-1, top-5, perplexity of each exit
    python -m training.evaluate decode                                      # routing, agreement, acceptance rate
    python -m training.evaluate lossless --dtype bfloat16     # verified = full, for every threshold and draft length

`exits` reads whole texts in one pass (teacher-forced): windows of plain text files, and the test documents of data
folders. An exit that reads the carried state is measured twice. First the carried state comes from the full model, then
from the exit itself. Top-1 is the share of positions where the exit's likeliest word is the full model's choice. Top-5
is the share of positions where the full model's choice is among the exit's five likeliest words. Both use the exit's
trimmed head. Perplexity is measured on the next token of the text, and uses the whole vocabulary head.

`decode` runs the engine on the project's prompts. It measures the cascade at several thresholds. It also measures
self-speculation as in the original CascadeExit: one exit alone drafts K tokens at a time, at threshold 0.

`lossless` decodes the project's prompts with `full`, and with `verified` at every combination of threshold and draft
length. It counts the tokens that differ; there must be none. The first prompts, as many as --reference says, are also
decoded with transformers' greedy `generate`, which uses other tensor shapes and another cache. In fp32, the text of
`generate` must equal the text of `full`. In other data types, the first difference is only reported, with the margin of
the full model at that position: its largest logit minus its second largest logit. The same command continues an
interrupted run.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cascadeexit.carry import carried_states
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.hub import load, load_model
from cascadeexit.metrics import agreement, match
from cascadeexit.prompts import bundled_prompts, token_ids
from training.command import run_command
from training.documents import Document, Split, load_documents
from training.features import Features, FeatureStore
from training.json_files import ResumableRows, save_json
from training.options import add_dtype, add_model_and_exits, add_prompts, command_parser
from training.provenance import provenance, results_file

# -- lossless ---------------------------------------------------------------------------------------------------------


def check_lossless(args: argparse.Namespace) -> None:
    """Run the command `lossless`, and save and print its result.

    Raises SystemExit if `verified` differs from `full`, or in fp32 if `generate` differs from `full`.
    """
    dtype = getattr(torch, args.dtype)
    engine, tokenizer = load(args.model, args.exits, dtype=dtype)
    reference = load_model(args.model, dtype=dtype)[0] if args.reference else None
    out = args.out or results_file(args.model, args.exits, f"lossless-{engine.model.device.type}-{args.dtype}.json")
    key = {"model": engine.model.name, "exits": engine.bank.fingerprint(), "tokens": args.tokens,
           "thresholds": args.thresholds, "max_draft": args.max_draft, "dtype": args.dtype}
    partial = ResumableRows(out.with_suffix(".partial.jsonl"), key | {"reference": args.reference})
    prompts, done, started = bundled_prompts()[:args.prompts], len(partial.rows), time.perf_counter()
    for index in tqdm(range(done, len(prompts)), initial=done, total=len(prompts), unit="prompt"):
        prompt = prompts[index]
        partial.append({"set": prompt.kind, "prompt": prompt.text} | compare_prompt(
            engine, token_ids(tokenizer, prompt.text), args, reference if index < args.reference else None))
    summary = summarize_lossless(partial.rows)
    save_json(out, {"provenance": provenance(0), **key, "trained_exits": engine.bank.config.trained,
                    "minutes": round((time.perf_counter() - started) / 60, 1), **summary, "rows": partial.rows})
    partial.finish()
    print(json.dumps(summary, indent=2))
    if summary["verified_differing_tokens"] or (dtype == torch.float32 and summary["reference_differing_tokens"]):
        raise SystemExit("verified, or transformers' generate in fp32, wrote other tokens than full: the result file "
                         "says how many")


def compare_prompt(engine: Engine, ids: list[int], args: argparse.Namespace, reference) -> dict:
    """Decode one prompt with `full`, with `verified` in all combinations of settings, and with the reference.

    Args:
        ids: token ids of the prompt.
        args: `tokens`, `thresholds` and `max_draft` are used, with the meaning of the command's options.
        reference: transformers' model; None = decode without it.

    Returns a dict:
    - `tokens`: number of tokens of `full`.
    - `verified`: {"threshold/draft length": {"differing": tokens that differ from `full`, "drafted": number of drafts,
      "accepted": number of accepted drafts}}. For the default threshold, the key has "own rule".
    - `reference`, only with a reference: {"differing": tokens of `generate` that differ from `full`,
      "first_difference": position of the first of them or None, "margin": margin at this position or None}.
    """
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
    """Decode a prompt greedily with transformers' `generate`. Returns the new token ids."""
    out = reference.generate(torch.tensor([ids], device=reference.device), max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids):].tolist()


@torch.inference_mode()
def _margin(reference, ids: list[int]) -> float:
    """Return the largest logit minus the second largest logit, for the token that follows these tokens."""
    best = reference(torch.tensor([ids], device=reference.device)).logits[0, -1].float().topk(2).values
    return (best[0] - best[1]).item()


def summarize_lossless(rows: list[dict]) -> dict:
    """Add up the results of `compare_prompt` over all prompts.

    Returns a dict:
    - `prompts`, `full_tokens`: number of prompts, and of tokens of `full`.
    - `verified_runs`, `verified_tokens`: number of runs with `verified`, and of the tokens that were compared.
    - `verified_differing_tokens`: number of tokens that differ.
    - `acceptance`: {"threshold/draft length": acceptance rate}.
    - `reference_prompts`: number of prompts that `generate` also decoded.
    - `reference_differing_tokens`: number of tokens of `generate` that differ from `full`.
    - `reference_identical`: number of texts of `generate` that are identical to the text of `full`.
    - `reference_margins`: margin of the full model at each first difference.
    """
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


# -- exits, teacher-forced --------------------------------------------------------------------------------------------


class Tally:
    """Adds up how well exits predict the tokens of texts. All sums are 0 at first; `read_document` adds to them.

    Args:
        readers: number of exits, plus 1 for the full model.

    Attributes:
        rows: number of positions.
        top1, top5: number of top-1 and of top-5 hits of each exit. The last entry is not used.
        nll: sum of the negative log-likelihoods of each exit and then of the full model, in nats.
    """

    def __init__(self, readers: int):
        self.rows, self.top1, self.top5, self.nll = 0, [0] * readers, [0] * readers, [0.0] * readers

    def report(self, layers: tuple[int, ...]) -> dict:
        """Convert the sums to rates and perplexities.

        Args:
            layers: the layer of each exit.

        Returns {"rows": number of positions, "full_perplexity": ..., "exits": [{"layer": ..., "top1": ..., "top5": ...,
        "perplexity": ..., "perplexity_ratio": perplexity / full model's perplexity}, ...]}. Rates are in [0, 1].
        """
        perplexity = [math.exp(nll / self.rows) for nll in self.nll]
        return {"rows": self.rows, "full_perplexity": perplexity[-1],
                "exits": [{"layer": layer, "top1": self.top1[s] / self.rows, "top5": self.top5[s] / self.rows,
                           "perplexity": perplexity[s], "perplexity_ratio": perplexity[s] / perplexity[-1]}
                          for s, layer in enumerate(layers)]}


@torch.inference_mode()
def read_document(engine: Engine, f: Features, tallies: dict[str, Tally]) -> None:
    """Run all exits over one document, and add the results to the tallies.

    Args:
        f: features of the document.
        tallies: {source: tally}. With the source "full", exits read carried states of the full model. With "exit", each
            exit reads carried states that it computed itself.
    """
    exits, words, project = engine.exits, engine.bank.head_ids, engine.model.head.logits
    wanted = f.wanted.clone()
    wanted[-1] = False                                       # nothing follows the last token
    following, truth = f.ids.roll(-1)[wanted].long(), f.choices[wanted].long()

    def surprise(rows: Tensor) -> float:
        return F.cross_entropy(project(rows).float(), following, reduction="sum").item()

    for source, tally in tallies.items():
        carried = carried_states(f.top)
        tally.rows += len(truth)
        for s in range(engine.num_exits):
            hidden = exits.hidden(s, f.exits[:, s], carried)
            if source == "exit":
                hidden = exits.hidden(s, f.exits[:, s], carried_states(hidden))
            hidden = hidden[wanted]
            best = exits.logits(s, hidden).topk(5, dim=-1).indices
            hits = (best if words is None else words[best]) == truth[:, None]
            tally.top1[s] += hits[:, 0].sum().item()
            tally.top5[s] += hits.any(-1).sum().item()
            tally.nll[s] += surprise(hidden)
        tally.nll[-1] += surprise(f.top[wanted])


def windows(tokenizer, path: Path, window: int, tokens: int) -> list[Document]:
    """Cut the first `tokens` tokens of a text file into documents of `window` tokens. The last one may be shorter."""
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"][:tokens]
    return [Document(ids[a:a + window], [0] * len(ids[a:a + window])) for a in range(0, len(ids) - 1, window)]


def texts_to_read(tokenizer, args: argparse.Namespace) -> dict[str, list[Document]]:
    """Read the texts of --text and --data. Returns {name of the text: documents}.

    A text of --text has the name "folder/file". It is cut into documents by `windows`.

    From the folders of --data, only test documents that the model wrote are read. Together they are one text with the
    name "held-out".

    Raises SystemExit if there are no documents.
    """
    texts = {f"{path.parent.name}/{path.name}": windows(tokenizer, path, args.window, args.tokens)
             for path in args.text}
    if args.data:
        texts["held-out"] = [d for d in load_documents(args.data) if d.split == Split.TEST and any(d.chosen)]
    texts = {name: documents for name, documents in texts.items() if documents}
    if not texts:
        raise SystemExit("nothing to read: give --text FILE, or --data FOLDER with test documents")
    return texts


def measure_text(engine: Engine, name: str, documents: list[Document]) -> dict:
    """Measure all exits on one text, and print the figures.

    Returns {"after_full": report, "after_exit": report}. `Tally.report` describes a report. For "after_full", the
    carried states come from the full model; for "after_exit", they come from the exit itself. If the exits do not read
    the carried state, "after_exit" is missing.
    """
    store = FeatureStore(engine.model, documents, Path(), budget_gb=0)
    sources = ("full", "exit") if engine.bank.adapters[0].reads_carried else ("full",)
    tallies = {source: Tally(engine.num_exits + 1) for source in sources}
    for i in tqdm(range(len(store)), unit="text", desc=name):
        read_document(engine, store[i], tallies)
    reports = {source: tally.report(engine.model.exit_layers) for source, tally in tallies.items()}
    for source, report in reports.items():
        for row in report["exits"]:
            print(f"{name}, carried state from {source}: layer {row['layer']}: top-1 {row['top1']:.1%}, "
                  f"top-5 {row['top5']:.1%}, perplexity {row['perplexity']:.2f} = {row['perplexity_ratio']:.2f}x")
    return {f"after_{source}": report for source, report in reports.items()}


def measure_exits(args: argparse.Namespace) -> None:
    """Run the command `exits`: measure each exit on whole texts (teacher-forced), and save the result."""
    out = args.out or results_file(args.model, args.exits, "exits.json")
    engine, tokenizer = load(args.model, args.exits)
    report = {name: measure_text(engine, name, documents)
              for name, documents in texts_to_read(tokenizer, args).items()}
    save_json(out, {
        "provenance": provenance(0), "model": engine.model.name, "exits": engine.bank.fingerprint(),
        "adapter": engine.bank.config.adapter,
        "head_sizes": [engine.bank.config.words(s) for s in range(engine.num_exits)],
        "exit_parameters": sum(p.numel() for p in engine.bank.adapters.parameters()) // engine.num_exits,
        "window": args.window, "texts": report})


# -- decoding, closed loop --------------------------------------------------------------------------------------------


def measure_decoding(args: argparse.Namespace) -> None:
    """Run the command `decode`: measure texts that the cascade and self-speculation decode, and save the result."""
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
    """Decode these prompts with the cascade, and measure the texts.

    Args:
        prompts: token ids of each prompt.
        fulls: the output of `full` for each prompt, as token ids.
        config: config of the cascade.

    Returns a dict:
    - `routing_share`, `agreement`, `average_depth`, `cost`: means over all tokens (see `metrics.RunStats`).
    - `early`: share of the tokens that exits produced.
    - `positional_match`, `sequence_match`: match with the text of `full` (`metrics.match`), means over the prompts.
    """
    runs = [engine.run(ids, config) for ids in prompts]
    total = sum(r.stats.tokens for r in runs)

    def mean(values) -> float:
        """Compute the mean of one value per run, weighted by the number of tokens of the run."""
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
    """Decode these prompts with `verified`, and measure the texts.

    Args:
        prompts: token ids of each prompt.
        fulls: the output of `full` for each prompt, as token ids.
        config: config of mode `verified`.

    Returns {"acceptance": accepted drafts / drafts, "tokens_per_verification": tokens per verification pass,
    "identical": share of the texts that are identical to the text of `full`}.
    """
    runs = [engine.run(ids, config) for ids in prompts]
    drafted, tokens = sum(r.stats.drafted for r in runs), sum(r.stats.tokens for r in runs)
    passes = sum(r.stats.tokens / r.stats.tokens_per_verification for r in runs if r.stats.tokens_per_verification)
    return {"acceptance": sum(r.stats.acceptance * r.stats.drafted for r in runs if r.stats.drafted) / drafted,
            "tokens_per_verification": tokens / passes,
            "identical": sum(r.token_ids == full for r, full in zip(runs, fulls)) / len(runs)}


# -- command ----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = command_parser(__doc__)
    commands = p.add_subparsers(required=True, metavar="{exits,decode,lossless}")
    exits = commands.add_parser("exits", help="top-1, top-5 and perplexity of each exit, on given texts")
    exits.add_argument("--text", type=Path, nargs="*", default=[], help="plain text files, such as WikiText-2's "
                       "test.txt")
    exits.add_argument("--data", type=Path, nargs="*", default=[], help="folders written by training.data; their test "
                       "documents are read")
    exits.add_argument("--window", type=int, default=512, help="tokens of a text that are read in one pass")
    exits.add_argument("--tokens", type=int, default=100_000, help="tokens of each text file that are read, at most")
    exits.set_defaults(run=measure_exits)
    decode = commands.add_parser("decode", help="routing, agreement and acceptance rate of decoded texts")
    add_prompts(decode, prompts=20, tokens=96)
    decode.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95],
                        help="thresholds of the cascade's first exit; those of the other exits follow from it")
    decode.add_argument("--max-draft", type=int, nargs="+", default=[3, 5, 7], help="draft lengths")
    decode.set_defaults(run=measure_decoding)
    lossless = commands.add_parser("lossless", help="check that verified, full and transformers' generate write the "
                                   "same tokens")
    add_dtype(lossless)
    add_prompts(lossless, prompts=50, tokens=128)
    lossless.add_argument("--reference", type=int, default=20, help="number of prompts that transformers' generate "
                          "also decodes")
    lossless.add_argument("--thresholds", type=lambda text: None if text == "own" else float(text), nargs="+",
                          default=[0, 0.3, 0.6, 0.9, None], help="thresholds; own: the default of verified, which "
                          "drafts a tree")
    lossless.add_argument("--max-draft", type=int, nargs="+", default=[1, 3, 7], help="draft lengths")
    lossless.set_defaults(run=check_lossless)
    for command in (exits, decode, lossless):
        add_model_and_exits(command)
        command.add_argument("--out", type=Path, help="result file; default: in assets/results, named by its content")
    return p


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
