"""Replay: the engine's efficiency at the shape of any model, with random weights and scripted exits.

The exits compute all that trained exits do (adapter, estimator, head), but a script decides the outcome. In the cascade
it draws the exit of each token with the published shares. In verified mode each draft is accepted with a given
probability. The speed-up that bytes allow is 1 / cost, where the cost is the weight bytes that a token reads relative
to those of the full model. The result shows how much of that speed-up the engine achieves.
"""

import random
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cascadeexit.backends.base import ExitRuntime
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.metrics import RunStats, summarize
from cascadeexit.model import SegmentedModel
from cascadeexit.sampling import Sampler

PUBLISHED_ROUTING = (0.651, 0.245, 0.075, 0.029)
PUBLISHED_TOKENS_PER_SECOND = 35.3              # the published cascade, on an A100
SHAPES = {
    "llama-3.2-3b": (dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                          num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
                     (8, 16, 22)),
    "smollm2-135m": (dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                          num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True), (9, 17, 24)),
    "tiny": (dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
                  num_key_value_heads=2, tie_word_embeddings=True), (2, 4, 6)),
}


class ScriptedExits:
    """An exit runtime that computes what trained exits do; a script decides where each token leaves."""

    def __init__(self, exits: ExitRuntime):
        self._exits = exits
        self.follow(PUBLISHED_ROUTING, 0)

    def __getattr__(self, name: str):
        return getattr(self._exits, name)

    def follow(self, routing: tuple[float, ...], seed: int) -> None:
        """Start a script with these shares of the segments."""
        self._script, self._routing, self._wanted = random.Random(seed), routing, None

    def confidence(self, s: int, hidden, copied, before=None):
        self._exits.confidence(s, hidden, copied, before)               # costs what a real exit costs
        if s == 0 or self._wanted is None:                              # the first exit runs once a token
            self._wanted = self._script.choices(range(len(self._routing)), self._routing)[0]
        return [1.0 if s == self._wanted else 0.4]                      # high enough for the next exit to be tried


class ScriptedSampler(Sampler):
    """Accepts a draft with a fixed probability; greedy otherwise."""

    def __init__(self, *args, acceptance: float):
        super().__init__(*args)
        self._acceptance, self._script = acceptance, random.Random(0)

    def judge(self, drafts, row):
        best = super().judge((), row)
        if drafts and self._script.random() < self._acceptance:
            return drafts[0]
        return best if best not in drafts else (best + 1) % self.vocab_size


class ScriptedEngine(Engine):
    """An engine whose drafts are accepted with probability `acceptance`."""

    acceptance = 0.0

    def __init__(self, model: SegmentedModel, bank: ExitBank):
        super().__init__(model, bank)
        self.exits = ScriptedExits(self.exits)

    def sampler(self, config: DecodeConfig) -> Sampler:
        return ScriptedSampler(config.temperature, config.top_p, config.seed, self.model.vocab_size, self.model.device,
                               acceptance=self.acceptance)


def make_engine(shape: str, device: torch.device) -> ScriptedEngine:
    """Make an engine with random bf16 weights at this shape, exits of the published width and 16,384 words."""
    config, layers = SHAPES[shape]
    with torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            base = AutoModelForCausalLM.from_config(
                LlamaConfig(**config, max_position_embeddings=4096), attn_implementation="sdpa")
        finally:
            torch.set_default_dtype(torch.float32)
    model = SegmentedModel(base, layers, name=shape)
    head = min(16384, config["vocab_size"] // 2)
    bank = ExitBank.untrained(model, confidence="sketch", confidence_width=48, sketch_size=min(2048, head),
                                  adapter="carry", width=min(512, config["hidden_size"]), head_size=head)
    return ScriptedEngine(model, bank)


def measure(shape: str | None, tokens: int, read_bandwidth: Callable, acceptances: tuple[float, ...] = (0.5, 0.7, 0.9),
            rounds: int = 3) -> dict:
    """Measure `full`, `cascade` at the published routing, and `verified` at these acceptance rates.

    The modes take turns; figures are medians over the rounds.

    Args:
        shape: name of a shape in SHAPES; None = Llama-3.2-3B on a GPU, SmolLM2-135M on a CPU.
        tokens: new tokens per run.
        read_bandwidth: measures the bandwidth of a device, in bytes per second.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape or ("llama-3.2-3b" if device.type == "cuda" else "smollm2-135m")
    engine, prompt = make_engine(shape, device), list(range(2, 34))
    only_first = (0.0, *(None,) * (engine.num_exits - 1))       # the first exit drafts, whatever its confidence
    jobs = {"full": (0.0, dict(mode=Mode.FULL)),
            "cascade": (0.0, dict(mode=Mode.CASCADE, thresholds=(0.5,) * engine.num_exits))}
    jobs |= {f"verified, {a:.0%} right": (a, dict(mode=Mode.VERIFIED, thresholds=only_first, max_draft=4))
             for a in acceptances}
    runs: dict[str, list] = {name: [] for name in jobs}
    for index in range(rounds + 1):
        for name, (acceptance, options) in jobs.items():
            engine.acceptance = acceptance
            engine.exits.follow(PUBLISHED_ROUTING, index)
            events = list(engine.generate(prompt, DecodeConfig(max_new_tokens=tokens, ignore_eos=True, **options)))
            if index:                                           # the first round warms up
                runs[name].append(summarize(events, engine.costs))
    bandwidth, full = read_bandwidth(device), median(s.tokens_per_second for s in runs["full"])
    rows = {name: _summary(stats, full, engine.costs.full_token_bytes / bandwidth) for name, stats in runs.items()}
    if shape == "llama-3.2-3b":
        for row in rows.values():
            row["over_published"] = row["tokens_per_second"] / PUBLISHED_TOKENS_PER_SECOND
    return {"shape": shape, "device": str(device), "tokens": tokens, "weight_bytes": engine.costs.full_token_bytes,
            "read_bandwidth": bandwidth, "rows": rows}


def _summary(stats: list[RunStats], full_speed: float, full_token_seconds: float) -> dict:
    """Summarise the runs of one mode as medians.

    Args:
        full_speed: tokens per second of `full`.
        full_token_seconds: how long this machine takes to read the bytes of a `full` token.
    """
    speed, cost = median(s.tokens_per_second for s in stats), median(s.cost for s in stats)
    return {"tokens_per_second": speed, "over_full": speed / full_speed, "allowed_by_bytes": 1 / cost,
            "of_allowed": speed / full_speed * cost, "roofline_multiple": speed * full_token_seconds,
            "average_depth": median(s.average_depth for s in stats),
            "routing_share": [median(s.routing_share[i] for s in stats) for i in range(len(stats[0].routing_share))]}


def table(result: dict) -> str:
    """Format a result as text."""
    lines = [f"{result['shape']}, random weights, bf16, {result['device']}, {result['tokens']} tokens; "
             f"{result['read_bandwidth'] / 1e9:.0f} GB/s read", "",
             f"{'':<22}{'tokens/s':>9}{'x full':>8}{'bytes allow':>13}{'reached':>9}{'roofline':>10}{'depth':>7}"]
    lines += [f"{name:<22}{r['tokens_per_second']:>9.1f}{r['over_full']:>8.2f}{r['allowed_by_bytes']:>13.2f}"
              f"{r['of_allowed']:>9.0%}{r['roofline_multiple']:>10.2f}{r['average_depth']:>7.2f}"
              for name, r in result["rows"].items()]
    return "\n".join(lines)
