"""Tiny models on the `gpu` backend, whose kernels Triton's interpreter runs on a CPU."""

import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cascadeexit.backends.gpu import GpuBackend, fits_shape
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.model import SegmentedModel
from tests.tiny_models import SHAPE, base_of

SMALL = SHAPE | dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
                     num_key_value_heads=1)
FAMILIES = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**SMALL, attention_bias=True),
    "mistral": MistralConfig(**SMALL, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
}
TINIEST = SHAPE | dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1)
FAMILIES_TO_DECODE = {"llama": LlamaConfig(**TINIEST, tie_word_embeddings=False),
                      "qwen3": Qwen3Config(**TINIEST, head_dim=16)}


class Interpreted(GpuBackend):
    """The `gpu` backend on a CPU."""

    name = "interpreted"
    fits = staticmethod(fits_shape)


def model_of(family: str, exits: tuple[int, ...] = (1,), dtype: torch.dtype = torch.bfloat16,
             **options) -> SegmentedModel:
    return SegmentedModel(base_of(FAMILIES[family], dtype, **options), exits, backend=Interpreted)


def engines(family: str, exits: tuple[int, ...] = (0, 1), dtype: torch.dtype = torch.bfloat16,
            **shape) -> tuple[Engine, Engine]:
    """Two engines of one model and random exits: interpreted kernels and `torch`. Few programs: tokens take 0.2 s."""
    made = []
    for backend in (Interpreted, "torch"):
        model = SegmentedModel(base_of(FAMILIES_TO_DECODE[family], dtype, 0.25), exits, backend=backend)
        torch.manual_seed(1)
        bank = ExitBank.untrained(model, **dict(width=16, confidence_width=8) | shape)
        for name, weight in bank.named_parameters():
            if name.endswith(("up.weight", "linear.weight", "context.weight", "outer.weight")):
                weight.data.normal_(std=0.1)
        made.append(Engine(model, bank))
    return tuple(made)
