"""Helpers that several test files share, beside the tiny models of tiny_models.py."""

from pathlib import Path

import torch

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.inspection import inspect
from cascadeexit.race import race
from cascadeexit.sides import CASCADE, FULL, Side
from cascadeexit.stream import TokenStream, frames
from training.documents import Document
from training.features import FeatureStore

PROMPTS = ([5], [5, 6, 7], [9, 3] * 12)


def verified_runs(engine: Engine, tokens: int = 60, max_drafts: tuple[int, ...] = (1, 4, 16)) -> list:
    """Decode PROMPTS with `verified` at these draft lengths, and assert that each text equals that of `full`."""
    runs = []
    for prompt in PROMPTS:
        full = engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=tokens)).token_ids
        for max_draft in max_drafts:
            runs.append(engine.run(prompt, DecodeConfig(mode="verified", max_new_tokens=tokens, max_draft=max_draft)))
            assert runs[-1].token_ids == full, f"prompt {prompt}, max_draft {max_draft}"
    return runs


def tiny_store(engine: Engine, folder: Path, documents: int, budget_gb: float = 1.0) -> FeatureStore:
    """Make the features of random documents of 20 tokens; the last 16 count as chosen by the model."""
    ids = torch.randint(2, 97, (documents, 20), generator=torch.Generator().manual_seed(3)).tolist()
    store = FeatureStore(engine.model, [Document(row, [0] * 4 + [1] * 16, key) for key, row in enumerate(ids)],
                         folder, budget_gb)
    store.prepare()
    store.open()
    return store


def run_stream(engine, tokenizer, mode: str, **options) -> TokenStream:
    """Race a mode against `full` on a tiny model; the stream of the whole race, with its verdict."""
    config = DecodeConfig(mode=mode, thresholds=options.pop("thresholds", 0.6), max_new_tokens=60, **options)
    prompt = [5, 6, 7]
    full = DecodeConfig(mode=Mode.FULL, max_new_tokens=60, temperature=config.temperature)
    sides = [Side(CASCADE, "With exits", config), Side(FULL, "Full model", full)]
    stream = TokenStream(engine, tokenizer, sides, prompt)
    for _ in frames(stream, race({CASCADE: engine.generate(prompt, config), FULL: engine.generate(prompt, full)})):
        pass
    stream.close_text()
    stream.end(CASCADE, inspect(engine, prompt, stream.sides[CASCADE].events))
    return stream
