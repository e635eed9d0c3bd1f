"""LoRA files for models for which diffusers has no loader."""

from pathlib import Path

import torch
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

RANK, ALPHA = 2, 4.0


def write_lora(unet: ModelMixin, targets: list[str], file: Path, std: float = 0.3) -> Path:
    """A LoRA of random factors in diffusers' names; the model is left with it."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    inject_adapter_in_model(config, unet, adapter_name="saved")
    torch.manual_seed(5)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet, adapter_name="saved").items()}
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(ALPHA) for key in state if "lora_A" in key}
    save_file(state | alphas, file)
    return file


def ip_adapter(unet) -> dict:
    """The weights of an untrained one, for image embeddings of 8 numbers."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    context = unet.config.cross_attention_dim
    image = {"proj.weight": random(4 * context, 8), "proj.bias": random(4 * context)}
    image |= {"norm.weight": torch.ones(context), "norm.bias": torch.zeros(context)}
    layers = {}
    crossing = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    for number, module in enumerate(crossing):
        for which in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * number + 1}.{which}.weight"] = random(module.inner_dim, context)
    return {"image_proj": image, "ip_adapter": layers}
