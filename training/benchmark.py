"""Benchmark: measure the speed of our decoding modes, of transformers' `generate` and of llama.cpp in one run.

    python -m training.benchmark --quick
    python -m training.benchmark --growth --out assets/results/benchmark-cpu.json
    python -m training.benchmark --replay                   # our engine only, random weights; 3B parameters on a GPU
    python -m training.benchmark --replay --simulate        # count bytes and kernels of a GPU, without a GPU

A contender is one way to decode, such as a mode of our engine. First, every contender decodes one prompt as a warm-up,
which does not count. Then every contender decodes every prompt greedily, with the same limit of new tokens. The order
of the contenders changes from prompt to prompt. Our engine, transformers and llama.cpp each have their own copy
of the weights.

The speed is in tokens per second and includes prefill. The table shows the median and the quartiles of the speed over
the prompts. The ratio of two speeds is computed for each prompt. Each set of prompts (chat, code, summarise, facts) has
a median ratio. The ratio in the table is the geometric mean of these medians. Two of the programs can skip a part of
prefill. If our engine uses its own kernels, it reads the opening of the chat template only once, when the model is
loaded. llama.cpp reuses the beginning that a prompt has in common with the prompt before.

The table also shows the quality. Agreement is the share of tokens that the full model would have chosen after the same
text. Sequence match is the share of texts that are identical to the text of `full`, which is our engine without exits.
The roofline multiple is tokens per second x weight bytes / read bandwidth. For our engine, the weight bytes are those
that `full` reads for a token. For transformers, they are all weights. The bandwidth is measured before and after the
contenders run, and the higher value counts.

--growth also measures how the time per token grows with the length of context and output. --check-late also runs every
cascade with `DecodeConfig.check_late`, and reports its speed / the speed of the same cascade without this option. The
last line of the output is one JSON object.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean, median, quantiles

import torch
from tqdm import tqdm

from cascadeexit import backends
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.hub import load, load_model
from cascadeexit.machine import now, read_bandwidth, resident_bytes
from cascadeexit.metrics import agreement, match
from cascadeexit.prompts import bundled_prompts, token_ids
from training import replay, simulation
from training.command import run_command
from training.contenders import CHECKED, COMPARED, GENERATE, LLAMA_CPP, Contender, make_contenders
from training.growth import growth
from training.json_files import save_json
from training.options import add_dtype, add_model_and_exits, command_parser, thresholds
from training.plots import growth_plot
from training.provenance import provenance


def race_all(contenders: list[Contender], prompts: list[list[int]], device: torch.device) -> None:
    """Decode every prompt with every contender. The results are appended to `speeds` and `outputs` of each contender.

    First, every contender decodes the longest prompt as a warm-up, which does not count. Compiled code and caches get
    their size from this prompt. If a contender fails in the warm-up, it is left out and its `error` says why. But
    an error of a contender that others are compared with (`COMPARED`) is raised.
    """
    for index, ids in enumerate(tqdm([max(prompts, key=len), *prompts], unit="prompt")):
        if not index:
            for contender in contenders:
                contender.warm_up(ids, needed=contender.name in COMPARED)
            contenders = [contender for contender in contenders if not contender.error]
            continue
        order = contenders[index % len(contenders):] + contenders[:index % len(contenders)]
        for contender in order:
            start = now(device)
            output = contender.decode(ids)
            seconds = now(device) - start
            contender.speeds.append(len(output[0]) / seconds)
            contender.outputs.append(output)


# -- results ----------------------------------------------------------------------------------------------------------


def ratio(ours: Contender, base: Contender, kinds: list[str]) -> float:
    """Return the speed of `ours` relative to the speed of `base`.

    The ratio is computed for each prompt. Each set of prompts has a median ratio. The result is the geometric mean of
    these medians.

    Args:
        kinds: the set of each prompt, such as "chat".
    """
    each = defaultdict(list)
    for kind, a, b in zip(kinds, ours.speeds, base.speeds, strict=True):
        each[kind].append(a / b)
    return geometric_mean(map(median, each.values()))


def checked_speeds(contenders: dict[str, Contender], kinds: list[str]) -> dict[str, float]:
    """Compare the speed of each cascade with and without `DecodeConfig.check_late`.

    Returns {name of a cascade: speed with `check_late` / speed without `check_late`}.

    Args:
        contenders: {name: contender}.
        kinds: the set of each prompt, such as "chat".
    """
    return {name: ratio(contenders[name + CHECKED], plain, kinds) for name, plain in contenders.items()
            if name + CHECKED in contenders}


def result_row(contender: Contender, contenders: dict[str, Contender], engine: Engine, prompts: list[list[int]],
               kinds: list[str], bandwidth: float) -> dict:
    """Compute the table row of one contender from its speeds and outputs.

    Args:
        contenders: all contenders, {name: contender}. The ratios compare with some of them.
        kinds: the set of each prompt, such as "chat".
        bandwidth: read bandwidth of the memory, in bytes per second.

    Returns a dict with these entries and, for a mode of our engine, the entries of `engine_figures`:
    - `tokens_per_second`, `quartiles`: median of the speeds, and their first and third quartile.
    - `over_generate`, `over_full`: speed / speed of `generate` or `full`, as `ratio` computes it.
    - `roofline_multiple`: tokens per second x weight bytes / bandwidth. None for llama.cpp.
    - `sequence_match`: share of the texts that are identical to the text of `full`.
    """
    full, base = contenders["full"], contenders[GENERATE]
    speed = median(contender.speeds)
    low, _, high = quantiles(contender.speeds, n=4) if len(contender.speeds) > 1 else (speed,) * 3
    ours = all(stats is not None for _, stats in contender.outputs)
    read = engine.costs.full_token_bytes if ours else engine.model.weight_bytes
    return {
        "tokens_per_second": speed, "quartiles": [low, high],
        "over_generate": ratio(contender, base, kinds), "over_full": ratio(contender, full, kinds),
        # By the bytes of the model's own weights, which are more than llama.cpp's 4-bit ones.
        "roofline_multiple": speed * read / bandwidth if contender.name != LLAMA_CPP else None,
        "sequence_match": _mean(match(a, b).sequence for (a, _), (b, _) in zip(contender.outputs, full.outputs)),
    } | (engine_figures(contender, engine, prompts) if ours else {})


def engine_figures(contender: Contender, engine: Engine, prompts: list[list[int]]) -> dict:
    """Compute the figures that only our engine reports. `metrics.RunStats` explains them.

    Returns a dict. Values that a mode does not have are None:
    - `agreement`, `average_depth`, `cost`, `routing_share`, `copied_share`: means over all tokens.
    - `acceptance`, `tokens_per_verification`: means over the prompts.
    - `first_token_ms`, `token_ms_p50`, `token_ms_p90`, `token_ms_p99`: medians over the prompts, in milliseconds.
    """
    stats = [stats for _, stats in contender.outputs]
    tokens = [(agreement(ids, engine.full_choices(prompt, ids)), len(ids))
              for prompt, (ids, _) in zip(prompts, contender.outputs)]
    total = sum(s.tokens for s in stats)

    def over_tokens(name: str) -> float:
        return sum(getattr(s, name) * s.tokens for s in stats) / total

    def median_ms(name: str) -> float | None:
        values = [getattr(s, name) for s in stats if getattr(s, name) is not None]
        return 1e3 * median(values) if values else None

    return {
        "agreement": sum(a * n for a, n in tokens) / total,
        "average_depth": over_tokens("average_depth"), "cost": over_tokens("cost"),
        "routing_share": [sum(s.routing_share[i] * s.tokens for s in stats) / total
                          for i in range(engine.model.num_segments)],
        "copied_share": over_tokens("copied_share"),
        "acceptance": _mean(s.acceptance for s in stats if s.acceptance is not None),
        "tokens_per_verification": _mean(s.tokens_per_verification for s in stats if s.tokens_per_verification),
        "first_token_ms": median_ms("first_token_seconds"), "token_ms_p50": median_ms("token_seconds_p50"),
        "token_ms_p90": median_ms("token_seconds_p90"), "token_ms_p99": median_ms("token_seconds_p99"),
    }


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def table(rows: dict[str, dict]) -> str:
    """Format the results as a text table with a line for each contender.

    Args:
        rows: {name of the contender: its `result_row`}.
    """
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
    """Format a number in the format `form`, such as ".2f". Returns "-" for None and NaN."""
    return "-" if value is None or math.isnan(value) else format(value, form)


# -- command ----------------------------------------------------------------------------------------------------------


def record_seconds(engine: Engine) -> float | None:
    """Return how many seconds it took to record the model's passes as CUDA graphs, when the model was loaded.

    Returns None if the backend does not record passes.
    """
    passes = getattr(engine.model.layers, "passes", None)
    return passes.recorder.seconds if passes else None


class Loaded:
    """Loads the engine and the prompts of a benchmark, and measures the time and the memory that loading takes.

    Args:
        args: `model`, `exits` and `dtype` are used, with the meaning of the command's options.
        prompts: how many of the project's prompts are used.
    """

    def __init__(self, args: argparse.Namespace, prompts: int):
        before, started = resident_bytes(), time.perf_counter()
        backends.build()
        compiled = time.perf_counter()
        self.engine, self.tokenizer = load(args.model, args.exits, dtype=getattr(torch, args.dtype))
        self.kernel_seconds, self.load_seconds = compiled - started, time.perf_counter() - compiled
        device = self.engine.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)              # without what only loading took
        chosen = bundled_prompts()[:prompts]
        self.prompts, self.kinds = [token_ids(self.tokenizer, p.text) for p in chosen], [p.kind for p in chosen]
        self.engine.run(self.prompts[0], DecodeConfig(mode=Mode.FULL, max_new_tokens=8))
        self.grown_bytes = None if before is None else resident_bytes() - before
        if device.type == "cuda":
            self.grown_bytes = torch.cuda.max_memory_allocated(device)

    def report(self, tokens: int) -> dict:
        """Return how long loading took, and how much memory the loaded model needs.

        Args:
            tokens: new tokens per prompt. It decides the size of the KV cache.

        Returns a dict. Values that are not known are None:
        - `kernel_seconds`, `load_seconds`: time for compiling the kernels, and for loading the model and the exits.
        - `record_seconds`: time for recording the passes as CUDA graphs.
        - `exit_bytes`, `cache_bytes`: size of the exits, and of the KV cache.
        - `grown_bytes`: on a GPU, the largest amount of allocated memory during a first short run. On a CPU, the growth
          of this process's main memory during loading and that run.
        - `memory_over_need`: `grown_bytes` / the size of weights, exits and KV cache together.
        """
        model = self.engine.model
        needed = model.weight_bytes + self.engine.exits.memory_bytes
        cache = model.layers.new_cache(self.engine.capacity(max(map(len, self.prompts)) + tokens)).nbytes
        return {"kernel_seconds": self.kernel_seconds, "load_seconds": self.load_seconds,
                "record_seconds": record_seconds(self.engine),
                "exit_bytes": needed - model.weight_bytes, "cache_bytes": cache, "grown_bytes": self.grown_bytes,
                "memory_over_need": None if self.grown_bytes is None else self.grown_bytes / (needed + cache)}


def compare(args: argparse.Namespace) -> dict:
    """Run the benchmark without --replay: measure all contenders, and print the table.

    Args:
        args: all options of the command.

    Returns the result as a dict that can be saved as JSON. `rows` has a `result_row` for each contender.
    """
    loaded = Loaded(args, args.prompts)
    engine, prompts, kinds = loaded.engine, loaded.prompts, loaded.kinds
    model, bank, device = engine.model, engine.bank, engine.model.device
    reference = load_model(args.model, dtype=getattr(torch, args.dtype))[0]
    bandwidth = read_bandwidth(device)
    contenders = {c.name: c for c in make_contenders(engine, reference, args)}
    race_all(list(contenders.values()), prompts, device)
    bandwidth = max(bandwidth, read_bandwidth(device))      # the memory of a shared machine may be faster by now
    failed = {name: c.error for name, c in contenders.items() if c.error}
    rows = {name: result_row(c, contenders, engine, prompts, kinds, bandwidth)
            for name, c in contenders.items() if name not in failed}
    read = engine.costs.full_token_bytes
    result = {"provenance": provenance(0), "model": model.name, "dtype": args.dtype, "device": str(device),
              "native_kernels": model.backend.name == "cpu", "exits": bank.fingerprint(),
              "drafter": bank.drafter_fingerprint(),
              "trained_exits": bank.config.trained, "prompts": len(prompts),
              "sets": {kind: kinds.count(kind) for kind in sorted(set(kinds))}, "tokens": args.tokens,
              "opening_tokens": len(engine.opening), "cascade_thresholds": args.cascade_thresholds,
              "max_draft": args.max_draft, "weight_bytes": model.weight_bytes, "full_token_bytes": read,
              "read_bandwidth": bandwidth, **loaded.report(args.tokens), "failed": failed, "rows": rows}
    print(f"\n{model.name}, {args.dtype}, {device}, {len(prompts)} prompts of {args.tokens} new tokens; "
          f"{bandwidth / 1e9:.1f} GB/s read, {read / 1e6:.0f} MB a token\n")
    print(table(rows))
    if args.check_late:
        result["checked_late"] = checked_speeds(contenders, kinds)
        for name, speed in result["checked_late"].items():
            print(f"{name}{CHECKED}: {speed:.3f}x the speed without this check")
    for name, error in failed.items():
        print(f"left out: {name}: {error}")
    if args.growth:
        reference = reference if args.growth == "all" else None
        result["growth"] = growth(engine, reference, loaded.tokenizer, args.max_draft)
        for entry in result["growth"]["context"] + result["growth"]["output"]:
            print({k: round(v, 2) for k, v in entry.items()})
        if args.out:
            growth_plot(result["growth"], args.out.with_suffix(".html"))
    return result


def parse_args() -> argparse.Namespace:
    p = command_parser(__doc__)
    p.add_argument("--quick", action="store_true", help="8 prompts of 64 tokens: a minute or two on a CPU")
    add_model_and_exits(p)
    add_dtype(p)
    p.add_argument("--prompts", type=int, help="how many of the project's prompts to decode; default: 50, or 8 with "
                   "--quick")
    p.add_argument("--tokens", type=int, help="new tokens per prompt; default: 128, or 64 with --quick")
    p.add_argument("--cascade-thresholds", type=thresholds, nargs="+", default=[0.8, 0.6, 0.4], metavar="T",
                   help="thresholds of the first exit, from which the others follow; or thresholds of all exits, "
                   "separated by commas, where 'no' disables an exit")
    p.add_argument("--tolerances", type=float, nargs="*", default=[0.3, 0.5], help="tolerances of lossy verification")
    p.add_argument("--max-draft", type=int, default=DecodeConfig.max_draft, help="draft length, at most")
    p.add_argument("--gguf", type=Path, help="the model's GGUF file, for llama.cpp where llama_cpp is installed")
    p.add_argument("--skip", nargs="*", default=[], metavar="NAME", help="leave out contenders whose name begins with "
                   "NAME")
    p.add_argument("--growth", nargs="?", const="all", choices=("all", "ours"), help="also measure the time per token "
                   "at several lengths; ours: leave out transformers' generate, which is slow at long contexts on a "
                   "CPU without bf16 instructions")
    p.add_argument("--check-late", action="store_true", help="also run each cascade with DecodeConfig.check_late, and "
                   "compare the speeds")
    p.add_argument("--replay", action="store_true", help="only measure the engine, with random weights and scripted "
                   "exits")
    p.add_argument("--simulate", action="store_true", help="with --replay: only count the bytes and kernel "
                   "launches of a GPU, without running them")
    p.add_argument("--shape", choices=replay.SHAPES, help="with --replay: shape of the model; the default "
                   "depends on the device")
    p.add_argument("--out", type=Path, help="also write the JSON to this file, and with --growth a plot beside it")
    args = p.parse_args()
    args.prompts = args.prompts or (8 if args.quick else 50)
    args.tokens = args.tokens or (64 if args.quick else 128)
    if any(name.startswith(skipped) for skipped in args.skip for name in COMPARED):
        p.error(f"--skip {' '.join(args.skip)}: '{GENERATE}' and 'full' cannot be left out, since all others are "
                "compared with them")
    return args


def main() -> None:
    args = parse_args()
    if args.replay and args.simulate:
        result = {"provenance": provenance(0)} | simulation.simulate(args.shape or replay.GPU_SHAPE, args.tokens)
        print(simulation.table(result))
    elif args.replay:
        result = {"provenance": provenance(0)} | replay.measure(args.shape, args.tokens, read_bandwidth)
        print(replay.table(result))
    else:
        result = compare(args)
    if args.out:
        save_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
