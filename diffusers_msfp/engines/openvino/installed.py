"""OpenVINO as it is here: whether there is one, how it is to compile, whether its 8-bit products are exact."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...compat.torch import has_bf16_instructions
from ...errors import SEE_DOCTOR, ConfigError
from ...formats import UINT8_MAX


def why_missing() -> str | None:
    """Why OpenVINO cannot be used here; None if it can."""
    if importlib.util.find_spec("openvino") is None:
        return "the package `openvino` is not installed"
    return None


def require() -> None:
    """Refuse to go on without OpenVINO.

    Raises:
        ConfigError: it is not installed.
    """
    if (reason := why_missing()) is not None:
        raise ConfigError(
            f"Engine 'openvino' needs OpenVINO, but {reason}. Install it (`pip install 'diffusers-msfp[openvino]'`), "
            f"or take engine 'auto'. {SEE_DOCTOR}"
        )


def precision_of(dtype: torch.dtype) -> str:
    """What is computed outside of 8-bit products."""
    return "bf16" if dtype == torch.bfloat16 and has_bf16_instructions() else "f32"


def settings(precision: str) -> dict[str, Any]:
    """Of compilation; as many threads as torch has."""
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else products of floats may be made with rounded ones
    }


_KINDS: dict[Callable[..., Tensor], tuple[tuple[int, ...], tuple[int, ...]]] = {
    F.conv2d: ((2, 64, 5, 5), (16, 64, 3, 3)),
    F.linear: ((2, 4, 64), (16, 64)),
}
"""Operation → shapes of its input and weight."""


class _Product(nn.Module):
    """A convolution or linear of bytes as `layers` records them, with one weight everywhere."""

    weight: Tensor

    def __init__(self, operation: Callable[..., Tensor], value: int) -> None:
        super().__init__()
        self.operation = operation
        self.register_buffer("weight", torch.full(_KINDS[operation][1], value, dtype=torch.int8, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """Of whole numbers from 0 to 255, float32."""
        x = torch.fake_quantize_per_tensor_affine(x, 1.0, 0, 0, UINT8_MAX)
        ones = torch.ones(16, *[1] * (self.weight.ndim - 1), dtype=torch.float32, device="cpu")
        weight = self.weight.to(torch.float32) * ones
        return self.operation(x, weight)


@lru_cache(maxsize=64)
def products_are_exact(largest_input: int, largest_weight: int) -> bool:
    """Whether OpenVINO's kernels add the largest products without saturation on this processor.

    Processors without VNNI add pairs of products in 16 bits. Where OpenVINO is missing nothing is wrong.
    """
    if why_missing() is not None:
        return True
    import openvino

    from ...compat.openvino import graph_of

    for operation, (shape, _) in _KINDS.items():
        x = torch.full(shape, float(largest_input), dtype=torch.float32, device="cpu")
        for value in (largest_weight, -largest_weight):
            module = _Product(operation, value).eval()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch would have another way taken, which OpenVINO does not read
                traced = torch.jit.trace(module, x, check_trace=False)
                graph = graph_of(traced, [x])
            found = openvino.Core().compile_model(graph, "CPU", settings("f32"))([x.numpy()])
            if not torch.equal(torch.from_numpy(found[0]), module(x)):
                return False
    return True
