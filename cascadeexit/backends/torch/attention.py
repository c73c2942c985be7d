"""Grouped-query attention for transformers' layers, without copies of keys and values for each query head.

transformers finds an attention function by its name in a table. `register` adds ours to the table under a name that
nothing else uses. `register` is called when the first model is made, not on import.

Letters: B texts, H query heads, K key-value heads, G = H / K, N rows in a pass, C positions, d head size.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "cascadeexit_grouped"


@functools.cache
def register() -> str:
    """Add `grouped_attention` to transformers' table of attention functions.

    Returns the name of the function in this table. A model's config selects the function by this name.
    """
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None) -> Tensor:
    """Compute grouped-query attention. Returns (B, H, N, d).

    The G query heads of a key-value head are computed as one head with G N rows. So keys and values are not copied for
    each query head. With 9 query heads and 3 key-value heads, each key-value head has 3 N rows.

    Args:
        query: (B, H, N, d).
        key, value: (B, K, >= C, d). K divides H. Slots from C on are not read.
        mask: numbers that are added to the scores, from `additive_mask`: (B, 1, G N, C).
        scaling: factor of the scores; None for 1 / sqrt(d).
    """
    (b, _, n, d), slots = query.shape, mask.shape[3]
    rows = query.reshape(b, key.shape[1], -1, d)                                            # (B, K, H / K * N, d)
    out = F.scaled_dot_product_attention(rows, key[:, :, :slots], value[:, :, :slots], attn_mask=mask, scale=scaling)
    # Not `view`: the memory-efficient kernel of CUDA, which a mask selects, returns a transposed layout.
    return out.reshape(b, -1, n, d)


def additive_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Convert a boolean attention mask (B, 1, N, C) to a mask for `attend`: True becomes 0, False becomes -inf.

    groups: number G of query heads for each key-value head.

    Returns (B, 1, G N, C): the N rows of the mask, repeated G times.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf).repeat(1, 1, groups, 1)


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                      scaling: float | None = None, **kwargs) -> tuple[Tensor, None]:
    """Compute attention in a transformers layer. Returns (B, N, H, d), and None for the attention weights.

    If the mask is from `additive_mask`, `attend` computes the attention. Another mask, or None, means that the
    transformers model was called as a whole. Then transformers' own SDPA attention is used.
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is None or attention_mask.shape[2] != groups * query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2), None
