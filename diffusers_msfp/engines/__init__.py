"""Engines: ways to run a quantized layer. All give the reference's result; they differ in speed and memory.

| engine | arithmetic | runs |
|---|---|---|
| `reference` | fake quantization in float32, differentiable; the definition of the result | everything |
| `openvino` | a graph of the whole model, 8-bit products (`engines.openvino`) | CPUs, where it is asked for |
| `cuda` | 8-bit integers or bfloat16, tensor cores | quantized inputs, and linears with 4-bit weights, on a GPU |
| `int8` | 8-bit integers, int32 sums, oneDNN | weights of 8 and inputs of up to 16 bits as integers, on a CPU |
| `bf16` | lattice integers as bfloat16, float32 sums | every layer, on any device |

Adding one: a class in a file of its own, one line in `ENGINES`.
"""

from ..registry import Registry
from .auto import AutoEngine
from .bf16 import BF16Engine
from .cuda import CudaEngine
from .engine import MEMORY_MODES, Engine
from .int8 import Int8Engine
from .reference import ReferenceEngine

ENGINES: Registry[type[Engine]] = Registry("engine")
"""Engines by name, the fastest first; `auto` takes the first of them that runs a layer exactly."""

for _engine in (CudaEngine, Int8Engine, BF16Engine, ReferenceEngine):
    ENGINES.add(_engine.name, _engine)

__all__ = ["ENGINES", "MEMORY_MODES", "AutoEngine", "Engine"]
