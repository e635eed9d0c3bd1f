"""Attention of bfloat16 models on a CPU: torch's flash kernel does its products in float32, these run in bfloat16.

Scores are rounded to bfloat16, so keys are centred first: subtracting one vector from all keys leaves the softmax as it
is and makes the scores, and with them the rounding, smaller.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels

_SCORES = 2**21  # scores held at once: 4 MB, so that they stay in the cache
_FEW = 2**14  # scores of a head up to which torch's one call is faster than several


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(query @ key.T / sqrt(D)) @ value`, some rows at a time.

    Args:
        query (`Tensor`, `(B, H, N, D)`, bfloat16).
        key, value (`Tensor`, `(B, H, M, D)`, bfloat16).

    Returns:
        `Tensor`, `(B, H, N, D)`, bfloat16.
    """
    batch, heads, length, size = query.shape
    tokens = key.shape[2]
    if length * tokens <= _FEW:
        return F.scaled_dot_product_attention(query, key, value)
    flat = (batch * heads, -1, size)
    q = (query * size**-0.5).reshape(flat)
    k = (key - key.mean(dim=2, keepdim=True)).reshape(flat).transpose(1, 2).contiguous()
    v = value.reshape(flat)
    out = query.new_empty(batch * heads, length, size)
    rows = min(length, max(1, _SCORES // tokens))
    together = max(1, _SCORES // (rows * tokens))
    for first in range(0, batch * heads, together):
        part = slice(first, first + together)
        for start in range(0, length, rows):
            some = slice(start, start + rows)
            scores = torch.bmm(q[part, some], k[part])
            factor = kernels.softmax_numerators(scores)
            torch.div(torch.bmm(scores, v[part]), factor, out=out[part, some])
    return out.view(batch, heads, length, size)
