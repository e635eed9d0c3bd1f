"""Small networks made from code, the embedded model, and nothing from the network."""

import atexit
import copy
import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["MSFP_AUTOTUNE"] = "0"  # equal results on every machine and in every run
if "PYTEST_XDIST_WORKER" not in os.environ:  # all that a run and its workers leave lies in one folder and goes with it
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # what pytest keeps of its last runs
    tempfile.tempdir = tempfile.mkdtemp(prefix="msfp-tests-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
    os.environ |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), tempfile.tempdir)
# where diffusers copies pipelines' code; local ones all have the same name there, so each worker has a folder
os.environ["HF_MODULES_CACHE"] = os.path.join(
    tempfile.gettempdir(), "modules", os.environ.get("PYTEST_XDIST_WORKER", "")
)
# what this machine has compiled saves minutes, what it has measured must not reach tests
os.environ.setdefault(
    "NUMBA_CACHE_DIR",
    os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "diffusers_msfp", "numba"),
)
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "cache")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # the cores are shared by the processes that run the tests
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import logging

from diffusers_msfp import quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.layers.execution import Execution

logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_custom_pipelines():
    """Diffusers gives every local `pipeline.py` the same module name."""
    yield
    sys.modules.pop("diffusers_modules.local.pipeline", None)


ONE_BLOCK = {
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": 8,
    "add_attention": False,
}
"""Of `make_unet`: as few layers as a UNet can have."""


def make_unet(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
        "norm_num_groups": 8,
    }
    return UNet2DModel(**arguments | changes).eval()


def make_condition_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**arguments | changes).eval()


def make_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{"block_out_channels": (32,), "norm_num_groups": 8} | changes).eval()


def make_dit(**changes) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "sample_size": 8,
        "num_embeds_ada_norm": 1000,
    }
    return DiTTransformer2DModel(**arguments | changes).eval()


def make_dit_pipe(**changes) -> DiTPipeline:
    """With class labels and guidance."""
    return DiTPipeline(make_dit(**changes), make_vae(), DDIMScheduler())


WAYS = ("in place", "data", "module")


@torch.no_grad()
def change_scale(layer: QuantLayer, way: str) -> None:
    """Make the scale of a layer's weight larger in one of `WAYS`, as foreign code writes to or exchanges tensors."""
    larger = 1.5 * layer.weight_scale
    if way == "in place":
        layer.weight_scale.copy_(larger)
    elif way == "data":
        layer.weight_scale.data = larger
    else:
        layer._buffers["weight_scale"] = larger


@pytest.fixture
def unet() -> UNet2DModel:
    return make_unet()


@pytest.fixture
def condition_unet() -> UNet2DConditionModel:
    return make_condition_unet()


@pytest.fixture
def tiny_pipe() -> DDPMPipeline:
    return DDPMPipeline(make_unet(), DDPMScheduler())


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> str:
    """A float pipeline's folder."""
    path = tmp_path_factory.mktemp("tiny")
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def _packed() -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    return quantize_pipeline(pipe, "w4a4", num_samples=4, num_inference_steps=3)


@pytest.fixture
def packed_pipe(_packed) -> DDPMPipeline:
    """A calibrated w4a4 pipeline of one's own."""
    return copy.deepcopy(_packed)


@pytest.fixture(scope="session")
def packed_dir(_packed, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("packed")
    _packed.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def embedded() -> DDPMPipeline:
    """The embedded model in float32; not to be changed."""
    return DiffusionPipeline.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """What is compiled and measured is kept for a module's tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Digests are not checked, so that what else is checked is seen."""
    monkeypatch.setenv("MSFP_CHECK_DIGEST", "0")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def call_in_its_block(norm, *args):
    """Call a fused norm as the block does that it belongs to; whoever else calls it gets floats."""
    scope = {"__name__": "diffusers.models"}
    exec("def forward(self, norm, *args):\n    return norm(*args)", scope)  # noqa: S102
    return scope["forward"](norm.feeds.parent, norm, *args)


def inputs_of_layers(monkeypatch) -> list[tuple]:
    """Filled with the quantized layers that run, and what each reads: a hook would let norms give floats."""
    seen, forward = [], Execution.forward
    monkeypatch.setattr(Execution, "forward", lambda layer, x: seen.append((layer, x)) or forward(layer, x))
    return seen


def run(model, x: torch.Tensor, timestep: float = 10) -> torch.Tensor:
    with torch.no_grad():
        return model(x, timestep).sample


def equal_state(a, b) -> bool:
    """Same tensors under the same names, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )
