"""Model state under names that no wrapper shows in.

DistributedDataParallel, DataParallel and torch.compile each put the wrapped module under an attribute of their own
(`module`, `_orig_mod`), which then appears in every key. It is removed by the structure of the module tree, not by its
spelling: a submodule that its author called `module` keeps its name, and a wrapper deep inside loses its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LoadReport:
    """What became of a model's state; every entry is a portable name, `reshaped` and `cast` say from what to what."""

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of the model was in the checkpoint, and nothing else."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        """Return it as one line, with a few names of each kind."""
        parts = [f"{len(self.loaded)} loaded"]
        for what, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.reshaped),
            ("of another dtype", self.cast),
        ):
            if names:
                parts.append(f"{len(names)} {what}: {_listed(names)}")
        return "; ".join(parts)


def load_model_state(module: nn.Module, state: Mapping[str, Any], *, strict: bool = True, cast: bool = False) -> LoadReport:
    """Load state with portable names into a module with any wrappers.

    Args:
        module: the target, on any device.
        state: portable name -> tensor, or a module's extra state.
        strict: refuse a state that does not fit in full; else load what fits and leave the rest of the module as it is.
        cast: accept tensors of another dtype, converted; without it they do not fit.

    Raises:
        CheckpointMismatchError: names the first missing and unexpected keys, or those of another shape; nothing was loaded.
    """
    names = portable_names(module)
    own = module.state_dict()
    pairs = {name: (own[key], state[name]) for key, name in names.items() if name in state}
    tensors = {name: pair for name, pair in pairs.items() if all(isinstance(part, torch.Tensor) for part in pair)}
    reshaped = {
        name: f"{name} {tuple(saved.shape)} for {tuple(mine.shape)}" for name, (mine, saved) in tensors.items() if saved.shape != mine.shape
    }
    differing = {
        name: f"{name} {_dtype(saved)} for {_dtype(mine)}"
        for name, (mine, saved) in tensors.items()
        if saved.dtype != mine.dtype and name not in reshaped
    }
    fitting = [name for name in pairs if name not in reshaped and (cast or name not in differing)]
    report = LoadReport(
        loaded=tuple(fitting),
        missing=tuple(name for name in names.values() if name not in state),
        unexpected=tuple(name for name in state if name not in pairs),
        reshaped=tuple(reshaped.values()),
        cast=tuple(differing.values()),
    )
    problems = [f"it lacks {_listed(report.missing)}"] if report.missing else []
    problems += [f"the model has no {_listed(report.unexpected)}"] if report.unexpected else []
    problems += [f"shapes differ: {_listed(report.reshaped)}"] if report.reshaped else []
    problems += [f"types differ: {_listed(report.cast)}"] if report.cast and not cast else []
    if problems and strict:
        raise CheckpointMismatchError(
            f"the checkpoint does not fit the model: {'; '.join(problems)}; was the model changed since it was saved?"
        )
    wanted = set(fitting)
    module.load_state_dict({key: state[name] for key, name in names.items() if name in wanted}, strict=False)
    return report


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
