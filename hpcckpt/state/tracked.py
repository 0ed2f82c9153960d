"""The objects a run saves and restores, by name."""

import copy
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from hpcckpt.errors import CheckpointMismatchError, UsageError
from hpcckpt.state.model import load_model_state, model_state, wrapper_name
from hpcckpt.state.portable import portable

# Bookkeeping keys of a checkpoint file; every other key is `<tracked name>_state_dict`.
FORMAT_VERSION = 1
_SUFFIX = "_state_dict"
_GROUPS = "param_groups"


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be saved and restored."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state, as tensors and primitives."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take the state back."""
        ...


class Tracked:
    """A registry of named objects. The same names on every rank."""

    def __init__(self) -> None:
        self._objects: dict[str, Stateful] = {}

    def add(self, name: str, value: object) -> None:
        """Register an object.

        Raises:
            UsageError: it has no state_dict and load_state_dict, or the name is taken.
        """
        if not isinstance(value, Stateful):
            raise UsageError(
                f"run.track({name}=…): a {type(value).__name__} has no state_dict and load_state_dict, so it cannot be restored; "
                "track an object that has both"
            )
        if name in self._objects:
            raise UsageError(f"run.track({name}=…): {name} is tracked already; choose another name")
        self._one(name, value)  # what cannot be saved must be found now, not at the first checkpoint
        self._objects[name] = value

    def __bool__(self) -> bool:
        return bool(self._objects)

    def modules(self) -> list[torch.nn.Module]:
        """Return the tracked modules."""
        return [value for value in self._objects.values() if isinstance(value, torch.nn.Module)]

    def wrapper(self) -> str:
        """Return what the model, or the first module, is wrapped in."""
        model = self._objects.get("model")
        modules = [model] if isinstance(model, torch.nn.Module) else self.modules()
        return wrapper_name(modules[0]) if modules else "none"

    def state(self, boundary: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the state of every object under its key in the file; tensors share memory with the objects.

        What `boundary` holds, from an earlier `small_state`, takes the place of what has changed since.
        """
        state = {f"{name}{_SUFFIX}": self._one(name, value) for name, value in self._objects.items()}
        for key, earlier in (boundary or {}).items():
            # Of an optimizer the boundary holds a part, of everything else in it the whole.
            partial = isinstance(self._objects[key.removesuffix(_SUFFIX)], torch.optim.Optimizer)
            state[key] = {**state[key], **earlier} if partial else earlier
        return state

    def small_state(self) -> dict[str, Any]:
        """Return a copy of what may change outside of training steps, and is small: schedulers, scalers and their like, and
        the hyperparameters that schedulers set in optimizers. Modules and optimizer state change in training steps only.
        """
        small: dict[str, Any] = {}
        for name, value in self._objects.items():
            if isinstance(value, torch.optim.Optimizer):
                small[f"{name}{_SUFFIX}"] = {_GROUPS: portable(value.state_dict()[_GROUPS], name)}
            elif not isinstance(value, torch.nn.Module):
                small[f"{name}{_SUFFIX}"] = self._one(name, value)
        return copy.deepcopy(small)

    def put_back(self, small: Mapping[str, Any]) -> None:
        """Undo what has changed since `small` was taken by `small_state`, modules and optimizer state aside."""
        for key, earlier in copy.deepcopy(dict(small)).items():
            value = self._objects[key.removesuffix(_SUFFIX)]
            if isinstance(value, torch.optim.Optimizer):
                for group, saved in zip(value.param_groups, earlier[_GROUPS], strict=True):
                    group.update({name: hyper for name, hyper in saved.items() if name != "params"})
            else:
                value.load_state_dict(earlier)

    def load(self, state: Mapping[str, Any], *, weights_only: bool = False) -> None:
        """Restore every object, or the modules alone.

        Raises:
            CheckpointMismatchError: an object's state is missing or does not fit; names the object.
        """
        for name, value in self._objects.items():
            is_module = isinstance(value, torch.nn.Module)
            if weights_only and not is_module:
                continue
            saved = state.get(f"{name}{_SUFFIX}")
            if saved is None:
                known = ", ".join(key.removesuffix(_SUFFIX) for key in state if key.endswith(_SUFFIX))
                raise CheckpointMismatchError(
                    f"the checkpoint has no state for {name!r}; it has {known}: track under the names it was saved with"
                )
            try:
                if isinstance(value, torch.nn.Module):
                    load_model_state(value, saved)
                else:
                    value.load_state_dict(saved)
            except CheckpointMismatchError as error:
                raise CheckpointMismatchError(f"{name}: {error}") from None
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                raise CheckpointMismatchError(
                    f"{name}: a {type(value).__name__} did not take its saved state ({type(error).__name__}: {error}); was it "
                    "built differently when it was saved?"
                ) from error

    @staticmethod
    def _one(name: str, value: Stateful) -> dict[str, Any]:
        state = model_state(value) if isinstance(value, torch.nn.Module) else value.state_dict()
        plain: dict[str, Any] = portable(state, name)
        return plain
