"""Replay: measure the speed of the engine for a model of any size, with random weights instead of trained weights.

The exits compute all that trained exits compute (adapter, estimator, head, drafter), but these results are not used.
Random outcomes replace them. In mode `cascade`, the exit of each token is chosen at random, with the shares of the
original CascadeExit. In mode `verified`, the likeliest draft is accepted at random, with a probability that gives a
wanted mean number of tokens per verification pass. The tokens of the full model are random, too. So no text repeats
itself, and the n-gram lookup copies nothing.

The result has two limits that follow from memory reads, beside the measured values. The limit of the speed-up over
`full` is 1 / cost, where cost is the weight bytes read per token relative to the full model. The limit of the time per
token is the weight bytes read per token, divided by the measured memory bandwidth.
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
GPU_SHAPE = "llama-3.2-3b"                      # shape of the model in the published figures
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
    """Chooses the outcomes of one run at random: exits, drafts and verified tokens.

    A script replaces trained weights when only the speed of the engine is measured. Call its methods in the order of
    decoding: each call draws the next random outcome.

    Args:
        seed: decides all outcomes.
        vocab_size: size of the vocabulary from which tokens are chosen.
        tokens_per_pass: wanted mean number of tokens per verification pass. 1 if the run has no drafts.
    """

    def __init__(self, seed: int, vocab_size: int, tokens_per_pass: float = 1.0):
        self._random, self._vocab_size = random.Random(seed), vocab_size
        self.acceptance = 1 - 1 / tokens_per_pass           # of each draft on a path: a geometric series of tokens

    def exit(self) -> int:
        """Choose at random which exit produces the next token, with the probabilities `PUBLISHED_ROUTING`.

        These are the shares of the tokens that each exit of the original CascadeExit produced. Returns the number of
        the exit, 1 to 3, or 4 for the full model. Exit 0, before the first layer, is never chosen.
        """
        return 1 + self._random.choices(range(len(PUBLISHED_ROUTING)), PUBLISHED_ROUTING)[0]

    def drafts(self) -> tuple[list[float], list[int]]:
        """Choose the drafts after one token: BRANCHES different random tokens.

        Returns their probabilities, the largest first, and their token ids.
        """
        others = [(1 - self.acceptance) / BRANCHES] * (BRANCHES - 1)
        return [self.acceptance, *others], self._random.sample(range(2, self._vocab_size), BRANCHES)

    def judge(self, drafts: list[int]) -> int:
        """Choose the verified token at one position.

        With the probability `acceptance`, this is the first draft. Else it is a random token that is none of the
        drafts.

        Args:
            drafts: token ids of the drafts for this position, the likeliest first. [] if there are none.
        """
        if drafts and self._random.random() < self.acceptance:
            return drafts[0]
        while (token := self._random.randrange(2, self._vocab_size)) in drafts:
            pass
        return token


class ScriptedExits:
    """Exits whose confidences and drafts come from a `Script`.

    They still compute all that trained exits compute, so that they take the same time.
    """

    def __init__(self, exits: ExitRuntime):
        self._exits = exits

    def __getattr__(self, name: str):
        return getattr(self._exits, name)

    def follow(self, script: Script) -> None:
        """Use the outcomes of this script in the next run. Call this before each run."""
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
    """A sampler whose verified tokens come from a `Script`, not from the model's logits."""

    def __init__(self, *args, script: Script):
        super().__init__(*args)
        self._script = script

    def judge(self, drafts, row):
        return self._script.judge(drafts)


class ScriptedEngine(Engine):
    """An engine whose exits, drafts and verified tokens come from a `Script`. Call `follow` before each run."""

    def __init__(self, model: SegmentedModel, bank: ExitBank):
        super().__init__(model, bank)
        self.exits = ScriptedExits(self.exits)

    def follow(self, seed: int, tokens_per_pass: float) -> None:
        """Make the script of the next run.

        Args:
            seed: decides all outcomes of the run.
            tokens_per_pass: wanted mean number of tokens per verification pass, 1 or more; 1 = no draft is accepted.
        """
        self._script = Script(seed, self.model.vocab_size, tokens_per_pass)
        self.exits.follow(self._script)

    def sampler(self, config: DecodeConfig) -> Sampler:
        return ScriptedSampler(config.temperature, config.top_p, config.seed, self.model.vocab_size,
                               torch.device("cpu"), script=self._script)            # it draws no tensors


def make_engine(shape: str, device: torch.device, backend: type | None = None) -> ScriptedEngine:
    """Make an engine with random bf16 weights, to measure its speed. Call its `follow` before each run.

    Its exits have adapters of the original CascadeExit's width, 512, and a head of 16,384 words. For small models, both
    are smaller.

    Args:
        shape: name of the model's shape in SHAPES.
        backend: class of the backend; None = the default for this device.
    """
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
    """Return the runs to measure: {name of the run: (tokens per verification pass, fields of its DecodeConfig)}."""
    verified = dict(mode=Mode.VERIFIED, max_draft=7)
    published = (None, *(0.5,) * (engine.num_exits - 1))                # the exit before the first layer only drafts
    return {"full": (1.0, dict(mode=Mode.FULL)),
            "cascade": (1.0, dict(mode=Mode.CASCADE, thresholds=published)),
            "verified": (bundled_tokens_per_pass(), verified),
            f"verified, {BETTER_DRAFTER:g} tokens a pass": (BETTER_DRAFTER, verified)}


def bundled_tokens_per_pass() -> float:
    """Read the bundled model's mean number of tokens per verification pass from the result file of the benchmark.

    Raises FileNotFoundError if there is no such file.
    """
    if (measured := read_json(MEASURED)) is None:
        raise FileNotFoundError(f"{MEASURED} is missing: python -m training.benchmark --out {MEASURED}")
    return measured["rows"]["verified"]["tokens_per_verification"]


def replayed(engine: ScriptedEngine, job: tuple[float, dict], tokens: int, seed: int) -> RunStats:
    """Decode once with scripted outcomes. Returns the statistics of the run.

    Args:
        job: one of the values of `jobs_of`.
        tokens: new tokens of the run.
        seed: seed of the script.
    """
    tokens_per_pass, options = job
    engine.follow(seed, tokens_per_pass)
    config = DecodeConfig(max_new_tokens=tokens, ignore_eos=True, **options)
    return summarize(list(engine.generate(PROMPT, config)), engine.costs)


def measure(shape: str | None, tokens: int, read_bandwidth: Callable, rounds: int = 3) -> dict:
    """Measure the speed of the runs in `jobs_of`: `full`, `cascade`, and `verified` with two acceptance rates.

    The runs take turns. One round is a warm-up. Figures are medians over the other rounds.

    Args:
        shape: name of the model's shape in SHAPES. None = Llama-3.2-3B on a GPU, SmolLM2-135M on a CPU.
        tokens: new tokens per run.
        read_bandwidth: function that measures the memory bandwidth of a device, in bytes per second.
        rounds: number of rounds that count.

    Returns a dict that can be saved as JSON:
    - `shape`, `device`, `backend`, `tokens`: what was measured.
    - `weight_bytes`: weight bytes that `full` reads per token. `read_bandwidth`: in bytes per second.
    - `peak_bytes`: highest use of GPU memory; None on a CPU.
    - `rows`: {name of the run: figures}. Some figures are: `token_ms`, the time per token in milliseconds; `bytes_ms`,
      its limit; `over_full`, the speed-up over `full`; `allowed_by_bytes`, its limit; and `of_allowed`, which share of
      this limit was reached.
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
    """Compute the medians over several runs of one mode.

    Args:
        full_speed: speed of `full`, in tokens per second.
        full_token_seconds: time to read the weight bytes of one token of `full` at the measured memory bandwidth.
    """
    speed, cost = median(s.tokens_per_second for s in stats), median(s.cost for s in stats)
    return {"tokens_per_second": speed, "token_ms": 1e3 / speed, "bytes_ms": 1e3 * cost * full_token_seconds,
            "over_full": speed / full_speed, "allowed_by_bytes": 1 / cost,
            "of_allowed": speed / full_speed * cost, "roofline_multiple": speed * full_token_seconds,
            "average_depth": median(s.average_depth for s in stats),
            "tokens_per_verification": stats[0].tokens_per_verification,
            "routing_share": [median(s.routing_share[i] for s in stats) for i in range(len(stats[0].routing_share))]}


def table(result: dict) -> str:
    """Format the result of `measure` as a text table."""
    lines = [f"{result['shape']}, random weights, bf16, {result['device']}, {result['tokens']} tokens; "
             f"{result['read_bandwidth'] / 1e9:.0f} GB/s read", "",
             f"{'':<26}{'ms a token':>11}{'by bytes':>10}{'x full':>8}{'bytes allow':>13}{'reached':>9}"
             f"{'roofline':>10}{'depth':>7}"]
    lines += [f"{name:<26}{r['token_ms']:>11.2f}{r['bytes_ms']:>10.2f}{r['over_full']:>8.2f}"
              f"{r['allowed_by_bytes']:>13.2f}{r['of_allowed']:>9.0%}{r['roofline_multiple']:>10.2f}"
              f"{r['average_depth']:>7.2f}"
              for name, r in result["rows"].items()]
    return "\n".join(lines)
