"""Hyperparameters that a script gives and a checkpoint overrides.

The state_dict of torch's optimizers and schedulers holds what they were made with, and loading it brings that back: with
the epochs raised in the configuration, CosineAnnealingLR(T_max=epochs) keeps the old T_max, and a new weight_decay
changes nothing. A run goes on exactly, which is what was promised, but its user should be told.

What objects were made with is read before the load and again behind it. Only what cannot change while they are stepped
is compared, so that an unchanged script is never told anything.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from hpcckpt.state.text import printable, ranges

_PARAMS, _LR, _INITIAL_LR = "params", "lr", "initial_lr"
# Arguments of every scheduler that are no hyperparameters, or count steps.
_NO_HYPERPARAMETERS = frozenset({"self", "optimizer", "last_epoch", "verbose"})
# What schedulers put into an optimizer's groups when they are made.
_OF_SCHEDULERS = ("max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
# What they change there while they step, where they cycle momentum.
_CYCLED = frozenset({"momentum", "betas"})
# Schedulers of torch keep these arguments in another form.
_DERIVED: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "CyclicLR": {
        "step_size_up": lambda kept: round(kept["total_size"] * kept["step_ratio"], 6),
        "step_size_down": lambda kept: round(kept["total_size"] * (1 - kept["step_ratio"]), 6),
    },
    "OneCycleLR": {
        "pct_start": lambda kept: round((kept["_schedule_phases"][0]["end_step"] + 1) / kept["total_steps"], 6),
        "three_phase": lambda kept: len(kept["_schedule_phases"]) == 3,
        "anneal_strategy": lambda kept: kept["_anneal_func_type"],
    },
}
_NONE = object()
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class _Hyper:
    """One hyperparameter, as it is now."""

    owner: str  # the tracked name, and which of several schedulers in it
    group: int | None  # of an optimizer
    name: str
    value: Any
    # Nothing but a load changes it. Without that, objects of a user's own class may keep counters under such names.
    is_constant: bool

    @property
    def key(self) -> str:
        return "/".join((self.owner, "" if self.group is None else str(self.group), self.name))


def given(objects: Mapping[str, object]) -> dict[str, Any]:
    """Return the hyperparameters that optimizers and schedulers were made with: primitives, which may go into a file.

    To be called before the load. All other objects are left out. Never raises.

    Args:
        objects: those that are tracked, by name.
    """
    return {hyper.key: hyper.value for hyper in _hyperparameters(objects)}


def overridden(snapshot: Mapping[str, Any], objects: Mapping[str, object], saved: Mapping[str, Any] | None = None) -> list[str]:
    """Return one sentence for each hyperparameter that is another one than the script gave. Never raises.

    To be called behind the load.

    Args:
        snapshot: `given` of the same objects before it.
        objects: those that are tracked, by name.
        saved: `given` of the attempt that began the run, where the checkpoint has it. What the script gave then as now is
            not overridden, however it was changed in between: by hand, or by a class of the user's own. And what it gave
            otherwise is, in any class.
    """
    found: dict[tuple[str, str], list[_Hyper]] = {}
    everywhere: Counter[tuple[str, str]] = Counter()
    for hyper in _hyperparameters(objects):
        everywhere[hyper.owner, hyper.name] += 1
        if hyper.key not in snapshot or _same(hyper.value, snapshot[hyper.key]):
            continue
        then = _plain((saved or {}).get(hyper.key, _NONE))
        if hyper.is_constant if then is _NONE else not _same(then, snapshot[hyper.key]):
            found.setdefault((hyper.owner, hyper.name), []).append(hyper)
    return [
        _sentence(those, snapshot, is_everywhere=everywhere[place] == len(those), several=those[0].group is not None)
        for place, those in found.items()
    ]


def _sentence(those: list[_Hyper], snapshot: Mapping[str, Any], *, is_everywhere: bool, several: bool) -> str:
    """Return what happened to one hyperparameter, in however many groups."""
    first = those[0]
    ours, others = _shown(first.value), _shown(snapshot[first.key])
    if several and not is_everywhere:
        who = f"{first.owner}, group{'s' if len(those) > 1 else ''} {ranges(hyper.group or 0 for hyper in those)}"
    else:
        who = first.owner
    if any(not _same(hyper.value, first.value) or not _same(snapshot[hyper.key], snapshot[first.key]) for hyper in those):
        return f"{who}: {first.name} is as in the checkpoint, not as in the script (group {first.group}: {ours}, not {others})"
    return f"{who}: {first.name} is {ours} as in the checkpoint, not {others} as in the script"


def _hyperparameters(objects: Mapping[str, object]) -> list[_Hyper]:
    """Return the hyperparameters of all objects that can be read."""
    found: list[_Hyper] = []
    for name, value in objects.items():
        try:
            if isinstance(value, torch.optim.Optimizer):
                found += _of_optimizer(name, value, is_driven=_is_driven(value, objects))
            elif isinstance(value, LRScheduler):
                found += _of_scheduler(name, value)
        except Exception:  # noqa: BLE001, S112 - a user's object may do anything; a report must not stop a run
            continue
    return found


def _of_optimizer(owner: str, optimizer: torch.optim.Optimizer, *, is_driven: bool) -> Iterator[_Hyper]:
    names = [*dict.fromkeys((*_arguments(optimizer), *_OF_SCHEDULERS))]
    own_kind = _is_of_torch(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        left_out = {_PARAMS, *(_CYCLED if "max_momentum" in group else ())}
        for name in names:
            # Where a scheduler sets the rate, it remembers what it began with.
            source = _INITIAL_LR if name == _LR and _INITIAL_LR in group else name
            value = _plain(group[source]) if source in group and name not in left_out else _NONE
            if value is not _NONE:
                yield _Hyper(owner, index, name, value, own_kind and not (is_driven and source == _LR))


def _is_driven(optimizer: torch.optim.Optimizer, objects: Mapping[str, object]) -> bool:
    """Return whether any tracked object may set the optimizer's learning rate, without a trace in its groups."""
    for value in objects.values():
        try:
            if getattr(value, "optimizer", None) is optimizer:
                return True
        except Exception:  # noqa: BLE001, S112 - a property of a user's own
            continue
    return False


def _of_scheduler(owner: str, scheduler: LRScheduler) -> Iterator[_Hyper]:
    kept = vars(scheduler)
    for name in _arguments(scheduler):
        value = _kept(type(scheduler).__name__, kept, name)
        if value is not _NONE:
            yield _Hyper(owner, None, name, value, _is_of_torch(scheduler))
    parts = kept.get("_schedulers")
    for index, part in enumerate(parts if isinstance(parts, list | tuple) else ()):
        if isinstance(part, LRScheduler):
            yield from _of_scheduler(f"{owner}, part {index} ({type(part).__name__})", part)


def _kept(kind: str, kept: dict[str, Any], argument: str) -> Any:
    """Return an argument as a scheduler keeps it: under its name, or one like it; `_NONE` where it is not there."""
    try:
        derived = _DERIVED.get(kind, {}).get(argument)
        if derived is not None:
            return _plain(derived(kept))
    except (LookupError, TypeError, ZeroDivisionError):
        return _NONE
    for name in (argument, f"_{argument}", f"{argument}s", f"_{argument}s"):
        if name in kept:
            return _plain(kept[name])
    return _NONE


def _arguments(value: object) -> list[str]:
    """Return the names of the constructor's arguments, and those of the classes it is derived from."""
    names: dict[str, None] = {}
    for kind in type(value).__mro__:
        if "__init__" not in vars(kind) or kind is object:
            continue
        try:
            names |= dict.fromkeys(inspect.signature(vars(kind)["__init__"]).parameters)
        except (TypeError, ValueError):  # written in C
            continue
    return [name for name in names if name not in _NO_HYPERPARAMETERS]


def _is_of_torch(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def _plain(value: Any) -> Any:
    """Return a value as primitives in tuples and dicts; `_NONE` where that cannot be done."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, torch.Tensor):
        return _plain(value.item()) if value.numel() == 1 and not value.is_meta else _NONE
    if isinstance(value, int | float):
        return float.__float__(value) if isinstance(value, float) else int.__int__(value)
    if isinstance(value, Counter):  # milestones
        return _plain(sorted(value.elements()))
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _NONE if any(item is _NONE for item in items) else tuple(items)
    return _NONE


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


def _shown(value: Any) -> str:
    return printable(repr(value), _LONGEST_VALUE)
