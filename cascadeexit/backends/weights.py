"""Weights: where a transformers decoder of a supported type keeps its weights.

Only this module depends on the names of these weights in transformers. (The `torch` backend does, too, because it runs
transformers' own modules.) All supported types share one layout: RMSNorm, attention with grouped queries and rotary
embedding (with biases in Qwen2, with norms of queries and keys in Qwen3), RMSNorm, SwiGLU.

Letters: D hidden size, H query heads, K key-value heads, d head size, F inner size of the MLP, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OuterWeights:
    """Weights outside the decoder layers. V: number of words."""

    embedding: Tensor           # (V, D)
    final_norm: Tensor          # (D,)
    head: Tensor                # (V, D)
    head_bias: Tensor | None    # (V,)

    @property
    def tied(self) -> bool:
        """True if embedding and head are the same tensor."""
        return self.head is self.embedding

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype


def outer_weights(base) -> OuterWeights:
    """Return the weights outside the layers of a transformers *ForCausalLM, without a copy."""
    return OuterWeights(base.model.embed_tokens.weight, base.model.norm.weight, base.lm_head.weight, base.lm_head.bias)


def is_spread(base) -> bool:
    """Return True if accelerate has spread a model's weights over several devices, main memory or disk."""
    places = {str(place) for place in getattr(base, "hf_device_map", {}).values()}
    return len(places) > 1 or "disk" in places


def layer_devices(base) -> list[torch.device]:
    """Return the device of each decoder layer. Weights on disk are loaded to this device for each call."""
    return [_execution_device(layer) for layer in base.model.layers]


def _execution_device(layer: nn.Module) -> torch.device:
    """Return a layer's device: that in its accelerate hook (which may contain several), else that of its weights."""
    hook = getattr(layer, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "execution_device", None) is not None:
            return torch.device(part.execution_device)
    return next(layer.parameters()).device


def bring_outer_weights(base) -> None:
    """Load the embedding, the final norm and the head into memory if accelerate left them on disk.

    Every pass needs them, and they are small compared with the layers. Their accelerate hooks are removed.
    """
    for module in (base.model.embed_tokens, base.model.norm, base.lm_head):
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and module.weight.device.type == "meta":
            hook.pre_forward(module)                                    # brings the weights
            held = {name: p.detach().clone() for name, p in module.named_parameters()}
            for name in ("_hf_hook", "_old_forward", "forward"):        # the class has a `forward` of its own
                delattr(module, name)
            for name, value in held.items():
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    if base.config.tie_word_embeddings:
        base.lm_head.weight = base.model.embed_tokens.weight


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one decoder layer. A weight that the model type does not have is None."""

    attention_norm: Tensor      # (D,)
    q: Tensor                   # (H d, D)
    k: Tensor                   # (K d, D)
    v: Tensor                   # (K d, D)
    o: Tensor                   # (D, H d)
    mlp_norm: Tensor            # (D,)
    gate: Tensor                # (F, D)
    up: Tensor                  # (F, D)
    down: Tensor                # (D, F)
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    q_norm: Tensor | None       # (d,)
    k_norm: Tensor | None       # (d,)
    scaling: float              # factor of attention scores
    plain_mlp: bool             # True if the MLP has SiLU and no biases

    @property
    def nbytes(self) -> int:
        """Bytes of all these weights."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))


def layer_weights(base) -> list[LayerWeights]:
    """Return the weights of every decoder layer of a transformers *ForCausalLM, without a copy."""
    return [_layer(layer) for layer in base.model.layers]


def _layer(layer: nn.Module) -> LayerWeights:
    a, m = layer.self_attn, layer.mlp
    no_bias = all(linear.bias is None for linear in (m.gate_proj, m.up_proj, m.down_proj))
    return LayerWeights(
        layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.o_proj.weight,
        layer.post_attention_layernorm.weight, m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight,
        a.q_proj.bias, a.k_proj.bias, a.v_proj.bias, a.o_proj.bias, _norm(a, "q_norm"), _norm(a, "k_norm"),
        a.scaling, plain_mlp=no_bias and type(m.act_fn).__name__ in ("SiLU", "SiLUActivation"))


def _norm(module: nn.Module, name: str) -> Tensor | None:
    part = getattr(module, name, None)
    return None if part is None else part.weight


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder, from its config."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    positions: int
    norm_eps: float

    @classmethod
    def of(cls, config) -> "DecoderShape":
        """Make the shape that a transformers config describes."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.hidden_size, heads, config.num_key_value_heads, head_dim, config.intermediate_size,
                   config.max_position_embeddings, config.rms_norm_eps)


def rotary_angles(base, shape: DecoderShape) -> Sequence[Tensor]:
    """Compute cosines and sines of the rotary embedding at every position: two fp32 tensors (P, d / 2)."""
    angles = base.model.rotary_emb(torch.zeros((), dtype=torch.float32),
                                   position_ids=torch.arange(shape.positions)[None])
    return [t[0, :, :shape.head_dim // 2] for t in angles]
