"""What diffusers expects of a quantized model: load, save, shard, cast, copy, offload, compile, dequantize."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import compute_module_sizes
from conftest import equal_state, make_condition_unet, make_dit, make_unet, make_vae, run
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import load_file

import diffusers_msfp
from diffusers_msfp import MSFPConfig, MSFPPipelineMixin, calibration_state, freeze, quantize_pipeline
from diffusers_msfp.errors import CheckpointError, ConfigError, MSFPError, NonFiniteError, StateError, UnsupportedError
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.plugin.quantizer import MSFPQuantizer


def quant_layer_names(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLayer)}


@pytest.fixture
def float_dir(unet, tmp_path) -> str:
    unet.save_pretrained(tmp_path / "float")
    return str(tmp_path / "float")


def load(path, **arguments) -> UNet2DModel:
    return UNet2DModel.from_pretrained(path, **arguments)


# ── doors ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_argument_at_pipeline_level(tiny_dir):
    pipe = DiffusionPipeline.from_pretrained(tiny_dir, quantization_config=MSFPConfig())
    assert type(pipe) is DDPMPipeline
    assert type(pipe.unet) is UNet2DModel
    assert quant_layer_names(pipe.unet) == {
        name for name, m in make_unet().named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert calibration_state(pipe.unet) == "observing"
    assert pipe.unet.config.quantization_config.scheme == "w4a8"


def test_inside_a_quant_mapping(tiny_dir):
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": MSFPConfig(scheme="w4a16")})
    pipe = DiffusionPipeline.from_pretrained(tiny_dir, quantization_config=mapping)
    assert calibration_state(pipe.unet) == "frozen"
    assert pipe.unet.config.quantization_config.scheme == "w4a16"


def test_equals_quantizing_in_memory(float_dir, unet):
    quantize_model(unet, MSFPConfig(scheme="w4a4"))
    loaded = load(float_dir, quantization_config=MSFPConfig(scheme="w4a4"))
    assert equal_state(loaded, unet)
    assert loaded.config.quantization_config.to_dict() == unet.config.quantization_config.to_dict()


MODELS = {
    "UNet2DModel": (make_unet, lambda: {"sample": torch.randn(1, 3, 8, 8), "timestep": 3}),
    "UNet2DConditionModel": (
        make_condition_unet,
        lambda: {
            "sample": torch.randn(1, 4, 8, 8),
            "timestep": 3,
            "encoder_hidden_states": torch.randn(1, 5, 16),
        },
    ),
    "DiTTransformer2DModel": (
        lambda: make_dit(num_layers=2, num_embeds_ada_norm=10),
        lambda: {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "timestep": torch.tensor([3]),
            "class_labels": torch.tensor([1]),
        },
    ),
    "AutoencoderKL": (make_vae, lambda: {"sample": torch.randn(1, 3, 16, 16)}),
}


@pytest.mark.parametrize(("make", "inputs"), MODELS.values(), ids=MODELS)
def test_models_quantize_save_and_reload_bit_identical(make, inputs, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "float")
    parameters = model.num_parameters()
    cls = type(model)
    quantized = cls.from_pretrained(tmp_path / "float", quantization_config=MSFPConfig(scheme="w4a4"))
    assert quantized.num_parameters() == parameters
    arguments = inputs()
    with torch.no_grad():
        quantized(**arguments)
        freeze(quantized)
        expected = quantized(**arguments).sample
        assert torch.isfinite(expected).all()
        assert not torch.equal(expected, model(**arguments).sample)
    quantized.save_pretrained(tmp_path / "packed")
    again = cls.from_pretrained(tmp_path / "packed")
    assert equal_state(quantized, again)
    with torch.no_grad():
        assert torch.equal(again(**arguments).sample, expected)
    assert type(again) is cls
    assert again.num_parameters() == parameters
    assert again.get_memory_footprint() < 0.75 * model.get_memory_footprint()


def test_the_config_object_of_the_user_is_not_changed(tiny_dir, float_dir):
    config = MSFPConfig(scheme="w4a4")
    before = config.to_dict()
    DiffusionPipeline.from_pretrained(tiny_dir, quantization_config=config)
    assert config.to_dict() == before


def test_components(tiny_dir):
    with pytest.raises(ConfigError, match="must have a component to quantize \\(vae\\), but this one has .*unet"):
        DiffusionPipeline.from_pretrained(tiny_dir, quantization_config=MSFPConfig(components_to_quantize=["vae"]))
    with pytest.raises(ConfigError, match="Unknown scheme"):
        DiffusionPipeline.from_pretrained(tiny_dir, quantization_config=MSFPConfig(scheme="w5a5"))


def test_kept_modules(float_dir):
    model = load(float_dir, quantization_config=MSFPConfig(scheme="w4a16", modules_to_not_convert=["conv_out", "mid*"]))
    names = quant_layer_names(model)
    assert "conv_out" not in names
    assert not any(name.startswith("mid") for name in names)
    assert any(name.startswith("down") for name in names)


def test_overrides(float_dir):
    config = MSFPConfig(scheme="w4a16", scheme_overrides={"conv_in": "w4a4", "attentions": "w8a8"})
    model = load(float_dir, quantization_config=config)
    assert model.conv_in.weight_format.bits == 4
    assert model.conv_in.observing
    assert model.mid_block.attentions[0].to_q.weight_format.bits == 8
    assert model.mid_block.resnets[0].conv1.weight_format.bits == 4


# ── round trips ──────────────────────────────────────────────────────────────────────────────────────────────

SAVES = {"plain": {}, "sharded": {"max_shard_size": "20KB"}, "variant": {"variant": "w4"}}


@pytest.mark.parametrize("how", SAVES.values(), ids=SAVES)
def test_round_trip(packed_pipe, images, tmp_path, how):
    packed_pipe.unet.save_pretrained(tmp_path, **how)
    if "max_shard_size" in how:
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = load(tmp_path, variant=how.get("variant"))
    assert equal_state(packed_pipe.unet, again)
    assert torch.equal(run(again, images), run(packed_pipe.unet, images))
    assert calibration_state(again) == "frozen"


def test_parallel_loading(packed_pipe, tmp_path, monkeypatch):
    packed_pipe.unet.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "yes")
    assert equal_state(packed_pipe.unet, load(tmp_path))


def test_sharded_float_checkpoint(unet, tmp_path, float_dir):
    unet.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    config = MSFPConfig(scheme="w4a16")
    assert equal_state(
        load(tmp_path / "shards", quantization_config=config), load(float_dir, quantization_config=config)
    )


def test_bfloat16_keeps_scales_exact(packed_pipe, packed_dir, images):
    model = load(Path(packed_dir) / "unet", dtype=torch.bfloat16)
    exact = packed_pipe.unet.state_dict()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] in ("weight_scale", "input_scale", "input_zero_point"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, exact[name])
    assert model.conv_in.bias.dtype == torch.bfloat16
    y = run(model, images.bfloat16())
    assert y.dtype == torch.bfloat16
    reference = run(packed_pipe.unet, images)
    assert (y.float() - reference).norm() < 0.25 * reference.norm()


def test_weights_are_searched_before_they_are_cast(float_dir):
    config = MSFPConfig(scheme="w4a16")
    whole, half = (load(float_dir, quantization_config=config, dtype=d) for d in (torch.float32, torch.bfloat16))
    for (name, a), b in zip(whole.state_dict().items(), half.state_dict().values(), strict=True):
        if name.endswith(("weight_scale", "conv1.packed_weight")):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu"], ids=str)
def test_device_map(packed_pipe, packed_dir, images, device_map):
    model = load(Path(packed_dir) / "unet", device_map=device_map)
    assert torch.equal(run(model, images), run(packed_pipe.unet, images))


def test_device_map_auto(condition_unet, tmp_path):
    condition_unet.save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(
        tmp_path, quantization_config=MSFPConfig(scheme="w4a16"), device_map="auto"
    )
    assert model.conv_in.weight.device.type == "cpu"


def counted(model: UNet2DModel, quantizer: MSFPQuantizer, dtype: torch.dtype) -> int:
    """Bytes that accelerate counts of a model without weights, when it shares out devices."""
    quantizer.update_torch_dtype(dtype)
    quantizer.preprocess_model(model)
    special = quantizer.get_special_dtypes_update(model, dtype)
    return compute_module_sizes(model, dtype=quantizer.adjust_target_dtype(dtype), special_dtypes=special)[""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_device_maps_count_what_is_stored(packed_dir, float_dir, dtype):
    folder = Path(packed_dir) / "unet"
    record = MSFPConfig.from_dict(UNet2DModel.load_config(folder)["quantization_config"])
    asked = MSFPConfig("w4a16", scheme_overrides={"conv1": "w8a16"})
    with torch.device("meta"):
        packed, floats = UNet2DModel.from_config(UNet2DModel.load_config(folder)), make_unet()
    packed_bytes = counted(packed, MSFPQuantizer(record, pre_quantized=True), dtype)
    assert packed_bytes == load(folder, dtype=dtype).get_memory_footprint()
    wanted = load(float_dir, quantization_config=asked, dtype=dtype).get_memory_footprint()
    found = counted(floats, MSFPQuantizer(asked, pre_quantized=False), dtype)
    assert found == pytest.approx(wanted, rel=0.05)  # scales come with the weights


def test_config_json_is_plain_and_says_what_was_done(packed_dir):
    record = json.loads((Path(packed_dir) / "unet" / "config.json").read_text())["quantization_config"]
    assert record["quant_method"] == "msfp"
    assert record["format_version"] == 2
    assert set(record["digest"]) == {"algorithm", "groups"}
    assert record["calibration"] == {"state": "frozen"}
    modules = [name for group in record["layers"] for name in group["modules"]]
    assert len(modules) == len(set(modules)) == len(quant_layer_names(load(Path(packed_dir) / "unet")))
    index = json.loads((Path(packed_dir) / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    tensors = load_file(Path(packed_dir) / "unet" / "diffusion_pytorch_model.safetensors")
    assert tensors["down_blocks.0.resnets.0.conv1.weight"].dtype == torch.uint8


def test_user_options_for_a_packed_checkpoint_do_not_apply(packed_dir):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(Path(packed_dir) / "unet", quantization_config=MSFPConfig(scheme="w8a8"))
    assert model.config.quantization_config.scheme == "w4a4"


# ── copies, casts, devices ───────────────────────────────────────────────────────────────────────────────────


def test_deepcopy(packed_pipe, images, tmp_path):
    twin = copy.deepcopy(packed_pipe.unet)
    expected = run(packed_pipe.unet, images)
    for parameter in packed_pipe.unet.parameters():
        parameter.data.zero_()
    assert torch.equal(run(twin, images), expected)
    assert twin.num_parameters() == make_unet().num_parameters()
    twin.save_pretrained(tmp_path)
    assert torch.equal(run(load(tmp_path), images), expected)


def test_dequantize_then_save_then_reload(packed_pipe, images, tmp_path):
    unet = packed_pipe.unet
    weight = unet.mid_block.resnets[0].conv1.dequantize_weight()
    unet.dequantize()
    assert not quant_layer_names(unet)
    assert torch.equal(unet.mid_block.resnets[0].conv1.weight, weight)
    assert "quantization_config" not in unet.config
    assert not unet.is_quantized
    assert not hasattr(unet, "hf_quantizer")
    unet.to(torch.bfloat16).to(torch.float32).half().float()
    unet.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert equal_state(unet, again)
    assert torch.equal(run(unet, images), run(again, images))
    with pytest.raises(ValueError, match="first quantize"):
        unet.dequantize()


def test_from_config_gives_a_float_model(packed_pipe):
    assert not quant_layer_names(UNet2DModel.from_config(packed_pipe.unet.config))


def test_casts_are_refused_with_the_way_out(packed_pipe):
    unet = packed_pipe.unet
    for cast in (
        lambda: unet.to(torch.float16),
        lambda: unet.to(device="cpu", dtype=torch.bfloat16),
        lambda: packed_pipe.to(torch.float16),
        unet.half,
        unet.float,
    ):
        with pytest.raises(UnsupportedError, match="`dtype="):
            cast()
    assert unet.to("cpu") is unet
    assert unet.to(torch.float32) is unet
    assert unet.to("cpu", torch.float32) is unet


def test_from_pipe(packed_pipe):
    other = DDIMPipeline.from_pipe(packed_pipe)
    assert other.unet is packed_pipe.unet
    with pytest.raises(ValueError, match="`dtype="):
        DDIMPipeline.from_pipe(packed_pipe, dtype=torch.bfloat16)


def test_layerwise_casting_and_fusing_are_refused_before_anything_changes(packed_pipe, images):
    unet, before = packed_pipe.unet, run(packed_pipe.unet, images)
    with pytest.raises(UnsupportedError, match="`enable_layerwise_casting` is not possible"):
        unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(UnsupportedError, match="`fuse_qkv_projections` is not possible"):
        make_quantized_condition_unet().fuse_qkv_projections()
    assert torch.equal(run(unet, images), before)


def make_quantized_condition_unet():
    model = make_condition_unet()
    quantize_model(model, MSFPConfig(scheme="w4a16"))
    return model


def test_group_offload(packed_pipe, images):
    expected = run(packed_pipe.unet, images)
    packed_pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(run(packed_pipe.unet, images), expected)


def test_disk_offload_that_would_cast_scales_is_refused(condition_unet, tmp_path):
    quantize_model(condition_unet, MSFPConfig("w4a16"))
    condition_unet.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="Disk offload keeps scales exact only in float32"):
        UNet2DConditionModel.from_pretrained(
            tmp_path,
            dtype=torch.bfloat16,
            device_map={"": "cpu", "mid_block": "disk"},
            offload_folder=str(tmp_path / "disk"),
        )


def test_disk_offload_while_quantizing_is_refused(condition_unet, tmp_path):
    condition_unet.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="Quantize without offloading to disk"):
        UNet2DConditionModel.from_pretrained(
            tmp_path,
            quantization_config=MSFPConfig("w4a16"),
            device_map={"": "cpu", "mid_block": "disk"},
            offload_folder=str(tmp_path / "disk"),
        )


def test_model_cpu_offload(packed_pipe):
    def sample():
        generator = torch.Generator().manual_seed(0)
        return packed_pipe(1, generator, num_inference_steps=2, output_type="np").images

    expected = sample()
    packed_pipe.enable_model_cpu_offload(device="cpu")
    assert (sample() == expected).all()


def small() -> UNet2DModel:
    """A block of each kind: the compiler's time goes by the number of layers."""
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    return make_unet(block_out_channels=(16,), attention_head_dim=16, **blocks)


def compiled(model, backend):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


def first_of_two(forward, images):
    with torch.no_grad():
        first = forward(images, torch.tensor(10)).sample
        forward(images, torch.tensor(500))
    return first


def test_compiles_without_graph_breaks(images):
    pipe = DDPMPipeline(small(), DDIMScheduler())
    unet = quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2).unet
    expected, forward = run(unet, images, torch.tensor(10)), compiled(unet, "aot_eager")
    assert torch.allclose(first_of_two(forward, images), expected, atol=1e-5)
    with pytest.raises(NonFiniteError, match="The input of layer `.*` must be finite"):
        first_of_two(forward, torch.full_like(images, float("inf")))


@pytest.mark.slow
def test_an_observing_model_compiles_too_and_observes(images):
    unet = small()
    quantize_model(unet, MSFPConfig(scheme="w4a4"))
    first_of_two(compiled(unet, "aot_eager"), images)
    assert calibration_state(unet) == "observing"
    assert all(int(m.observation.count) for m in unet.modules() if isinstance(m, QuantLayer) and m.observing)
    freeze(unet)
    assert torch.allclose(
        first_of_two(compiled(unet, "aot_eager"), images), run(unet, images, torch.tensor(10)), atol=1e-5
    )


@pytest.mark.slow
def test_compiles_with_inductor(packed_pipe, images):
    expected = run(packed_pipe.unet, images, torch.tensor(10))
    actual = first_of_two(compiled(packed_pipe.unet, "inductor"), images)
    # one value on a border flips a whole step, so whole networks agree loosely; layers agree exactly
    assert (actual - expected).norm() < 0.05 * expected.norm()


# ── damaged and foreign checkpoints ──────────────────────────────────────────────────────────────────────────


def edit_record(packed_dir, tmp_path, **changes) -> Path:
    import shutil

    target = tmp_path / "edited"
    shutil.copytree(Path(packed_dir) / "unet", target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def edit_tensor(path: Path, key: str, value: torch.Tensor | None) -> Path:
    from safetensors.torch import save_file

    file = path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def test_newer_version_is_refused_and_unknown_keys_warn(packed_dir, tmp_path, caplog):
    with pytest.raises(CheckpointError, match="up to format version 2, but got 3"):
        load(edit_record(packed_dir, tmp_path, format_version=3))
    with pytest.raises(TypeError, match="surprise"):
        MSFPConfig(surprise=1)
    (tmp_path / "edited" / "config.json").unlink()
    import shutil

    shutil.rmtree(tmp_path / "edited")
    with pytest.raises(CheckpointError, match="only known keys, but `quantization_config` in config.json has surprise"):
        load(edit_record(packed_dir, tmp_path, surprise=1))
    MSFPConfig.from_dict({"quant_method": "msfp", "format_version": 1, "surprise": 1})
    assert "surprise" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": None}, "must have `layers`"),
        ({"layers": [{"weight": "fp4_e2m1"}]}, "must have `weight`, `input` and `modules`"),
        ({"layers": [{"weight": "fp4_e9m9", "input": None, "modules": []}]}, "In `layers` of config.json a format"),
        ({"layers": [{"weight": ["x"], "input": None, "modules": []}]}, "must name formats, but got"),
        ({"layers": [{"weight": "fp4_e2m1", "input": {}, "modules": []}]}, "must name formats, but got"),
        ({"layers": [{"weight": "fp4_ue2m2", "input": None, "modules": []}]}, "signed formats"),
        ({"layers": [{"weight": "fp4_e2m1", "input": None, "modules": ["no.such"]}]}, "has no such layer"),
        ({"layers": [{"weight": "fp4_e2m1", "input": None, "modules": ["conv_norm_out"]}]}, "has GroupNorm there"),
        ({"adapters": {"rank": 4}}, "`adapters` in config.json is malformed"),
        ({"format_version": "one"}, "whole number"),
        ({"scheme": "w1a1"}, "Unknown scheme"),
    ],
)
def test_impossible_records_are_refused(packed_dir, tmp_path, changes, reason):
    with pytest.raises(MSFPError, match=reason):
        load(edit_record(packed_dir, tmp_path, **changes))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("conv_out.weight_scale", None, "must hold `conv_out.weight_scale`"),
        ("conv_out.weight", None, "must hold `conv_out.weight`"),
        ("conv_out.weight_scale", torch.full((3,), float("nan")), "must be finite and > 0"),
        ("conv_out.weight_scale", torch.zeros(3), "must be finite and > 0"),
        ("conv_out.weight_scale", torch.ones(4), "must have shape \\(3,\\), but got \\(4,\\)"),
        ("conv_out.weight", torch.zeros(3, 1, 1, 5, dtype=torch.uint8), "must have shape"),
        ("conv_out.weight", torch.zeros(3, 1, 1, 288), "must be torch.uint8"),
        ("conv_out.input_zero_point", torch.tensor(1.0), "must be finite and ≤ 0"),
        ("conv_out.input_scale", torch.tensor(float("inf")), "must be finite and > 0"),
        ("conv_out.weight_error", torch.tensor(float("nan")), "must be finite, but it is not"),
    ],
)
def test_damaged_tensors_are_refused(packed_dir, tmp_path, key, value, reason):
    with pytest.raises(CheckpointError, match=reason):
        load(edit_tensor(edit_record(packed_dir, tmp_path), key, value))


def test_non_finite_weight_names_the_layer(unet, tmp_path):
    unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    unet.save_pretrained(tmp_path)
    with pytest.raises(MSFPError, match="weight of layer `mid_block.resnets.0.conv1` must be finite, but got NaN"):
        load(tmp_path, quantization_config=MSFPConfig())


def test_quantizing_twice_is_refused(packed_pipe):
    with pytest.raises(StateError, match="quantized once"):
        diffusers_msfp.quantize_pipeline(packed_pipe, "w4a4")


def test_registration_is_idempotent_and_never_over_a_foreign_entry(monkeypatch):
    from diffusers.quantizers import auto

    diffusers_msfp.plugin.register()
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "msfp", dict)
    with pytest.raises(ConfigError, match="builtins.dict has it"):
        diffusers_msfp.plugin.register()


def test_config_repr_and_json():
    config = MSFPConfig(scheme="w4a4", modules_to_not_convert="conv_out")
    assert "w4a4" in repr(config)
    assert json.loads(json.dumps(config.to_dict()))["modules_to_not_convert"] == ["conv_out"]
    assert MSFPConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert set(config.to_diff_dict()) == {"quant_method", "format_version", "scheme", "modules_to_not_convert"}
    for arguments, reason in (
        ({"modules_to_not_convert": [1]}, "non-empty strings"),
        ({"scheme_overrides": ["a"]}, "must map patterns"),
        ({"scheme_overrides": {"a": "w9"}}, "Unknown scheme"),
    ):
        with pytest.raises(ConfigError, match=reason):
            MSFPConfig(**arguments)


def test_scheduler_classes_in_use_are_stock(packed_dir):
    assert isinstance(DiffusionPipeline.from_pretrained(packed_dir).scheduler, (DDIMScheduler, DDPMScheduler))


def test_observation_ends_with_the_pipeline_s_call():
    pipe = MSFPPipelineMixin.attach(DDPMPipeline(make_unet(), DDIMScheduler()))
    quantize_model(pipe.unet, MSFPConfig(scheme="w4a4"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.quantization_report()["unet"]["calibration_state"] == "observing"
    pipe(num_inference_steps=2)
    assert pipe.quantization_report()["unet"]["calibration_state"] == "frozen"
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    with pytest.raises(StateError, match="has none. Load it with"):
        MSFPPipelineMixin.attach(DDPMPipeline(make_unet(), DDIMScheduler())).talora_summary()
