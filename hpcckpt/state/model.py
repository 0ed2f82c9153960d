"""Model state under names that no wrapper shows in.

DistributedDataParallel, DataParallel and torch.compile each put the wrapped module under an attribute of their own
(`module`, `_orig_mod`), which then appears in every key. It is removed by the structure of the module tree, not by its
spelling: a submodule that its author called `module` keeps its name, and a wrapper deep inside loses its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hpcckpt.errors import CheckpointMismatchError

_SHOWN = 5


def _wrapped_child(module: nn.Module) -> str | None:
    """Return the attribute under which a wrapper keeps its module; None if `module` is no wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    # torch._dynamo is slow to import and only there if something was compiled.
    if type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo"):
        return "_orig_mod"
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module inside any nesting of wrappers."""
    while (child := _wrapped_child(module)) is not None:
        module = getattr(module, child)
    return module


def wrapper_name(module: nn.Module) -> str:
    """Return the wrappers from the outside in, "DistributedDataParallel+OptimizedModule" say; "none" without any."""
    names = []
    while (child := _wrapped_child(module)) is not None:
        names.append(type(module).__name__)
        module = getattr(module, child)
    return "+".join(names) or "none"


def portable_names(module: nn.Module) -> dict[str, str]:
    """Return the portable name of every key of `module.state_dict()`."""
    # Dotted paths that end in a wrapper's own attribute: exactly these parts are dropped from a key.
    inner = set()
    for path, submodule in module.named_modules(remove_duplicate=False):
        child = _wrapped_child(submodule)
        if child is not None:
            inner.add(f"{path}.{child}" if path else child)
    names = {}
    for key in module.state_dict():
        parts = key.split(".")
        kept = [part for index, part in enumerate(parts) if ".".join(parts[: index + 1]) not in inner]
        names[key] = ".".join(kept)
    return names


def model_state(module: nn.Module) -> dict[str, Any]:
    """Return the state under portable names; tensors share memory with the module."""
    names = portable_names(module)
    return {names[key]: value for key, value in module.state_dict().items()}


def load_model_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load state with portable names into a module with any wrappers.

    Raises:
        CheckpointMismatchError: names the first missing and unexpected keys, or those of another shape; nothing was loaded.
    """
    names = portable_names(module)
    own = module.state_dict()
    problems = []
    if missing := [name for name in names.values() if name not in state]:
        problems.append(f"it lacks {_listed(missing)}")
    if unexpected := [name for name in state if name not in set(names.values())]:
        problems.append(f"the model has no {_listed(unexpected)}")
    if reshaped := [
        f"{name} {tuple(state[name].shape)} for {tuple(own[key].shape)}"
        for key, name in names.items()
        if isinstance(own[key], torch.Tensor) and name in state and state[name].shape != own[key].shape
    ]:
        problems.append(f"shapes differ: {_listed(reshaped)}")
    if problems:
        raise CheckpointMismatchError(
            f"the checkpoint does not fit the model: {'; '.join(problems)}; was the model changed since it was saved?"
        )
    module.load_state_dict({key: state[name] for key, name in names.items()})


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
