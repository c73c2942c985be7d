"""Replay: the engine's efficiency at the shape of any model, with random weights and scripted exits.

The exits compute all that trained exits do (adapter, estimator, head, drafter), but a script decides the outcome. In
the cascade it draws the exit of each token with the published shares. In verified mode the drafter's likeliest draft is
accepted so often that a verification pass brings a given number of tokens. The full model's own tokens are random, so
that no text repeats itself and no draft is copied.

The speed-up that bytes allow is 1 / cost, where the cost is the weight bytes that a token reads relative to those of
the full model. The result shows how much of that speed-up the engine achieves. The time that bytes allow is the weight
bytes of a token over the measured bandwidth.
"""

import random
from collections.abc import Callable
from pathlib import Path
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
from training.json_files import read_json

MEASURED = Path(__file__).parents[1] / "assets" / "results" / "benchmark-cpu.json"      # of the bundled model
BETTER_DRAFTER = 3.0                            # tokens of a verification pass, for comparison
BRANCHES = 4                                    # drafts after each token
PUBLISHED_ROUTING = (0.651, 0.245, 0.075, 0.029)
GPU_SHAPE = "llama-3.2-3b"                      # that of the published figures
PROMPT = list(range(2, 34))
PUBLISHED_TOKENS_PER_SECOND = 35.3              # the published cascade, on an A100
# Sizes of the model, and its exits: one before the first layer, which only drafts, then the published three.
SHAPES = {
    "llama-3.2-3b": (dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                          num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
                     (0, 8, 16, 22)),
    "llama-3.1-8b": (dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                          num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
                     (0, 9, 18, 25)),
    "smollm2-135m": (dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                          num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True), (0, 9, 17, 24)),
    "tiny": (dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
                  num_key_value_heads=2, tie_word_embeddings=True), (0, 2, 4, 6)),
}


class Script:
    """Outcomes of one run, the same for every model with this many segments.

    Args:
        vocab_size: number of tokens to choose from.
        tokens_per_pass: mean number of tokens that a verification pass shall bring; 1 where nothing is drafted.
    """

    def __init__(self, seed: int, vocab_size: int, tokens_per_pass: float = 1.0):
        self._random, self._vocab_size = random.Random(seed), vocab_size
        self.acceptance = 1 - 1 / tokens_per_pass           # of each draft on a path: a geometric series of tokens

    def exit(self) -> int:
        """Draw the number of the exit that produces the next token, by the published routing."""
        return 1 + self._random.choices(range(len(PUBLISHED_ROUTING)), PUBLISHED_ROUTING)[0]

    def drafts(self) -> tuple[list[float], list[int]]:
        """Draw what the drafter says: probabilities, best first, and as many different tokens."""
        others = [(1 - self.acceptance) / BRANCHES] * (BRANCHES - 1)
        return [self.acceptance, *others], self._random.sample(range(2, self._vocab_size), BRANCHES)

    def judge(self, drafts: list[int]) -> int:
        """Draw the verified token at a place with these drafts, the likeliest first."""
        if drafts and self._random.random() < self.acceptance:
            return drafts[0]
        while (token := self._random.randrange(2, self._vocab_size)) in drafts:
            pass
        return token


class ScriptedExits:
    """An exit runtime that computes what trained exits do; a script decides where each token leaves."""

    def __init__(self, exits: ExitRuntime):
        self._exits = exits

    def __getattr__(self, name: str):
        return getattr(self._exits, name)

    def follow(self, script: Script) -> None:
        """Start a script."""
        self._script, self._wanted, self._last = script, 0, len(PUBLISHED_ROUTING)

    def confidence(self, s: int, hidden, copied, before=None):
        self._exits.confidence(s, hidden, copied, before)               # costs what a real exit costs
        if s <= self._last:                                             # no deeper than before: a new token
            self._wanted = self._script.exit()
        self._last = s
        return [1.0 if s == self._wanted else 0.4]                      # high enough for the next exit to be tried

    def drafts(self, *args, **options):
        drafted = self._exits.drafts(*args, **options)
        return [(state, *self._script.drafts()) for state, *_ in drafted]


class ScriptedSampler(Sampler):
    """Accepts and chooses as a script says."""

    def __init__(self, *args, script: Script):
        super().__init__(*args)
        self._script = script

    def judge(self, drafts, row):
        return self._script.judge(drafts)


class ScriptedEngine(Engine):
    """An engine that follows a script. Call `follow` before each run."""

    def __init__(self, model: SegmentedModel, bank: ExitBank):
        super().__init__(model, bank)
        self.exits = ScriptedExits(self.exits)

    def follow(self, seed: int, tokens_per_pass: float) -> None:
        """Start a script for the next run."""
        self._script = Script(seed, self.model.vocab_size, tokens_per_pass)
        self.exits.follow(self._script)

    def sampler(self, config: DecodeConfig) -> Sampler:
        return ScriptedSampler(config.temperature, config.top_p, config.seed, self.model.vocab_size,
                               torch.device("cpu"), script=self._script)            # it draws no tensors


def make_engine(shape: str, device: torch.device, backend: type | None = None) -> ScriptedEngine:
    """Make an engine with random bf16 weights at this shape, exits of the published width and 16,384 words."""
    sizes, layers = SHAPES[shape]
    config = LlamaConfig(**sizes, max_position_embeddings=4096)
    with torch.device(device):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if device.type == "meta":                                           # shapes alone, but angles are numbers
        base.model.rotary_emb = type(base.model.rotary_emb)(config)
    model = SegmentedModel(base, layers, name=shape, backend=backend)
    model.head_fingerprint = ""                                         # random weights: there is nothing to tell
    head, width = min(16384, sizes["vocab_size"] // 2), min(512, sizes["hidden_size"])
    with torch.device(device):
        bank = ExitBank.untrained(model, confidence="sketch", confidence_width=48, sketch_size=min(2048, head),
                                  adapter="carry", width=width, head_size=head, draft_size=min(4096, head),
                                  drafter_width=width)
    return ScriptedEngine(model, bank)


def jobs_of(engine: Engine) -> dict[str, tuple[float, dict]]:
    """List what is replayed: by name, the tokens that a verification pass brings, and options of the run."""
    verified = dict(mode=Mode.VERIFIED, max_draft=7)
    published = (None, *(0.5,) * (engine.num_exits - 1))                # the exit before the first layer only drafts
    return {"full": (1.0, dict(mode=Mode.FULL)),
            "cascade": (1.0, dict(mode=Mode.CASCADE, thresholds=published)),
            "verified": (bundled_tokens_per_pass(), verified),
            f"verified, {BETTER_DRAFTER:g} tokens a pass": (BETTER_DRAFTER, verified)}


def bundled_tokens_per_pass() -> float:
    """Read the tokens that a verification pass of the bundled model brings, as the benchmark measured them.

    Raises FileNotFoundError without that result.
    """
    if (measured := read_json(MEASURED)) is None:
        raise FileNotFoundError(f"{MEASURED} is missing: python -m training.benchmark --out {MEASURED}")
    return measured["rows"]["verified"]["tokens_per_verification"]


def replayed(engine: ScriptedEngine, job: tuple[float, dict], tokens: int, seed: int) -> RunStats:
    """Replay one run of a job from `jobs_of`. Returns its statistics."""
    tokens_per_pass, options = job
    engine.follow(seed, tokens_per_pass)
    config = DecodeConfig(max_new_tokens=tokens, ignore_eos=True, **options)
    return summarize(list(engine.generate(PROMPT, config)), engine.costs)


def measure(shape: str | None, tokens: int, read_bandwidth: Callable, rounds: int = 3) -> dict:
    """Measure `full`, `cascade` at the published routing, and `verified` at the bundled model's acceptance.

    The modes take turns; figures are medians over the rounds.

    Args:
        shape: name of a shape in SHAPES; None = Llama-3.2-3B on a GPU, SmolLM2-135M on a CPU.
        tokens: new tokens per run.
        read_bandwidth: measures the bandwidth of a device, in bytes per second.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape or (GPU_SHAPE if device.type == "cuda" else "smollm2-135m")
    engine = make_engine(shape, device)
    jobs = jobs_of(engine)
    runs: dict[str, list] = {name: [] for name in jobs}
    for index in range(rounds + 1):
        for name, job in jobs.items():
            stats = replayed(engine, job, tokens, index)
            if index:                                           # the first round warms up
                runs[name].append(stats)
    bandwidth, full = read_bandwidth(device), median(s.tokens_per_second for s in runs["full"])
    rows = {name: _summary(stats, full, engine.costs.full_token_bytes / bandwidth) for name, stats in runs.items()}
    if shape == GPU_SHAPE:
        for row in rows.values():
            row["over_published"] = row["tokens_per_second"] / PUBLISHED_TOKENS_PER_SECOND
    return {"shape": shape, "device": str(device), "backend": engine.model.backend.name, "tokens": tokens,
            "weight_bytes": engine.costs.full_token_bytes, "read_bandwidth": bandwidth,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None, "rows": rows}


def _summary(stats: list[RunStats], full_speed: float, full_token_seconds: float) -> dict:
    """Summarise the runs of one mode as medians.

    Args:
        full_speed: tokens per second of `full`.
        full_token_seconds: how long this machine takes to read the bytes of a `full` token.
    """
    speed, cost = median(s.tokens_per_second for s in stats), median(s.cost for s in stats)
    return {"tokens_per_second": speed, "token_ms": 1e3 / speed, "bytes_ms": 1e3 * cost * full_token_seconds,
            "over_full": speed / full_speed, "allowed_by_bytes": 1 / cost,
            "of_allowed": speed / full_speed * cost, "roofline_multiple": speed * full_token_seconds,
            "average_depth": median(s.average_depth for s in stats),
            "tokens_per_verification": stats[0].tokens_per_verification,
            "routing_share": [median(s.routing_share[i] for s in stats) for i in range(len(stats[0].routing_share))]}


def table(result: dict) -> str:
    """Format a result as text."""
    lines = [f"{result['shape']}, random weights, bf16, {result['device']}, {result['tokens']} tokens; "
             f"{result['read_bandwidth'] / 1e9:.0f} GB/s read", "",
             f"{'':<26}{'ms a token':>11}{'by bytes':>10}{'x full':>8}{'bytes allow':>13}{'reached':>9}"
             f"{'roofline':>10}{'depth':>7}"]
    lines += [f"{name:<26}{r['token_ms']:>11.2f}{r['bytes_ms']:>10.2f}{r['over_full']:>8.2f}"
              f"{r['allowed_by_bytes']:>13.2f}{r['of_allowed']:>9.0%}{r['roofline_multiple']:>10.2f}"
              f"{r['average_depth']:>7.2f}"
              for name, r in result["rows"].items()]
    return "\n".join(lines)
