"""The contenders of the benchmark: transformers' `generate`, llama.cpp, and the modes of our engine."""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.metrics import RunStats

GENERATE, LLAMA_CPP = "transformers generate", "llama.cpp, 4-bit"
CHECKED = ", checked late"        # ends the name of a cascade with `check_late`
STATIC_CACHE = "generate, static cache, compiled"
COMPARED = (GENERATE, "full")                       # all others are compared with these

Output = tuple[list[int], RunStats | None]          # token ids, and the statistics of our engine
Decode = Callable[[list[int]], Output]              # decodes a prompt


@dataclass
class Contender:
    """One way to decode, with its results so far. `speeds` and `outputs` have one entry for each decoded prompt."""

    name: str
    decode: Decode
    speeds: list[float] = field(default_factory=list)               # tokens/s, prefill included
    outputs: list[Output] = field(default_factory=list)
    error: str = ""                                                 # why the contender failed; "" if it did not

    def warm_up(self, ids: list[int], needed: bool) -> None:
        """Decode a prompt without storing speed or output.

        If decoding raises an error, `error` gets its text. If `needed` is True, the error is raised instead.
        """
        try:
            self.decode(ids)
        except Exception as error:          # compilers and libraries raise errors of many kinds
            if needed:
                raise
            self.error = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def with_transformers(reference, tokens: int, **options) -> Decode:
    """Make a function that decodes a prompt greedily with transformers' `generate`.

    Args:
        reference: the transformers model.
        tokens: new tokens, at most.
        options: more arguments of `generate`.

    The function takes the token ids of the prompt, and returns (ids of the new tokens, None).
    """
    def decode(ids: list[int]) -> Output:
        inputs = torch.tensor([ids], device=reference.device)
        out = reference.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens,
                                 do_sample=False, **options)
        return out[0, len(ids):].tolist(), None
    return decode


def with_engine(engine: Engine, tokens: int, mode: Mode, **options) -> Decode:
    """Make a function that decodes a prompt with our engine.

    Args:
        tokens: new tokens, at most.
        options: more fields of `DecodeConfig`.

    The function takes the token ids of the prompt, and returns (ids of the new tokens, `RunStats` of the run).
    """
    config = DecodeConfig(mode=mode, max_new_tokens=tokens, **options)

    def decode(ids: list[int]) -> Output:
        run = engine.run(ids, config)
        return run.token_ids, run.stats
    return decode


def with_llama_cpp(gguf: Path, tokens: int, eos: frozenset[int]) -> Decode:
    """Make a function that decodes a prompt greedily with llama.cpp.

    Args:
        gguf: file with the 4-bit weights of the model.
        tokens: new tokens, at most.
        eos: ids of the tokens that end a text.

    The function takes the token ids of the prompt, and returns (ids of the new tokens, None).
    """
    from llama_cpp import Llama

    model = Llama(str(gguf), n_ctx=2048, n_threads=torch.get_num_threads(), verbose=False)

    def decode(ids: list[int]) -> Output:
        out: list[int] = []
        for token in model.generate(ids, temp=0.0, reset=True):
            out.append(token)
            if len(out) == tokens or token in eos:
                break
        return out, None
    return decode


def make_contenders(engine: Engine, reference, args: argparse.Namespace) -> list[Contender]:
    """Make all contenders that can run on this machine.

    A contender is left out if its name begins with an entry of --skip.

    Args:
        reference: the transformers model.
        args: `tokens`, `gguf`, `cascade_thresholds`, `check_late`, `max_draft`, `tolerances` and `skip` are used, with
            the meaning of the options of `training.benchmark`.
    """
    n, first = args.tokens, next(layer for layer in engine.model.exit_layers if layer)
    jobs = {GENERATE: with_transformers(reference, n)}
    if engine.model.device.type == "cuda":
        jobs[STATIC_CACHE] = with_transformers(reference, n, cache_implementation="static")
    jobs["generate, prompt lookup"] = with_transformers(reference, n, prompt_lookup_num_tokens=10)
    jobs[f"generate, early exit after {first}"] = with_transformers(reference, n, assistant_early_exit=first)
    if args.gguf and importlib.util.find_spec("llama_cpp"):
        jobs[LLAMA_CPP] = with_llama_cpp(args.gguf, n, engine.model.eos_ids)
    jobs["full"] = with_engine(engine, n, Mode.FULL)
    for thresholds in args.cascade_thresholds:
        each = thresholds if isinstance(thresholds, tuple) else (thresholds,)
        name = ",".join("no" if t is None else f"{t:g}" for t in each)
        jobs[f"cascade {name}"] = with_engine(engine, n, Mode.CASCADE, thresholds=thresholds)
        if args.check_late:
            jobs[f"cascade {name}{CHECKED}"] = with_engine(engine, n, Mode.CASCADE, thresholds=thresholds,
                                                           check_late=True)
    jobs["verified"] = with_engine(engine, n, Mode.VERIFIED, max_draft=args.max_draft)
    for tolerance in args.tolerances:
        jobs[f"verified, tolerance {tolerance:g}"] = with_engine(engine, n, Mode.VERIFIED, max_draft=args.max_draft,
                                                                 tolerance=tolerance)
    return [Contender(name, decode) for name, decode in jobs.items() if not name.startswith(tuple(args.skip))]
