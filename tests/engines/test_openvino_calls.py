"""Calls of graphs that have once given another result than torch: what they were called with, and by whom."""

import copy
import functools
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import ONE_BLOCK, make_condition_unet, make_unet, run
from elsewhere import ONE_BLOCK_WITH_TEXT

from diffusers_msfp import set_engine
from diffusers_msfp.engines.choose import engines_of
from diffusers_msfp.engines.openvino import forward, graph_forward_of, obstacles
from diffusers_msfp.engines.openvino.layers import Inputs
from diffusers_msfp.engines.openvino.record import UNSOUND
from diffusers_msfp.engines.openvino.rounding import Grid
from diffusers_msfp.errors import MSFPError, NonFiniteError, UnsupportedError
from diffusers_msfp.formats import FORMATS
from diffusers_msfp.layers.convert import Conversion, convert
from diffusers_msfp.sampling.observation import freeze

openvino = pytest.importorskip("openvino")

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("own_cache")]


@functools.cache
def _calibrated(dtype: torch.dtype, scheme: str, **changes):
    torch.manual_seed(0)
    unet = make_unet(**ONE_BLOCK | {"add_attention": True, **changes}).to(dtype)
    convert(unet, Conversion.plan(unet, scheme))
    labels = {"class_labels": torch.tensor([0, 1])} if changes.get("num_class_embeds") else {}
    with torch.no_grad():
        unet(torch.randn(2, 3, 8, 8).to(dtype), 10, **labels)
    freeze(unet)
    return unet


def packed(dtype: torch.dtype = torch.float32, scheme: str = "w4a8", **changes):
    """A small calibrated model that runs as a graph."""
    unet = copy.deepcopy(_calibrated(dtype, scheme, **changes))
    set_engine(unet, "openvino")
    return unet


@functools.cache
def _calibrated_with_text(dtype: torch.dtype):
    torch.manual_seed(0)
    unet = make_condition_unet(**ONE_BLOCK_WITH_TEXT).to(dtype)
    convert(unet, Conversion.plan(unet, "w4a8"))
    x, text = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 5, unet.config.cross_attention_dim).to(dtype)
    with torch.no_grad():
        unet(x, 10, text)
    freeze(unet)
    return unet, x, text


def packed_with_text(dtype: torch.dtype):
    """A small text-conditional one, and what it was calibrated on: a sample and a text."""
    unet, x, text = copy.deepcopy(_calibrated_with_text(dtype))
    set_engine(unet, "openvino")
    return unet, x, text


def by_layers(model):
    """A copy that runs layer by layer."""
    other = copy.deepcopy(model)
    set_engine(other, "auto")
    return other


def difference(y: torch.Tensor, other: torch.Tensor) -> float:
    """Relative."""
    return float((y.float() - other.float()).norm() / other.float().norm())


VIEWS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_tensors_that_are_not_contiguous_are_read_whole(view):
    model, x = packed(), torch.randn(2, 3, 8, 8)
    for seed in range(3):
        x = VIEWS[view](torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
        assert difference(run(model, x), run(by_layers(model), x)) < 0.05
    assert graph_forward_of(model).latest is None


def test_threads_that_call_at_once_have_the_models_own_graph(monkeypatch):
    """One that came while another looked at the model had the old digest, or none, as the name of its graph."""
    model, x = packed(), torch.randn(2, 3, 8, 8)
    digest_of = forward.digest_of

    begun, over = threading.Event(), threading.Event()

    def slowly(*arguments):
        begun.set()
        over.wait(1.0)
        return digest_of(*arguments)

    monkeypatch.setattr(forward, "digest_of", slowly)
    for _ in range(2):
        with torch.no_grad():
            model.conv_out.bias.add_(1)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(run, model, x)
            begun.wait()
            second = pool.submit(run, model, x)
        begun.clear()
        wanted = run(by_layers(model), x)
        assert all(difference(each.result(), wanted) < 0.05 for each in (first, second))


def test_a_graph_that_gives_something_else_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(forward, "_GRAPHS", OrderedDict())

    def refuse(*_):
        raise UnsupportedError("its graph gives another result than torch")

    monkeypatch.setattr(forward.runtime, "check", refuse)
    model, x = packed(), torch.randn(2, 3, 8, 8)
    assert torch.equal(run(model, x), run(by_layers(model), x))
    assert "another result" in graph_forward_of(model).latest
    assert not [*tmp_path.rglob("graph.blob")]


@pytest.mark.parametrize("labels", [[1, 10], [1, 50_000], [-1, 2], [1, -11]])
def test_rows_that_a_table_does_not_have_are_an_error(labels):
    model, x = packed(num_class_embeds=10), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        y = model(x, 10, torch.tensor([0, 9])).sample
        assert graph_forward_of(model).latest is None
        assert difference(y, by_layers(model)(x, 10, torch.tensor([0, 9])).sample) < 0.05
        with pytest.raises(IndexError):
            model(x, 10, torch.tensor(labels))
        assert torch.equal(model(x, 10, torch.tensor([0, 9])).sample, y)


def test_a_first_call_with_wrong_rows_leaves_no_trace():
    model, x = packed(num_class_embeds=11), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with pytest.raises(IndexError):
            model(x, 10, torch.tensor([1, 11]))
        model(x, 10, torch.tensor([1, 10]))
    assert graph_forward_of(model).latest is None


def outcome(model, x: torch.Tensor) -> torch.Tensor | str:
    """What a call gives, or the error it ends with."""
    try:
        return run(model, x)
    except MSFPError as error:
        return f"{type(error).__name__}: {error}"


NOT_FINITE = {
    "bias": lambda model: model.mid_block.resnets[0].conv2.bias.fill_(torch.inf),
    "norm": lambda model: model.mid_block.resnets[0].norm2.weight.fill_(torch.nan),
}


@pytest.mark.parametrize("part", NOT_FINITE)
@torch.no_grad()
def test_parameters_that_are_not_finite_run_in_torch(part):
    model, x = packed(), torch.randn(2, 3, 8, 8)
    run(model, x)
    NOT_FINITE[part](model)
    first, second = outcome(model, x), outcome(by_layers(model), x)
    assert first == second if isinstance(first, str) else torch.equal(first, second)
    assert "holds NaN or infinity" in graph_forward_of(model).latest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_overflow_within_are_an_error(dtype):
    model, x = packed(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    y = run(model, x)
    assert graph_forward_of(model).latest is None
    first, second = outcome(model, x * 1e38), outcome(by_layers(model), x * 1e38)
    assert first == second
    assert first.startswith("NonFiniteError")
    assert torch.equal(run(model, x), y)
    assert graph_forward_of(model).latest is None


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_graphs_find_what_is_not_finite_anywhere(value, dtype, monkeypatch):
    """One number of a text, as if nobody had looked at arguments."""
    monkeypatch.setattr(obstacles, "of_call", lambda *_: None)
    model, x, text = packed_with_text(dtype)
    with torch.no_grad():
        model(x, 10, text)
        assert graph_forward_of(model).latest is None
        text[1, 2, 3] = value
        with pytest.raises(NonFiniteError):
            model(x, 10, text)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@torch.no_grad()
def test_graphs_find_one_number_wherever_it_enters(value, dtype, monkeypatch):
    """In the sample, and in each of what a ControlNet adds to: norms read it, of which one value tells."""
    monkeypatch.setattr(obstacles, "of_call", lambda *_: None)
    model, x, text = packed_with_text(dtype)
    set_engine(model, "auto")
    skips, hooks = [], []
    for part in (model.conv_in, *model.down_blocks, model.mid_block):
        hooks.append(part.register_forward_hook(lambda _, __, y: skips.extend(y[1] if isinstance(y, tuple) else [y])))
    model(x, 10, text)
    for hook in hooks:
        hook.remove()
    set_engine(model, "openvino")
    *down, middle = [torch.zeros_like(each) for each in skips]
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    y = model(x, 10, text, **added).sample
    for each in (x, *down, middle):
        before, each[1, 2, 3, -1] = each[1, 2, 3, -1].item(), value
        with pytest.raises(NonFiniteError):
            model(x, 10, text, **added)
        assert graph_forward_of(model).latest == UNSOUND
        each[1, 2, 3, -1] = before
    assert torch.equal(model(x, 10, text, **added).sample, y)
    assert graph_forward_of(model).latest is None


@pytest.mark.parametrize("part", ["down_blocks.0.resnets.0.norm1", "conv_norm_out"])
def test_norms_that_make_infinity_are_noticed(part):
    model, x = packed(), torch.randn(2, 3, 8, 8)
    model.get_submodule(part).weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError), torch.no_grad():
        model(x, 10)


def test_norms_without_a_bias():
    model, x = packed(torch.bfloat16), torch.randn(2, 3, 8, 8).bfloat16()
    for norm in (each for each in model.modules() if isinstance(each, torch.nn.GroupNorm)):
        norm.bias = None
    y = run(model, x)
    assert graph_forward_of(model).latest is None
    assert difference(y, run(by_layers(model), x)) < 0.3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_write_in_place_makes_another_tensor(mode):
    with mode():
        inputs, x = Inputs(), torch.ones(2, 3)
        inputs.begin(None)
        grid = Grid(FORMATS["fp8_e1m6"], 0.5, 2.0, 0)
        inputs.soundness.trust(x)
        inputs.soundness.watch(x)
        before = inputs.quantize(x, grid)
        assert torch.isfinite(inputs.soundness.total())
        x += torch.nan
        inputs.soundness.watch(x)
        assert not torch.isfinite(inputs.soundness.total())
        x.fill_(2)
        assert not torch.equal(inputs.quantize(x, grid), before)


TIMES = {
    "float32": lambda timestep: torch.tensor(timestep, dtype=torch.float32),
    "int64": torch.tensor,
    "int32 of each sample": lambda timestep: torch.tensor([timestep] * 2, dtype=torch.int32),
}


@pytest.mark.parametrize("how", ["float32", *(pytest.param(each, marks=pytest.mark.slow) for each in [*TIMES][1:])])
def test_bfloat16_graphs_know_odd_timesteps(how):
    """Their errors are those of rounding, which every timestep has, and not those of another timestep."""
    deep = {"block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    deep |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16}
    model, x = packed(torch.bfloat16, "w8a8", **deep), torch.randn(2, 3, 8, 8).bfloat16()
    layers = by_layers(model)
    errors = {}
    with torch.no_grad():
        for timestep in (256, 512, 992, 257, 515, 993, 997):
            y = model(x, TIMES[how](timestep)).sample
            errors[timestep] = difference(y, layers(x, timestep).sample)
        apart = difference(layers(x, 992).sample, layers(x, 993).sample)
    assert graph_forward_of(model).latest is None
    assert max(errors.values()) < 0.7 * apart, errors


def patch_scores(model):
    attention = model.mid_block.attentions[0]
    scores = type(attention).get_attention_scores
    attention.get_attention_scores = lambda *args: scores(attention, *args) * 0.5


def test_plain_tensors_are_known_by_their_values():
    model, x = packed(), torch.randn(2, 3, 8, 8)
    model.time_proj.scale = torch.tensor(0.2)
    assert difference(run(model, x, 500), run(by_layers(model), x, 500)) < 0.05
    for change in (lambda: model.time_proj.scale.mul_(0.5), lambda: model.time_proj.scale.data.mul_(4)):
        change()
        assert difference(run(model, x, 500), run(by_layers(model), x, 500)) < 0.05
    assert graph_forward_of(model).latest is None


UNKNOWN = {
    "function": patch_scores,
    "object": lambda model: setattr(model.mid_block, "table", OrderedDict(unknown=Table())),
    "module": lambda model: setattr(model.mid_block, "aside", [torch.nn.Linear(2, 2)]),
}


class Table:
    """Of which nothing is known."""


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_nothing_is_known_of_runs_in_torch(what):
    model, x = packed(), torch.randn(2, 3, 8, 8)
    run(model, x)
    UNKNOWN[what](model)
    assert torch.equal(run(model, x), run(by_layers(model), x))
    assert "of which nothing is known" in graph_forward_of(model).latest


def test_formats_count():
    """Which are objects: equal bytes in another format are another model."""
    model = packed()
    seen = {forward.Seen.of(model).digest}
    model.conv_in.weight_format = FORMATS["fp8_e2m5"]
    seen.add(forward.Seen.of(model).digest)
    model.mid_block.numbers = [1, 2]
    look = graph_forward_of(model)._look
    for _ in range(2):
        seen.add(look()[0].digest)
        model.mid_block.numbers.append(3)
    assert len(seen) == 4


def test_writes_anywhere_in_a_float_tensor_are_seen():
    model, x = packed(num_class_embeds=1000), torch.randn(2, 3, 8, 8)
    labels = torch.tensor([400, 999])
    with torch.no_grad():
        model(x, 10, labels)
        for change in (lambda rows: rows[400].mul_(-20), lambda rows: rows[999, -1:].add_(9)):
            change(model.class_embedding.weight.data)
            assert difference(model(x, 10, labels).sample, by_layers(model)(x, 10, labels).sample) < 0.05
    assert graph_forward_of(model).latest is None


def test_a_model_that_does_not_change_is_looked_at_once(monkeypatch):
    model, x = packed(), torch.randn(2, 3, 8, 8)
    looks, digest_of = [], forward.digest_of
    monkeypatch.setattr(forward, "digest_of", lambda *arguments: looks.append(1) or digest_of(*arguments))
    for timestep in (10, 20, 30):
        run(model, x, timestep)
    by_layers(model)
    run(model, x)
    assert len(looks) == 1


def test_another_engine_takes_a_graph_from_below_a_hook(images):
    model = packed()
    run(model, images)
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu"))
    y = run(model, images)
    assert graph_forward_of(model) is not None
    set_engine(model, "reference")
    assert graph_forward_of(model) is None
    assert engines_of(model).keys() == {"reference"}
    exact = run(model, images)
    assert difference(y, exact) < 0.05
    assert not torch.equal(y, exact)
    set_engine(model, "openvino")
    assert torch.equal(run(model, images), y)
    remove_hook_from_module(model)
    set_engine(model, "reference")
    assert torch.equal(run(model, images), exact)
    assert graph_forward_of(model) is None


def doubled(model) -> None:
    """Put another forward on a model: somebody's, around the one that it has."""
    forward = model.forward
    model.forward = lambda *args, **kwargs: (2 * forward(*args, return_dict=False, **kwargs)[0],)


def test_another_forward_on_the_whole_model_is_called(images):
    model = packed()
    graph = run(model, images)
    set_engine(model, "auto")
    layers = run(model, images)
    doubled(model)
    set_engine(model, "openvino")
    with torch.no_grad():
        assert torch.equal(model(images, 10)[0], 2 * layers)
    assert "somebody has put another forward on it" in graph_forward_of(model).latest
    set_engine(model, "auto")
    del model.forward
    set_engine(model, "openvino")
    doubled(model)  # around the graph
    with torch.no_grad():
        assert torch.equal(model(images, 10)[0], 2 * graph)
        assert engines_of(model).keys() == {"openvino"}
        set_engine(model, "auto")
        assert engines_of(model).keys() != {"openvino"}
        assert torch.equal(model(images, 10)[0], 2 * layers)
        set_engine(model, "openvino")
        assert torch.equal(model(images, 10)[0], 2 * layers)
    assert "another forward" in graph_forward_of(model).latest


def test_a_graph_stands_above_hooks_that_move_tensors(images):
    class Doubling(ModelHook):
        def post_forward(self, _module, output):
            return type(output)(sample=2 * output.sample)

    model = packed()
    graph = run(model, images)
    for hook, expected in ((AlignDevicesHook(execution_device="cpu"), graph), (Doubling(), None)):
        set_engine(model, "auto")
        layers = run(model, images)
        add_hook_to_module(model, hook)
        set_engine(model, "openvino")
        assert torch.equal(run(model, images), 2 * layers if expected is None else expected)
        assert (graph_forward_of(model).latest is None) == (expected is not None)
        set_engine(model, "auto")
        remove_hook_from_module(model)


@pytest.mark.parametrize("wanted", [True, False, None])
@torch.no_grad()
def test_outputs_have_the_form_that_was_asked_for(images, wanted):
    model = packed()
    y = model(images, 10, return_dict=wanted)
    assert graph_forward_of(model).latest is None
    assert type(y) is type(by_layers(model)(images, 10, return_dict=wanted))
