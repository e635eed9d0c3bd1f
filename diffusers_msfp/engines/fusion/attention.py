"""Attention of bfloat16 models on a CPU: torch's kernel, or products in bfloat16, whichever is faster on the shape.

Where a processor has AMX, torch's flash kernel multiplies with it; elsewhere it does its products in float32, and those
in bfloat16 may be faster. Their scores are rounded to bfloat16, so keys are centred first: subtracting one vector from
all keys leaves the softmax as it is and makes the scores, and with them the rounding, smaller.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels, tuning

_SCORES = 2**21  # scores held at once: 4 MB, so that they stay in the cache
_FEW = 2**14  # scores of a head up to which torch's one call is the default


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(query @ key.T / sqrt(D)) @ value`, by what is measured to be the fastest.

    Args:
        query (`Tensor`, `(B, H, N, D)`, bfloat16).
        key, value (`Tensor`, `(B, H, M, D)`, bfloat16).

    Returns:
        `Tensor`, `(B, H, N, D)`, bfloat16.
    """
    ways = {"torch": F.scaled_dot_product_attention, "rows": by_rows}
    default = "torch" if query.shape[2] * key.shape[2] <= _FEW else "rows"
    names = (default, *(name for name in ways if name != default))
    way = default
    if tuning.allowed():
        asked = f"attention {tuning.text_of(query, query.dtype)} tokens {key.shape[2]}"
        way = tuning.fastest(asked, {name: partial(ways[name], query, key, value) for name in names})
    return ways[way](query, key, value)


def by_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `attention`: two products in bfloat16, some rows at a time."""
    batch, heads, length, size = query.shape
    tokens = key.shape[2]
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
