"""The engine at a given shape with random weights and scripted exits: its efficiency, without anybody's weights.

Exits compute all that trained ones do (adapter, estimator, head); only what comes of it is scripted. In the cascade a
script says by which exit each token leaves, with the published shares. In verified mode each draft is right by the
toss of a coin. The speed that bytes allow is one over the cost, the weight bytes that a token reads over those of the
full model; how near the engine comes is its own doing.
"""

import random
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.exits import ExitBank
from cascadeexit.metrics import summarize
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


class ScriptedBank(ExitBank):
    """Exits that compute as trained ones do and then leave as the script says."""

    def follow(self, routing: tuple[float, ...], seed: int) -> None:
        self._script, self._routing, self._wanted = random.Random(seed), routing, None

    def confidence(self, s: int, hidden, copied, before=None):
        super().confidence(s, hidden, copied, before)                   # a real exit is waited for
        if s == 0 or self._wanted is None:      # the first exit is asked once a token
            self._wanted = self._script.choices(range(len(self._routing)), self._routing)[0]
        return [1.0 if s == self._wanted else 0.4]                      # near enough not to rule out the next one


class ScriptedSampler(Sampler):
    """Judges drafts by the toss of a coin; greedy otherwise."""

    def __init__(self, *args, acceptance: float):
        super().__init__(*args)
        self._acceptance, self._coin = acceptance, random.Random(0)

    def judge(self, drafts, row):
        best = super().judge((), row)
        if drafts and self._coin.random() < self._acceptance:
            return drafts[0]
        return best if best not in drafts else (best + 1) % self.vocab_size


class ScriptedEngine(Engine):
    acceptance = 0.0

    def sampler(self, config: DecodeConfig) -> Sampler:
        return ScriptedSampler(config.temperature, config.top_p, config.seed, self.model.vocab_size, self.model.device,
                               acceptance=self.acceptance)


def make_engine(shape: str, device: torch.device) -> ScriptedEngine:
    """Random weights at this shape, bf16, exits of the published width with a head of 16,384 words."""
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
    model.eos_ids = frozenset()                                 # no token ends a run
    head = min(16384, config["vocab_size"] // 2)
    bank = ScriptedBank.untrained(model, confidence="sketch", confidence_width=48, sketch_size=min(2048, head),
                                  adapter="carry", width=min(512, config["hidden_size"]), head_size=head)
    bank.follow(PUBLISHED_ROUTING, 0)
    return ScriptedEngine(model, bank)


def measure(shape: str | None, tokens: int, read_bandwidth: Callable, acceptances: tuple[float, ...] = (0.5, 0.7, 0.9),
            rounds: int = 3) -> dict:
    """Full, cascade at the published routing, verified at these acceptances: alternated, medians over rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape or ("llama-3.2-3b" if device.type == "cuda" else "smollm2-135m")
    engine, prompt = make_engine(shape, device), list(range(2, 34))
    only_first = (0.0, *(None,) * (engine.num_exits - 1))       # one exit drafts, four at a time, whatever it thinks
    jobs = {"full": (0.0, dict(mode=Mode.FULL)),
            "cascade": (0.0, dict(mode=Mode.CASCADE, thresholds=(0.5,) * engine.num_exits))}
    jobs |= {f"verified, {a:.0%} right": (a, dict(mode=Mode.VERIFIED, thresholds=only_first, max_draft=4))
             for a in acceptances}
    runs: dict[str, list] = {name: [] for name in jobs}
    for index in range(rounds + 1):
        for name, (acceptance, options) in jobs.items():
            engine.acceptance = acceptance
            engine.bank.follow(PUBLISHED_ROUTING, index)
            events = list(engine.generate(prompt, DecodeConfig(max_new_tokens=tokens, **options)))
            if index:                                           # the first round warms up
                runs[name].append(summarize(events, engine.costs))
    bandwidth, rows = read_bandwidth(device), {}
    full = median(s.tokens_per_second for s in runs["full"])
    for name, stats in runs.items():
        speed, cost = median(s.tokens_per_second for s in stats), median(s.cost for s in stats)
        rows[name] = {"tokens_per_second": speed, "over_full": speed / full, "allowed_by_bytes": 1 / cost,
                      "of_allowed": speed / full * cost,
                      "roofline_multiple": speed * engine.costs.full_token_bytes / bandwidth,
                      "average_depth": median(s.average_depth for s in stats),
                      "routing_share": [median(s.routing_share[i] for s in stats) for i in range(engine.num_exits + 1)]}
        if shape == "llama-3.2-3b":
            rows[name]["over_published"] = speed / PUBLISHED_TOKENS_PER_SECOND
    return {"shape": shape, "device": str(device), "tokens": tokens, "weight_bytes": engine.costs.full_token_bytes,
            "read_bandwidth": bandwidth, "rows": rows}


def table(result: dict) -> str:
    lines = [f"{result['shape']}, random weights, bf16, {result['device']}, {result['tokens']} tokens; "
             f"{result['read_bandwidth'] / 1e9:.0f} GB/s read", "",
             f"{'':<22}{'tokens/s':>9}{'x full':>8}{'bytes allow':>13}{'reached':>9}{'roofline':>10}{'depth':>7}"]
    lines += [f"{name:<22}{r['tokens_per_second']:>9.1f}{r['over_full']:>8.2f}{r['allowed_by_bytes']:>13.2f}"
              f"{r['of_allowed']:>9.0%}{r['roofline_multiple']:>10.2f}{r['average_depth']:>7.2f}"
              for name, r in result["rows"].items()]
    return "\n".join(lines)
