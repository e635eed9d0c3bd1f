"""Engines leaf by leaf, in models of every kind: each leaf sees what the reference's sees, and gives what that gives.

Whole models cannot be compared so tightly: a last bit flips a step somewhere, and all that follows is another number.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import call_in_its_block, make_condition_unet, make_dit, make_unet, make_vae
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_msfp import MSFPConfig, freeze, set_engine
from diffusers_msfp.assets import TUNED_MODELS
from diffusers_msfp.engines import ENGINES
from diffusers_msfp.engines.fusion.norms import FusedGroupNorm
from diffusers_msfp.engines.fusion.processors import BF16AttnProcessor
from diffusers_msfp.engines.int8 import products_are_exact
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.numerics import Codes
from diffusers_msfp.plugin.quantize import quantize_model

EXACT = 1e-5  # relative; sums of floats in another order
BORDER = 1e-4  # share of values so near to a border between two codes that the last bit of a norm decides
OUTSIDE = 1e-6  # relative; what no engine touches, and norms whose next layer takes no codes


def text() -> torch.Tensor:
    return torch.randn(2, 5, 16)


def latents(size: int = 8) -> torch.Tensor:
    return torch.randn(2, 4, size, size)


SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 4}

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple]]] = {
    "cross-attention": (lambda: make_condition_unet(**SMALL), lambda: (latents(), 10, text())),
    "linear projections, two blocks": (
        lambda: make_condition_unet(**SMALL, use_linear_projection=True, transformer_layers_per_block=2),
        lambda: (latents(), 10, text()),
    ),
    "dit": (lambda: make_dit(num_layers=2), lambda: (latents(), torch.tensor([10, 700]), torch.tensor([1, 2]))),
    "scale and shift": (
        lambda: make_unet(**SMALL, resnet_time_scale_shift="scale_shift"),
        lambda: (torch.randn(2, 3, 8, 8), 10),
    ),
    "residual resampling": (
        lambda: make_unet(**SMALL, downsample_type="resnet", upsample_type="resnet"),
        lambda: (torch.randn(2, 3, 8, 8), 10),
    ),
    "autoencoder": (lambda: make_vae(block_out_channels=(16,)), lambda: (torch.randn(1, 3, 16, 16),)),
}


def norms_of(model: nn.Module, name: str) -> list[nn.Module]:
    return [child for module in model.modules() if isinstance(child := getattr(module, name, None), nn.GroupNorm)]


def on_each(name: str, hook: Callable, kind: str) -> Callable:
    """Puts a hook on all norms of this name, or with no name on all modules there are."""

    def attach(model: nn.Module) -> list:
        if not name:
            whole = {"pre": register_module_forward_pre_hook, "post": register_module_forward_hook}[kind]
            return [whole(lambda m, *rest: hook(m, *rest) if isinstance(m, nn.GroupNorm) else None)]
        attach_to = {"pre": nn.Module.register_forward_pre_hook, "post": nn.Module.register_forward_hook}[kind]
        return [attach_to(norm, hook) for norm in norms_of(model, name)]

    return attach


def same_input(_norm, args):
    return (args[0] * 1.0,)


def same_output(_norm, _args, output):
    return output * 1.0


def zeros(_norm, args, *output):
    return torch.zeros_like(output[0]) if output else (torch.zeros_like(args[0]),)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def tuned(request) -> tuple[UNet2DModel, torch.Tensor, dict[str, torch.Tensor]]:
    """A model that the package brings, an input, and what each engine gives without hooks."""
    dtype = request.param
    model = UNet2DModel.from_pretrained(TUNED_MODELS["w4a8"], subfolder="unet", torch_dtype=dtype).eval()
    x, plain = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype), {}
    for engine in ("auto", "reference"):
        set_engine(model, engine)
        plain[engine] = model(x, 500).sample.float()
    return model, x, plain


@pytest.mark.parametrize("name", ["norm1", "norm2", "group_norm", "conv_norm_out", ""])
@pytest.mark.parametrize("kind", ["pre", "post"])
@torch.no_grad()
def test_hooks_on_norms_work_as_without_fusion(name, kind, tuned):
    """One that changes nothing leaves the result; one that gives zeros has the effect that it has on the reference."""
    model, x, plain = tuned

    def run(hook: Callable, engine: str = "auto") -> torch.Tensor:
        set_engine(model, engine)
        handles = on_each(name, hook, kind)(model)
        try:
            return model(x, 500).sample.float()
        finally:
            for handle in handles:
                handle.remove()

    level = 3 * relative(plain["auto"], plain["reference"])  # what engines differ by
    assert relative(run(same_input if kind == "pre" else same_output), plain["auto"]) <= level
    expected = run(zeros, "reference")
    assert relative(expected, plain["auto"]) > level
    assert relative(run(zeros), expected) <= level


@torch.no_grad()
def test_a_time_embedding_of_another_batch_is_added_to_every_sample():
    """Blocks that somebody calls with one embedding for all samples; what cannot be broadcast is refused as ever."""
    model = UNet2DModel.from_pretrained(TUNED_MODELS["w4a8"], subfolder="unet").eval()
    model(torch.randn(1, 1, 32, 32), 500)
    block = model.mid_block.resnets[0]
    x, embedding = torch.randn(3, block.in_channels, 8, 8), torch.randn(1, block.time_emb_proj.in_features)
    assert torch.equal(block(x, embedding), block(x, embedding.expand(3, -1)))
    with pytest.raises(RuntimeError, match="size"):
        block(x, embedding.expand(2, -1))
    with pytest.raises(RuntimeError, match="size"):
        model(torch.randn(1, 1, 32, 32), torch.tensor([10, 500, 900]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_norms_before_a_peft_adapter_are_as_exact_as_torchs(dtype):
    """Such an adapter reads floats: the norm gives them, by the same kernel where it is as precise."""
    model = make_unet(**SMALL)
    quantize_model(model, MSFPConfig(scheme="w4a8"))
    model(torch.randn(2, 3, 8, 8), 10)
    freeze(model)
    set_engine(model, "auto")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False), model)
    norms = [m for m in model.modules() if type(m) is FusedGroupNorm and hasattr(m.feeds.layer(), "base_layer")]
    assert norms
    by_torch = TorchCalls("aten.native_group_norm")
    for norm in norms:
        x, added = torch.randn(2, norm.num_channels, 8, 8) * 3 + 1, torch.randn(2, norm.num_channels)
        exact = copy.deepcopy(norm).double()
        for more in (None, added):
            whole = x.to(dtype).double() if more is None else x.to(dtype).double() + more.to(dtype)[:, :, None, None]
            expected = F.group_norm(whole, norm.num_groups, exact.weight, exact.bias, norm.eps)
            with by_torch:
                y = norm.to(dtype)(x.to(dtype), None if more is None else more.to(dtype))
            assert y.dtype == dtype
            assert relative(y, expected) <= max(OUTSIDE, 2 * torch.finfo(dtype).eps)
        bad = torch.full_like(x, float("nan")).to(dtype)
        assert norm(bad).isnan().all()
    assert by_torch.count == (0 if dtype != torch.float64 else 2 * len(norms))


LEFT = {  # norms that work on rows, or are followed by something else than a layer
    "embedded": {"group_norm"},
    "cross-attention": set(),
    "linear projections, two blocks": {"norm"},
    "dit": set(),
    "scale and shift": {"group_norm", "norm2"},
    "residual resampling": {"group_norm", "norm1"},
    "autoencoder": {"group_norm"},
}


def float_model(name: str, embedded) -> tuple[nn.Module, tuple]:
    """A model of one's own, and arguments for it."""
    torch.manual_seed(0)
    if name == "embedded":
        return copy.deepcopy(embedded.unet), (torch.randn(2, 1, 32, 32), 500)
    build, inputs = MODELS[name]
    return build().eval(), inputs()


@pytest.fixture(
    scope="module", params=[("embedded", "w4a4"), ("embedded", "w8a8"), ("dit", "w8a8")]
    + [(name, "w4a4") for name in MODELS], ids="-".join,
)  # fmt: skip
def model_and_inputs(request, embedded) -> tuple[nn.Module, tuple]:
    """A quantized model of each kind, its ranges frozen, and arguments for it."""
    name, scheme = request.param
    model, inputs = float_model(name, embedded)
    return frozen(model, inputs, scheme), inputs


@torch.no_grad()
def frozen(model: nn.Module, inputs: tuple, scheme: str) -> nn.Module:
    """Quantized, its ranges frozen, run by the reference."""
    quantize_model(model, MSFPConfig(scheme=scheme))
    set_engine(model, "reference")
    model(*inputs)
    freeze(model)
    return model


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2; 0 for two tensors of zeros."""
    norm = expected.double().norm().item()
    return (y - expected).double().norm().item() / (norm or 1.0)


class TorchCalls(TorchDispatchMode):
    """Counts an operator of torch's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(self.name)
        return func(*args, **kwargs or {})


def is_leaf(module: nn.Module) -> bool:
    return isinstance(module, QuantLayer) or not list(module.children())


def seen_by_leaves(model: nn.Module, inputs: tuple) -> dict[str, tuple]:
    """Name → arguments and output of each leaf in a call of the model."""
    seen = {}

    def remember(name: str):
        def hook(_module, args, kwargs, output):
            args = [each.clone() if isinstance(each, torch.Tensor) else each for each in args]
            seen[name] = args, kwargs, output.clone() if isinstance(output, torch.Tensor) else output

        return hook

    hooks = [m.register_forward_hook(remember(n), with_kwargs=True) for n, m in model.named_modules() if is_leaf(m)]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def check_codes(norm: FusedGroupNorm, codes: torch.Tensor, plain: torch.Tensor) -> None:
    """Codes are those that the next layer would have made of the norm's float result, and the layer makes it the same.

    Args:
        plain (`Tensor`): what the norm and the activation behind it give.
    """
    layer = norm.feeds.layer()
    if not getattr(layer.prepared, "reads_codes", False):
        assert type(codes) is torch.Tensor
        assert relative(F.silu(codes) if norm.silu else codes, plain) <= OUTSIDE
        return
    assert type(codes) is Codes
    assert codes.dtype == plain.dtype  # to all others they are floats
    (own,) = layer.prepared.codes(plain.contiguous(memory_format=torch.channels_last), 0)
    differ = codes.bytes() != own
    assert differ.sum() <= max(1, BORDER * differ.numel())
    assert relative(layer(codes), layer(plain)) <= (EXACT if not differ.any() else 1e-2)


def runs_any(engine: str, model: torch.nn.Module) -> bool:
    """Whether an engine can run one of the model's layers here."""
    return any(ENGINES[engine]().refusal(layer) is None for _, layer in quant_layers(model))


@torch.no_grad()
def test_every_leaf_equals_the_reference(model_and_inputs):
    model, inputs = model_and_inputs
    set_engine(model, "reference")
    seen = seen_by_leaves(model, inputs)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    assert quantized <= seen.keys()
    for engine in ("int8", "bf16", "auto"):
        if engine == "int8" and not products_are_exact(255, 127) and not runs_any(engine, model):
            continue  # `w8a8` on processors that add pairs of products in 16 bits
        set_engine(model, engine)
        for name, (args, kwargs, output) in seen.items():
            leaf = model.get_submodule(name)
            result = call_in_its_block(leaf, *args) if type(leaf) is FusedGroupNorm else leaf(*args, **kwargs)
            if type(leaf) is FusedGroupNorm:
                check_codes(leaf, result, F.silu(output) if leaf.silu else output)
            elif isinstance(output, torch.Tensor):
                assert relative(result, output) <= (EXACT if name in quantized else OUTSIDE), (engine, name)


@torch.no_grad()
def test_fused_norms_equal_their_parts(model_and_inputs):
    """On inputs of all sizes, with and without what a residual block adds before its second norm."""
    model, _ = model_and_inputs
    set_engine(model, "auto")
    for norm in [module for module in model.modules() if type(module) is FusedGroupNorm]:
        for x in (torch.randn(2, norm.num_channels, 8, 8), torch.randn(1, norm.num_channels, 3, 5) * 7 + 3):
            for added in (None, torch.randn(len(x), norm.num_channels)):
                whole = x if added is None else x + added[:, :, None, None]
                plain = F.group_norm(whole, norm.num_groups, norm.weight, norm.bias, norm.eps)
                check_codes(norm, call_in_its_block(norm, x, added), F.silu(plain) if norm.silu else plain)


@pytest.mark.parametrize("name", ["embedded", *MODELS])
@torch.no_grad()
def test_what_is_fused(name, embedded):
    """All norms that stand right before a quantized layer; those of attention work on rows."""
    model, _ = float_model(name, embedded)
    quantize_model(model, MSFPConfig(scheme="w4a16"))
    set_engine(model, "auto")
    norms = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    left = {norm.rpartition(".")[2] for norm, kind in norms.items() if kind is not FusedGroupNorm}
    assert left == LEFT[name]


@pytest.mark.parametrize("name", ["embedded", "cross-attention", "autoencoder"])
@torch.no_grad()
def test_attention_is_as_exact_as_the_processor_it_replaces(name, embedded):
    """In bfloat16, against float64: with every argument that the model gives it."""
    model, inputs = float_model(name, embedded)
    seen = {}

    def remember(module, args, kwargs):
        seen[module] = args, kwargs

    hooks = [
        m.register_forward_pre_hook(remember, with_kwargs=True) for m in model.modules() if isinstance(m, Attention)
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    assert seen
    for module, (args, kwargs) in seen.items():
        rounded = copy.deepcopy(module).bfloat16()
        exact = copy.deepcopy(rounded).double()

        def call(attention, dtype, args=args, kwargs=kwargs):
            def cast(value):
                return value.bfloat16().to(dtype) if isinstance(value, torch.Tensor) else value

            return attention(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()}).double()

        exact.set_processor(AttnProcessor2_0())
        expected, errors = call(exact, torch.float64), []
        for processor in (AttnProcessor2_0(), BF16AttnProcessor()):
            rounded.set_processor(processor)
            errors.append(relative(call(rounded, torch.bfloat16), expected))
        assert errors[1] <= 1.1 * errors[0]
