"""hpcckpt: PyTorch training on Slurm that survives time limits, preemption, node failures and kills."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcckpt import errors
    from hpcckpt.environment import TaskEnvironment
    from hpcckpt.errors import HpcckptError
    from hpcckpt.manager import DDPCheckpointManager
    from hpcckpt.run import Run
    from hpcckpt.state.model import LoadReport
    from hpcckpt.state.prefixes import add_module_prefix, normalize_state_dict, remove_module_prefix
    from hpcckpt.weights import (
        load_checkpoint_universal,
        load_dataparallel_checkpoint,
        load_weights,
        save_dataparallel_checkpoint,
        save_safetensors,
    )

__all__ = [
    "DDPCheckpointManager",
    "HpcckptError",
    "LoadReport",
    "Run",
    "TaskEnvironment",
    "add_module_prefix",
    "errors",
    "load_checkpoint_universal",
    "load_dataparallel_checkpoint",
    "load_weights",
    "normalize_state_dict",
    "remove_module_prefix",
    "save_dataparallel_checkpoint",
    "save_safetensors",
]

# Resolved on first use: a login node's commands must not wait for torch.
_HOME = {
    "DDPCheckpointManager": "hpcckpt.manager",
    "HpcckptError": "hpcckpt.errors",
    "LoadReport": "hpcckpt.state.model",
    "Run": "hpcckpt.run",
    "TaskEnvironment": "hpcckpt.environment",
    "add_module_prefix": "hpcckpt.state.prefixes",
    "load_checkpoint_universal": "hpcckpt.weights",
    "load_dataparallel_checkpoint": "hpcckpt.weights",
    "load_weights": "hpcckpt.weights",
    "normalize_state_dict": "hpcckpt.state.prefixes",
    "remove_module_prefix": "hpcckpt.state.prefixes",
    "save_dataparallel_checkpoint": "hpcckpt.weights",
    "save_safetensors": "hpcckpt.weights",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "errors":
        return importlib.import_module("hpcckpt.errors")
    raise AttributeError(f"module 'hpcckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
