"""Calibration from the user's own pictures and prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE_BLOCK, make_dit_pipe, make_unet, make_vae
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    MarigoldDepthPipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from pipelines import (
    SMALL,
    make_controlnet,
    make_flux,
    make_inpainting,
    make_pipe,
    make_sd3,
    make_small_pipe,
    make_wan,
    photographs,
    picture,
    turned,
)
from torch import nn

import diffusers_msfp
from diffusers_msfp import MSFPConfig, calibrate, calibration_state, cli, freeze, quantize_pipeline, set_engine
from diffusers_msfp.calibration.pictures import opened
from diffusers_msfp.errors import ConfigError, NonFiniteError, UnsupportedError
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.sampling.calls import DEFAULT_PROMPTS, Call, call_arguments
from diffusers_msfp.sampling.denoisers import denoiser_of
from diffusers_msfp.sampling.pictures import NoisedPictures
from diffusers_msfp.sampling.trajectory import Trajectories

RUN = {"num_samples": 3, "num_inference_steps": 2}


def ranges(model: nn.Module) -> list[torch.Tensor]:
    return [layer.input_scale.clone() for _, layer in quant_layers(model) if layer.input_format is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def quietly(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(pipe, **arguments) -> list[tuple]:
    """What the denoiser is called with while it is calibrated: sample, timestep."""
    quantize_pipeline(pipe, "w4a8", **RUN, **arguments)
    seen = []

    def look(_module, args, kwargs) -> None:
        names = ("hidden_states", "sample")
        sample = next((kwargs[name] for name in names if name in kwargs), args[0] if args else None)
        seen.append((sample.clone(), kwargs.get("timestep", args[1] if len(args) > 1 else None)))

    handle = denoiser_of(pipe).register_forward_pre_hook(look, with_kwargs=True)
    try:
        calibrate(pipe, **RUN, **arguments)
    finally:
        handle.remove()
    return seen[1:]  # the first is the check's


@pytest.mark.situation(
    "calibrating from pictures: a folder, a list, a generator, arrays, tensors; equal ranges", "right"
)
def test_kinds_of_pictures(tmp_path):
    pipe = quantize_pipeline(quietly(DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler())), "w4a4", **RUN)
    own = ranges(pipe.unet)
    pictures = [each.convert("L" if pipe.unet.config.in_channels == 1 else "RGB") for each in photographs()]
    for number, each in enumerate(pictures):
        (tmp_path / "deep").mkdir(exist_ok=True)
        each.save(tmp_path / "deep" / f"{number}.png")
    arrays = [np.asarray(each) for each in pictures]
    found = []
    for images in (
        tmp_path,
        pictures,
        (each for each in pictures),
        arrays,
        [each.astype(np.float32) / 255 for each in arrays],
        [torch.from_numpy(each.reshape(30, 20, -1).copy()).movedim(-1, 0) for each in arrays],
    ):
        calibrate(pipe, **RUN, images=images)
        found.append(ranges(pipe.unet))
    assert all(same(found[0], each) for each in found)
    assert not same(found[0], own)
    calibrate(pipe, **RUN, images=pictures, seed=1)
    assert not same(found[0], ranges(pipe.unet))


@pytest.mark.situation("calibrating from 16-bit grey pictures: as bright as in 8 bits", "right")
@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_wide_greys(kind, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (30, 20), dtype=np.uint8)
    wide = Image.fromarray(grey.astype(kind) * np.array(257, kind))
    assert wide.mode.startswith("I;16")
    wide.save(tmp_path / "wide.png")
    assert np.array_equal(np.asarray(opened(wide)), grey)
    pipe = quietly(DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler()))
    quantize_pipeline(pipe, "w4a4", images=[Image.fromarray(grey)], **RUN)
    found = ranges(pipe.unet)
    for images in (tmp_path, [wide]):
        calibrate(pipe, **RUN, images=images)
        assert same(ranges(pipe.unet), found)


@pytest.mark.situation("pictures of 32-bit integers or floats, whose white is not known", "refused")
@pytest.mark.parametrize("mode", ["I", "F"])
def test_greys_of_unknown_white(mode, tmp_path):
    image = Image.fromarray(np.full((30, 20), 1000, np.int32)).convert(mode)
    image.save(tmp_path / "wide.tiff")
    for each in (image, tmp_path / "wide.tiff"):
        with pytest.raises(
            ConfigError, match=f"must be 8-bit, or 16-bit grey, but got Pillow's mode '{mode}'.*Scale it"
        ):
            opened(each)


@pytest.mark.situation("calibrating from photographs that say how the camera was held: read upright", "right")
def test_turned_photographs(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    file, pipe = turned(upright, tmp_path), quietly(DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler()))
    quantize_pipeline(pipe, "w4a4", images=[upright], **RUN)
    found = ranges(pipe.unet)
    with Image.open(file) as stored:
        for images in (tmp_path, [file], [stored]):
            calibrate(pipe, **RUN, images=images)
            assert same(ranges(pipe.unet), found)


@pytest.mark.situation("pictures of any size for a latent pipeline: cropped, encoded with its factor, noised", "right")
@pytest.mark.parametrize("euler", [False, True])
def test_latents_are_those_of_training(euler):
    pipe = quietly(make_small_pipe())
    if euler:  # whose samples are scaled otherwise, but not what the denoiser reads
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    (one,) = photographs(1)
    seen = inputs_of(pipe, images=[one], prompts=["a hat"], guidance_scale=4.0)
    size = 8 * pipe.vae_scale_factor
    pixels = torch.from_numpy(np.array(one.resize((size, size)))).float().permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
    alphas, times = DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod, set()
    for sample, timestep in seen:
        uncond, cond = sample.chunk(2)
        assert torch.equal(uncond, cond)  # guidance sees one picture twice
        share = alphas[int(timestep)]
        noise = (cond - share.sqrt() * latents) / (1 - share).sqrt()
        assert abs(float(noise.mean())) < 0.3
        assert 0.7 < float(noise.std()) < 1.3
        times.add(int(timestep))
    assert len(times) == len(seen)
    assert not times & set(map(int, pipe.scheduler.timesteps))


@pytest.mark.situation("pictures for flow matching: mixed with noise, with the timestep as the model takes it", "right")
def test_flow_matching():
    pipe = quietly(make_sd3())
    (one,) = photographs(1)
    for sample, timestep in inputs_of(pipe, images=[one], prompts=["a hat"]):
        assert 0 < float(timestep.max()) <= 1000
        assert sample.isfinite().all()
        assert torch.equal(*sample.chunk(2))


@pytest.mark.situation("pictures and seeds where torch's default device is another one", "right")
def test_default_devices():
    pipe, sample = quietly(make_small_pipe()), torch.zeros(1, 4, 8, 8)
    pictures = NoisedPictures(pipe, photographs(1), None, 1, 0)
    labelled = make_dit_pipe()
    trajectories = Trajectories(pipe, call_arguments(pipe, ["a hat"], 2, {}), 1, seed=0)
    with torch.device("meta"):
        pictures.show(Call({}, 0))
        (noised, _), _ = pictures.exchange(pipe.unet, (sample, torch.tensor(501, device="cpu")), {})
        call = call_arguments(labelled, None, 2, {})(0, 2, torch.Generator().manual_seed(0))
        step = trajectories[1]
    assert noised.device == step.output.device == sample.device
    assert noised.any()
    assert len(call.arguments["class_labels"]) == 2


@pytest.mark.situation("a model is quantized and run where torch's default device is another one", "right")
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8"])
def test_engines_on_another_default_device(scheme):
    x, found = torch.randn(1, 3, 8, 8), []
    for device in ("cpu", "meta"):
        unet = make_unet(**ONE_BLOCK)
        quantize_model(unet, MSFPConfig(scheme))
        with torch.no_grad(), torch.device(device):
            unet(x, 500)
            freeze(unet)
            for engine in ("reference", "auto", "bf16"):
                set_engine(unet, engine)
                found.append(unet(x, 500).sample)
    for one, other in zip(found[:3], found[3:], strict=True):
        assert torch.equal(one, other)


class Told(DDPMPipeline):
    """Tells its denoiser the timestep in a way of its own."""

    tell = None

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="np", return_dict=True):  # noqa: ARG002
        config = self.unet.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        sample = randn_tensor(shape, generator=generator)
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        own = {"sigmas": sigmas} if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) else {}
        self.scheduler.set_timesteps(num_inference_steps, **own)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            told = type(self).tell(torch.as_tensor(timestep).float()).expand(batch_size)
            output = self.unet(sample, told).sample
            sample = self.scheduler.step(output, timestep, sample).prev_sample
        return ImagePipelineOutput(sample.clamp(0, 1).movedim(1, -1).numpy())


WHITE = [Image.new("L", (30, 20), 255)]
UNIPC = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOWS = {
    "SD3": (FlowMatchEulerDiscreteScheduler(), lambda t: t, lambda told: told / 1000),
    "Flux": (FlowMatchEulerDiscreteScheduler(shift=3.0), lambda t: t / 1000, lambda told: told),
    "Lumina": (FlowMatchEulerDiscreteScheduler(), lambda t: 1 - t / 1000, lambda told: 1 - told),
    "OmniGen": (
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        lambda t: t,
        lambda told: 1 - told,
    ),
    "Sana": (DPMSolverMultistepScheduler(**UNIPC), lambda t: t, lambda told: told / 1000),
    "UniPC": (UniPCMultistepScheduler(**UNIPC), lambda t: t, lambda told: told / 1000),
}


@pytest.mark.situation("pictures for flows: as much noise as the model is told, however it is told", "right")
@pytest.mark.parametrize("case", FLOWS)
def test_flows_are_told_their_noise(case, monkeypatch):
    scheduler, tell, share = FLOWS[case]
    monkeypatch.setattr(Told, "tell", staticmethod(tell))
    pipe = quietly(Told(make_unet(**ONE_BLOCK), scheduler))
    seen = inputs_of(pipe, images=WHITE)
    assert len(seen) > 1
    for sample, told in seen:
        noise = share(float(told.max()))
        assert abs(float(sample.std()) - noise) < 0.15 * noise + 0.01  # white is 1, so all that varies is noise
        assert abs(float(sample.mean()) - (1 - noise)) < 0.15


@pytest.mark.situation("pictures where the model is told its timestep in a way that is not known", "refused")
@pytest.mark.parametrize(
    ("tell", "scheduler"),
    [
        (lambda t: 300 + t / 7, FlowMatchEulerDiscreteScheduler()),
        (lambda _: torch.tensor(0.67), EulerDiscreteScheduler(timestep_spacing="linspace")),  # a logarithm of the noise
    ],
)
def test_told_in_another_way(tell, scheduler, monkeypatch):
    monkeypatch.setattr(Told, "tell", staticmethod(tell))
    pipe = quietly(Told(make_unet(**ONE_BLOCK), scheduler))
    with pytest.raises(UnsupportedError, match="Told tells it .* at the timestep"):
        quantize_pipeline(pipe, "w4a4", **RUN, images=WHITE)
    assert not list(quant_layers(pipe.unet))


@pytest.mark.situation("`quantize --images` of a pipeline whose denoiser comes before its autoencoder", "right")
def test_command_line_where_the_denoiser_has_no_weights_yet(tmp_path):
    quietly(make_dit_pipe(norm_num_groups=4)).save_pretrained(tmp_path / "float")
    (tmp_path / "pictures").mkdir()
    for number, each in enumerate(photographs()):
        each.save(tmp_path / "pictures" / f"{number}.png")
    made = cli.quantize(str(tmp_path / "float"), tmp_path / "out", scheme="w4a8", images=tmp_path / "pictures", **RUN)
    assert made.calibration_state == "frozen"


@pytest.mark.situation("pictures for inpainting: the mask and what is behind it stay the pipeline's", "right")
def test_other_channels_stay():
    pipe = quietly(make_inpainting())
    given = {"image": picture(), "mask_image": torch.ones(1, 1, 8, 8), "prompts": ["a hat"]}
    seen = inputs_of(pipe, images=photographs(), **given)
    assert all(torch.equal(sample[:, 4:5], torch.ones_like(sample[:, 4:5])) for sample, _ in seen)


@pytest.mark.situation("pictures for a model of classes, with guidance and learned variances", "right")
def test_classes():
    pipe = quietly(make_dit_pipe(norm_num_groups=4))
    assert quantize_pipeline(pipe, "w4a4", **RUN, images=photographs()) is pipe
    assert calibration_state(pipe) == "frozen"


def make_marigold() -> MarigoldDepthPipeline:
    """Joins the picture that it is given before its sample."""
    parts = make_pipe(SMALL | {"in_channels": 8}).components
    parts = {name: parts[name] for name in ("unet", "vae", "text_encoder", "tokenizer")}
    return MarigoldDepthPipeline(**parts, scheduler=DDIMScheduler(), prediction_type="depth")


MARIGOLD = {"image": picture(), "processing_resolution": 0}


@pytest.mark.situation("a pipeline that knows no latent output (Marigold) is calibrated", "right")
def test_pipelines_without_latent_outputs():
    pipe = quantize_pipeline(quietly(make_marigold()), "w4a8", **RUN, **MARIGOLD)
    assert calibration_state(pipe) == "frozen"


def no_pictures(tmp_path):
    return make_small_pipe(), {"images": tmp_path}


def captions(_):
    return make_small_pipe(), {"images": photographs(3), "prompts": ["a", "b"]}


REFUSED = {
    "an empty folder": (no_pictures, ConfigError, "there are none"),
    "no folder": (lambda _: (make_small_pipe(), {"images": "nowhere"}), ConfigError, "nowhere: it is no folder"),
    "an empty list": (lambda _: (make_small_pipe(), {"images": []}), ConfigError, "must hold a picture at least"),
    "no number of samples": (
        lambda _: (make_small_pipe(), {"images": photographs(), "num_samples": -1}),
        ConfigError,
        "`num_samples` must be at least 1, but got -1",
    ),
    "text": (lambda _: (make_small_pipe(), {"images": [3]}), ConfigError, "but got int"),
    "values beyond": (
        lambda _: (make_small_pipe(), {"images": [np.full((8, 8, 3), 2.0)]}),
        ConfigError,
        r"or float in \[0, 1\]",
    ),
    "captions of another number": (captions, ConfigError, "a caption for each picture or one for all, but got 2 for 3"),
    "packed latents": (lambda _: (make_flux(), {"images": photographs()}), ConfigError, "FluxPipeline calls its"),
    "ControlNet": (
        lambda _: (make_controlnet(), {"images": photographs(), "image": picture()}),
        ConfigError,
        "has several networks",
    ),
    "a sample that is not the first": (
        lambda _: (make_marigold(), {"images": photographs(1), "num_samples": 1, **MARIGOLD}),
        UnsupportedError,
        "but MarigoldDepthPipeline has it elsewhere",
    ),
    "two denoisers": (lambda _: (make_wan(), {"images": photographs()}), ConfigError, "has several networks"),
}


@pytest.mark.situation("pictures that cannot be read or shown to this pipeline; nothing is changed", "refused")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case, tmp_path):
    make, error, message = REFUSED[case]
    pipe, given = make(tmp_path)
    before = {name: id(module) for name, module in denoiser_of(pipe).named_modules()} if case != "two denoisers" else {}
    with pytest.raises(error, match=message):
        quantize_pipeline(quietly(pipe), "w4a4", **RUN | given)
    if before:
        assert before == {name: id(module) for name, module in denoiser_of(pipe).named_modules()}


@pytest.mark.situation("pictures whose encoder puts out NaN", "refused")
def test_encoder_without_numbers():
    pipe = quietly(make_small_pipe())
    pipe.vae = make_vae()
    with torch.no_grad():
        pipe.vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="Encoded pictures must be finite, but AutoencoderKL makes NaN"):
        quantize_pipeline(pipe, "w4a4", **RUN, images=photographs())


@pytest.mark.situation("pictures for a scheduler with noise of its own kind", "refused")
def test_other_noise():
    pipe = quietly(ConsistencyModelPipeline(make_unet(), CMStochasticIterativeScheduler()))
    with pytest.raises(UnsupportedError, match="CMStochasticIterativeScheduler has another way"):
        quantize_pipeline(pipe, "w4a4", **RUN, images=photographs())
    told = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(UnsupportedError, match="EulerDiscreteScheduler has another way"):
        quantize_pipeline(quietly(DDPMPipeline(make_unet(), told)), "w4a4", **RUN, images=photographs())


@pytest.mark.situation("pictures where the autoencoder is to be calibrated too", "refused")
def test_other_components():
    config = MSFPConfig("w4a4", components_to_quantize=["unet", "vae"])
    with pytest.raises(ConfigError, match="its AutoencoderKL is to be calibrated too"):
        quantize_pipeline(quietly(make_small_pipe()), config, **RUN, images=photographs())


@pytest.mark.situation(
    "`quantize --images FOLDER --prompts FILE`: as `quantize_pipeline(images=…, prompts=…)`", "right"
)
def test_command_line(tmp_path):
    pipe, captions = quietly(make_small_pipe()), ["a hat", "a shoe", "a bag"]
    pipe.save_pretrained(tmp_path / "float")
    (tmp_path / "pictures").mkdir()
    for number, each in enumerate(photographs()):
        each.save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "captions.txt").write_text("\n".join([*captions, ""]), encoding="utf-8")
    made = cli.quantize(
        str(tmp_path / "float"),
        tmp_path / "out",
        scheme="w4a4",
        images=tmp_path / "pictures",
        prompts=tmp_path / "captions.txt",
        **RUN,
    )
    quantize_pipeline(pipe, "w4a4", images=tmp_path / "pictures", prompts=captions, **RUN)
    loaded = type(pipe).from_pretrained(made.out)
    assert same(ranges(loaded.unet), ranges(pipe.unet))


@pytest.mark.situation("`quantize --images` or `--prompts FILE` for a model alone, an empty file", "refused")
def test_command_line_refusals(tmp_path):
    make_unet().save_pretrained(tmp_path / "unet")
    (tmp_path / "pictures").mkdir()
    photographs()[0].save(tmp_path / "pictures" / "a.png")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="`--images` need a pipeline to be shown to"):
        cli.quantize(str(tmp_path / "unet"), tmp_path / "out", images=tmp_path / "pictures")
    with pytest.raises(ConfigError, match="a prompt on each line, but .*empty.txt holds none"):
        cli.quantize(str(tmp_path / "unet"), tmp_path / "out", prompts=tmp_path / "empty.txt")
    assert not (tmp_path / "out").exists()


def test_the_built_in_prompts_are_documented():
    page = (Path(diffusers_msfp.__file__).parent / "calibration" / "README.md").read_text(encoding="utf-8")
    assert all(f"- {prompt}\n" in page for prompt in DEFAULT_PROMPTS)
