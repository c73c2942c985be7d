"""Tokens per second, side by side in one run: transformers' generate, and our full, cascade and verified.

    python -m training.benchmark --quick
    python -m training.benchmark --out assets/results/benchmark-cpu.json

Every prompt is decoded by every contender in turn, the order rotating from prompt to prompt, after a warm-up that is
not counted; each runs greedily to the same length on its own copy of the weights. Speed is end to end (prefill
included) per prompt, and the table shows medians with quartiles; a ratio is the median of per-prompt ratios.
Quality stands beside speed: agreement (part of the tokens that the full model would have chosen after the same text)
and sequence match (identical to `full` from start to end). The roofline multiple is tokens/s x weight bytes / read
bandwidth measured here. The last line is one JSON object.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch
from tqdm import tqdm

from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.hub import DEFAULT_MODEL, load, load_model
from cascadeexit.metrics import RunStats, agreement, match
from cascadeexit.prompts import bundled_prompts
from training.prompts import chat_ids
from training.provenance import provenance, save_json

GENERATE = "transformers generate"


@dataclass
class Contender:
    name: str
    decode: Callable[[list[int]], tuple[list[int], RunStats | None]]
    speeds: list[float] = field(default_factory=list)               # tokens/s of each prompt, prefill included
    outputs: list[tuple[list[int], RunStats | None]] = field(default_factory=list)


def read_bandwidth(device: torch.device, megabytes: int = 1024) -> float:
    """Bytes per second that summing a large tensor reads: the best of five."""
    data, times = torch.ones(megabytes * 2**18, device=device), []
    for _ in range(6):
        start = _now(device)
        data.sum()
        times.append(_now(device) - start)
    return data.nbytes / min(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_contenders(engine: Engine, reference, args) -> list[Contender]:
    def generate(ids: list[int]):
        out = reference.generate(torch.tensor([ids], device=reference.device), max_new_tokens=args.tokens,
                                 do_sample=False)
        return out[0, len(ids):].tolist(), None

    def ours(mode: Mode) -> Callable:
        config = DecodeConfig(mode=mode, max_new_tokens=args.tokens, max_draft=args.max_draft,
                              thresholds=args.cascade_threshold if mode is Mode.CASCADE else args.verified_threshold)

        def decode(ids: list[int]):
            run = engine.run(ids, config)
            return run.token_ids, run.stats
        return decode

    return [Contender(GENERATE, generate)] + [Contender(mode.value, ours(mode)) for mode in Mode]


def race_all(contenders: list[Contender], prompts: list[list[int]], device: torch.device) -> None:
    """Decode every prompt with every contender; the first prompt warms up and is not counted."""
    for index, ids in enumerate(tqdm([prompts[0], *prompts], unit="prompt")):
        order = contenders[index % len(contenders):] + contenders[:index % len(contenders)]
        for contender in order:
            start = _now(device)
            output = contender.decode(ids)
            seconds = _now(device) - start
            if index:
                contender.speeds.append(len(output[0]) / seconds)
                contender.outputs.append(output)


def row(contender: Contender, contenders: dict[str, Contender], engine: Engine, prompts: list[list[int]],
        bandwidth: float) -> dict:
    """One line of the table: medians over prompts for speed, sums over tokens for shares."""
    full, base = contenders[Mode.FULL], contenders[GENERATE]
    speed = median(contender.speeds)
    low, _, high = quantiles(contender.speeds, n=4) if len(contender.speeds) > 1 else (speed,) * 3
    result = {
        "tokens_per_second": speed, "quartiles": [low, high],
        "over_generate": median(a / b for a, b in zip(contender.speeds, base.speeds)),
        "over_full": median(a / b for a, b in zip(contender.speeds, full.speeds)),
        "roofline_multiple": speed * engine.costs.full_token_bytes / bandwidth,
        "sequence_match": _mean(match(a, b).sequence for (a, _), (b, _) in zip(contender.outputs, full.outputs)),
    }
    if contender is base:
        return result
    tokens = [(agreement(ids, engine.full_choices(prompt, ids)), len(ids))
              for prompt, (ids, _) in zip(prompts, contender.outputs)]
    stats = [stats for _, stats in contender.outputs]
    weighted = defaultdict(float)
    for s in stats:
        for name in ("average_depth", "cost"):
            weighted[name] += getattr(s, name) * s.tokens
    total = sum(s.tokens for s in stats)
    return result | {
        "agreement": sum(a * n for a, n in tokens) / total,
        "average_depth": weighted["average_depth"] / total, "cost": weighted["cost"] / total,
        "routing_share": [sum(s.routing_share[i] * s.tokens for s in stats) / total
                          for i in range(engine.model.num_segments)],
        "acceptance": _mean(s.acceptance for s in stats if s.acceptance is not None),
        "tokens_per_verification": _mean(s.tokens_per_verification for s in stats if s.tokens_per_verification),
        "first_token_ms": 1e3 * median(s.first_token_seconds for s in stats),
        "token_ms_p50": 1e3 * median(s.token_seconds_p50 for s in stats),
        "token_ms_p90": 1e3 * median(s.token_seconds_p90 for s in stats),
        "token_ms_p99": 1e3 * median(s.token_seconds_p99 for s in stats),
    }


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def table(rows: dict[str, dict]) -> str:
    """The rows as text, speed and quality side by side."""
    lines = [f"{'':<22}{'tokens/s':>9}{'quartiles':>15}{'x generate':>11}{'x full':>8}{'roofline':>9}"
             f"{'agreement':>11}{'identical':>11}{'depth':>7}{'cost':>6}"]
    for name, r in rows.items():
        low, high = r["quartiles"]
        lines.append(f"{name:<22}{r['tokens_per_second']:>9.1f}{f'{low:.1f}-{high:.1f}':>15}{r['over_generate']:>11.2f}"
                     f"{r['over_full']:>8.2f}{r['roofline_multiple']:>9.2f}{show(r.get('agreement'), '.1%'):>11}"
                     f"{show(r['sequence_match'], '.0%'):>11}{show(r.get('average_depth'), '.2f'):>7}"
                     f"{show(r.get('cost'), '.2f'):>6}")
    return "\n".join(lines)


def show(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 prompts of 64 tokens: a few minutes on a CPU")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
    parser.add_argument("--exits", type=Path, help="exits folder; default the shipped ones")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, help="default 50, --quick 8")
    parser.add_argument("--tokens", type=int, help="new tokens a prompt; default 128, --quick 64")
    parser.add_argument("--cascade-threshold", type=float, default=0.7)
    parser.add_argument("--verified-threshold", type=float, default=0.7)
    parser.add_argument("--max-draft", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    args.prompts = args.prompts or (8 if args.quick else 50)
    args.tokens = args.tokens or (64 if args.quick else 128)

    dtype = getattr(torch, args.dtype)
    engine, tokenizer = load(args.model, args.exits, dtype=dtype)
    reference = load_model(args.model, dtype=dtype)[0]
    device = engine.model.device
    prompts = [chat_ids(tokenizer, prompt.text) for prompt in bundled_prompts()[:args.prompts]]
    bandwidth = read_bandwidth(device)
    contenders = {c.name: c for c in make_contenders(engine, reference, args)}
    race_all(list(contenders.values()), prompts, device)
    rows = {name: row(c, contenders, engine, prompts, bandwidth) for name, c in contenders.items()}
    result = {"provenance": provenance(0), "model": engine.model.name, "dtype": args.dtype, "device": str(device),
              "exits": engine.bank.fingerprint(), "trained_exits": engine.bank.config.trained,
              "prompts": len(prompts), "tokens": args.tokens, "cascade_threshold": args.cascade_threshold,
              "verified_threshold": args.verified_threshold, "max_draft": args.max_draft,
              "weight_bytes": engine.costs.full_token_bytes, "read_bandwidth": bandwidth, "rows": rows}
    print(f"\n{engine.model.name}, {args.dtype}, {device}, {len(prompts)} prompts of {args.tokens} new tokens; "
          f"{bandwidth / 1e9:.1f} GB/s read, {engine.costs.full_token_bytes / 1e6:.0f} MB a token\n")
    print(table(rows))
    if args.out:
        save_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
