"""The objects a run saves and restores, by name."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from hpcckpt.distributed import is_sharded, local_state, share_buffers
from hpcckpt.errors import CheckpointMismatchError, CheckpointSaveError, HpcckptError, UsageError
from hpcckpt.state.model import LoadReport, load_model_state, model_state, parameter_names, portable_names, wrapper_name
from hpcckpt.state.optimizer import check_optimizer_state, is_sharded_optimizer, load_optimizer_state, optimizer_state
from hpcckpt.state.portable import compacted, portable

# Bookkeeping keys of a checkpoint file; every other key is `<tracked name>_state_dict`.
FORMAT_VERSION = 1
_SUFFIX = "_state_dict"
_GROUPS, _PARAMS, _NAMES = "param_groups", "params", "param_names"
_PARAMETERS = frozenset({_PARAMS, _NAMES})


def check_version(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a file of a later format than this version of hpcckpt reads; one without a format is another program's.

    Raises:
        CheckpointMismatchError: it is one.
    """
    version = content.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointMismatchError(
            f"{path}: was written in format {version}, this version reads up to {FORMAT_VERSION}; upgrade hpcckpt"
        )


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
    """A registry of named objects. The same names, in the same order, on every rank."""

    def __init__(self) -> None:
        self._objects: dict[str, Stateful] = {}
        self._has_own_buffers = False

    def add(self, name: str, value: object) -> None:
        """Register an object.

        Raises:
            UsageError: it has no state_dict and load_state_dict, or they do not work, or the name is taken.
            CheckpointSaveError: its state holds what a file cannot.
        """
        if not isinstance(value, Stateful):
            raise UsageError(
                f"{name}: a {type(value).__name__} has no state_dict and load_state_dict, so it cannot be restored; "
                "give an object that has both"
            )
        if name in self._objects:
            raise UsageError(f"{name}: {name} is tracked already; choose another name")
        # What cannot be saved must be found now, not at the first checkpoint. Weights may come with the restore.
        try:
            names = portable_names(value) if isinstance(value, torch.nn.Module) else {}
            state: Any = value.state_dict()
        except HpcckptError as error:
            raise type(error)(f"{name}: {error}") from error
        except Exception as error:
            raise UsageError(f"{name}: {_unreadable(value, error)}") from error
        state = local_state(state)
        portable({names.get(key, key): item for key, item in state.items()} if names else state, name, meta=True)
        self._objects[name] = value

    def __bool__(self) -> bool:
        return bool(self._objects)

    def modules(self) -> list[torch.nn.Module]:
        """Return the tracked modules."""
        return list(self._modules().values())

    def objects(self) -> dict[str, Stateful]:
        """Return all tracked objects by name."""
        return dict(self._objects)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the tracked optimizers of PyTorch."""
        return [value for value in self._objects.values() if isinstance(value, torch.optim.Optimizer)]

    def size_bytes(self) -> int:
        """Return about how many bytes modules and optimizers of this rank hold."""
        held = [tensor for module in self.modules() for tensor in (*module.parameters(), *module.buffers())]
        for optimizer in self.optimizers():
            held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in held)

    def named_modules(self) -> dict[str, torch.nn.Module]:
        """Return the tracked modules by name."""
        return self._modules()

    def note_trained(self) -> None:
        """Note that there was a training pass: since then each rank has buffers of its own."""
        self._has_own_buffers = True

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers, which a checkpoint has, if that is due. Every rank must call it, where none is unwinding."""
        if self._has_own_buffers:
            self._has_own_buffers = False
            for module in self.modules():
                share_buffers(module)

    def has_gradients(self) -> bool:
        """Return whether any parameter of the tracked modules has a gradient that is not zero."""
        gradients = (parameter.grad for module in self._modules().values() for parameter in module.parameters())
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

    def without_state(self) -> list[str]:
        """Return the names of those whose state_dict() has nothing in it, though they hold something that changes."""
        others = {name: value for name, value in self._objects.items() if not isinstance(value, torch.nn.Module | torch.optim.Optimizer)}
        return [name for name, value in others.items() if not value.state_dict() and not _is_disabled(value)]

    def module_names(self) -> dict[str, list[str]]:
        """Return, for each tracked module, the portable names of its state."""
        return {name: list(portable_names(module).values()) for name, module in self._modules().items()}

    def has_sharded(self) -> bool:
        """Return whether any tracked module or optimizer has parameters that are spread over ranks."""
        return any(_is_sharded(value) for value in self._objects.values())

    def wrapper(self) -> str:
        """Return what the model, or the first module, is wrapped in."""
        model = self._objects.get("model")
        modules = [model] if isinstance(model, torch.nn.Module) else self.modules()
        return wrapper_name(modules[0]) if modules else "none"

    def state(self, boundary: Mapping[str, Any] | None = None, *, is_main: bool = True) -> dict[str, Any]:
        """Return the state of every object under its key in the file; {} where `is_main` is false.

        Every rank must call it where `has_sharded` is true: what is sharded is gathered onto rank 0's CPU. All other tensors
        share memory with the objects, small views of large ones aside. What `boundary` holds, from an earlier `small_state`,
        takes the place of what has changed since.

        Raises:
            CheckpointSaveError: an object did not give its state, or one that a file cannot hold; names the object.
        """
        names = self._parameter_names()
        # All that is gathered first: an error in what rank 0 does alone must not keep the others waiting.
        gathered = {name: _state_of(name, value, names, keep=is_main) for name, value in self._objects.items() if _is_sharded(value)}
        if not is_main:
            return {}
        state = {}
        for name, value in self._objects.items():
            content = gathered[name] if name in gathered else _state_of(name, value, names)
            state[f"{name}{_SUFFIX}"] = portable(content, name)
        for key, earlier in (boundary or {}).items():
            # Of an optimizer the boundary holds a part, of everything else in it the whole.
            is_part = isinstance(self._objects[key.removesuffix(_SUFFIX)], torch.optim.Optimizer)
            state[key] = _with_hyperparameters(state[key], earlier) if is_part else earlier
        result: dict[str, Any] = compacted(state)
        return result

    def small_state(self) -> dict[str, Any]:
        """Return a copy of what may change outside of training steps, and is small: schedulers, scalers and their like, and
        the hyperparameters that schedulers set in optimizers. Modules and optimizer state change in training steps only.
        """
        small: dict[str, Any] = {}
        for name, value in self._objects.items():
            if isinstance(value, torch.optim.Optimizer):
                small[f"{name}{_SUFFIX}"] = {_GROUPS: portable(_read(name, value)[_GROUPS], name)}
            elif not isinstance(value, torch.nn.Module):
                small[f"{name}{_SUFFIX}"] = portable(_read(name, value), name)
        return copy.deepcopy(small)

    def put_back(self, small: Mapping[str, Any]) -> None:
        """Undo what has changed since `small` was taken by `small_state`, modules and optimizer state aside."""
        for key, earlier in copy.deepcopy(dict(small)).items():
            value = self._objects[key.removesuffix(_SUFFIX)]
            if isinstance(value, torch.optim.Optimizer):
                for group, saved in zip(value.param_groups, earlier[_GROUPS], strict=True):
                    group.update({name: hyper for name, hyper in saved.items() if name not in _PARAMETERS})
            else:
                value.load_state_dict(earlier)

    def load(self, state: Mapping[str, Any], *, weights_only: bool = False) -> None:
        """Restore every object, or the modules alone. Every rank must call it with the same state; there is no collective.

        No object shares memory with `state` afterwards, which may be a file mapped into memory.

        Raises:
            CheckpointMismatchError: an object's state is missing or does not fit; names the object. Nothing is changed where it
                is missing, or an optimizer's.
        """
        modules = self._modules()
        wanted = modules if weights_only else self._objects
        for name in wanted:
            if f"{name}{_SUFFIX}" not in state:
                known = ", ".join(key.removesuffix(_SUFFIX) for key in state if key.endswith(_SUFFIX))
                raise CheckpointMismatchError(
                    f"the checkpoint has no state for {name!r}; it has {known}: give objects the names they were saved with"
                )
        if not weights_only:
            self._check_optimizers(state)
        # Modules first: an optimizer's state goes to the devices on which its parameters are then.
        for name, module in modules.items():
            _load_module(name, module, state[f"{name}{_SUFFIX}"])
        names = {} if weights_only else self._parameter_names()
        for name in wanted:
            if name not in modules:
                _load_other(name, self._objects[name], state[f"{name}{_SUFFIX}"], names)

    def load_weights(self, states: Mapping[str, Mapping[str, Any]], *, strict: bool) -> tuple[str, ...]:
        """Load modules alone, from any origin, converted to their own dtypes; return what is worth a note.

        Every rank must call it with the same states; there is no collective.

        Args:
            states: name of a tracked module -> state under that module's portable names.
            strict: refuse what does not fit in full; else load what fits and note the rest.

        Raises:
            CheckpointMismatchError: a module is not in `states` or does not fit, and `strict` is true; names the module. Or no
                tensor at all fits.
        """
        modules, notes, loaded = self._modules(), [], 0
        for name in modules:
            if name not in states:
                notes.append(f"{name}: nothing to load, it keeps its own weights; there is {', '.join(states) or 'nothing'}")
                if strict:
                    raise CheckpointMismatchError(f"no weights for {name!r}; there are those of {', '.join(states) or 'nothing'}")
        for name, content in states.items():
            if name not in modules:
                notes.append(f"{name}: is no tracked module, its weights are left out")
                continue
            report = _load_module(name, modules[name], content, strict=strict, cast=True)
            loaded += len(report.loaded)
            if report.cast or report.on_meta or not report.is_complete:
                notes.append(f"{name}: {report}")
        if modules and not loaded and any(portable_names(module) for module in modules.values()):
            raise CheckpointMismatchError(f"not one tensor of the tracked modules is there: {'; '.join(notes)}")
        return tuple(notes)

    def _check_optimizers(self, state: Mapping[str, Any]) -> None:
        names = self._parameter_names()
        optimizers = {name: value for name, value in self._objects.items() if isinstance(value, torch.optim.Optimizer)}
        for name, optimizer in optimizers.items():
            with naming(name, optimizer):
                same_groups = check_optimizer_state(optimizer, state[f"{name}{_SUFFIX}"], names)
            others = [other for other in optimizers.values() if other is not optimizer]
            for label, value in () if same_groups else self._objects.items():
                if isinstance(value, torch.optim.lr_scheduler.LRScheduler) and not any(value.optimizer is other for other in others):
                    raise CheckpointMismatchError(
                        f"{name}: groups of parameters come in another order (or number) than when it was saved, and a scheduler ({label}) "
                        "counts them by position: put them back, or load without the scheduler"
                    )

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {name: value for name, value in self._objects.items() if isinstance(value, torch.nn.Module)}

    def _parameter_names(self) -> dict[int, str]:
        """Return the name of every tracked parameter by its id: as of now, since modules may be wrapped after they were tracked."""
        if not any(isinstance(value, torch.optim.Optimizer) for value in self._objects.values()):
            return {}
        names: dict[int, str] = {}
        for name, module in sorted(self._modules().items(), key=lambda item: item[0] != "model"):
            prefix = "" if name == "model" else f"{name}."
            for key, parameter in parameter_names(module).items():
                names.setdefault(key, f"{prefix}{parameter}")
        return names


def _is_disabled(value: Stateful) -> bool:
    return isinstance(value, torch.amp.GradScaler) and not value.is_enabled()


def _is_sharded(value: Stateful) -> bool:
    if isinstance(value, torch.nn.Module):
        return is_sharded(value)
    return isinstance(value, torch.optim.Optimizer) and is_sharded_optimizer(value)


def _unreadable(value: object, error: Exception) -> str:
    return (
        f"a {type(value).__name__} did not give its state ({type(error).__name__}: {error}); its state_dict() has to work on every "
        "rank, at any time and without the other ranks: give something else in its place"
    )


def _read(name: str, value: Stateful) -> Mapping[str, Any]:
    try:
        return value.state_dict()
    except Exception as error:
        raise CheckpointSaveError(f"{name}: {_unreadable(value, error)}") from error


def _state_of(name: str, value: Stateful, names: Mapping[int, str], *, keep: bool = True) -> Mapping[str, Any]:
    try:
        if isinstance(value, torch.nn.Module):
            return model_state(value, keep=keep)
        if isinstance(value, torch.optim.Optimizer):
            return optimizer_state(value, names, keep=keep)
        return value.state_dict()
    except HpcckptError as error:
        raise CheckpointSaveError(f"{name}: {error}") from error
    except Exception as error:
        raise CheckpointSaveError(f"{name}: {_unreadable(value, error)}") from error


def _with_hyperparameters(state: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with earlier hyperparameters, and with the names of the parameters that they are of."""
    groups = []
    for index, group in enumerate(earlier[_GROUPS]):
        names = state[_GROUPS][index].get(_NAMES) if index < len(state[_GROUPS]) else None
        hypers = {key: value for key, value in group.items() if key != _NAMES}
        groups.append({**hypers, _NAMES: names[: len(group[_PARAMS])]} if names is not None else hypers)
    return {**state, **earlier, _GROUPS: groups}


def _load_module(name: str, module: torch.nn.Module, saved: Mapping[str, Any], *, strict: bool = True, cast: bool = False) -> LoadReport:
    with naming(name, module):
        return load_model_state(module, saved, strict=strict, cast=cast)


def _load_other(name: str, value: Stateful, saved: Any, names: Mapping[int, str]) -> None:
    with naming(name, value):
        if isinstance(value, torch.optim.Optimizer):
            load_optimizer_state(value, saved, names)
        else:
            value.load_state_dict(copy.deepcopy(saved))


@contextlib.contextmanager
def naming(name: str, value: object) -> Iterator[None]:
    """Have errors name the object whose state does not fit, by `name`."""
    try:
        yield
    except HpcckptError as error:
        raise CheckpointMismatchError(f"{name}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointMismatchError(
            f"{name}: a {type(value).__name__} did not take its saved state ({type(error).__name__}: {error}); was it "
            "built differently when it was saved?"
        ) from error
