"""One entry of a stack, by a number or by a tensor."""

from torch import Tensor


def select(stack: Tensor, index: int | Tensor) -> Tensor:
    """Entry of the first axis: a view where `index` is a number; no value is read where it is a tensor `()`."""
    return stack[index] if isinstance(index, int) else stack.index_select(0, index.reshape(1))[0]
