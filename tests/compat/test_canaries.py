"""One canary for each internal of another package: fails with a sentence when a new version changes it."""

import copy
import inspect
import json
from pathlib import Path

import diffusers.loaders.single_file as single_file
import diffusers.loaders.single_file_model as single_file_model
import diffusers.loaders.single_file_utils as single_file_utils
import pytest
import torch
from conftest import make_unet
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.quantizers.base import DiffusersQuantizer
from pipelines import make_clip
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from diffusers_msfp import MSFPConfig
from diffusers_msfp.compat import diffusers, hooks, modules, peft, transformers
from diffusers_msfp.compat import torch as torch_compat
from diffusers_msfp.engines.fusion.fuse import FusedResnetBlock2D
from diffusers_msfp.engines.fusion.norms import fuse_norm
from diffusers_msfp.engines.fusion.processors import BF16AttnProcessor


def test_trees():
    tree = {"a": [torch.ones(2), 3], "b": (None,)}
    leaves, shape = torch_compat.tree_flatten(tree)
    assert len(leaves) == len(torch_compat.tree_leaves(tree)) == 3, "torch's trees have other leaves than before"
    assert torch_compat.tree_unflatten(leaves, shape)["a"][1] == 3, "torch's trees are put together otherwise"
    assert torch_compat.tree_map(lambda leaf: leaf, tree)["b"] == (None,), "torch's trees map `None` otherwise"


def test_what_the_processor_can():
    assert torch_compat.has_bf16_instructions() in (True, False), "torch tells otherwise whether it has bfloat16"
    if torch_compat.has_bf16_instructions() and (info := Path("/proc/cpuinfo")).exists():
        assert "bf16" in info.read_text(), "torch claims bfloat16 instructions that the processor does not name"


@pytest.mark.skipif(not torch_compat.has_int8_operators(), reason="this build of torch has no oneDNN")
def test_int8_operators():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 15, (4, 32), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-7, 8, (16, 32), dtype=torch.int8, generator=generator)
    units, zeros, bias = torch.rand(16), torch.zeros(16, dtype=torch.int64), torch.rand(16)
    packed = torch_compat.pack_int8_linear(weight)
    y = torch_compat.int8_linear(x, 0.5, 3, packed, units, zeros, bias, torch.float32)
    expected = 0.5 * units * ((x.float() - 3) @ weight.float().T) + bias
    torch.testing.assert_close(y, expected, msg="oneDNN's 8-bit linear takes other arguments than before")

    x = torch.randint(0, 15, (2, 8, 5, 5), dtype=torch.uint8, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-7, 8, (16, 8, 3, 3), dtype=torch.int8, generator=generator)
    geometry = ([2, 1], [1, 1], [1, 1], 1)
    packed = torch_compat.pack_int8_conv(weight, units, *geometry, x.shape)
    y = torch_compat.int8_conv(x, 0.5, 3, packed, units, zeros, bias, *geometry, torch.float32)
    expected = F.conv2d(0.5 * (x.float() - 3), weight.float() * units.view(-1, 1, 1, 1), bias, *geometry)
    torch.testing.assert_close(y, expected, msg="oneDNN's 8-bit convolution takes other arguments than before")


def test_integer_products():
    x = torch.randint(-7, 8, (32, 16), dtype=torch.int8)
    product = torch_compat.int8_matmul(x, x.T.contiguous())
    assert torch.equal(product, (x.int() @ x.int().T)), "torch._int_mm is not an exact product any more"


class Number(torch_compat.Opaque):
    def __init__(self, value: float) -> None:
        self.value = value


def test_operators_take_objects():
    torch_compat.register_opaque(Number, lambda number: [number.value > 0])

    @torch.library.custom_op("diffusers_msfp_canary::scale", mutates_args=())
    def scale(x: torch.Tensor, number: Number) -> torch.Tensor:
        return x * number.value

    seen = []
    scale.register_fake(lambda x, number: seen.append(torch_compat.opaque_inside(number)) or torch.empty_like(x))
    compiled, numbers = torch.compile(scale, backend="aot_eager", fullgraph=True), [Number(v) for v in (2, 3, -4)]
    for number in numbers:
        result = compiled(torch.ones(2), number)
        assert torch.equal(result, torch.full((2,), number.value)), "opaque objects are no inputs of a graph any more"
    assert set(seen) == {numbers[0], numbers[2]}, "a graph of opaque objects is not guarded as before"


def test_late_assertions():
    torch_compat.assert_later(torch.tensor(True), "never said")
    with pytest.raises(RuntimeError, match="said"):
        torch_compat.assert_later(torch.tensor(False), "said")


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolution_layers(mode):
    layer = nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode=mode)
    x, weight = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 5)
    ends = modules.padding_ends(layer)
    assert ends == [2, 2, 1, 1], "convolutions keep their padding otherwise"
    padded = F.pad(x, ends, mode="constant" if mode == "zeros" else mode)
    expected = F.conv2d(padded, weight, layer.bias)
    torch.testing.assert_close(torch_compat.convolve(layer, x, weight, layer.bias), expected)


def test_hooks_and_children():
    module = nn.Sequential(nn.Linear(2, 2))
    assert not torch_compat.is_hooked(module)
    module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    assert torch_compat.is_hooked(module), "torch keeps hooks elsewhere"
    assert len(list(torch_compat.pre_hooks(module))) == 1, "torch keeps hooks elsewhere"
    torch_compat.remove_hooks(module, lambda hook: callable(hook))
    module(torch.zeros(1, 2))
    assert not torch_compat.is_hooked(module), "a hook was not taken off"
    other = nn.Linear(2, 5)
    torch_compat.replace_children(module, {id(module[0]): other})
    assert module[0] is other, "torch keeps children elsewhere"
    assert set(torch_compat.tensors_of(other)) == {"weight", "bias"}, "torch keeps parameters elsewhere"


def test_what_is_never_cast():
    class Kept(torch_compat.StatefulModule):
        def __init__(self):
            super().__init__()
            self.parameter = nn.Parameter(torch.tensor(1 / 3), requires_grad=False)
            self.register_buffer("buffer", torch.tensor(1 / 3))
            self.moves = 0

        def before_move(self, fn):
            self.moves += 1

    module = Kept().half()
    assert module.moves == 1, "torch casts modules by another way"
    for tensor in (module.parameter, module.buffer):
        assert tensor.dtype == torch.float32, "torch casts modules by another way"
        assert tensor.item() == torch.tensor(1 / 3).item(), "a tensor was rounded on the way"


def test_tables_of_quantizers():
    for library in (diffusers, transformers):
        for table in library.quantization_tables():
            assert "msfp" in table, f"{library.__name__.rpartition('.')[2]} keeps its quantizers elsewhere"


def test_components_that_are_being_loaded(tiny_dir, monkeypatch):
    seen = []
    assert diffusers.components_being_loaded() is None
    resolve = MSFPConfig._resolve_quant_config

    def watch(self, *args, **kwargs):
        seen.append(diffusers.components_being_loaded())
        return resolve(self, *args, **kwargs)

    monkeypatch.setattr(MSFPConfig, "_resolve_quant_config", watch)
    DiffusionPipeline.from_pretrained(tiny_dir, quantization_config=MSFPConfig("w4a16"))
    assert seen, "diffusers asks a pipeline's config for its components by another method"
    assert {"unet", "scheduler"} <= seen[0].keys(), "diffusers' loader calls its table of components otherwise"


def test_pipeline_that_is_being_saved(packed_pipe, tmp_path, monkeypatch):
    seen = []
    assert diffusers.pipeline_being_saved() is None
    kind = type(packed_pipe.unet.hf_quantizer)
    assert issubclass(kind, DiffusersQuantizer)
    write = kind.get_state_dict_and_metadata

    def watch(self, *args, **kwargs):
        seen.append(diffusers.pipeline_being_saved())
        packed_pipe.register_to_config(told="now")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(kind, "get_state_dict_and_metadata", watch)
    packed_pipe.save_pretrained(tmp_path)
    assert seen == [packed_pipe], "diffusers saves the components of pipelines otherwise"
    config = json.loads((tmp_path / "model_index.json").read_text())
    assert config["told"] == "now", "diffusers writes a pipeline's config before its components"


def test_progress_bars(tiny_pipe):
    tiny_pipe.set_progress_bar_config(disable=True)
    assert diffusers.progress_bar_config(tiny_pipe) == {"disable": True}, "pipelines keep their progress bar elsewhere"


def test_old_names_of_attention_weights():
    model = make_unet()
    names = {"mid_block.attentions.0.query.weight": 0}
    diffusers.rename_old_keys(model, names)
    assert list(names) == ["mid_block.attentions.0.to_q.weight"], "diffusers renames old keys otherwise"


def test_configs_can_be_replaced():
    model = make_unet()
    diffusers.set_config(model, {**model.config, "more": 1} | {"sample_size": 9})
    assert (model.config.sample_size, model.config.more) == (9, 1), "diffusers keeps a model's config elsewhere"


def test_float_models_without_weights():
    with diffusers.no_init_weights():
        make_unet()
    left = torch.get_rng_state()
    torch.manual_seed(0)  # as `make_unet` begins
    assert torch.equal(left, torch.get_rng_state()), "diffusers draws weights otherwise"


def test_single_files_are_recognised():
    for name in ("fetch_diffusers_config", "load_single_file_checkpoint"):
        assert hasattr(single_file_utils, name), f"diffusers has no `{name}` for single files any more"
    assert single_file_model._get_single_file_loadable_mapping_class(UNet2DConditionModel) == "UNet2DConditionModel"
    assert "checkpoint_mapping_fn" in single_file_model.SINGLE_FILE_LOADABLE_CLASSES["UNet2DConditionModel"]
    assert hasattr(single_file, "load_single_file_sub_model"), "pipelines load models otherwise"
    assert hasattr(single_file_utils, "SingleFileComponentError"), "what a single file lacks is said otherwise"


def test_transformers_fills_missing_weights_by_this_method():
    name = "_move_missing_keys_from_meta_to_device"
    assert hasattr(PreTrainedModel, name), "transformers fills missing weights by another method"
    assert "missing_keys" in inspect.signature(getattr(PreTrainedModel, name)).parameters


def test_transformers_renames_tensors():
    renaming = transformers.WeightRenaming("^a.fc1.weight", "a.fc1.packed_weight")
    assert renaming.rename_source_key("a.fc1.weight")[0] == "a.fc1.packed_weight", "transformers renames otherwise"
    assert renaming.rename_source_key("a.fc1.weight_scale")[0] == "a.fc1.weight_scale", "transformers renames too much"


def test_names_and_patterns_of_peft():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    (wrapped,) = (name for name, module in model.named_modules() if type(module) is nn.Linear and "base" in name)
    assert peft.is_wrapped(wrapped), "PEFT calls the wrapped layer otherwise"
    assert peft.name_inside(f"{wrapped}.weight") == "0.weight", "PEFT calls the wrapped layer otherwise"
    assert peft.pattern_value({"q$": 3, "x": 4}, "a.x", 1) == 4, "PEFT's patterns match otherwise"
    assert peft.pattern_value({}, "a.x", 1) == 1


def test_peft_makes_layers_of_the_class_it_adapts():
    from peft import LoraConfig, inject_adapter_in_model

    class Asking(nn.Conv2d):
        def __init__(self, *sizes, **more) -> None:
            asked.append(peft.asked_by_peft())
            super().__init__(*sizes, **more)

    asked = []
    model = nn.Sequential(Asking(2, 2, 1))
    inject_adapter_in_model(LoraConfig(target_modules=["0"], r=2), model)
    assert asked == [False, True, True], "PEFT makes a convolution's LoRA otherwise: see `PackedLayer.__new__`"


# ── bodies of diffusers that are written again, against diffusers' own ───────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"out_channels": 16}, {"output_scale_factor": 2.0}, {"skip_time_act": True}])
def test_residual_block(changes):
    torch.manual_seed(0)
    block = ResnetBlock2D(**{"in_channels": 8, "temb_channels": 12, "groups": 4} | changes).eval()
    x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 12)
    expected = block(x, temb)
    again = copy.deepcopy(block)
    again.__class__ = FusedResnetBlock2D
    for norm, conv in (("norm1", "conv1"), ("norm2", "conv2")):
        fuse_norm(getattr(again, norm), again, conv, "nonlinearity")
    torch.testing.assert_close(again(x, temb), expected, msg="diffusers' ResnetBlock2D computes otherwise")


@torch.no_grad()
@pytest.mark.parametrize("cross", [False, True])
def test_attention_processor(cross):
    torch.manual_seed(0)
    sizes = {"query_dim": 32, "heads": 2, "dim_head": 16, "cross_attention_dim": 24 if cross else None}
    attention = Attention(**sizes, norm_num_groups=None if cross else 4, residual_connection=True).bfloat16().eval()
    x = torch.randn(2, 200, 32).bfloat16()
    context = torch.randn(2, 200, 24).bfloat16() if cross else None
    attention.set_processor(AttnProcessor2_0())
    expected = attention(x, context).float()
    attention.set_processor(BF16AttnProcessor())
    error = (attention(x, context).float() - expected).norm() / expected.norm()
    assert error < 0.02, "diffusers' AttnProcessor2_0 computes otherwise"


def test_copies_of_modules_and_what_changes_in_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].register_forward_hook(lambda *_: None)
    copied = modules.shadow_copy(model, lambda each: nn.Identity() if isinstance(each, nn.Dropout) else None, torch.neg)
    assert torch.equal(copied[0].weight, -model[0].weight), "torch keeps parameters elsewhere"
    assert not torch_compat.is_hooked(copied[0]), "torch keeps hooks elsewhere"
    assert type(copied[1]) is nn.Identity
    for change in (
        lambda: model[0].weight.data.add_(1),
        lambda: model[0].register_forward_pre_hook(lambda *_: None),
        lambda: setattr(model[1], "p", 0.1),
        lambda: setattr(model, "1", nn.Identity()),
        model.eval,
    ):
        snapshot = modules.Snapshot(model)
        assert snapshot.holds()
        change()
        assert not snapshot.holds(), "torch keeps something of modules elsewhere"
    assert not hooks.has_global_hooks()
    assert not hooks.has_dispatch_modes()
    with FlopCounterMode(display=False):
        assert hooks.has_dispatch_modes(), "torch counts its modes otherwise"


def test_backward_passes_have_numbers():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: seen.append(torch_compat.backward_pass()))
    for _ in range(2):
        x.sum().backward()
    assert len({*seen, -1}) == 3, "torch says otherwise which backward pass is running"
    assert torch_compat.backward_pass() == -1


def test_checkpointing_calls_a_function_of_each_block():
    unet = make_unet()
    called = []
    unet.enable_gradient_checkpointing(lambda block, *args: called.append(block) or block(*args))
    unet.train()
    unet(torch.zeros(1, 3, 8, 8), 1)
    assert called, "diffusers checkpoints otherwise"
    assert any(diffusers.checkpointing(module) is not None for module in unet.modules())


@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "disk"])
def test_group_offload_is_known(kind, tmp_path):
    unet = make_unet()
    assert diffusers.offloaded_groups(unet) is None
    disk = {"offload_to_disk_path": str(tmp_path)} if kind == "disk" else {}
    level = "block_level" if kind == "disk" else kind
    unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), level, num_blocks_per_group=1, **disk)
    assert diffusers.offloaded_groups(unet) == ("disk" if kind == "disk" else "memory"), "diffusers keeps it otherwise"


def test_models_are_saved_under_their_own_names(tmp_path):
    model = make_clip()
    model.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    own = load_file(file)
    save_file({f"text_model.{name}": value for name, value in own.items()}, file, metadata={"format": "pt"})
    for keep in (False, True):
        loaded = type(model).from_pretrained(tmp_path / "float")
        if keep:
            transformers.keep_own_names(loaded)
        loaded.save_pretrained(tmp_path / "new")
        assert (load_file(tmp_path / "new" / "model.safetensors").keys() == own.keys()) == keep


def test_changes_in_place_are_counted():
    x, before = torch.zeros(2), modules.version_of(torch.zeros(2))
    x.add_(1)
    assert modules.version_of(x) > before, "torch counts otherwise how often a tensor was changed"


def test_values_are_not_looked_at():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    modules.run_without_values(nn.SiLU(), [torch.ones(2)])
    with pytest.raises(Exception, match="_local_scalar_dense"):
        modules.run_without_values(Branching(), [torch.ones(2)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openvino_reads_traces():
    openvino = pytest.importorskip("openvino")
    from diffusers_msfp.compat.openvino import graph_of

    x = torch.randn(2, 3)
    graph = graph_of(torch.jit.trace(nn.SiLU(), x), [x])
    y = openvino.Core().compile_model(graph, "CPU")([x.numpy()])[0]
    assert torch.allclose(torch.from_numpy(y), F.silu(x), atol=1e-6), "OpenVINO's frontend gives another graph"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openvino_keeps_waves_exact_in_bfloat16():
    openvino = pytest.importorskip("openvino")
    from diffusers.models.embeddings import Timesteps

    from diffusers_msfp.compat.openvino import graph_of, keep_waves_exact

    model = nn.Sequential(Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0), nn.Linear(64, 64, bias=False))
    nn.init.eye_(model[1].weight)
    times = torch.tensor([3.0, 257.0, 515.5, 993.0])
    graph = graph_of(torch.jit.trace(model, times), [times])
    keep_waves_exact(graph)
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    y = torch.from_numpy(compiled([times.numpy()])[0])
    assert torch.allclose(y, model[0](times), atol=4e-3), "what leads to an output is rounded too"
