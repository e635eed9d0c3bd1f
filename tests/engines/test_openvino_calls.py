"""Calls of graphs that have once given another result than torch: what they were called with, and by whom."""

import copy

import pytest
import torch
from conftest import make_unet, run

from diffusers_msfp import set_engine
from diffusers_msfp.engines.openvino import graph_forward_of
from diffusers_msfp.layers.convert import Conversion, convert
from diffusers_msfp.sampling.observation import freeze

openvino = pytest.importorskip("openvino")
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True, scope="module")
def _store(tmp_path_factory):
    """Graphs are kept for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def packed(dtype: torch.dtype = torch.float32, scheme: str = "w4a8", **changes):
    """A small calibrated model that runs as a graph."""
    unet = make_unet(block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=16, **changes).to(dtype)
    convert(unet, Conversion.plan(unet, scheme))
    labels = {"class_labels": torch.tensor([0, 1])} if changes.get("num_class_embeds") else {}
    with torch.no_grad():
        unet(torch.randn(2, 3, 8, 8).to(dtype), 10, **labels)
    freeze(unet)
    set_engine(unet, "openvino")
    return unet


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
