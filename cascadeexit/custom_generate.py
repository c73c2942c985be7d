"""Custom generate: decodes with exits inside `generate` of transformers.

    model.generate(**inputs, custom_generate=cascadeexit.generate, max_new_tokens=64, do_sample=False)

transformers prepares the prompt, the config and the stopping criteria. The engine chooses the tokens. transformers 5.24
does not pass `streamer` on to `cascadeexit.generate`. So bind `streamer` to this function as well:

    model.generate(**inputs, streamer=streamer, custom_generate=partial(cascadeexit.generate, streamer=streamer))
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.events import TokenEvent
from cascadeexit.hub import attach, short_name

_CARD = """---
library_name: transformers
tags: [custom_generate, early-exit, speculative-decoding]
---

# Decode with CascadeExit

Install CascadeExit, and name this repository or folder in `generate` of transformers:

    model.generate(**inputs, custom_generate="...", trust_remote_code=True, max_new_tokens=64, do_sample=False)

`mode` is "verified" (default: the text of the full model), "cascade" or "full". `exits` is a folder of trained exits.
"""
_CODE = '''"""Decodes with CascadeExit."""

from functools import partial

import cascadeexit


def generate(model, streamer=None, **options):
    decode = partial(cascadeexit.generate, streamer=streamer)      # transformers gives a function no streamer
    return model.generate(streamer=streamer, custom_generate=decode, **options)
'''
_REPOSITORY = {"README.md": _CARD, "custom_generate/generate.py": _CODE,
               "custom_generate/requirements.txt": "cascadeexit\n"}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def generate(model, input_ids: Tensor, logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList,
             generation_config: GenerationConfig, synced_gpus: bool = False, streamer=None,
             exits: str | Path | None = None, mode: Mode | str = Mode.VERIFIED,
             thresholds: float | None = None, seed: int = 0, **model_kwargs) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode with exits. Pass this function as the argument `custom_generate` of transformers' `model.generate`.

    Returns the prompt and the new tokens (1, T + new), or a `GenerateDecoderOnlyOutput` with them if the generation
    config asks for a dict.

    The first call for a model freezes the model, makes an engine with these exits, and keeps the engine on the model.
    A call with other `exits` makes a new engine. Load the model anew if you change its weights.

    Args:
        model: a transformers *ForCausalLM of a supported type. `model.generate` passes it, like all arguments up to
            `streamer`.
        input_ids: the prompt, (1, T).
        exits: a folder of trained exits; None = the exits shipped for this model, else untrained exits.
        mode: 'verified', 'cascade' or 'full'. In `verified`, the greedy text equals the full model's text.
        thresholds: confidence from which the first exit is taken, as in `DecodeConfig`.
        seed: seed of the sampling, if do_sample is True. transformers samples other tokens with the same seed.

    Raises ValueError for what the engine cannot do: several sequences, padding, a cache that is filled, logits
    processors other than temperature and top_p, and outputs other than the tokens.
    """
    _check(input_ids, logits_processor, generation_config, model_kwargs)
    sampled = generation_config.do_sample
    config = DecodeConfig(mode=mode, thresholds=thresholds, seed=seed,
                          max_new_tokens=generation_config.max_length - input_ids.shape[1],
                          temperature=_given(generation_config.temperature) if sampled else 0.0,
                          top_p=_given(generation_config.top_p) if sampled else 1.0,
                          ignore_eos=True)              # the stopping criteria know the end-of-sequence tokens
    events = _engine_of(model, exits).generate(input_ids[0].tolist(), config)
    with closing(events):
        sequences = _collect(events, input_ids, stopping_criteria, streamer)
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


def export(folder: str | Path) -> None:
    """Write a `custom_generate` repository: a folder that can be uploaded to the Hub, and named in `model.generate`.

    The repository has only code, which calls the installed package. Missing folders are made, and files replaced.

    folder: the folder to write.
    """
    for name, text in _REPOSITORY.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _collect(events: Iterator[TokenEvent], input_ids: Tensor, stopping_criteria: StoppingCriteriaList,
             streamer) -> Tensor:
    """Return prompt and new tokens (1, T), up to the first token at which a stopping criterion holds."""
    for event in events:
        if not event.final:
            continue
        token = torch.tensor([event.token_id], device=input_ids.device)
        input_ids = torch.cat([input_ids, token[None]], dim=1)
        if streamer is not None:
            streamer.put(token.cpu())
        if stopping_criteria(input_ids, None).all():
            break
    if streamer is not None:
        streamer.end()
    return input_ids


def _engine_of(model, exits: str | Path | None) -> Engine:
    """Return the engine of a model with these exits. It is made at the first call and kept on the model."""
    kept = vars(model).get("_cascadeexit")
    if kept is None or kept[0] != exits:
        name = model.config.name_or_path
        kept = model._cascadeexit = exits, attach(model, short_name(name) if name else model.config.model_type, exits)
    return kept[1]


def _check(input_ids: Tensor, logits_processor: LogitsProcessorList, generation_config: GenerationConfig,
           model_kwargs: dict) -> None:
    """Raise ValueError if a call of `generate` asks for something that the engine cannot do."""
    if len(input_ids) != 1:
        raise ValueError(f"input_ids must be one sequence, got {len(input_ids)} (num_beams and num_return_sequences "
                         "make copies): call generate once for each")
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("attention_mask must be all ones, got zeros: leave padding out of the prompt")
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"the cache must be empty, got {cache.get_seq_length()} positions: the engine has its own")
    known = (TemperatureLogitsWarper, TopPLogitsWarper) if generation_config.do_sample else ()
    others = [type(one).__name__ for one in logits_processor if not isinstance(one, known)]
    if others:
        raise ValueError(f"logits processors must be temperature and top_p alone, got {', '.join(others)}: set the "
                         "options that ask for them to None (top_k=0 for top_k)")
    asked = [name for name in _OUTPUTS if getattr(generation_config, name)]
    if asked:
        raise ValueError(f"only the tokens can be returned, got {', '.join(asked)}=True")


def _given(value: float | None) -> float:
    return 1.0 if value is None else value
