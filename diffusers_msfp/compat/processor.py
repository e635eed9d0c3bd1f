"""The processor at hand: what timings depend on, and what every result that was timed says."""

import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

_SETS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables, new and old name, that keep oneDNN, and nothing else, from using newer instructions."""
_OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@lru_cache
def processor() -> str:
    """Name, family and model: `AMD EPYC, family 25, model 17`; virtual machines often give no better name."""
    about = _first_processor()
    name = about.get("model name") or platform.processor() or platform.machine()
    parts = [f"{key.removeprefix('cpu ')} {about[key]}" for key in ("cpu family", "model") if key in about]
    return ", ".join([name, *parts])


@lru_cache
def instruction_sets() -> tuple[str, ...]:
    """Those of the processor that products of matrices use, where the system lists them; else what torch uses."""
    about = _first_processor()
    flags = set((about.get("flags") or about.get("Features") or "").split())
    return tuple(each for each in _SETS if each in flags) or (torch.backends.cpu.get_cpu_capability().lower(),)


@lru_cache
def instruction_limit() -> str:
    """What oneDNN is limited to, which it reads once; empty where it is not."""
    return next((os.environ[name] for name in LIMITS if os.environ.get(name)), "")


def openmp_settings() -> dict[str, str]:
    """The environment's OpenMP variables; empty under the default settings."""
    return {name: os.environ[name] for name in _OPENMP if name in os.environ}


def _first_processor() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
