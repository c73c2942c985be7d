"""Growth: measure how the time per token grows with the length of the context and of the output."""

from collections import defaultdict
from collections.abc import Callable
from statistics import median

import torch
from tqdm import tqdm

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.machine import now
from cascadeexit.prompts import bundled_prompts, token_ids
from training.contenders import GENERATE

CONTEXTS, OUTPUTS = (128, 512, 1024, 2048, 4096), (64, 128, 256, 512, 1024)


def growth(engine: Engine, reference, tokenizer, max_draft: int, rounds: int = 5) -> dict:
    """Measure milliseconds per token at several lengths of the context and of the output.

    At each context length, 32 tokens are decoded. The model writes the context at temperature 1: a greedy text often
    repeats itself, and then too many drafts are copied from it. The end-of-sequence token does not end a text. Each
    round measures every length once. All figures are medians over the rounds.

    Args:
        reference: transformers' model for `generate`; None = measure only our engine.
        max_draft: draft length of `verified`, at most.

    Returns {"context": [...], "output": [...]}. Each list has a dict for each length: the length itself (`context` or
    `output`), and milliseconds per token for `full` and `verified`, at the context lengths also for `generate`. An
    entry of "context" also has three ratios, each relative to the shortest context:
    - `allowed`: ratio of the bytes that `full` reads per token (weights, keys and values).
    - `allowed_16_bits`: ratio of these bytes if keys and values had 16 bits. Our CPU kernels use 12 bits.
    - `times`: ratio of the measured times of `full`. The shortest context is measured again right after each length,
      because the memory speed of a shared machine varies.
    """
    model = engine.model
    longest = min(max(CONTEXTS), model.max_positions - 64)
    prompt = token_ids(tokenizer, bundled_prompts()[0].text)

    def ms(mode: Mode, ids: list[int], tokens: int) -> float:
        config = DecodeConfig(mode=mode, max_new_tokens=tokens, max_draft=max_draft, ignore_eos=True)
        return 1e3 / engine.run(ids, config).stats.tokens_per_second

    def at_context(length: int) -> dict[str, float]:
        generate = {GENERATE: _generate_ms(reference, text[:length])} if reference else {}
        full, shortest = (ms(Mode.FULL, text[:n], 32) for n in (length, CONTEXTS[0]))
        return {"context": length, **_allowed(engine, length), "times": full / shortest, "full": full,
                "verified": ms(Mode.VERIFIED, text[:length], 32), **generate}

    def at_output(length: int) -> dict[str, float]:
        return {"output": length, "full": ms(Mode.FULL, prompt, length), "verified": ms(Mode.VERIFIED, prompt, length)}

    text = prompt + _write(engine, prompt, max(1, longest - len(prompt)))
    return {"context": _in_turn(at_context, [c for c in CONTEXTS if c <= longest], rounds, "context"),
            "output": _in_turn(at_output, [n for n in OUTPUTS if n + len(prompt) < longest], rounds, "output")}


def _write(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    """Let the model write `tokens` tokens after the prompt, at temperature 1. Returns the new token ids."""
    config = DecodeConfig(mode=Mode.FULL, max_new_tokens=tokens, temperature=1.0, ignore_eos=True)
    events = tqdm(engine.generate(prompt, config), desc="context to read", total=tokens, unit="token")
    return [event.token_id for event in events if event.final]


def _allowed(engine: Engine, length: int) -> dict[str, float]:
    """Compute the bytes that `full` reads per token at this context length, relative to the shortest context.

    Returns the ratio for the engine's own KV cache, and the ratio for a KV cache with 16 bits.
    """
    model, weights = engine.model, engine.costs.full_token_bytes
    cache = model.layers.new_cache(1)
    position_bytes = {"allowed": cache.nbytes / cache.capacity,
                      "allowed_16_bits": 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2}
    return {name: (weights + each * length) / (weights + each * CONTEXTS[0]) for name, each in position_bytes.items()}


def _in_turn(measure: Callable[[int], dict[str, float]], lengths: list[int], rounds: int, desc: str) -> list[dict]:
    """Call `measure` once per round for every length. Returns a dict for each length: medians over the rounds."""
    seen = defaultdict(list)
    for length in tqdm(lengths * rounds, desc=desc, unit="length"):
        seen[length].append(measure(length))
    return [{name: median(entry[name] for entry in entries) for name in entries[0]} for entries in seen.values()]


def _generate_ms(reference, ids: list[int], tokens: int = 32) -> float:
    """Measure milliseconds per token of transformers' `generate`. The time of the first token does not count.

    The result is (time for `tokens` + 1 new tokens - time for one new token) / `tokens`.
    """
    inputs, spent = torch.tensor([ids], device=reference.device), []
    for n in (1, tokens + 1):
        start = now(reference.device)
        reference.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=n, min_new_tokens=n,
                           do_sample=False)
        spent.append(now(reference.device) - start)
    return 1e3 * (spent[1] - spent[0]) / tokens
