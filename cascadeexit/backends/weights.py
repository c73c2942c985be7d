"""Weights: find the weights of a transformers decoder of a supported type.

Only this module and the `torch` backend depend on the names that transformers gives to these weights. The `torch`
backend needs them because it runs transformers' own modules. The decoder layers of the types in `PLAIN` have the same
parts: RMSNorm, grouped-query attention with rotary embedding, RMSNorm, and a SwiGLU MLP. In Qwen2, queries, keys and
values also have biases. In Qwen3, queries and keys also have norms. Other supported types run on the `torch` backend
only: Phi-3 has fused projections, OLMo 2 has its norms after attention and MLP, and SmolLM3 has layers without rotary
embedding.

Letters: D hidden size, H query heads, K key-value heads, d head size, F inner size of the MLP, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PLAIN = ("llama", "mistral", "qwen2", "qwen3")      # model types whose layers `layer_weights` can read


@dataclass(frozen=True)
class OuterWeights:
    """Weights of a model outside its decoder layers. V is the number of tokens in the vocabulary, D the hidden size."""

    embedding: Tensor           # (V, D)
    final_norm: Tensor          # (D,)
    head: Tensor                # (V, D)
    head_bias: Tensor | None    # (V,)

    @property
    def tied(self) -> bool:
        """True if the embedding and the head are the same tensor."""
        return self.head is self.embedding

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype


def outer_weights(base) -> OuterWeights:
    """Return the embedding, the final norm and the head of a transformers *ForCausalLM, without copying them."""
    return OuterWeights(base.model.embed_tokens.weight, base.model.norm.weight, base.lm_head.weight, base.lm_head.bias)


def is_spread(base) -> bool:
    """Return True if accelerate has put a transformers model partly on disk, or on several devices.

    Main memory counts as a device.
    """
    places = {str(place) for place in getattr(base, "hf_device_map", {}).values()}
    return len(places) > 1 or "disk" in places


def layer_devices(base) -> list[torch.device]:
    """Return the device on which each decoder layer runs.

    If accelerate has offloaded a layer's weights to main memory or disk, this is the device to which accelerate loads
    them for each call.
    """
    return [_execution_device(layer) for layer in base.model.layers]


def _execution_device(layer: nn.Module) -> torch.device:
    """Return the device on which a layer runs.

    This is the execution device of the layer's accelerate hook, if the layer has such a hook. Otherwise it is the
    device of the layer's weights.
    """
    hook = getattr(layer, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "execution_device", None) is not None:
            return torch.device(part.execution_device)
    return next(layer.parameters()).device


def bring_outer_weights(base) -> None:
    """Load the embedding, the final norm and the head if accelerate has offloaded them to main memory or disk.

    This changes `base` in place: these weights stay loaded, and accelerate's hooks on them are removed. Every pass
    needs them, and they are small compared with the layers.
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
    """Weights of one decoder layer. A weight is None if the model type does not have it.

    Letters: D hidden size, H query heads, K key-value heads, d head size, F inner size of the MLP.
    """

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
        """Size of all weights of this layer, in bytes."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))


def layer_weights(base) -> list[LayerWeights]:
    """Return the weights of each decoder layer of a transformers *ForCausalLM, without copying them.

    The type of the model must be in `PLAIN`.
    """
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
    """Sizes of a decoder. `inner` is the inner size of the MLP, and `positions` the largest number of positions."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    positions: int
    norm_eps: float

    @classmethod
    def of(cls, config) -> "DecoderShape":
        """Read the sizes from a transformers config."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.hidden_size, heads, config.num_key_value_heads, head_dim, config.intermediate_size,
                   config.max_position_embeddings, config.rms_norm_eps)


def rotary_angles(base, shape: DecoderShape) -> Sequence[Tensor]:
    """Compute the cosines and the sines of the rotary embedding at every position.

    Returns two fp32 tensors (P, d / 2): cosines, sines.
    """
    angles = base.model.rotary_emb(torch.zeros((), dtype=torch.float32),
                                   position_ids=torch.arange(shape.positions)[None])
    return [t[0, :, :shape.head_dim // 2] for t in angles]
