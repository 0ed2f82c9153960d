"""The facts of a process that decide the bits of a training step: versions, hardware, and the switches of torch.

Two attempts of a run agree to the last bit only where these agree. They go into a checkpoint, and a restart compares
them with its own. Everything is read through interfaces that neither start CUDA nor warn: of torch's switches for TF32
only the new ones (fp32_precision), since the older ones raise once a script has used the new ones.
"""

import functools
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hpcckpt.state.text import printable

Fact = str | int | float | bool

# Without types for most of what is read here.
_BACKENDS: Any = torch.backends
_CUDA: Any = torch.cuda
_CPU_DEVICE, _CUDA_DEVICE = "cpu", "cuda"
# What libraries read from the environment at any time, and what they compute depends on.
_VARIABLES = {
    _CPU_DEVICE: ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA"),
    _CUDA_DEVICE: ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO", "NCCL_PROTO"),
}
_ASIDE = "which can change what is computed outside of torch, such as augmentation"
_HOST = "which can change what the CPU computes, such as augmentation"
# What each fact is called, and what it can change where that is not the training step itself; in the order of the report.
_FACTS: dict[str, tuple[str, str]] = {
    "seed": ("seed", ""),
    "device": ("device", ""),
    "torch": ("torch", ""),
    "gpu": ("GPU", ""),
    "cuda": ("CUDA", ""),
    "hip": ("HIP", ""),
    "cudnn": ("cuDNN", ""),
    "nccl": ("NCCL", ""),
    "num_nodes": ("number of nodes, which decides how NCCL adds", ""),
    "machine": ("machine architecture", ""),
    "cpu": ("CPU", ""),
    "cpu_capability": ("CPU instruction set used by torch", ""),
    "mkl": ("MKL", ""),
    "onednn": ("oneDNN", ""),
    "threads": ("threads of torch on the CPU", ""),
    "deterministic": ("torch.use_deterministic_algorithms", ""),
    "matmul_precision": ("float32 precision of matrix products", ""),
    "conv_precision": ("float32 precision of convolutions", ""),
    "rnn_precision": ("float32 precision of recurrent layers", ""),
    "fp16_reduction": ("reduced-precision sums in float16 matrix products", ""),
    "bf16_reduction": ("reduced-precision sums in bfloat16 matrix products", ""),
    "fp16_accumulation": ("accumulation in float16", ""),
    "attention": ("allowed kernels for attention", ""),
    "cudnn_enabled": ("torch.backends.cudnn.enabled", ""),
    "cudnn_deterministic": ("torch.backends.cudnn.deterministic", ""),
    "cudnn_benchmark": ("torch.backends.cudnn.benchmark", ""),
    "onednn_enabled": ("torch.backends.mkldnn.enabled", ""),
    "onednn_deterministic": ("torch.backends.mkldnn.deterministic", ""),
    **{variable: (f"environment variable {variable}", "") for variables in _VARIABLES.values() for variable in variables},
    "python": ("Python", _ASIDE),
    "numpy": ("NumPy", _ASIDE),
}
# These mean something else on each kind of device.
_OF_ONE_DEVICE = frozenset({"matmul_precision", "conv_precision", "rnn_precision"})
_OF_THE_HOST = frozenset({"machine", "cpu", "cpu_capability", "mkl", "onednn"})
# How torch.get_deterministic_debug_mode counts.
_MODES = {0: "off", 1: "warn only", 2: "on"}


def conditions(device: torch.device, seed: int | None = None, num_nodes: int = 1) -> dict[str, Fact]:
    """Return what decides the bits of a training step on `device`, in this process and now.

    `seed` is the run's, and `num_nodes` are those that its ranks are spread over.
    Plain values under names that later versions keep. A fact that cannot be had is left out, the GPU's name among them
    for as long as CUDA has not been started. Never raises.
    """
    readers = {**_EVERYWHERE, **_BY_DEVICE.get(device.type, {})}
    found = {"device": device.type, **_fixed(device.type), **_read(readers), **_environment(device.type)}
    gpu = _gpu(device)
    if device.type != _CPU_DEVICE:
        found["num_nodes"] = num_nodes
    if seed is not None:
        found["seed"] = seed
    return {**found, "gpu": gpu} if gpu else found


def differences(saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each fact that has changed since a checkpoint was saved and can change bits.

    Facts that only one side has are left out: another version of hpcckpt wrote them.

    Args:
        saved: `conditions` as the checkpoint has them; None or empty where it has none.
        now: `conditions` of this process.
    """
    if not saved:
        return ["the checkpoint does not say under which versions, hardware and settings it was saved (hpcckpt did not record them yet)"]
    on_gpu, same_device = now.get("device") != _CPU_DEVICE, saved.get("device") == now.get("device")
    sentences = []
    for fact, (label, can_change) in _FACTS.items():
        if not same_device and fact in _OF_ONE_DEVICE:
            continue
        then, current = saved.get(fact), now.get(fact)
        if not isinstance(then, Fact) or not isinstance(current, Fact) or then == current:
            continue
        suffix = can_change or (_HOST if on_gpu and fact in _OF_THE_HOST else "")
        sentences.append(f"{label} {_shown(then)} then, {_shown(current)} now{f', {suffix}' if suffix else ''}")
    return sentences


def doubts(now: Mapping[str, Any]) -> list[str]:
    """Return why two runs may differ even under equal conditions; nothing on a CPU."""
    device = now.get("device", _CPU_DEVICE)
    if device == _CPU_DEVICE:
        return []
    found = []
    mode = now.get("deterministic")
    if mode in {"off", "warn only"}:
        found.append(
            f"torch.use_deterministic_algorithms {'is off' if mode == 'off' else 'only warns'}, so that some operations on "
            f"{str(device).upper()} add in another order each time"
        )
    if now.get("cudnn_benchmark") is True:
        found.append("torch.backends.cudnn.benchmark is on, so that each process chooses its convolutions by measured time")
    return found


def _shown(value: Fact) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else printable(str(value)) or "unset"


def _read(readers: Mapping[str, Callable[[], Any]]) -> dict[str, Fact]:
    """Return what can be read, as plain values."""
    facts: dict[str, Fact] = {}
    for name, reader in readers.items():
        try:
            value = reader()
        except Exception:  # noqa: BLE001, S112 - a build of torch without it; a report must not stop a run
            continue
        if value is not None:
            facts[name] = value if isinstance(value, bool | int) else str(value)
    return facts


@functools.cache
def _fixed(kind: str) -> dict[str, Fact]:
    """Return what stays the same for the life of the process."""
    readers: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch.__version__,
        "machine": platform.machine,
        "cpu": lambda: torch.cpu.get_capabilities()["cpu_name"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability,
        "mkl": lambda: _library("Math Kernel Library"),
        "onednn": lambda: _library("MKL-DNN v"),
        # Later ones correct errors; sum() of floats and random's methods have changed between these.
        "python": lambda: f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    if kind == _CUDA_DEVICE:
        readers |= {
            "cuda": lambda: torch.version.cuda,
            "hip": lambda: torch.version.hip,
            "cudnn": _BACKENDS.cudnn.version,
            "nccl": lambda: ".".join(map(str, _CUDA.nccl.version())),
        }
    return _read(readers)


def _library(name: str) -> str | None:
    """Return what torch tells of a library, as of now: some builds of torch link them at run time."""
    return next((line.strip(" -") for line in torch.__config__.show().splitlines() if name in line), None)


def _environment(kind: str) -> dict[str, Fact]:
    return {variable: os.environ.get(variable, "") for variable in _VARIABLES.get(kind, ())}


def _gpu(device: torch.device) -> str | None:
    """Return the GPU's name, if CUDA runs already: asking for it would start CUDA."""
    try:
        return str(_CUDA.get_device_name(device)) if device.type == _CUDA_DEVICE and _CUDA.is_initialized() else None
    except Exception:  # noqa: BLE001 - a device that is not there, or has failed
        return None


def _numpy() -> str | None:
    return getattr(sys.modules.get("numpy"), "__version__", None)


def _precision(holder: Any) -> str:
    """Return what float32 is computed in; torch says "none" where nobody chose, which is plain float32."""
    chosen = str(holder.fp32_precision)
    return "ieee" if chosen == "none" else chosen


def _attention() -> str:
    backends = _BACKENDS.cuda
    allowed = {
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
        "cuDNN": backends.cudnn_sdp_enabled(),
    }
    return ", ".join(name for name, is_allowed in allowed.items() if is_allowed)


_EVERYWHERE: dict[str, Callable[[], Any]] = {
    "numpy": _numpy,
    "deterministic": lambda: _MODES[torch.get_deterministic_debug_mode()],
}
_BY_DEVICE: dict[str, dict[str, Callable[[], Any]]] = {
    _CPU_DEVICE: {
        "threads": torch.get_num_threads,
        "matmul_precision": lambda: _precision(_BACKENDS.mkldnn.matmul),
        "conv_precision": lambda: _precision(_BACKENDS.mkldnn.conv),
        "rnn_precision": lambda: _precision(_BACKENDS.mkldnn.rnn),
        "onednn_enabled": lambda: _BACKENDS.mkldnn.enabled,
        "onednn_deterministic": lambda: _BACKENDS.mkldnn.deterministic,
    },
    _CUDA_DEVICE: {
        "matmul_precision": lambda: _precision(_BACKENDS.cuda.matmul),
        "conv_precision": lambda: _precision(_BACKENDS.cudnn.conv),
        "rnn_precision": lambda: _precision(_BACKENDS.cudnn.rnn),
        "fp16_reduction": lambda: _BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bf16_reduction": lambda: _BACKENDS.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "fp16_accumulation": lambda: _BACKENDS.cuda.matmul.allow_fp16_accumulation,
        "attention": _attention,
        "cudnn_enabled": lambda: _BACKENDS.cudnn.enabled,
        "cudnn_deterministic": lambda: _BACKENDS.cudnn.deterministic,
        "cudnn_benchmark": lambda: _BACKENDS.cudnn.benchmark,
    },
}
