"""Triton's interpreter, where there is no GPU."""

import pytest
import torch


@pytest.fixture
def bfloat16_dots(monkeypatch):
    """The interpreter keeps bfloat16 as its bits, and `tl.dot` would multiply those."""
    if torch.cuda.is_available():
        return
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widen(handle):
        return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def dot(self, a, b, *arguments):
        a, b = (widen(handle) if handle.dtype.scalar == tl.bfloat16 else handle for handle in (a, b))
        return create_dot(self, a, b, *arguments)

    create_dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
