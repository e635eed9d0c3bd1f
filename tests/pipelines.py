"""Tiny pipelines of every kind, made from code: few channels, 8 × 8 latents, untrained."""

from pathlib import Path

import numpy as np
import torch
from conftest import ONE_BLOCK, make_condition_unet, make_unet, make_vae
from diffusers import (
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMWuerstchenScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    KandinskyV22CombinedPipeline,
    LDMPipeline,
    PNDMScheduler,
    PriorTransformer,
    SD3Transformer2DModel,
    StableCascadeCombinedPipeline,
    StableCascadeUNet,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet1DModel,
    UNet2DModel,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel
from PIL import ExifTags, Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TOKENS = [*_LETTERS, *(f"{c}</w>" for c in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2}


def picture(channels: int = 3) -> torch.Tensor:
    return torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(2))


def turned(upright: Image.Image, folder: Path) -> Path:
    """A file in `folder` as of a camera that was held on its side: it says so in EXIF data."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    return folder / "turned.png"


def make_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(_TOKENS)}, merges=[], model_max_length=77)


def make_clip(cls: type = CLIPTextModel) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(_TOKENS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=len(_TOKENS) - 2,
        eos_token_id=len(_TOKENS) - 1,
    )
    return cls(config).eval()


def make_t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(_TOKENS), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def make_scheduler() -> PNDMScheduler:
    return PNDMScheduler(skip_prk_steps=True, steps_offset=1)


def make_pipe(unet: dict | None = None) -> StableDiffusionPipeline:
    """Stable Diffusion; `unet` changes its denoiser."""
    return StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(),
        unet=make_condition_unet(**unet or {}),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_small_pipe() -> StableDiffusionPipeline:
    return make_pipe(SMALL)


def make_sdxl() -> StableDiffusionXLPipeline:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "cross_attention_dim": 32,
        "use_linear_projection": True,
    }
    return StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_clip(),
        text_encoder_2=make_clip(CLIPTextModelWithProjection),
        tokenizer=make_tokenizer(),
        tokenizer_2=make_tokenizer(),
        unet=make_condition_unet(**SMALL | added),
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )


def make_img2img() -> StableDiffusionImg2ImgPipeline:
    return StableDiffusionImg2ImgPipeline(**make_small_pipe().components, requires_safety_checker=False)


def make_inpainting() -> StableDiffusionInpaintPipeline:
    components = make_pipe(SMALL | {"in_channels": 9}).components
    return StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)


def make_controlnet() -> StableDiffusionControlNetPipeline:
    components = make_small_pipe().components
    torch.manual_seed(1)
    config = dict(components["unet"].config) | {"conditioning_embedding_out_channels": (8,)}
    controlnet = ControlNetModel.from_config(config).eval()
    for parameter in controlnet.parameters():  # its zero convolutions would say nothing
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return StableDiffusionControlNetPipeline(**components, controlnet=controlnet, requires_safety_checker=False)


def make_latent_diffusion() -> LDMPipeline:
    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=3, vq_embed_dim=3, num_vq_embeddings=16
    ).eval()
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()
    return LDMPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler())


def make_sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=make_vae(shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=make_clip(CLIPTextModelWithProjection),
        text_encoder_2=make_clip(CLIPTextModelWithProjection),
        text_encoder_3=make_t5(),
        **{name: make_tokenizer() for name in ("tokenizer", "tokenizer_2", "tokenizer_3")},
    )


def make_flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return FluxPipeline(
        transformer=transformer,
        vae=make_vae(shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=make_clip(),
        text_encoder_2=make_t5(),
        **{name: make_tokenizer() for name in ("tokenizer", "tokenizer_2")},
    )


def make_kontext() -> FluxKontextPipeline:
    """Reads a picture to be edited beside its sample, and throws away what it puts out in its place."""
    return FluxKontextPipeline(**{name: part for name, part in make_flux().components.items() if part is not None})


def kontext_call() -> dict:
    """Arguments for `make_kontext`: a picture of 16 tokens beside a sample of 64."""
    return {"image": picture(), "height": 16, "width": 16, "max_area": 256, "_auto_resize": False}


def make_cascade() -> StableCascadeCombinedPipeline:
    """Two denoisers, `prior_prior` and `decoder`, which take a `timestep_ratio`."""
    torch.manual_seed(0)
    layers = {"down_num_layers_per_block": (1,), "up_num_layers_per_block": (1,)}
    layers |= {"down_blocks_repeat_mappers": (1,), "up_blocks_repeat_mappers": (1,), "dropout": (0.0,)}
    layers |= {"block_out_channels": (16,), "num_attention_heads": (2,), "conditioning_dim": 16}
    layers |= {"clip_text_pooled_in_channels": 16, "timestep_ratio_embedding_dim": 16, "switch_level": None}
    layers |= {"block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),)}
    text = {"clip_text_in_channels": 16, "clip_image_in_channels": 16}
    prior = StableCascadeUNet(in_channels=16, out_channels=16, **layers, **text)
    decoder = StableCascadeUNet(in_channels=4, out_channels=4, effnet_in_channels=16, **layers)
    for model in (prior, decoder):  # its zero layers would say nothing
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return StableCascadeCombinedPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=make_clip(CLIPTextModelWithProjection),
        decoder=decoder.eval(),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8).eval(),
        prior_prior=prior.eval(),
        prior_text_encoder=make_clip(CLIPTextModelWithProjection),
        prior_tokenizer=make_tokenizer(),
        prior_scheduler=DDPMWuerstchenScheduler(),
    )


SMALL_CASCADE = {"height": 128, "width": 128}
"""For `make_cascade`: latents of a few pixels."""


def make_kandinsky() -> KandinskyV22CombinedPipeline:
    """Two denoisers: a `prior_prior`, which returns `predicted_image_embedding`, and a `unet`."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1)
    prior.clip_std = torch.nn.Parameter(torch.ones(prior.clip_std.shape))
    unet = make_condition_unet(
        **SMALL,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    return KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=DDIMScheduler(),
        movq=movq.eval(),
        prior_prior=prior.eval(),
        prior_image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        prior_text_encoder=make_clip(CLIPTextModelWithProjection),
        prior_tokenizer=make_tokenizer(),
        prior_scheduler=UnCLIPScheduler(num_train_timesteps=1000, prediction_type="sample"),
        prior_image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )


SMALL_KANDINSKY = {"height": 64, "width": 64}
"""For `make_kandinsky`."""


def make_wan() -> WanPipeline:
    """Two denoisers, `transformer` for the noisy half of the steps and `transformer_2` for the other."""

    def transformer(seed: int) -> WanTransformer3DModel:
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ).eval()

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    return WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=make_t5(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(1),
        transformer_2=transformer(2),
        boundary_ratio=0.8,
    )


def small_wan() -> dict:
    """Arguments for `make_wan`, of one short video."""
    embeddings = torch.randn(2, 1, 8, 32, generator=torch.Generator().manual_seed(3))
    prompts = {"prompt": None, "prompt_embeds": embeddings[0], "negative_prompt_embeds": embeddings[1]}
    return prompts | {"height": 16, "width": 16, "num_frames": 1}


def make_small_wan() -> WanPipeline:
    """With one denoiser."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    return WanPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=make_t5(),
        tokenizer=make_tokenizer(),
    )


def photographs(number: int = 3, size: tuple[int, int] = (30, 20), channels: int = 3) -> list[Image.Image]:
    """Of random colours, each of one."""
    drawn = np.random.default_rng(0).integers(0, 255, (number, 1, 1, channels), dtype=np.uint8)
    return [Image.fromarray(np.broadcast_to(each, (*size, channels)).copy()) for each in drawn]


def make_unet_1d() -> UNet1DModel:
    """Of sound, as DanceDiffusionPipeline takes it."""
    config = {"sample_size": 64, "sample_rate": 64, "extra_in_channels": 64, "use_timestep_embedding": False}
    config |= {"block_out_channels": (32, 32, 64), "time_embedding_type": "fourier", "flip_sin_to_cos": True}
    down = ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D")
    blocks = {"down_block_types": down, "up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip")}
    return UNet1DModel(**config, **blocks)


ATTENDING = ONE_BLOCK | {"down_block_types": ("AttnDownBlock2D",)}
"""Of `make_unet`: one block, with attention."""


def make_teacher() -> DDPMPipeline:
    """Small and quick to train after."""
    pipe = DDPMPipeline(make_unet(**ATTENDING), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
