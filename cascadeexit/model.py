"""SegmentedModel: a frozen transformers decoder that is divided into segments at its exits.

For example, exits after layers 9, 17, 24 of 30 give the bounds (0, 9, 17, 24, 30) and four segments. This module knows
sizes and checks arguments. A backend does the computing: `model.layers` runs hidden rows through segments, and
`model.head` projects them onto the vocabulary.

Letters: D hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Integral

import torch
from torch import Tensor

from cascadeexit import backends
from cascadeexit.backends.base import Backend
from cascadeexit.backends.weights import DecoderShape, is_spread, outer_weights
from cascadeexit.values import shown, whole

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3")
_GEMMA = ("most of its layers use sliding-window attention, and its two kinds of layers rotate positions by different "
          "angles")
_REFUSED = {"gemma3": _GEMMA, "gemma3_text": _GEMMA}        # types for which the reason is known
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# Largest sizes of a config. A config with a size far above them would occupy the machine for minutes before it fails.
_LARGEST = dict(num_hidden_layers=1_000, hidden_size=65_536, intermediate_size=1_048_576, num_attention_heads=4_096,
                num_key_value_heads=4_096, head_dim=4_096, vocab_size=4_194_304)


def check_supported(config) -> None:
    """Raise ValueError if a model with this transformers config cannot be divided into segments.

    The message says why.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind in _REFUSED:
        raise ValueError(f"model type '{kind}' is not supported: {_REFUSED[kind]}. Pick a model of one of the types "
                         f"{', '.join(SUPPORTED)}.")
    if kind not in SUPPORTED:
        raise ValueError(f"model type '{kind}' is not supported: CascadeExit runs decoder layers one by one and knows "
                         f"the layout of {', '.join(SUPPORTED)}. Pick a model of one of these types.")
    sliding = any(t != "full_attention" for t in getattr(config, "layer_types", None) or ())
    if sliding or (kind in ("mistral", "phi3") and getattr(config, "sliding_window", None)):
        raise ValueError(f"this {kind} model uses sliding-window attention, which is not supported: its layers would "
                         "need masks of different widths. Pick one with full attention in every layer.")
    for name, most in _LARGEST.items():
        if getattr(config, name, None) is not None:
            whole(f"{name} in the config of the model", getattr(config, name), 1, most)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _STATIC_ROPE:
        raise ValueError(f"rotary embedding type '{rope}' is not supported: its angles change with the length of the "
                         f"text, so cached keys would go stale. Supported: {', '.join(_STATIC_ROPE)}.")


class SegmentedModel:
    """A causal language model whose layers run in segments between exits.

    The caller may delete the transformers model afterwards, because the backend keeps the weights (`cpu` in packed
    copies). If accelerate has spread the model over several devices, its weights stay where they are.

    Args:
        base: a transformers *ForCausalLM of a supported type. It is put in eval mode and frozen.
        exit_layers: for each exit, the number of layers below it, ascending, each in 0..num_layers-1. An exit with
            0 layers below it reads the token's embedding and, depending on its adapter, also the carried state.
        name: short name for messages and saved files.
        backend: 'cpu', 'gpu', 'torch', a class of your own (`backends.base.Backend`), or None for the fastest that
            fits.

    Raises ValueError for an unsupported architecture, bad exit layers, or a backend that cannot run the model here.
    """

    def __init__(self, base, exit_layers: Sequence[int], *, name: str = "",
                 backend: str | type[Backend] | None = None):
        check_supported(base.config)
        num_layers = base.config.num_hidden_layers
        bounds = (0, *exit_layers, num_layers)
        if any(a >= b for a, b in zip((-1, *bounds[1:]), bounds[1:])):
            raise ValueError(f"exit layers must ascend within 0..{num_layers - 1}, got {tuple(exit_layers)}")
        weights = outer_weights(base)
        self.device, self.dtype, self.vocab_size = weights.device, weights.dtype, weights.head.shape[0]
        if self.device.type == "meta" and is_spread(base):
            raise ValueError("the vocabulary projection is not in memory: the device_map must put lm_head on a device")
        self.name = name or base.config.model_type
        self.config, self.bounds = base.config, bounds
        self.norm_weight = weights.final_norm.detach().clone()              # (D,)
        self.eos_ids = _eos_ids(base)
        base.eval().requires_grad_(False)
        self.weight_bytes = sum(p.nbytes for p in base.model.layers.parameters()) + weights.head.nbytes
        self.backend: Backend = backends.make(base, bounds, backend)
        self.layers, self.head = self.backend.layers, self.backend.head

    @property
    def num_segments(self) -> int:
        return len(self.bounds) - 1

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return self.bounds[1:-1]

    @property
    def num_layers(self) -> int:
        return self.bounds[-1]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return DecoderShape.of(self.config).head_dim

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def pass_bytes(self) -> int:
        """Bytes of weights that one pass through all layers reads. If weights are packed, this is the packed size."""
        return sum(self.layers.segment_bytes)

    @property
    def head_weight(self) -> Tensor:
        """Weight (V, D) of the vocabulary projection, which all exits share.

        On some backends, this weight is computed at each access.
        """
        return self.head.weight

    @cached_property
    def head_fingerprint(self) -> str:
        """SHA-256 (hex) of the head's weight, rounded to bf16. It shows if exits were trained for these weights."""
        weight = self.head_weight.detach().to("cpu", torch.bfloat16).contiguous()
        return hashlib.sha256(weight.view(torch.uint8).numpy()).hexdigest()

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raise ValueError for an empty prompt, and for what `check_ids` refuses."""
        if len(ids) == 0:
            raise ValueError("the prompt is empty: give at least one token")
        self.check_ids(ids)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise ValueError for token ids outside the vocabulary, and for values that are not whole numbers.

        With such ids, kernels would read invalid memory.
        """
        bad = [i for i in ids if not _is_whole(i) or not 0 <= i < self.vocab_size]
        if bad:
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {shown(bad[:5])}")


def token_ids(ids: Iterable[int]) -> list[int]:
    """Return token ids as a list of Python's own whole numbers. Arrays and tensors of one dimension are accepted.

    Raises ValueError for text and bytes, and for values that are not whole numbers: 1.5 and True would else become 1.
    """
    if isinstance(ids, (str, bytes, bytearray)) or not isinstance(ids, Iterable):
        raise ValueError(f"token ids must be a list of whole numbers, got {shown(ids)}: encode text with the tokenizer")
    each = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    bad = [i for i in each if not _is_whole(i)]
    if bad:
        raise ValueError(f"token ids must be whole numbers, got {shown(bad[:5])}")
    return list(map(int, each))


def _is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _eos_ids(base) -> frozenset[int]:
    """Return the ids of the tokens that end a text. The set may be empty.

    Raises ValueError for anything but a whole number, a list of them, or None.
    """
    ids = base.generation_config.eos_token_id
    if ids is None:
        ids = base.config.eos_token_id
    each = ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
    return frozenset(whole("eos_token_id", i, -1, 2**31) for i in each)
