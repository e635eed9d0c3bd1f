"""Compiles every kernel for a GPU that need not be there; prints what came of it as JSON.

The functions are called as an engine calls them, on CPU tensors and with a driver that only names a target; launches
end where they would reach the device. So the options are those of real launches.
"""

import json
import sys

import torch


class Driver:
    """Stands in for the CUDA driver as far as compiling goes."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def call_everything() -> None:
    from diffusers_msfp import FORMATS
    from diffusers_msfp.engines.triton import conv2d, input_codes, w4a16

    one, many = torch.ones(()), torch.ones(128)
    input_codes.quantize(torch.zeros(4096), one, one, FORMATS["fp4_ue2m2"], bad=torch.zeros(1, dtype=torch.int32))
    for dtype in (torch.int8, torch.bfloat16):
        conv2d.conv2d(
            torch.zeros(2, 128, 16, 16).to(dtype),
            torch.zeros(128, 3, 3, 128).to(dtype),
            many,
            weight_sum=many.to(torch.int32 if dtype == torch.int8 else torch.float32),
            weight_unit=many,
            unit=one,
            zero=one,
            padding=(1, 1),
            dtype=torch.bfloat16,
        )
    for dtype in (torch.bfloat16, torch.float32):
        packed = torch.zeros(128, 64, dtype=torch.uint8)
        w4a16.linear(torch.zeros(128, 128, dtype=dtype), packed, many, weight_unit=many, fmt=FORMATS["fp4_e2m1"])


def main(architecture: int) -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def compile_only(self, *args, warmup, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        name = f"{self.__name__[1:]}-{str(args[0].dtype).removeprefix('torch.')}"
        compiled[name] = {"ptx": kernel.asm["ptx"], "shared": kernel.metadata.shared}
        return kernel

    compiled, run = {}, JITFunction.run
    JITFunction.run = compile_only
    driver.set_active(Driver(architecture))
    call_everything()
    json.dump(compiled, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
