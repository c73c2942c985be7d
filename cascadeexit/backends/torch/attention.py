"""Grouped attention for transformers' layers: the query heads of a group share their keys without copies.

transformers finds attention functions by name in a table of its own, so ours has to be registered there. It is
registered when the first model is made, not on import, under a name that nothing else uses.

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
    """Make `grouped_attention` known to transformers; returns the name to put into a model's config."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None) -> Tensor:
    """Compute attention, with the query heads of a group as rows of one head that share its keys: (B, H, N, d).

    Keys are not repeated in memory: with 9 query heads on 3 key-value heads, each key-value head has 3 N query rows.

    Args:
        query: (B, H, N, d).
        key, value: (B, K, >= C, d) with K dividing H; slots from C on are not read.
        mask: numbers to add to the scores (B, 1, G N, C), one head of a group after another; from `additive_mask`.
        scaling: factor of the scores; None for 1 / sqrt(d).
    """
    (b, _, n, d), slots = query.shape, mask.shape[3]
    rows = query.reshape(b, key.shape[1], -1, d)                                            # (B, K, H / K * N, d)
    out = F.scaled_dot_product_attention(rows, key[:, :, :slots], value[:, :, :slots], attn_mask=mask, scale=scaling)
    # Not `view`: the memory-efficient kernel of CUDA, which a mask selects, returns a transposed layout.
    return out.reshape(b, -1, n, d)


def additive_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask (B, 1, N, C) for `attend`: True becomes 0, False becomes -inf.

    Returns (B, 1, G N, C): the mask is repeated for each of the `groups` (G) query heads of a key-value head.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf).repeat(1, 1, groups, 1)


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                      scaling: float | None = None, **kwargs) -> tuple[Tensor, None]:
    """Compute attention in a transformers layer: by `attend` if the mask comes from `additive_mask`.

    Any other mask means that the model was called as a whole. Then transformers' own SDPA attention computes it.
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is None or attention_mask.shape[2] != groups * query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2), None
