"""hpcckpt: PyTorch training on Slurm that survives time limits, preemption, node failures and kills."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcckpt import errors
    from hpcckpt.environment import TaskEnvironment
    from hpcckpt.errors import HpcckptError
    from hpcckpt.run import Run

__all__ = ["HpcckptError", "Run", "TaskEnvironment", "errors"]

# Resolved on first use: a login node's commands must not wait for torch.
_HOME = {
    "HpcckptError": "hpcckpt.errors",
    "Run": "hpcckpt.run",
    "TaskEnvironment": "hpcckpt.environment",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "errors":
        return importlib.import_module("hpcckpt.errors")
    raise AttributeError(f"module 'hpcckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
