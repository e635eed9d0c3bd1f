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
        asked = f"attention {tuning.text_of(query.shape, query.dtype)} tokens {key.shape[2]}"
        way = tuning.fastest(asked, {name: partial(ways[name], query, key, value) for name in names})
    return ways[way](query, key, value)


def by_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `attention`: two products in bfloat16, some rows of some heads at a time.

    The result lies in memory as `(B, N, H, D)`, so that joining the heads takes no copy.
    """
    batch, heads, length, size = query.shape
    tokens = key.shape[2]
    centred = key.to(torch.float32)
    centred = (centred - centred.mean(dim=2, keepdim=True)).mul_(size**-0.5)
    keys, values = centred.to(query.dtype).transpose(2, 3).contiguous(), value.contiguous()
    out = query.new_empty(batch, length, heads, size).transpose(1, 2)
    rows = min(length, max(1, _SCORES // tokens))
    together = max(1, _SCORES // (rows * tokens))
    for image in range(batch):
        for first in range(0, heads, together):
            part = image, slice(first, first + together)
            for start in range(0, length, rows):
                some = *part, slice(start, start + rows)
                scores = torch.bmm(query[some].contiguous(), keys[part])
                factor = kernels.softmax_numerators(scores)
                torch.div(torch.bmm(scores, values[part]), factor, out=out[some])
    return out
