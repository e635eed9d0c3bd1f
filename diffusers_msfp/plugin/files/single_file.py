"""What may be quantized while diffusers' `from_single_file` loads it."""

from collections.abc import Mapping

from torch import Tensor, nn

from ...compat.diffusers import in_single_file_pipeline
from ...errors import UnsupportedError


def require_float_file(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse what is not one model's float weights; diffusers says neither what a file holds nor for whom it reads it.

    Args:
        model (`ModelMixin`): without weights yet.
        state_dict (`Mapping[str, Tensor]`): those of the file, by the model's names.

    Raises:
        UnsupportedError: a whole pipeline is being loaded, whose VAE and text encoders would get the config too; or
            the weights are quantized.
    """
    kind = type(model).__name__
    if in_single_file_pipeline():
        raise UnsupportedError(
            "A single file can be quantized model by model while it is loaded, but diffusers gives a pipeline's config "
            "to all of its models, the VAE too. Load the denoiser alone "
            "(`UNet2DConditionModel.from_single_file(file, quantization_config=MSFPConfig())`) and pass it to the "
            "pipeline's `from_single_file(file, unet=unet)`; or load the pipeline, then `quantize_pipeline(pipe)`."
        )
    packed = [name for name, value in state_dict.items() if name.endswith("weight") and not value.is_floating_point()]
    if packed:
        raise UnsupportedError(
            f"`from_single_file` reads float weights, but `{packed[0]}` of this {kind} is "
            f"{state_dict[packed[0]].dtype}: quantized already. Load the folder that it lies in with `from_pretrained`."
        )
