"""Entries of a stack, by a number or by a tensor."""

from torch import Tensor


def select(stack: Tensor, index: int | Tensor) -> Tensor:
    """Entry of the first axis, or one for each element of a tensor `(B,)`.

    A view where `index` is a number; no value is read where it is a tensor.
    """
    if isinstance(index, int):
        return stack[index]
    found = stack.index_select(0, index.reshape(-1))
    return found if index.ndim else found[0]
