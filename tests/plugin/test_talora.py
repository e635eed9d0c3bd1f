"""Adapters on loaded pipelines: routing, verbs, files, LoRA exchange, threads, compilation."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from conftest import equal_state, make_condition_unet, make_unet, make_vae, run
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    MSFPPipelineMixin,
    StateError,
    export_adapter,
    finetune,
    import_adapter,
    quantize_pipeline,
)
from diffusers_msfp.errors import CheckpointError, ConfigError, MSFPError, NonFiniteError, ShapeError, UnsupportedError
from diffusers_msfp.layers.convert import layers_by_name
from diffusers_msfp.methods.talora import AdapterBank, AdapterPlan, adapter_rank
from diffusers_msfp.methods.talora.attach import connect, plan_of
from diffusers_msfp.plugin.adapters import talora_files
from diffusers_msfp.plugin.adapters.talora_files import load_talora, save_talora, unload_talora
from diffusers_msfp.plugin.quantize import quantize_model

LOW, HIGH = 10, 900  # timesteps with adapters of their own
KINDS = {"merged": {"placement": "merged"}, "side": {"reads": "float"}, "codes": {"reads": "codes"}}


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for values on a border, which another batch size moves a step; adapters differ by far more."""
    return bool((a - b).norm() < 0.12 * b.norm())


def strengthen(model) -> None:
    """Adapters that do something at once, and a table that splits in the middle."""
    torch.manual_seed(3)
    for module in model.modules():
        adapters = getattr(module, "adapters", None)
        if adapters is not None:
            with torch.no_grad():
                adapters.up.normal_(std=0.05)
    model.timestep_router.table[:, :500] = 0
    model.timestep_router.table[:, 500:] = 1


@pytest.fixture(scope="session")
def tuned_pipes(_packed) -> dict[str, DDPMPipeline]:
    teacher = DDPMPipeline(make_unet(), DDIMScheduler())
    made = {}
    for kind, settings in KINDS.items():
        pipe = copy.deepcopy(_packed)
        settings = settings | {
            "train_steps": 3,
            "num_inference_steps": 3,
            "batch_size": 4,
            "rank": 4,
            "learning_rate": 2.0,
        }
        finetune(pipe, teacher, FinetuneConfig(**settings))
        strengthen(pipe.unet)
        made[kind] = pipe
    return made


@pytest.fixture(params=KINDS)
def tuned(tuned_pipes, request) -> DDPMPipeline:
    return copy.deepcopy(tuned_pipes[request.param])


@pytest.fixture(params=("side", "codes"))
def side(tuned_pipes, request) -> DDPMPipeline:
    return MSFPPipelineMixin.attach(copy.deepcopy(tuned_pipes[request.param]))


@pytest.fixture
def merged(tuned_pipes) -> DDPMPipeline:
    return MSFPPipelineMixin.attach(copy.deepcopy(tuned_pipes["merged"]))


# ── routing ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_sample_gets_its_timestep_s_adapter(tuned, images):
    unet = tuned.unet
    mixed = run(unet, images, torch.tensor([LOW, HIGH]))
    for row, timestep in enumerate((LOW, HIGH)):
        for given in (timestep, float(timestep), torch.tensor(timestep), torch.tensor([timestep]), timestep + 0.3):
            assert near(run(unet, images[row : row + 1], given)[0], mixed[row])
    swapped = copy.deepcopy(unet)
    swapped.timestep_router.table.bitwise_xor_(1)
    assert not near(run(swapped, images, LOW), run(unet, images, LOW))


def test_guidance_doubles_the_batch(tuned, images):
    both = run(tuned.unet, torch.cat([images, images]), torch.tensor([LOW, HIGH, LOW, HIGH]))
    assert near(both[:2], both[2:])
    assert near(both[:2], run(tuned.unet, images, torch.tensor([LOW, HIGH])))


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_any_number_of_steps_and_a_callback(tuned, steps):
    seen = []
    handle = tuned.unet.register_forward_hook(lambda *_: seen.append(tuned.unet.timestep_router.route(0).uniform))
    pipe = DDIMPipeline(tuned.unet, tuned.scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe(batch_size=2, num_inference_steps=steps, output_type="np")
    handle.remove()
    timesteps = pipe.scheduler.timesteps
    assert seen == [int(timestep >= 500) for timestep in timesteps]


def test_continuous_timesteps_of_another_scheduler(tuned):
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()
    x = torch.randn(1, 3, 8, 8)
    for timestep in scheduler.timesteps:
        assert torch.isfinite(run(tuned.unet, x, timestep)).all()
        assert tuned.unet.timestep_router.route(0).uniform == int(timestep.round() >= 500)


def test_timesteps_outside_the_table_are_refused(tuned, images):
    with pytest.raises(ConfigError, match=r"Timesteps must lie within 0 … 999.* but got \[2000"):
        run(tuned.unet, images, 2000)
    with pytest.raises(ConfigError, match="each call must have a `timestep`"):
        tuned.unet(sample=images, timestep=None)


def test_threads_do_not_mix_up_their_timesteps(tuned, images):
    expected = {t: run(tuned.unet, images, t) for t in (LOW, HIGH)}

    def work(index: int) -> bool:
        timestep = (LOW, HIGH)[index % 2]
        return near(run(tuned.unet, images, timestep), expected[timestep])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


@pytest.mark.parametrize(
    "kind", ["side", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("merged", "codes"))]
)
def test_compiled_models_route_without_recompiling(kind):
    one_block = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    pipe, teacher = (
        DDPMPipeline(make_unet(block_out_channels=(8,), norm_num_groups=4, **one_block), DDIMScheduler()) for _ in "12"
    )
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    finetune(pipe, teacher, FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, **KINDS[kind]))
    strengthen(pipe.unet)
    graphs = []

    def count(module, _inputs):
        graphs.append(module)
        return module

    images = torch.randn(2, 3, 8, 8)
    torch.compiler.reset()
    compiled = torch.compile(pipe.unet, backend=count, fullgraph=True)
    timesteps = [torch.tensor(t) for t in (LOW, HIGH, 499, 500, 3)]
    for timestep in timesteps:
        assert near(run(compiled, images, timestep), run(pipe.unet, images, timestep))
        if timestep is timesteps[0]:
            first = len(graphs)
    assert len(graphs) == first
    mixed = torch.tensor([LOW, HIGH])
    assert near(run(compiled, images, mixed), run(pipe.unet, images, mixed))


@pytest.mark.parametrize("with_buffers", [False, True])
def test_sequential_offloading_finds_the_adapters(tuned, images, with_buffers):
    other = copy.deepcopy(tuned.unet)  # offloaded before its first call
    for timestep in (LOW, HIGH):
        expected = run(tuned.unet, images, timestep)
        if timestep == LOW:
            cpu_offload(other, execution_device=torch.device("cpu"), offload_buffers=with_buffers)
        assert near(run(other, images, timestep), expected)


def test_casting_by_force_keeps_adapters_and_their_ranges_exact(side):
    before = {key: value.clone() for key, value in side.unet.state_dict().items() if ".adapters." in key}
    torch.nn.ModuleList([side.unet]).to(torch.bfloat16)
    after = side.unet.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────


def test_copies_and_checkpoints_are_bit_identical(tuned, images, tmp_path):
    expected = run(tuned.unet, images, torch.tensor([LOW, HIGH]))
    tuned.save_pretrained(tmp_path)
    for again in (DiffusionPipeline.from_pretrained(tmp_path), copy.deepcopy(tuned)):
        assert equal_state(again.unet, tuned.unet)
        assert torch.equal(run(again.unet, images, torch.tensor([LOW, HIGH])), expected)
    half = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.unet.timestep_router.table.dtype == torch.uint8
    assert torch.isfinite(run(half.unet, images.bfloat16(), HIGH)).all()
    half.save_pretrained(tmp_path / "again")
    name = "unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(tmp_path / name), load_file(tmp_path / "again" / name)
    exact = [key for key in first if first[key].dtype in (torch.uint8, torch.float16) or key.endswith("_scale")]
    assert all(torch.equal(first[key], second[key]) for key in exact)


def damaged(folder, change) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("timestep_router.table"), "must hold `timestep_router.table`"),
        (lambda t: t["timestep_router.table"].fill_(2), "must name adapters below 2, but got 2"),
        (lambda t: t.update({"timestep_router.table": torch.zeros(1, 3, dtype=torch.uint8)}), "must have shape"),
        (lambda t: t["conv_in.adapters.up"].fill_(float("nan")), "`conv_in.adapters.up` must be finite"),
        (lambda t: t.pop("conv_in.adapters.down"), "must hold `conv_in.adapters.down`"),
        (lambda t: t["conv_out.adapters.input_scale"].fill_(-1), "`conv_out.adapters.input_scale` must be finite"),
    ],
)
def test_damaged_checkpoints_are_refused(side, tmp_path, change, message):
    side.save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(MSFPError, match=message):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("placement", "nowhere", "`placement` must be one of merged, side"),
        ("num_adapters", 0, "`num_adapters` must lie in 1 … 256"),
        ("num_adapters", True, "`num_adapters` must lie in 1 … 256"),
        ("num_timesteps", 10**9, "`num_timesteps` must lie in"),
        ("ranks", {"x": ["conv_in"]}, "`ranks` must map ranks to lists"),
        ("ranks", {"4": ["conv_nowhere"]}, "config.json says that `conv_nowhere` has adapters"),
        ("colour", "red", "`adapters` in config.json is malformed"),
    ],
)
def test_hostile_configs_are_refused(tuned, tmp_path, key, value, message):
    tuned.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["adapters"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        DiffusionPipeline.from_pretrained(tmp_path)


# ── the mixin ────────────────────────────────────────────────────────────────────────────────────────────────


def test_disable_scale_and_unload_fall_back_to_the_base(side, packed_pipe, images):
    base, tuned = run(packed_pipe.unet, images, LOW), run(side.unet, images, LOW)
    assert not torch.equal(tuned, base)
    side.disable_talora()
    assert torch.equal(run(side.unet, images, LOW), base)
    side.enable_talora()
    assert torch.equal(run(side.unet, images, LOW), tuned)
    side.set_talora_scale(0.5)
    assert not torch.equal(run(side.unet, images, LOW), tuned)
    side.set_talora_scale(1)
    assert torch.equal(run(side.unet, images, LOW), tuned)
    side.unload_talora()
    assert equal_state(side.unet, packed_pipe.unet)
    assert torch.equal(run(side.unet, images, LOW), base)
    assert plan_of(side.unet) is None
    with pytest.raises(StateError, match="it has none: load them with `load_talora`"):
        side.disable_talora()
    with pytest.raises(ConfigError, match="must be a finite number, but got nan"):
        side.set_talora_scale(float("nan"))


def test_adapters_travel_as_files_of_their_own(side, packed_pipe, images, tmp_path):
    expected = run(side.unet, images, LOW)
    side.save_talora(tmp_path / "adapters")
    side.save_pretrained(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["talora.safetensors", "talora_config.json"]
    for source in ("adapters", "whole"):
        pipe = MSFPPipelineMixin.attach(copy.deepcopy(packed_pipe))
        pipe.load_talora(tmp_path / source)
        assert torch.equal(run(pipe.unet, images, LOW), expected)
        assert equal_state(pipe.unet, side.unet)
        with pytest.raises(StateError, match="has timestep-aware adapters already"):
            pipe.load_talora(tmp_path / source)
        pipe.unload_talora()
        assert equal_state(pipe.unet, packed_pipe.unet)


def test_adapters_come_from_the_hub(side, packed_pipe, tmp_path, monkeypatch):
    side.save_talora(tmp_path)
    asked = {}

    def download(repo, allow_patterns, **hub):
        asked.update(hub, repo=repo, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(talora_files, "snapshot_download", download)
    load_talora(packed_pipe.unet, "user/adapters", revision="abc")
    assert (asked["repo"], asked["revision"]) == ("user/adapters", "abc")
    assert "talora.safetensors" in asked["patterns"]
    assert equal_state(packed_pipe.unet, side.unet)


def test_adapters_for_another_base_are_refused_and_change_nothing(side, tmp_path):
    save_talora(side.unet, tmp_path)
    other = make_unet()
    with torch.no_grad():
        other.conv_out.weight *= 1.5
    pipe = DDPMPipeline(other, DDIMScheduler())
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    before = copy.deepcopy(pipe.unet)
    with pytest.raises(ConfigError, match="fit only the quantized model .* its packed weights or formats differ"):
        load_talora(pipe.unet, tmp_path)
    small = DDPMPipeline(make_unet(layers_per_block=2), DDIMScheduler())
    quantize_pipeline(small, "w4a4", num_samples=2, num_inference_steps=2)
    with pytest.raises(ConfigError, match="its packed weights or formats differ"):
        load_talora(small.unet, tmp_path)
    assert equal_state(before, pipe.unet)
    observing = make_unet()
    quantize_model(observing, MSFPConfig(scheme="w4a4"))
    with pytest.raises(StateError, match="need a calibrated model, but this one observes"):
        load_talora(observing, tmp_path)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("timestep_router.table"), CheckpointError, "must hold the router's table"),
        (lambda t: t["timestep_router.table"].fill_(9), CheckpointError, "below 2, but got 9"),
        (lambda t: t["conv_in.adapters.up"].fill_(float("inf")), CheckpointError, "must be finite"),
        (lambda t: t.pop("conv_in.adapters.up"), CheckpointError, "`up`, but it is missing"),
        (lambda t: t.update({"conv_in.adapters.up": torch.zeros(2, 32, 9).half()}), ShapeError, r"\(rank 1\), but"),
    ],
)
def test_damaged_adapters_change_nothing(side, packed_pipe, tmp_path, change, error, message):
    side.save_talora(tmp_path)
    tensors = load_file(tmp_path / "talora.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "talora.safetensors")
    model = copy.deepcopy(packed_pipe.unet)
    with pytest.raises(error, match=message):
        load_talora(model, tmp_path)
    assert equal_state(model, packed_pipe.unet)
    (tmp_path / "talora_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="must be JSON"):
        load_talora(model, tmp_path)
    with pytest.raises(ConfigError, match="must be a folder or a Hub id"):
        load_talora(model, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds neither"):
        load_talora(model, tmp_path / "empty")


def test_merged_adapters_refuse_what_needs_a_base(merged, packed_pipe, tmp_path):
    for verb in (merged.disable_talora, merged.unload_talora, lambda: merged.set_talora_scale(0.5)):
        with pytest.raises(UnsupportedError, match="not possible for merged adapters: each is a packed weight"):
            verb()
    with pytest.raises(UnsupportedError, match="merged"):
        merged.save_talora(tmp_path / "no")
    with pytest.raises(UnsupportedError, match="merged"):
        export_adapter(merged.unet, 0, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    merged.save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match="Load the whole pipeline from there"):
        load_talora(copy.deepcopy(packed_pipe.unet), tmp_path / "whole")


def test_summary_and_report(side, merged, packed_pipe):
    summary = side.talora_summary()
    assert summary["intervals"] == [[(0, 499, 0), (500, 999, 1)]]
    assert summary["usage"] == [[0.5, 0.5]]
    assert (summary["placement"], summary["num_adapters"], summary["collapsed"]) == ("side", 2, [])
    side.unet.timestep_router.table.zero_()
    assert side.talora_summary()["collapsed"] == [0]
    plain = MSFPPipelineMixin.attach(copy.deepcopy(packed_pipe)).quantization_report()["unet"]
    report = merged.quantization_report()["unet"]
    assert report["scheme"] == "w4a4"
    assert report["bits_per_weight"] == plain["bits_per_weight"] < 5
    assert sum(report["weight_formats"].values()) == report["layers"] == sum(report["input_formats"].values())
    assert report["adapters"]["placement"] == "merged"
    assert plain["adapters"] is None
    assert plain["bytes"] < report["bytes"] < 2.1 * plain["bytes"]
    json.dumps(side.quantization_report())


class Mine(MSFPPipelineMixin, DDPMPipeline):
    """A user's own pipeline."""


def test_saving_never_names_a_class_that_plain_diffusers_cannot_open(side, tmp_path):
    own = Mine(side.unet, side.scheduler)
    for name, pipe in (("attached", side), ("own", own)):
        pipe.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
        assert type(DiffusionPipeline.from_pretrained(tmp_path / name)) is DDPMPipeline
    assert type(side).__name__ == "DDPMPipeline"
    assert MSFPPipelineMixin.attach(side) is side
    with pytest.raises(ConfigError, match="attaches to pipelines, but got dict"):
        MSFPPipelineMixin.attach({})


def test_as_a_custom_pipeline(side, tmp_path):
    side.save_pretrained(tmp_path / "model")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "pipeline.py").write_text(
        "from diffusers import DDPMPipeline\nfrom diffusers_msfp import MSFPPipelineMixin\n\n\n"
        "class Quantized(MSFPPipelineMixin, DDPMPipeline):\n    pass\n"
    )
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "code"), trust_remote_code=True
    )
    assert type(pipe).__name__ == "Quantized"
    assert pipe.talora_summary()["num_adapters"] == 2


# ── PEFT and diffusers' LoRA files ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_exported_adapters_come_back_equal(side, tmp_path, format):
    file = export_adapter(side.unet, 1, tmp_path, format)
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata()["msfp_trained_to_read"].startswith(f"{side.talora_summary()['reads']}: ")
    other = copy.deepcopy(side.unet)
    import_adapter(other, 0, tmp_path)
    for ours, theirs in zip(side.unet.modules(), other.modules(), strict=True):
        if getattr(ours, "adapters", None) is not None:
            assert torch.equal(theirs.adapters.down[0], ours.adapters.down[1])
            assert torch.equal(theirs.adapters.up[0], ours.adapters.up[1])
            assert torch.equal(theirs.adapters.up[1], ours.adapters.up[1])


def conditional(placement: str = "side") -> UNet2DConditionModel:
    """A quantized conditional model with hand-made adapters."""
    model = make_condition_unet()
    quantize_model(model, MSFPConfig(scheme="w4a16"))
    ranks: dict[str, list[str]] = {}
    for name, layer in layers_by_name(model).items():
        rank = adapter_rank(layer.logical_shape, 4)
        ranks.setdefault(str(rank), []).append(name)
        layer.adapters = AdapterBank(layer.logical_shape, 2, rank, dtype=torch.float16, device="cpu")
        layer.adapters.initialise(torch.Generator().manual_seed(len(name)))
    plan = AdapterPlan(placement, 2, 1000, ranks)
    connect(model, plan, torch.zeros(1, 1000, dtype=torch.uint8))
    strengthen(model)
    return model


INPUTS = {
    "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "encoder_hidden_states": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)),
}


def answer(model, timestep: int) -> torch.Tensor:
    with torch.no_grad():
        return model(timestep=timestep, **INPUTS).sample


@pytest.mark.parametrize(("adapter", "timestep"), [(0, LOW), (1, HIGH)])
def test_an_exported_adapter_is_the_same_lora_in_diffusers_and_peft(adapter, timestep, tmp_path):
    model = conditional()
    expected = answer(model, timestep)
    export_adapter(model, adapter, tmp_path / "diffusers", "diffusers")
    export_adapter(model, adapter, tmp_path / "peft", "peft")
    unload_talora(model)
    assert not torch.allclose(answer(model, timestep), expected, atol=1e-3)
    plain = copy.deepcopy(model)
    model.load_lora_adapter(
        str(tmp_path / "diffusers"), prefix="unet", weight_name="pytorch_lora_weights.safetensors", adapter_name="a"
    )
    assert torch.allclose(answer(model, timestep), expected, atol=1e-4)
    inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path / "peft"), plain, adapter_name="a")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    result = set_peft_model_state_dict(plain, tensors, adapter_name="a")
    assert not result.unexpected_keys
    assert torch.allclose(answer(plain, timestep), expected, atol=1e-4)


@pytest.mark.parametrize("placement", ["merged", "side"])
def test_style_loras_stack_on_top_and_come_off_without_a_trace(placement, tuned_pipes, images):
    if placement == "side":
        model = conditional()
        before, state = answer(model, HIGH), {k: v.clone() for k, v in model.state_dict().items()}
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "conv1", "conv_in"]), adapter_name="style")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        styled = answer(model, HIGH)
        assert not torch.allclose(styled, before)
        assert not torch.allclose(styled, answer(model, LOW))
        model.disable_adapters()
        assert torch.equal(answer(model, HIGH), before)
        model.unload_lora()
        assert torch.equal(answer(model, HIGH), before)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        return
    unet = copy.deepcopy(tuned_pipes["merged"].unet)
    before = run(unet, images, HIGH)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["conv1", "to_q"]), unet, adapter_name="style")
    assert torch.equal(run(unet, images, HIGH), before)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.equal(run(unet, images, HIGH), before)


def test_saving_under_a_style_lora_saves_the_adapters_alone(tmp_path):
    model = conditional()
    model.save_pretrained(tmp_path / "without")
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "conv1"]))
    model.save_pretrained(tmp_path / "with")
    save_talora(model, tmp_path / "talora")
    without, with_ = (UNet2DConditionModel.from_pretrained(tmp_path / name) for name in ("without", "with"))
    assert equal_state(without, with_)
    assert ".base_layer" not in "".join(load_file(tmp_path / "talora" / "talora.safetensors"))


def test_foreign_loras_are_refused_and_change_nothing(side, tmp_path):
    export_adapter(side.unet, 0, tmp_path)
    file, state = tmp_path / "adapter_model.safetensors", copy.deepcopy(side.unet)
    good = load_file(file)
    first = next(key for key in good if key.endswith("conv1.lora_A.weight"))
    second = first.replace("lora_A", "lora_B")
    cases = [
        (good | {first: torch.zeros(3, *good[first].shape[1:])}, ShapeError, "must have rank 4"),
        (good | {"base_model.model.nowhere.lora_A.weight": torch.zeros(1)}, ConfigError, r"1 others \(nowhere, …\)"),
        (good | {first: torch.full_like(good[first], float("nan"))}, NonFiniteError, "must be finite"),
        (good | {first: torch.full_like(good[first].float(), 1e9)}, NonFiniteError, "must be finite"),
        (
            good | {first.replace("lora_A", "lora_magnitude_vector"): torch.ones(1)},
            ConfigError,
            "another kind of adapter",
        ),
        (good | {second: good[second].repeat(1, 1, 3, 3)}, ShapeError, "must have rank 4"),
    ]
    for tensors, error, message in cases:
        save_file(tensors, file)
        with pytest.raises(error, match=message):
            import_adapter(side.unet, 0, tmp_path)
    file.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="no complete LoRA"):
        import_adapter(side.unet, 0, tmp_path)
    with pytest.raises(CheckpointError, match="holds neither"):
        import_adapter(side.unet, 0, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="`adapter` must lie in 0 … 1, but got 2"):
        import_adapter(side.unet, 2, tmp_path)
    with pytest.raises(ConfigError, match="`format` must be one of peft, diffusers, but got 'kohya'"):
        export_adapter(side.unet, 0, tmp_path, "kohya")
    assert equal_state(state, side.unet)


def test_alpha_of_an_imported_lora_counts(side, tmp_path):
    export_adapter(side.unet, 0, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"lora_alpha": 2 * config["r"], "alpha_pattern": {k: 2 * v for k, v in config["rank_pattern"].items()}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = side.unet.conv_out.adapters.up[0].clone()
    import_adapter(side.unet, 0, tmp_path)
    assert torch.allclose(side.unet.conv_out.adapters.up[0], 2 * before)


def test_models_without_timesteps_are_refused():
    vae = make_vae()
    quantize_model(vae, MSFPConfig(scheme="w4a16"))
    with pytest.raises(UnsupportedError, match="AutoencoderKL takes none"):
        load_talora(vae, "somewhere/else")
    assert not hasattr(vae, "timestep_router")
