"""Tokens per second, side by side in one run: what a user would pick instead, and our full, cascade and verified.

    python -m training.benchmark --quick
    python -m training.benchmark --growth --out assets/results/benchmark-cpu.json
    python -m training.benchmark --replay                   # the engine alone, at Llama-3.2-3B's shape on a GPU

Every prompt is decoded by every contender in turn, the order rotating from prompt to prompt, after a warm-up that is
not counted; each runs greedily to the same length on its own copy of the weights. Speed is end to end (prefill
included) per prompt, and the table shows medians with quartiles. A ratio is the median over the prompts of a set
(chat, code, summarise, facts), then the geometric mean over the sets. With our own kernels the chat template's opening
is read when the model is loaded, and llama.cpp goes on from what its last prompt had in common with the next. Quality
stands beside speed: agreement (part of the tokens that the full model would have chosen after the same text) and
sequence match (identical to `full` from start to end). The roofline multiple is tokens/s x weight bytes / read
bandwidth measured here, before or after the race: the bytes are those that a token of `full` reads, or all weights in
transformers. --growth adds the cost of a token against the length of context and
output. The last line is one JSON object.
"""

import argparse
import importlib.util
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median, quantiles

import torch
from tqdm import tqdm

from cascadeexit import memory
from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.hub import DEFAULT_MODEL, load, load_model
from cascadeexit.kernels import library
from cascadeexit.metrics import RunStats, agreement, match
from cascadeexit.prompts import bundled_prompts, token_ids
from training import replay
from training.command import run_command
from training.json_files import save_json
from training.plots import growth_plot
from training.provenance import provenance

GENERATE, LLAMA_CPP = "transformers generate", "llama.cpp, 4-bit"
CONTEXTS, OUTPUTS = (128, 512, 1024, 2048, 4096), (64, 128, 256, 512, 1024)


@dataclass
class Contender:
    name: str
    decode: Callable[[list[int]], tuple[list[int], RunStats | None]]
    speeds: list[float] = field(default_factory=list)               # tokens/s of each prompt, prefill included
    outputs: list[tuple[list[int], RunStats | None]] = field(default_factory=list)


def read_bandwidth(device: torch.device, megabytes: int = 1024) -> float:
    """Bytes per second that summing a large tensor reads: the best of five."""
    data, times = memory.zeros((megabytes * 2**18,), torch.float32, device).fill_(1), []
    for _ in range(6):
        start = _now(device)
        data.sum()
        times.append(_now(device) - start)
    return data.nbytes / min(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes() -> int | None:
    """Main memory that this process holds; None where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else None


# -- who runs ---------------------------------------------------------------------------------------------------------


def theirs(reference, tokens: int, **options) -> Callable:
    """transformers' generate, greedy, with these options."""
    def decode(ids: list[int]):
        inputs = torch.tensor([ids], device=reference.device)
        out = reference.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens,
                                 do_sample=False, **options)
        return out[0, len(ids):].tolist(), None
    return decode


def ours(engine: Engine, tokens: int, mode: Mode, **options) -> Callable:
    config = DecodeConfig(mode=mode, max_new_tokens=tokens, **options)

    def decode(ids: list[int]):
        run = engine.run(ids, config)
        return run.token_ids, run.stats
    return decode


def llama_cpp(gguf: Path, tokens: int, eos: frozenset[int]) -> Callable:
    """llama.cpp on the same model's 4-bit file, greedy."""
    from llama_cpp import Llama

    model = Llama(str(gguf), n_ctx=2048, n_threads=torch.get_num_threads(), verbose=False)

    def decode(ids: list[int]):
        out: list[int] = []
        for token in model.generate(ids, temp=0.0, reset=True):
            out.append(token)
            if len(out) == tokens or token in eos:
                break
        return out, None
    return decode


def thresholds(wanted: str) -> float | tuple[float | None, ...]:
    """0.6 as it is; no,0.3,0.4 one each. Raises ValueError for what is neither."""
    if "," not in wanted:
        return float(wanted)
    return tuple(None if part == "no" else float(part) for part in wanted.split(","))


def make_contenders(engine: Engine, reference, args) -> list[Contender]:
    n, first = args.tokens, next(layer for layer in engine.model.exit_layers if layer)
    jobs = {GENERATE: theirs(reference, n)}
    if engine.model.device.type == "cuda":
        jobs["generate, static cache, compiled"] = theirs(reference, n, cache_implementation="static")
    jobs["generate, prompt lookup"] = theirs(reference, n, prompt_lookup_num_tokens=10)
    jobs[f"generate, early exit after {first}"] = theirs(reference, n, assistant_early_exit=first)
    if args.gguf and importlib.util.find_spec("llama_cpp"):
        jobs[LLAMA_CPP] = llama_cpp(args.gguf, n, engine.model.eos_ids)
    jobs["full"] = ours(engine, n, Mode.FULL)
    for wanted in args.cascade_thresholds:
        each = wanted if isinstance(wanted, tuple) else (wanted,)
        name = ",".join("no" if t is None else f"{t:g}" for t in each)
        jobs[f"cascade {name}"] = ours(engine, n, Mode.CASCADE, thresholds=wanted)
    jobs["verified"] = ours(engine, n, Mode.VERIFIED, max_draft=args.max_draft)
    for tolerance in args.tolerances:
        jobs[f"verified, tolerance {tolerance:g}"] = ours(engine, n, Mode.VERIFIED, max_draft=args.max_draft,
                                                          tolerance=tolerance)
    return [Contender(name, decode) for name, decode in jobs.items() if not name.startswith(tuple(args.skip))]


def race_all(contenders: list[Contender], prompts: list[list[int]], device: torch.device) -> None:
    """Decode every prompt with every contender; the longest prompt warms up, uncounted: it sizes what is compiled."""
    for index, ids in enumerate(tqdm([max(prompts, key=len), *prompts], unit="prompt")):
        order = contenders[index % len(contenders):] + contenders[:index % len(contenders)]
        for contender in order:
            start = _now(device)
            output = contender.decode(ids)
            seconds = _now(device) - start
            if index:
                contender.speeds.append(len(output[0]) / seconds)
                contender.outputs.append(output)


# -- what came out ----------------------------------------------------------------------------------------------------


def ratio(ours: Contender, base: Contender, kinds: list[str]) -> float:
    """Median over the prompts of a kind, geometric mean over the kinds."""
    each = defaultdict(list)
    for kind, a, b in zip(kinds, ours.speeds, base.speeds, strict=True):
        each[kind].append(a / b)
    return geometric_mean(map(median, each.values()))


def row(contender: Contender, contenders: dict[str, Contender], engine: Engine, prompts: list[list[int]],
        kinds: list[str], bandwidth: float) -> dict:
    """One line of the table: medians over prompts for speed, sums over tokens for shares."""
    full, base = contenders["full"], contenders[GENERATE]
    speed = median(contender.speeds)
    low, _, high = quantiles(contender.speeds, n=4) if len(contender.speeds) > 1 else (speed,) * 3
    stats = [stats for _, stats in contender.outputs]
    read = engine.model.weight_bytes if None in stats else engine.costs.full_token_bytes
    result = {
        "tokens_per_second": speed, "quartiles": [low, high],
        "over_generate": ratio(contender, base, kinds), "over_full": ratio(contender, full, kinds),
        # Of the model's own weights: 4-bit ones are fewer bytes.
        "roofline_multiple": speed * read / bandwidth if contender.name != LLAMA_CPP else None,
        "sequence_match": _mean(match(a, b).sequence for (a, _), (b, _) in zip(contender.outputs, full.outputs)),
    }
    if None in stats:
        return result
    tokens = [(agreement(ids, engine.full_choices(prompt, ids)), len(ids))
              for prompt, (ids, _) in zip(prompts, contender.outputs)]
    total = sum(s.tokens for s in stats)

    def over_tokens(name: str) -> float:
        return sum(getattr(s, name) * s.tokens for s in stats) / total

    def middle(name: str) -> float | None:
        values = [getattr(s, name) for s in stats if getattr(s, name) is not None]
        return 1e3 * median(values) if values else None

    return result | {
        "agreement": sum(a * n for a, n in tokens) / total,
        "average_depth": over_tokens("average_depth"), "cost": over_tokens("cost"),
        "routing_share": [sum(s.routing_share[i] * s.tokens for s in stats) / total
                          for i in range(engine.model.num_segments)],
        "copied_share": over_tokens("copied_share"),
        "acceptance": _mean(s.acceptance for s in stats if s.acceptance is not None),
        "tokens_per_verification": _mean(s.tokens_per_verification for s in stats if s.tokens_per_verification),
        "first_token_ms": middle("first_token_seconds"), "token_ms_p50": middle("token_seconds_p50"),
        "token_ms_p90": middle("token_seconds_p90"), "token_ms_p99": middle("token_seconds_p99"),
    }


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def table(rows: dict[str, dict]) -> str:
    """The rows as text, speed and quality side by side."""
    lines = [f"{'':<33}{'tokens/s':>9}{'quartiles':>15}{'x generate':>11}{'x full':>8}{'roofline':>9}"
             f"{'agreement':>11}{'identical':>11}{'depth':>7}{'cost':>6}"]
    for name, r in rows.items():
        low, high = r["quartiles"]
        lines.append(f"{name:<33}{r['tokens_per_second']:>9.1f}{f'{low:.1f}-{high:.1f}':>15}{r['over_generate']:>11.2f}"
                     f"{r['over_full']:>8.2f}{show(r['roofline_multiple'], '.2f'):>9}"
                     f"{show(r.get('agreement'), '.1%'):>11}{show(r['sequence_match'], '.0%'):>11}"
                     f"{show(r.get('average_depth'), '.2f'):>7}{show(r.get('cost'), '.2f'):>6}")
    return "\n".join(lines)


def show(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


# -- length -----------------------------------------------------------------------------------------------------------


def growth(engine: Engine, reference, tokenizer, max_draft: int, rounds: int = 5) -> dict:
    """Milliseconds a token against the length of context (decoding 32 tokens) and of output; no token ends a text.

    The context is one that the model wrote, drawn at temperature 1: where text repeats, drafts would be copied from it.
    Medians over `rounds`, the lengths in turn; of ours alone where there is no reference. `allowed`: what a token costs
    at this context by the bytes it reads, weights and keys and values, over that at the shortest context;
    `allowed_16_bits`: the same if keys and values were read in 16 bits, which our CPU kernels keep in 12. `times`: what
    one of `full` took over one at the shortest context right after it: a shared machine's memory is not always as fast.
    """
    model, eos, weights = engine.model, engine.model.eos_ids, engine.costs.full_token_bytes
    longest = min(max(CONTEXTS), model.max_positions - 64)
    prompt = token_ids(tokenizer, bundled_prompts()[0].text)
    cache = model.new_cache(1)
    position_bytes = cache.nbytes / cache.capacity, 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2

    def ms(mode: Mode, ids: list[int], tokens: int) -> float:
        config = DecodeConfig(mode=mode, max_new_tokens=tokens, max_draft=max_draft)
        return 1e3 / engine.run(ids, config).stats.tokens_per_second

    def at_context(length: int) -> dict[str, float]:
        allowed, in_16_bits = ((weights + each * length) / (weights + each * CONTEXTS[0]) for each in position_bytes)
        theirs = {GENERATE: _generate_ms(reference, text[:length])} if reference else {}
        full, shortest = (ms(Mode.FULL, text[:n], 32) for n in (length, CONTEXTS[0]))
        return {"context": length, "allowed": allowed, "allowed_16_bits": in_16_bits, "times": full / shortest,
                "full": full, "verified": ms(Mode.VERIFIED, text[:length], 32), **theirs}

    def at_output(length: int) -> dict[str, float]:
        return {"output": length, "full": ms(Mode.FULL, prompt, length), "verified": ms(Mode.VERIFIED, prompt, length)}

    model.eos_ids = frozenset()
    try:
        wanted = DecodeConfig(mode=Mode.FULL, max_new_tokens=max(1, longest - len(prompt)), temperature=1.0)
        text = [*prompt, *(event.token_id for event in tqdm(engine.generate(prompt, wanted), desc="context to read",
                                                            total=wanted.max_new_tokens, unit="token"))]
        return {"context": _in_turn(at_context, [c for c in CONTEXTS if c <= longest], rounds, "context"),
                "output": _in_turn(at_output, [n for n in OUTPUTS if n + len(prompt) < longest], rounds, "output")}
    finally:
        model.eos_ids = eos


def _in_turn(measure: Callable[[int], dict[str, float]], lengths: list[int], rounds: int, desc: str) -> list[dict]:
    """For each length the medians of what is measured there in each round."""
    seen = defaultdict(list)
    for length in tqdm(lengths * rounds, desc=desc, unit="length"):
        seen[length].append(measure(length))
    return [{name: median(entry[name] for entry in entries) for name in entries[0]} for entries in seen.values()]


def _generate_ms(reference, ids: list[int], tokens: int = 32) -> float:
    """Milliseconds a token of transformers' generate after the first one: a long run less a short one."""
    inputs, spent = torch.tensor([ids], device=reference.device), []
    for n in (1, tokens + 1):
        start = _now(reference.device)
        reference.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=n, min_new_tokens=n,
                           do_sample=False)
        spent.append(_now(reference.device) - start)
    return 1e3 * (spent[1] - spent[0]) / tokens


# -- command ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 prompts of 64 tokens: a minute or two on a CPU")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
    parser.add_argument("--exits", type=Path, help="exits folder; default the shipped ones")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, help="default 50, --quick 8")
    parser.add_argument("--tokens", type=int, help="new tokens a prompt; default 128, --quick 64")
    parser.add_argument("--cascade-thresholds", type=thresholds, nargs="+", default=[0.8, 0.6, 0.4], metavar="T",
                        help="of the first exit, from which the others follow; or of each by commas, 'no' for one that "
                        "is closed")
    parser.add_argument("--tolerances", type=float, nargs="*", default=[0.3, 0.5], help="of lossy verification")
    parser.add_argument("--max-draft", type=int, default=DecodeConfig.max_draft)
    parser.add_argument("--gguf", type=Path, help="the model's GGUF file, for llama.cpp where llama_cpp is installed")
    parser.add_argument("--skip", nargs="*", default=[], metavar="NAME", help="leave out contenders with names that "
                        "begin so")
    parser.add_argument("--growth", nargs="?", const="all", choices=("all", "ours"), help="also the cost of a token "
                        "against length; ours: without generate, whose stock kernels take long to read a long context "
                        "on a CPU that has no products of bf16")
    parser.add_argument("--replay", action="store_true", help="only the engine with random weights, scripted exits")
    parser.add_argument("--shape", choices=replay.SHAPES, help="--replay: of the model; default by device")
    parser.add_argument("--out", type=Path, help="also write the JSON here, and with --growth a plot beside it")
    args = parser.parse_args()
    args.prompts = args.prompts or (8 if args.quick else 50)
    args.tokens = args.tokens or (64 if args.quick else 128)
    if any(name.startswith(skipped) for skipped in args.skip for name in (GENERATE, "full")):
        parser.error(f"--skip {' '.join(args.skip)}: '{GENERATE}' and 'full' stay, all others are measured by them")
    if args.replay:
        result = {"provenance": provenance(0)} | replay.measure(args.shape, args.tokens, read_bandwidth)
        print(replay.table(result))
    else:
        result = compare(args)
    if args.out:
        save_json(args.out, result)
    print(json.dumps(result))


def compare(args) -> dict:
    dtype, before = getattr(torch, args.dtype), resident_bytes()
    started = time.perf_counter()
    library()
    compiled = time.perf_counter()
    engine, tokenizer = load(args.model, args.exits, dtype=dtype)
    loaded, device = time.perf_counter(), engine.model.device
    chosen = bundled_prompts()[:args.prompts]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)              # without what only loading took
    prompts, kinds = [token_ids(tokenizer, p.text) for p in chosen], [p.kind for p in chosen]
    engine.run(prompts[0], DecodeConfig(mode=Mode.FULL, max_new_tokens=8))
    grown = None if before is None else resident_bytes() - before
    if device.type == "cuda":
        grown = torch.cuda.max_memory_allocated(device)
    reference = load_model(args.model, dtype=dtype)[0]
    bandwidth = read_bandwidth(device)
    contenders = {c.name: c for c in make_contenders(engine, reference, args)}
    race_all(list(contenders.values()), prompts, device)
    bandwidth = max(bandwidth, read_bandwidth(device))      # a shared machine's memory may be faster by now
    rows = {name: row(c, contenders, engine, prompts, kinds, bandwidth) for name, c in contenders.items()}
    weights, read = engine.model.weight_bytes, engine.costs.full_token_bytes
    held = weights + engine.bank.memory_bytes
    cache = engine.model.new_cache(engine.capacity(max(map(len, prompts)) + args.tokens)).nbytes
    result = {"provenance": provenance(0), "model": engine.model.name, "dtype": args.dtype, "device": str(device),
              "native_kernels": engine.model.native, "exits": engine.bank.fingerprint(),
              "drafter": engine.bank.drafter_fingerprint(), "trained_exits": engine.bank.config.trained,
              "prompts": len(prompts),
              "sets": {kind: kinds.count(kind) for kind in sorted(set(kinds))}, "tokens": args.tokens,
              "opening_tokens": len(engine.opening), "cascade_thresholds": args.cascade_thresholds,
              "max_draft": args.max_draft, "weight_bytes": weights, "full_token_bytes": read,
              "read_bandwidth": bandwidth, "kernel_seconds": compiled - started, "load_seconds": loaded - compiled,
              "exit_bytes": held - weights, "cache_bytes": cache, "grown_bytes": grown,
              "memory_over_need": None if grown is None else grown / (held + cache), "rows": rows}
    print(f"\n{engine.model.name}, {args.dtype}, {device}, {len(prompts)} prompts of {args.tokens} new tokens; "
          f"{bandwidth / 1e9:.1f} GB/s read, {read / 1e6:.0f} MB a token\n")
    print(table(rows))
    if args.growth:
        result["growth"] = growth(engine, reference if args.growth == "all" else None, tokenizer, args.max_draft)
        for entry in result["growth"]["context"] + result["growth"]["output"]:
            print({k: round(v, 2) for k, v in entry.items()})
        if args.out:
            growth_plot(result["growth"], args.out.with_suffix(".html"))
    return result


if __name__ == "__main__":
    run_command(main)
