"""Tiny models on the `gpu` backend, whose kernels Triton's interpreter runs on a CPU."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cascadeexit.backends.gpu import GpuBackend, fits_shape
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.model import SegmentedModel
from tests.tiny_models import SHAPE, logits_of, through

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
IDS = [5, 9, 33, 2, 71, 8, 15, 60, 44, 3, 17, 90, 12, 6, 28, 51, 77, 4, 39, 10, 11]


class Interpreted(GpuBackend):
    """The `gpu` backend on a CPU."""

    name = "interpreted"
    fits = staticmethod(fits_shape)


def base_of(family: str, dtype: torch.dtype = torch.bfloat16, std: float = 0.15, shapes: dict = FAMILIES):
    """A random model of a family; biases are as large as what they are added to."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(shapes[family], attn_implementation="sdpa")
    for name, parameter in base.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=std)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    return base.to(dtype).eval()


def model_of(family: str, exits: tuple[int, ...] = (1,), dtype: torch.dtype = torch.bfloat16,
             **options) -> SegmentedModel:
    return SegmentedModel(base_of(family, dtype, **options), exits, backend=Interpreted)


def engines(family: str, exits: tuple[int, ...] = (0, 1), dtype: torch.dtype = torch.bfloat16,
            **shape) -> tuple[Engine, Engine]:
    """Two engines of one model and random exits: interpreted kernels and `torch`. Few programs: tokens take 0.2 s."""
    made = []
    for backend in (Interpreted, "torch"):
        model = SegmentedModel(base_of(family, dtype, 0.25, FAMILIES_TO_DECODE), exits, backend=backend)
        torch.manual_seed(1)
        bank = ExitBank.untrained(model, **dict(width=16, confidence_width=8) | shape)
        for name, weight in bank.named_parameters():
            if name.endswith(("up.weight", "linear.weight", "context.weight", "outer.weight")):
                weight.data.normal_(std=0.1)
        made.append(Engine(model, bank))
    return tuple(made)


@torch.inference_mode()
def decoded(model: SegmentedModel, chunks: list[int], capacity: int = 64) -> torch.Tensor:
    """Logits of IDS (N, V), taken through the model in chunks of these sizes."""
    cache, out, at = model.layers.new_cache(capacity), [], 0
    for n in chunks:
        out.append(logits_of(model, through(model, cache, IDS[at:at + n]))[0])
        at += n
    return torch.cat(out)


@torch.inference_mode()
def states(model: SegmentedModel, cache, ids: list[int], parents: list[int] | None = None) -> torch.Tensor:
    """Rows of these tokens after the last layer (N, D)."""
    return through(model, cache, ids, parents)[0]
