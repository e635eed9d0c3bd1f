"""A UNet after NNCF's post-training quantization to 8 bits, run by OpenVINO in the original's place."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from steps import PlainModel
from torch import Tensor

from diffusers_msfp.plugin.calibrate import DEFAULT_SAMPLES
from diffusers_msfp.sampling.calls import call_arguments
from diffusers_msfp.sampling.trajectory import rollout

BATCH, STEPS = 16, 20  # of the trajectories on which ranges are set, as many as ours by default


class NNCFUNet(UNet2DModel):
    """Called as the original; everything that NNCF can quantize is."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True, **_: object) -> UNet2DOutput | tuple:
        """See `UNet2DModel.forward`."""
        output = torch.from_numpy(self.compiled(feeds(sample, timestep))[0].copy())
        return UNet2DOutput(output) if return_dict else (output,)

    def get_memory_footprint(self) -> int:
        """Bytes of the weights' file."""
        return self.bytes


def feeds(sample: Tensor, timestep: Tensor) -> list[np.ndarray]:
    """What the graph takes: samples and a timestep for each."""
    return [sample.float().numpy(), torch.as_tensor(timestep).reshape(-1).expand(len(sample)).long().numpy()]


def quantized(pipe: DiffusionPipeline, keep: tuple[str, ...] = ()) -> NNCFUNet:
    """The UNet of a float pipeline in 8 bits, with ranges from the pipeline's own trajectories.

    NNCF's preset for models with SiLU: inputs of products have zero points, weights do not.

    Args:
        pipe (`DiffusionPipeline`): float, unconditional.
        keep (`tuple[str, ...]`): parts of names of operations that stay float.
    """
    import nncf
    import openvino

    unet, arguments = pipe.unet.float().eval(), call_arguments(pipe, None, STEPS, {})
    batches = (rollout(pipe, arguments, first, BATCH, seed=0) for first in range(0, DEFAULT_SAMPLES, BATCH))
    data = [feeds(*step.args[:2]) for steps in batches for step in steps]
    example = tuple(torch.from_numpy(each) for each in data[0])
    shapes = [(-1, *each.shape[1:]) for each in example]
    with torch.no_grad():
        graph = openvino.convert_model(PlainModel(unet), example_input=example, input=shapes)
    settings = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(data)}
    if keep:
        settings["ignored_scope"] = nncf.IgnoredScope(patterns=[f".*{part}.*" for part in keep])
    graph = nncf.quantize(graph, nncf.Dataset(data), **settings)
    made = NNCFUNet.from_config(unet.config).eval()
    made.load_state_dict(unet.state_dict())
    made.compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(graph, Path(folder) / "unet.xml")
        made.bytes = (Path(folder) / "unet.bin").stat().st_size
        digest = hashlib.sha256(
            b"".join((Path(folder) / f"unet.{end}").read_bytes() for end in ("xml", "bin"))
        ).digest()
        made.register_buffer("graph_digest", torch.tensor(list(digest), dtype=torch.uint8))  # pictures are kept by it
    return made
