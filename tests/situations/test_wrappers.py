"""Models in wrappers: `torch.compile`, data parallelism, accelerate's, PEFT's. Verbs see the model inside."""

import copy
import inspect
import pickle

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import compile_regions
from conftest import equal_state, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from peft import LoraConfig
from pipelines import make_flux
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DataParallel, DistributedDataParallel

from diffusers_msfp import (
    FinetuneConfig,
    MSFPPipelineMixin,
    RoundingConfig,
    TemporalConfig,
    calibrate,
    calibration_state,
    finetune,
    freeze,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
    set_engine,
    split_shortcuts,
)
from diffusers_msfp.checkpoint.record import ModelRecord
from diffusers_msfp.compat.peft import has_adapters
from diffusers_msfp.compat.wrappers import unwrap
from diffusers_msfp.engines.choose import engines_of
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.evaluation import compare_pipelines, layer_snr
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.methods.temporal.features import temporal_features

RUN = {"num_samples": 2, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def _no_compiled_code():
    yield
    torch.compiler.reset()


@pytest.fixture
def process_group(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_parts(model: nn.Module) -> nn.Module:
    """As `compile_regions` does for repeated blocks."""
    for blocks in (model.down_blocks, model.up_blocks):
        for name, block in blocks.named_children():
            blocks._modules[name] = compiled(block)
    return model


def peft_model(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))


WRAPPERS = {
    "torch.compile": compiled,
    "compile in place": compiled_in_place,
    "compiled parts": compiled_parts,
    "DataParallel": DataParallel,
    "PEFT": peft_model,
}


SMALL = {
    "block_out_channels": (8,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def make_pipe() -> DDPMPipeline:
    return DDPMPipeline(make_unet(**SMALL), DDIMScheduler())


@pytest.fixture(scope="module")
def _packed() -> DDPMPipeline:
    return quantize_pipeline(make_pipe(), "w4a4", **RUN)


@pytest.fixture
def packed_pipe(_packed) -> DDPMPipeline:
    return copy.deepcopy(_packed)


def wrapped(pipe: DDPMPipeline, how: str) -> DDPMPipeline:
    pipe = copy.deepcopy(pipe)
    pipe.unet = WRAPPERS[how](pipe.unet)
    return pipe


def ranges(pipe: DDPMPipeline) -> dict:
    layers = quant_layers(unwrap(pipe.unet))
    return {name: (layer.input_format, layer.input_scale.tolist()) for name, layer in layers if layer.input_format}


@pytest.mark.parametrize("how", [how for how in WRAPPERS if how != "PEFT"])
@pytest.mark.situation("a float pipeline with a compiled or data-parallel denoiser is quantized", "right")
def test_quantize(how, packed_pipe, tmp_path):
    pipe = wrapped(make_pipe(), how)
    outside = pipe.unet
    assert quantize_pipeline(pipe, "w4a4", **RUN) is pipe
    assert pipe.unet is outside
    assert ranges(pipe) == ranges(packed_pipe)
    model = unwrap(pipe.unet)
    names = [name for group in ModelRecord.of(model).layers for name in group.modules]
    assert set(names) == set(dict(quant_layers(packed_pipe.unet)))
    if how == "DataParallel":  # diffusers itself cannot save the pipeline
        model.save_pretrained(tmp_path / "unet")
    else:
        pipe.save_pretrained(tmp_path)
    assert equal_state(UNet2DModel.from_pretrained(tmp_path / "unet"), packed_pipe.unet)


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.situation(
    "`calibrate`, `freeze` and `set_engine` after `torch.compile(pipe.unet)`, in PEFT's model", "right"
)
def test_calibrate(how, packed_pipe, images):
    pipe = wrapped(packed_pipe, how)
    if how == "torch.compile":  # code compiled before must not be used afterwards
        run(pipe.unet, images)
    for each in (pipe, packed_pipe):
        calibrate(each, **RUN, seed=5)
        set_engine(each.unet, "bf16")
        freeze(each.unet)
    assert calibration_state(pipe) == calibration_state(pipe.unet) == "frozen"
    assert ranges(pipe) == ranges(packed_pipe)
    assert engines_of(unwrap(pipe.unet)) == engines_of(packed_pipe.unet)
    assert torch.allclose(run(pipe.unet, images), run(packed_pipe.unet, images), atol=0.02)


@pytest.mark.parametrize("how", [pytest.param("torch.compile", marks=pytest.mark.slow), "DataParallel"])
@pytest.mark.situation("comparing and training pipelines whose denoisers are compiled or data-parallel", "right")
def test_compare_and_train(how, packed_pipe, images):
    float_pipe = make_pipe()
    pipe, teacher = wrapped(packed_pipe, how), wrapped(float_pipe, how)
    if how != "DataParallel":
        run(pipe.unet, images)
    assert compare_pipelines(teacher, pipe, **RUN) == compare_pipelines(float_pipe, packed_pipe, **RUN)
    assert layer_snr(teacher, pipe, **RUN) == layer_snr(float_pipe, packed_pipe, **RUN)
    settings = {"num_inference_steps": 2, "batch_size": 2}
    for student, original in ((pipe, teacher), (packed_pipe, float_pipe)):
        split_shortcuts(student, original)
        maintain_temporal(student, original, TemporalConfig(num_inference_steps=2, iterations=2))
        learn_rounding(student, original, RoundingConfig(**settings, num_samples=2, iterations=2))
        finetune(student, original, FinetuneConfig(**settings, train_steps=2, rank=2))
    assert temporal_features(teacher, pipe, num_inference_steps=2)
    assert equal_state(unwrap(pipe.unet), packed_pipe.unet)
    for timestep in (0, 999):  # adapters follow the timestep in what is compiled, too
        expected = run(packed_pipe.unet, images, timestep)
        assert torch.allclose(run(pipe.unet, images, torch.tensor(timestep)), expected, atol=1e-3)


@pytest.mark.situation("`DistributedDataParallel` and accelerate's `prepare`", "right")
def test_distributed(packed_pipe, process_group, images):
    accelerator = Accelerator(cpu=True)
    for wrap in (DistributedDataParallel, accelerator.prepare):
        pipe = copy.deepcopy(packed_pipe)
        for parameter in pipe.unet.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        pipe.unet = wrap(pipe.unet)
        calibrate(pipe, **RUN)
        set_engine(pipe.unet, "reference")
        report = MSFPPipelineMixin.attach(pipe).quantization_report()
        assert report["unet"]["calibration_state"] == "frozen"
        assert ranges(pipe) == ranges(packed_pipe)


@pytest.mark.situation("accelerate's `compile_regions`", "right")
def test_compiled_regions(packed_pipe, images):
    model = compile_regions(packed_pipe.unet, backend="eager")
    assert [name for name, _ in quant_layers(unwrap(model))] == [name for name, _ in quant_layers(packed_pipe.unet)]
    set_engine(model, "bf16")
    set_engine(packed_pipe, "bf16")
    assert engines_of(model) == engines_of(packed_pipe.unet)
    assert torch.allclose(run(model, images), run(packed_pipe.unet, images), atol=0.02)


@pytest.mark.situation("a model of `compile_regions` is moved, and gets an adapter", "right")
@torch.no_grad()
def test_compiled_regions_answer_for_themselves():
    def sample():
        generator = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 16, "num_inference_steps": 1}
        return pipe("a hat", **size, generator=generator, output_type="latent").images

    pipe = make_flux()
    quantize_pipeline(pipe, "w4a16")
    original = pipe.transformer
    pipe.transformer = compile_regions(original, backend="eager")
    assert pipe.transformer.to("cpu") is pipe.transformer
    before = sample()
    with pytest.raises(ValueError, match="Target module OptimizedModule"):  # as PEFT says of any compiled layer
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["x_embedder"], init_lora_weights=False))
    assert not has_adapters(original)
    assert not has_adapters(pipe.transformer)
    assert torch.equal(sample(), before)
    assert {"variant", "max_shard_size"} <= inspect.signature(pipe.transformer.save_pretrained).parameters.keys()
    assert pickle.loads(pickle.dumps(original)).num_parameters() == original.num_parameters()


@pytest.mark.situation("a model in shards (FSDP)", "refused")
def test_shards(packed_pipe):
    class FullyShardedDataParallel(nn.Module):
        """Has the shape of torch's, which needs a group of processes."""

        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module

    FullyShardedDataParallel.__module__ = "torch.distributed.fsdp"
    with pytest.raises(UnsupportedError, match="Quantized weights cannot be cut into shards"):
        set_engine(FullyShardedDataParallel(packed_pipe.unet), "reference")


@pytest.mark.situation("forward-mode differentiation, in which rounding has no gradient", "refused")
@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on the way
@pytest.mark.parametrize("way", ["dual", "func"])
def test_forward_mode(engine, way):
    pipe = make_pipe()
    quantize_pipeline(pipe, "w4a8", num_samples=1, num_inference_steps=2)
    set_engine(pipe, engine)
    x = torch.randn(1, pipe.unet.config.in_channels, 8, 8)

    def dual() -> None:
        with forward_ad.dual_level(), torch.no_grad():
            pipe.unet(forward_ad.make_dual(x, torch.ones_like(x)), 500)

    def func() -> None:
        torch.func.jvp(lambda x: pipe.unet(x, 500).sample, (x,), (torch.ones_like(x),))

    with pytest.raises(UnsupportedError, match="in forward-mode differentiation"):
        {"dual": dual, "func": func}[way]()
    assert pipe.unet(x, 500).sample.isfinite().all()
