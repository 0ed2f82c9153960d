"""Model state under names that no wrapper shows in.

DistributedDataParallel, DataParallel and torch.compile each put the wrapped module under an attribute of their own
(`module`, `_orig_mod`), which then appears in every key. It is removed by the structure of the module tree, not by its
spelling: a submodule that its author called `module` keeps its name, and a wrapper deep inside loses its own.
"""

import copy
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from hpcckpt.distributed import full_state, is_sharded, shard_like
from hpcckpt.errors import CheckpointMismatchError, UsageError
from hpcckpt.state.meta import Placeholders
from hpcckpt.state.text import listed, printable

_EXTRA_STATE = "_extra_state"
# Activation checkpointing puts this into the path of a module, but takes it out of the keys of the state by itself.
_NOT_IN_KEYS = "_checkpoint_wrapped_module."


def _is_a(module: nn.Module, name: str, package: str) -> bool:
    """Return whether `module` is of a class that is slow to import, and need not be, only to ask."""
    return any(kind.__name__ == name and kind.__module__.startswith(package) for kind in type(module).__mro__)


def _wrapped_child(module: nn.Module) -> str | None:
    """Return the attribute under which a wrapper keeps its module; None if `module` is no wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    return "_orig_mod" if _is_a(module, "OptimizedModule", "torch._dynamo") else None


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module inside any nesting of wrappers."""
    while (child := _wrapped_child(module)) is not None:
        module = getattr(module, child)
    return module


def wrapper_name(module: nn.Module) -> str:
    """Return the wrappers from the outside in, "DistributedDataParallel+OptimizedModule" say; "none" without any.

    FSDP2, which wraps nothing, comes last, as "fully_shard".
    """
    names = []
    while (child := _wrapped_child(module)) is not None:
        names.append("OptimizedModule" if child == "_orig_mod" else type(module).__name__)
        module = getattr(module, child)
    names += ["fully_shard"] if is_sharded(module) else []
    return "+".join(names) or "none"


def _named_state(module: nn.Module) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the portable name of every key of the state dict, and the state dict with the parameters themselves.

    Raises:
        UsageError: a parameter has no shape yet, or the module is of the first FSDP.
    """
    # Dotted paths that end in a wrapper's own attribute: exactly these parts are dropped from a key.
    inner = set()
    for path, submodule in module.named_modules(remove_duplicate=False):
        child = _wrapped_child(submodule)
        if child is not None:
            inner.add((f"{path}.{child}" if path else child).replace(_NOT_IN_KEYS, ""))
        if _is_a(submodule, "FullyShardedDataParallel", "torch.distributed"):
            raise UsageError(
                f"{path or type(submodule).__name__} is a FullyShardedDataParallel, whose flat parameters have no portable names: "
                "shard the model by torch.distributed.fsdp.fully_shard"
            )
    # Of a model that FSDP2 has gathered for a forward pass, this puts the sharded parameters back: no collective.
    own: dict[str, Any] = module.state_dict(keep_vars=True)
    names = {}
    for key, value in own.items():
        parts = key.split(".")
        kept = [part for index, part in enumerate(parts) if ".".join(parts[: index + 1]) not in inner]
        names[key] = ".".join(kept)
        if is_lazy(value):
            raise UsageError(
                f"{names[key]} has no shape before the model has seen data: run one batch through the model before run.track, and before "
                "its optimizer and wrappers are made"
            )
    return names, own


def portable_names(module: nn.Module) -> dict[str, str]:
    """Return the portable name of every key of `module.state_dict()`."""
    return _named_state(module)[0]


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Return the portable name of each parameter by its id; the first one where several share it."""
    names, own = _named_state(module)
    found: dict[int, str] = {}
    for key, value in own.items():
        if isinstance(value, nn.Parameter):
            found.setdefault(id(value), names[key])
    return found


def model_state(module: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """Return the state under portable names; tensors share memory with the module.

    Sharded parameters are gathered onto the CPU: then every rank must call it, and where `keep` is false gets nothing.
    """
    names, own = _named_state(module)
    state = full_state(own, keep=keep) if is_sharded(module) else own
    if not keep:
        return {}
    return {names[key]: value.detach() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


@dataclass(frozen=True)
class LoadReport:
    """What became of a model's state; every entry is a portable name, `reshaped` and `cast` say from what to what.

    `unfit` could not be loaded for another reason, and say why. `on_meta` are parameters and buffers that had no memory before,
    and still have none.
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    on_meta: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of the model was in the checkpoint, and nothing else."""
        return not (self.missing or self.unexpected or self.reshaped or self.unfit)

    def __str__(self) -> str:
        """Return it as one line, with a few names of each kind."""
        parts = [f"{len(self.loaded)} loaded"]
        for what, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.reshaped),
            ("that cannot be taken over", self.unfit),
            ("of another dtype", self.cast),
            ("still on the meta device", self.on_meta),
        ):
            if names:
                parts.append(f"{len(names)} {what}: {listed(names)}")
        return "; ".join(parts)


def load_model_state(module: nn.Module, state: Mapping[str, Any], *, strict: bool = True, cast: bool = False) -> LoadReport:
    """Load state with portable names into a module with any wrappers, sharded or not.

    Every rank calls it with the same state; there is no collective. The module keeps its own parameter objects, and
    none of the memory of `state`.

    Args:
        module: the target, on any device; what is on the meta device gets memory where `state` has its own.
        state: portable name -> full tensor, or a module's extra state. One name of tied parameters is enough.
        strict: refuse a state that does not fit in full; else load what fits and leave the rest of the module as it is.
        cast: accept tensors of another dtype of the same kind (float, complex, integer, bool), converted, unless that makes
            finite values infinite; without it they do not fit.

    Raises:
        CheckpointMismatchError: names the first missing and unexpected keys, or those that do not fit; nothing was loaded. Or
            a module's own load_state_dict or set_extra_state raised: then the model may be loaded in part.
        UsageError: a parameter of the module has no shape yet.
    """
    names, own = _named_state(module)
    sources = _sources(names, own, state)
    pairs = {names[key]: (own[key], state[source]) for key, source in sources.items()}
    # What a module returns from get_extra_state is its own affair, and may be a tensor of any size.
    tensors = {name: pair for name, pair in pairs.items() if name.rpartition(".")[2] != _EXTRA_STATE}
    reshaped = {
        name: f"{name} {_shape(saved)} for {_shape(mine)}" for name, (mine, saved) in tensors.items() if _shape(saved) != _shape(mine)
    }
    alike = {name: pair for name, pair in tensors.items() if name not in reshaped and isinstance(pair[0], torch.Tensor)}
    unfit = {name: f"{name} {reason}" for name, pair in alike.items() if (reason := _misfit(*pair, cast=cast))}
    differing = {
        name: f"{name} {_dtype(saved)} for {_dtype(mine)}"
        for name, (mine, saved) in alike.items()
        if name not in unfit and saved.dtype != mine.dtype
    }
    for tied in _torn(names, own, {name: value for name, value in state.items() if name in alike and name not in unfit}):
        unfit |= dict.fromkeys(tied, f"{' and '.join(tied)} are one tensor in the model, and differ in the file")
    refused = {*reshaped, *unfit, *(() if cast else differing)}
    fitting = [key for key in sources if names[key] not in refused]
    own_names = set(names.values())
    report = LoadReport(
        loaded=tuple(names[key] for key in fitting),
        missing=tuple(name for name in names.values() if name not in pairs),
        unexpected=tuple(name for name in state if name not in own_names),
        reshaped=tuple(reshaped.values()),
        cast=tuple(differing.values()),
        unfit=tuple(dict.fromkeys(unfit.values())),
    )
    if strict:
        _refuse_misfits(report, cast=cast)
    left = _fill(module, own, {key: state[sources[key]] for key in fitting}, complete=report.is_complete)
    return replace(report, on_meta=left)


def _sources(names: Mapping[str, str], own: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, str]:
    """Return, for each key of the module, the name in `state` it is loaded from: its own, or that of the same tensor."""
    there: dict[Hashable, str] = {}
    for key, name in names.items():
        if name in state:
            there.setdefault(_identity(own[key]), name)
    sources = {key: name if name in state else there.get(_identity(own[key])) for key, name in names.items()}
    return {key: source for key, source in sources.items() if source is not None}


def _identity(value: Any) -> Hashable:
    """Return what two names of the same tensor have in common."""
    if type(value) not in {torch.Tensor, nn.Parameter} or value.is_meta or value.layout != torch.strided or value.numel() == 0:
        return id(value)
    return value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype


def _refuse_misfits(report: LoadReport, *, cast: bool) -> None:
    problems = [f"it lacks {listed(report.missing)}"] if report.missing else []
    problems += [f"the model has no {listed(report.unexpected)}"] if report.unexpected else []
    problems += [f"shapes differ: {listed(report.reshaped)}"] if report.reshaped else []
    problems += [f"these cannot be taken over: {listed(report.unfit)}"] if report.unfit else []
    problems += [f"types differ: {listed(report.cast)}"] if report.cast and not cast else []
    if problems:
        raise CheckpointMismatchError(
            f"the checkpoint does not fit the model: {'; '.join(problems)}; was the model changed since it was saved?"
        )


def _fill(module: nn.Module, own: Mapping[str, Any], values: Mapping[str, Any], *, complete: bool) -> tuple[str, ...]:
    """Give `values`, by the module's own keys, to the module; return the names of what stays on the meta device."""
    placeholders, versions = Placeholders(module), getattr(own, "_metadata", None)
    there: OrderedDict[str, Any] = OrderedDict()
    absent: OrderedDict[str, Any] = OrderedDict()
    for key, value in values.items():
        mine = own[key]
        if not isinstance(mine, torch.Tensor) or key.rpartition(".")[2] == _EXTRA_STATE:
            there[key] = copy.deepcopy(value)  # a module may keep it
        elif mine.is_meta:
            part = shard_like(value, mine)
            absent[key] = part.detach().to(mine.dtype, copy=part is value)
        else:
            there[key] = shard_like(value, mine)
    for chosen, assign in ((there, False), (absent, True)):
        # With the versions of the module's own classes, which a state without them would be taken to be older than. A
        # state that lacks something may be older indeed; what has no memory yet must not be filled in by the first call.
        if complete or (absent and not assign):
            chosen._metadata = versions  # type: ignore[attr-defined]  # noqa: SLF001 - where load_state_dict looks for them
        try:
            if chosen:
                module.load_state_dict(chosen, strict=False, assign=assign)
        except Exception as error:
            placeholders.keep()
            raise CheckpointMismatchError(
                f"a {type(unwrap(module)).__name__} did not take its state ({type(error).__name__}: {printable(str(error))}) and may be "
                "loaded in part now: make it anew, as it was when it was saved, then load again"
            ) from error
    return placeholders.keep()


def _misfit(mine: torch.Tensor, saved: torch.Tensor, *, cast: bool) -> str | None:
    """Return why a saved tensor cannot become one of the model's of the same shape; None if it can."""
    if saved.is_meta:
        return "is on the meta device in the file, without values"
    if saved.layout != mine.layout:
        return f"{_name(saved.layout)} for {_name(mine.layout)}"
    if _scheme(saved) != _scheme(mine):
        return f"{_dtype(saved)} ({_scheme(saved)}) for {_dtype(mine)} ({_scheme(mine)})"
    if not cast or saved.dtype == mine.dtype:
        return None
    if _kind(saved.dtype) != _kind(mine.dtype):
        return f"{_dtype(saved)} for {_dtype(mine)}"
    return f"{_dtype(saved)} for {_dtype(mine)}, which cannot hold all of its values" if _overflows(saved, mine.dtype) else None


def _scheme(tensor: torch.Tensor) -> str:
    return f"quantized ({_name(tensor.qscheme())})" if tensor.is_quantized else "not quantized"


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"


def _overflows(saved: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether a narrower floating type makes finite values infinite, or NaN."""
    if _kind(dtype) not in ("float", "complex") or saved.numel() == 0 or saved.layout != torch.strided:
        return False
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(saved.dtype).max:
        return False
    values = torch.view_as_real(saved.detach().resolve_conj()) if saved.is_complex() else saved.detach()
    lowest, highest = torch.aminmax(values)
    if -limit <= lowest and highest <= limit:
        return False
    return bool((values.isfinite() & ~values.to(dtype.to_real()).isfinite()).any())


def _torn(names: Mapping[str, str], own: Mapping[str, Any], state: Mapping[str, Any]) -> list[list[str]]:
    """Return the names that are one tensor in the model and not in `state`."""
    tied: dict[Hashable, list[str]] = {}
    for key, name in names.items():
        if name in state:
            tied.setdefault(_identity(own[key]), []).append(name)
    return [group for group in tied.values() if not all(_same(state[group[0]], state[name]) for name in group[1:])]


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if _identity(first) == _identity(second):
        return True
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _dtype(tensor: torch.Tensor) -> str:
    return _name(tensor.dtype)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
