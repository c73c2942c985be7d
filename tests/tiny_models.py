"""Tiny random models of each family, built from configs: no weights, no network, CPU, seconds."""


import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.model import SegmentedModel

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=1)
FAMILIES = {
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
}
EXIT_LAYERS = (2, 3, 5)
IDS = [5, 9, 33, 2, 71, 8, 15, 60, 44, 3, 17, 90, 12, 6, 28, 51, 77, 4, 39, 10, 11]


def tiny_base(family: str = "llama-untied", seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model whose text depends on its context: larger weights than the default make sharp choices."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa")
    for parameter in base.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.25)
    return base.to(dtype).eval()


def tiny_engine(family: str = "llama-untied", seed: int = 0, dtype: torch.dtype = torch.float32,
                layers: tuple[int, ...] = EXIT_LAYERS, **shape) -> Engine:
    """Random exits over a random model: adapters that differ from the identity, random estimators."""
    model = SegmentedModel(tiny_base(family, seed, dtype), layers, name=family)
    bank = ExitBank.untrained(model, **dict(confidence="mlp", width=8, confidence_width=8) | shape)
    torch.manual_seed(seed + 1)
    for adapter in bank.adapters:
        for name, weight in adapter.named_parameters():
            if name in ("up.weight", "linear.weight"):
                weight.data.normal_(std=0.1)
    for weight in bank.drafter.parameters() if bank.drafter else ():
        weight.data.normal_(std=0.3)
    for head in bank.confidence_heads:
        if bank.config.confidence == "mlp":
            head.outer.weight.data.normal_(std=2.0)
        else:               # surer where the likeliest word is likelier, about as often sure as not
            for net in (head.alone, head.after):
                net[0].weight.data.zero_()[:, 0] = 3.0
                net[0].bias.data.fill_(8.0)                     # there silu is nearly a straight line
                net[2].weight.data.fill_(1 / len(net[0].weight))
                net[2].bias.data.fill_(-6.0)
    return Engine(model, bank)


def base_of(config, dtype: torch.dtype = torch.bfloat16, std: float = 0.15):
    """A random model of a config; biases are as large as what they are added to."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for name, parameter in base.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=std)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    return base.to(dtype).eval()


def logits_of(model: SegmentedModel, rows) -> torch.Tensor:
    """The full model's logits for rows after the last layer: (1, N, D) -> (1, N, V)."""
    return model.head.logits(model.layers.norm(rows))


def through(model: SegmentedModel, cache, ids, parents=None):
    """Token ids through every segment, one call each: the rows after the last, (1, N, D) in the backend's form."""
    rows = model.layers.embed(ids)
    for s in range(model.num_segments):
        rows, = model.layers.run(range(s, s + 1), rows, cache, parents)
    return rows


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
    return model.layers.tensor(through(model, cache, ids, parents))[0]


@torch.inference_mode()
def last_states(model: SegmentedModel, texts: list[list[int]], begins: list[int]) -> torch.Tensor:
    """Rows of the last token of each text (B, D), decoded as one batch; text b starts at its token begins[b]."""
    cache = model.layers.new_cache(len(texts[0]), batch=len(texts))
    for column in zip(*texts):
        rows = model.layers.embed(column)
        for s in range(model.num_segments):
            rows = model.layers.run_batch(s, rows, [min(b, cache.length(model.bounds[s])) for b in begins], cache)
    return model.layers.tensor(rows)[0]
