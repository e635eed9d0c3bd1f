"""Quantized models in forked processes, in several threads, interrupted, and in a process that has to end."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import make_unet, run
from diffusers import UNet2DModel
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, Dataset

from diffusers_msfp import MSFPConfig, calibration_state, freeze, set_engine
from diffusers_msfp.calibration import observe
from diffusers_msfp.calibration.observer import Observation
from diffusers_msfp.engines.kernels import NAME
from diffusers_msfp.layers.convert import layers_by_name
from diffusers_msfp.plugin.quantize import quantize_model

SECONDS = 120  # of a child that hangs


@pytest.fixture(autouse=True)
def _one_thread():
    """Torch's own threads do not survive a fork either: only with one does a float model run in a child."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(packed_pipe):
    """Its weights are expanded by a parallel kernel in every call."""
    set_engine(packed_pipe, "auto", memory="low")
    return packed_pipe.unet


class Denoised(Dataset):
    """Pictures that a quantized model has denoised in the loader's worker."""

    def __init__(self, model) -> None:
        self.model, self.noise = model, torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> torch.Tensor:
        return run(self.model, self.noise[index : index + 1])[0]


def work(model, noise, connection) -> None:
    connection.send(run(model, noise).numpy())


def in_a_child(model, noise) -> torch.Tensor:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(model, noise, theirs), daemon=True)
    child.start()
    theirs.close()
    assert ours.poll(SECONDS), "the child hangs"
    result = torch.from_numpy(ours.recv())  # EOFError if it died
    child.join(SECONDS)
    assert child.exitcode == 0
    return result


@pytest.mark.situation("a quantized model runs in a process that was forked after it had run in the parent", "right")
def test_fork_after_a_parallel_kernel(packed_dir):
    """In a process of its own: kernels have one thread in each of those that run the tests."""
    code = "import sys, test_processes; test_processes.fork_after_a_parallel_kernel(sys.argv[1])"
    here = Path(__file__).parent
    environment = os.environ | {
        "NUMBA_NUM_THREADS": "3",
        "PYTHONPATH": os.pathsep.join([*map(str, (here, *here.parents[:2])), os.environ.get("PYTHONPATH", "")]),
    }
    for name in ("OMP_NUM_THREADS", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code, packed_dir]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3 * SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def fork_after_a_parallel_kernel(folder: str) -> None:
    torch.set_num_threads(1)
    model, images = UNet2DModel.from_pretrained(folder, subfolder="unet"), torch.randn(2, 3, 8, 8)
    set_engine(model, "auto", memory="low")
    expected = run(model, images)
    if NAME == "numba":
        from diffusers_msfp.engines.kernels.numba_kernels import _Pool, numba

        assert numba.config.NUMBA_NUM_THREADS > 1
        assert _Pool.started
    assert torch.equal(in_a_child(model, images), expected)
    assert torch.equal(run(model, images), expected)  # the parent goes on with its threads


@pytest.mark.situation("a quantized model denoises in the worker of a `DataLoader`", "right")
def test_worker_of_a_data_loader(model):
    data = Denoised(model)
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context="fork", timeout=SECONDS)
    assert torch.equal(next(iter(loader)), expected)


THREADED = """
import os
from concurrent.futures import ThreadPoolExecutor
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import openvino, torch
openvino.Core()
from diffusers_msfp.engines.kernels import softmax_numerators
with ThreadPoolExecutor(1) as pool:
    pool.submit(softmax_numerators, torch.zeros(64, 64, dtype=torch.bfloat16)).result()
"""
"""A kernel in another thread than the main one, as in a Space, on one core, with the pool at hand that OpenVINO has."""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system gives a process no cores of its own")
@pytest.mark.situation("kernels run in a thread, on one core, beside OpenVINO: the process ends", "right")
def test_a_process_ends():
    pytest.importorskip("openvino")
    assert subprocess.run([sys.executable, "-c", THREADED], timeout=SECONDS, check=False).returncode == 0


def observing():
    unet = make_unet()
    quantize_model(unet, MSFPConfig("w4a4"))
    return unet


def sums(unet) -> set[str]:
    """Layers that know to read a residual sum."""
    return {name for name, layer in layers_by_name(unet).items() if layer.input_is_sum}


@pytest.fixture(scope="module")
def known() -> set[str]:
    unet = observing()
    run(unet, torch.randn(2, 3, 8, 8), 999)
    return sums(unet)


@pytest.mark.situation("two visitors at once while a model observes its first run", "right")
def test_the_first_call_in_two_threads(images, known):
    unet, inside, over = observing(), threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            over.wait(SECONDS)

    unet.mid_block.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, unet, images, 999)
        assert inside.wait(SECONDS)
        run(unet, images, 999)
        over.set()
        first.result()
        assert not pool.submit(_get_current_function_mode_stack).result()
    assert not _get_current_function_mode_stack()
    assert sums(unet) == known
    assert not unet.conv_in._forward_pre_hooks


@pytest.mark.situation("the first call of an observing model is interrupted by Ctrl-C", "right")
@pytest.mark.parametrize("then", [lambda unet, x: run(unet, x, 999), lambda unet, _: freeze(unet)])
def test_an_interrupted_first_call(images, known, then):
    unet = observing()

    def stop(*_):
        raise KeyboardInterrupt

    interrupted = unet.mid_block.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(unet, images, 999)
    interrupted.remove()
    with torch.device("cpu"):
        device = _get_current_function_mode_stack()[-1]
        then(unet, images)
        assert _get_current_function_mode_stack() == [device]
    assert not unet.conv_in._forward_pre_hooks
    assert sums(unet) == (known if calibration_state(unet) == "observing" else set())
    pickle.loads(pickle.dumps(unet))


@pytest.mark.situation("a second visitor comes while the first run is observed: it is observed to its end", "right")
def test_a_second_visitor_ends_no_run(images):
    unet, states = observing(), []
    with ThreadPoolExecutor(1) as other:
        for timestep in (999, 700, 500):
            run(unet, images, timestep)
        for timestep in (999, 600):
            other.submit(run, unet, images, timestep).result()
            states.append(calibration_state(unet))
        run(unet, images, 0)
        states.append(calibration_state(unet))
        other.submit(run, unet, images, 300).result()
        states.append(calibration_state(unet))
    assert states == ["observing"] * 4
    with ThreadPoolExecutor(1) as third:  # the first run is over, and a new one begins
        third.submit(run, unet, images, 999).result()
    assert calibration_state(unet) == "frozen"


@pytest.mark.situation("many threads show a layer values at once: all are counted", "right")
def test_values_of_many_threads_are_counted():
    observation, x = Observation(), torch.rand(1000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: observe(observation, x, "layer"), range(100)))
    assert int(observation.count) == 100_000
    assert (observation.drawn() > 0).float().mean() > 0.99
