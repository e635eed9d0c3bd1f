"""Quantized models in forked processes, and in threads of a process that has to end."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from conftest import run
from torch.utils.data import DataLoader, Dataset

from diffusers_msfp import set_engine
from diffusers_msfp.engines.kernels import NAME

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
def test_fork_after_a_parallel_kernel(model, images):
    expected = run(model, images)
    if NAME == "numba":
        from diffusers_msfp.engines.kernels.numba_kernels import _Pool

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
