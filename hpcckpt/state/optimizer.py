"""Optimizer state that finds its parameters by name, where names are known, and by position as torch does elsewhere.

The layout is torch's own, so that any optimizer reads it; what is added is `param_names`, which torch allows in a group
of parameters. With names, state fits a model whose parameters come in another order or in other groups, and does not
silently fit another model whose parameters are as many.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import LBFGS, Adafactor, Optimizer

from hpcckpt.distributed import full_state, holds_shards, shard_like
from hpcckpt.errors import CheckpointMismatchError
from hpcckpt.state.foreign import fit_names
from hpcckpt.state.portable import plain_tensors
from hpcckpt.state.text import listed

_STATE, _GROUPS, _PARAMS, _NAMES, _STEP = "state", "param_groups", "params", "param_names", "step"
# Of these every tensor but numbers has the parameter's shape. Subclasses may keep what they like.
_OPTIM = torch.optim
_ELEMENTWISE = frozenset(
    (
        *(_OPTIM.SGD, _OPTIM.Adam, _OPTIM.AdamW, _OPTIM.Adamax, _OPTIM.NAdam, _OPTIM.RAdam, _OPTIM.SparseAdam),
        *(_OPTIM.Adagrad, _OPTIM.Adadelta, _OPTIM.RMSprop, _OPTIM.Rprop, _OPTIM.ASGD, _OPTIM.Muon),
    )
)
_LBFGS_VECTORS = ("d", "prev_flat_grad", "old_dirs", "old_stps")


def parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Return the parameters of all groups, in the order in which their state is numbered."""
    return (parameter for group in optimizer.param_groups for parameter in group[_PARAMS])


def is_sharded_optimizer(optimizer: Optimizer) -> bool:
    """Return whether any of the parameters is spread over ranks."""
    return holds_shards(parameters(optimizer))


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str], *, keep: bool = True) -> dict[str, Any]:
    """Return the state in torch's layout, with the names of the parameters in every group where all have one.

    State of sharded parameters is gathered onto the CPU: then every rank must call it, and where `keep` is false gets
    nothing.

    Args:
        optimizer: anything that torch counts as an optimizer.
        names: parameter's id -> portable name.
        keep: whether this rank wants the result.
    """
    state = dict(optimizer.state_dict())
    if is_sharded_optimizer(optimizer):
        state = full_state(state, keep=keep)
    if not keep:
        return {}
    if _lengths(state) != [len(group[_PARAMS]) for group in optimizer.param_groups]:
        return state  # a layout of its own
    found = [[names.get(id(parameter)) for parameter in group[_PARAMS]] for group in optimizer.param_groups]
    unique = _all_unique([name for group in found for name in group if name is not None])
    groups = []
    for group, group_names in zip(state[_GROUPS], found, strict=True):
        own = {key: value for key, value in group.items() if key != _NAMES}
        groups.append({**own, _NAMES: group_names} if unique and None not in group_names else own)
    return {**state, _GROUPS: groups}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Load state into an optimizer, whose tensors share no memory with it afterwards.

    Every rank calls it with the same state; there is no collective. Where both sides name all parameters, they are
    matched by name, in whatever order and groups; a group takes the hyperparameters of the saved groups that its
    parameters were in. Else they are matched by position.

    Raises:
        CheckpointMismatchError: the parameters, their groups or the shapes of their state differ; nothing was changed.
    """
    if any(parameter.is_meta for parameter in parameters(optimizer)):
        raise CheckpointMismatchError(
            "some of its parameters are on the meta device, and of no tracked module: give the model memory (model.to_empty) before the "
            "optimizer is made"
        )
    arranged, _ = _arranged(optimizer, state, names)
    if _lengths(state) is not None:
        arranged[_STATE] = _sharded(optimizer, arranged[_STATE])
    _load(optimizer, arranged)


def check_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any], names: Mapping[int, str]) -> bool:
    """Return whether the groups are those of the saved state, one for one; what they are matched by as in `load_optimizer_state`.

    Raises:
        CheckpointMismatchError: the state does not fit. Nothing is changed.
    """
    return _arranged(optimizer, state, names)[1]


def _arranged(optimizer: Optimizer, state: Mapping[str, Any], names: Mapping[int, str]) -> tuple[dict[str, Any], bool]:
    """Return the state in the optimizer's own order and groups, and whether these are the saved groups, one for one."""
    if _lengths(state) is None:
        return dict(state), True
    own_names = [names.get(id(parameter)) for parameter in parameters(optimizer)]
    known = [name for name in own_names if name is not None]
    saved_names = _saved_names(state, known) if len(known) == len(own_names) and _all_unique(known) else None
    if saved_names is not None:
        arranged, same_groups = _by_name(optimizer, state, saved_names, known)
    else:
        arranged, same_groups = _by_position(optimizer, state), True
    _check_shapes(optimizer, arranged[_STATE], [name or f"parameter {index}" for index, name in enumerate(own_names)])
    return arranged, same_groups


def _lengths(state: Mapping[str, Any]) -> list[int] | None:
    """Return the numbers of parameters of the groups; None where the layout is not torch's."""
    groups = state.get(_GROUPS)
    if not isinstance(state.get(_STATE), Mapping) or not isinstance(groups, list):
        return None
    lists = [group.get(_PARAMS) if isinstance(group, Mapping) else None for group in groups]
    lengths = [len(ids) for ids in lists if isinstance(ids, list)]
    return lengths if len(lengths) == len(lists) else None


def _all_unique(names: Sequence[str | None]) -> bool:
    return len(set(names)) == len(names)


def _saved_names(state: Mapping[str, Any], own_names: Sequence[str]) -> list[str] | None:
    """Return the names of all saved parameters, in order, as the model has them; None where not all have one of their own."""
    names: list[str] = []
    for group in state[_GROUPS]:
        group_names = group.get(_NAMES) or []
        if not isinstance(group_names, list | tuple) or len(group_names) != len(group[_PARAMS]):
            return None
        names += group_names
    if not all(isinstance(name, str) for name in names) or not _all_unique(names):
        return None
    if set(names) != set(own_names) and len(names) == len(own_names):
        # Other programs save the names that a wrapper shows in.
        fitting = fit_names(names, set(own_names))
        if len(fitting) == len(names):
            here = {saved: name for name, saved in fitting.items()}
            return [here[name] for name in names]
    return names


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in {_PARAMS, _NAMES}}


def _renumbered(state: Mapping[str, Any], numbers: Mapping[Any, int]) -> dict[Any, Any]:
    """Return the state of each parameter under its number here; what belongs to no parameter stays as it is."""
    return {numbers.get(key, key): value for key, value in state[_STATE].items()}


def _own_numbers(optimizer: Optimizer) -> list[list[int]]:
    numbers = iter(range(sum(len(group[_PARAMS]) for group in optimizer.param_groups)))
    return [[next(numbers) for _ in group[_PARAMS]] for group in optimizer.param_groups]


def _by_position(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    saved, own = _lengths(state) or [], [len(group[_PARAMS]) for group in optimizer.param_groups]
    if saved != own:
        raise CheckpointMismatchError(
            f"the checkpoint has {_counted(saved)}, the optimizer has {_counted(own)}, and not all parameters have names to match them by: "
            "build the optimizer as it was when it was saved, and track its model too"
        )
    numbers = _own_numbers(optimizer)
    ids = [number for group in state[_GROUPS] for number in group[_PARAMS]]
    return {
        **state,
        _STATE: _renumbered(state, {saved_id: number for number, saved_id in enumerate(ids)}),
        _GROUPS: [{**_hyperparameters(group), _PARAMS: own_ids} for group, own_ids in zip(state[_GROUPS], numbers, strict=True)],
    }


def _counted(lengths: Sequence[int]) -> str:
    return f"{len(lengths)} parameter group{'' if len(lengths) == 1 else 's'} (of {', '.join(map(str, lengths))} parameters)"


def _by_name(
    optimizer: Optimizer, state: Mapping[str, Any], saved_names: Sequence[str], own_names: Sequence[str]
) -> tuple[dict[str, Any], bool]:
    here, there = set(own_names), set(saved_names)
    problems = [
        f"{what} {listed(names)}"
        for what, names in (
            ("it has no state of", [name for name in own_names if name not in there]),
            ("the optimizer has no", [name for name in saved_names if name not in here]),
        )
        if names
    ]
    if problems:
        raise CheckpointMismatchError(
            f"the checkpoint does not fit the optimizer: {'; '.join(problems)}; give the optimizer the parameters it had when it was "
            "saved, or begin a new run from the weights alone"
        )
    if isinstance(optimizer, LBFGS) and list(saved_names) != list(own_names):
        raise CheckpointMismatchError(
            f"LBFGS keeps its state as one vector over all parameters, whose order has changed since it was saved: {listed(own_names)} "
            f"were {listed(saved_names)}; give it the parameters in the order of the checkpoint"
        )
    homes = [index for index, group in enumerate(state[_GROUPS]) for _ in group[_PARAMS]]
    home = dict(zip(saved_names, homes, strict=True))
    groups: list[dict[str, Any]] = []
    position, same_groups = 0, len(state[_GROUPS]) == len(optimizer.param_groups)
    for index, (group, numbers) in enumerate(zip(optimizer.param_groups, _own_numbers(optimizer), strict=True)):
        mine = own_names[position : position + len(numbers)]
        position += len(numbers)
        first_of = {home[name]: name for name in reversed(mine)}
        # An empty group is that of the same place, if there is one.
        source = home[mine[0]] if mine else index
        same_groups = same_groups and not first_of.keys() - {index}
        hypers = _hyperparameters(state[_GROUPS][source] if source < len(state[_GROUPS]) else group)
        for other in sorted(first_of.keys() - {source}):
            differing = _differing(hypers, _hyperparameters(state[_GROUPS][other]))
            if differing:
                raise CheckpointMismatchError(
                    f"group {index} of the optimizer has {listed([mine[0]])} and {listed([first_of[other]])}, which were in groups "
                    f"{source} and {other} when it was saved, with other values of {listed(differing)}: put them into groups of "
                    "their own again"
                )
        groups.append({**hypers, _PARAMS: numbers})
    ids = [number for group in state[_GROUPS] for number in group[_PARAMS]]
    number_of = {name: number for number, name in enumerate(own_names)}
    numbers_here = {saved_id: number_of[name] for saved_id, name in zip(ids, saved_names, strict=True)}
    return {**state, _STATE: _renumbered(state, numbers_here), _GROUPS: groups}, same_groups


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [str(key) for key in {**first, **second} if key not in first or key not in second or not _equal(first[key], second[key])]


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)) or first.shape != second.shape:
            return False
        return bool(((first == second) | (first.isnan() & second.isnan())).all())
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    # NaN, of a loss that nothing has been put into, is itself.
    return bool(first == second or (isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second)))


def _check_shapes(optimizer: Optimizer, state: Mapping[Any, Any], labels: Sequence[str]) -> None:
    total = sum(parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in parameters(optimizer))
    for number, parameter in enumerate(parameters(optimizer)):
        saved = state.get(number, {})
        for key, value in saved.items() if isinstance(saved, Mapping) else ():
            expected = _expected_shape(optimizer, key, tuple(parameter.shape), total)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if expected is None or not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tuple(tensor.shape) == expected:
                    continue
                raise CheckpointMismatchError(
                    f"{key} of {labels[number]} has shape {tuple(tensor.shape)} in the checkpoint, and {expected} here: was the model or "
                    "the order of its parameters changed since it was saved?"
                )


def _expected_shape(optimizer: Optimizer, key: object, shape: tuple[int, ...], total: int) -> tuple[int, ...] | None:
    """Return the shape that a tensor of an optimizer of torch's own must have; None where that is not known."""
    if key == _STEP:
        return None
    if type(optimizer) in _ELEMENTWISE:
        return shape
    if type(optimizer) is Adafactor:
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:]), "variance": shape}.get(str(key))
    return (total,) if type(optimizer) is LBFGS and key in _LBFGS_VECTORS else None


def _sharded(optimizer: Optimizer, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the state with this rank's part of every tensor, where the parameter is sharded."""

    def visit(value: Any, parameter: torch.Tensor, key: object) -> Any:
        if isinstance(value, torch.Tensor):
            # Step counts and their like are plain numbers beside a sharded parameter, too.
            is_number = key == _STEP or (value.ndim == 0 and parameter.ndim > 0)
            return value if is_number else shard_like(value, parameter)
        if isinstance(value, Mapping):
            return {name: visit(item, parameter, name) for name, item in value.items()}
        if type(value) in {list, tuple}:
            return type(value)([visit(item, parameter, key) for item in value])
        return value

    own = dict(enumerate(parameters(optimizer)))
    return {number: visit(value, own[number], None) if number in own else value for number, value in state.items()}


def _load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Have the optimizer take `state`, then give it memory of its own; all or nothing."""
    containers: list[dict[Any, Any]] = [optimizer.state, *optimizer.param_groups]
    kept, state_before, groups_before = [dict(container) for container in containers], optimizer.state, optimizer.param_groups
    # One with a method of its own may keep anything anywhere.
    own_way = type(optimizer).load_state_dict is not Optimizer.load_state_dict or _lengths(state) is None
    try:
        optimizer.load_state_dict(copy.deepcopy(state) if own_way else state)
    except Exception:
        optimizer.state, optimizer.param_groups = state_before, groups_before
        for container, content in zip(containers, kept, strict=True):
            container.clear()
            container.update(content)
        raise
    if own_way:
        return
    taken = _storages(state[_STATE])
    saved = {id(parameter): state[_STATE].get(number) for number, parameter in enumerate(parameters(optimizer))}
    for key in list(optimizer.state):
        optimizer.state[key] = _settled(optimizer.state[key], saved.get(id(key)), None, taken)


def _settled(loaded: Any, saved: Any, key: object, taken: set[int]) -> Any:
    """Return what was loaded, in memory of its own, and in the dtype it was saved in.

    torch converts state to the parameter's dtype; of float32 numbers beside bfloat16 parameters that loses bits.
    """
    if isinstance(loaded, torch.Tensor):
        same = isinstance(saved, torch.Tensor) and saved.shape == loaded.shape
        if same and saved.dtype != loaded.dtype and key != _STEP:
            return saved.to(loaded.device, copy=True)
        return loaded.clone() if taken & _storages(loaded) else loaded
    if type(loaded) is dict:
        there = saved if isinstance(saved, Mapping) else {}
        return {name: _settled(item, there.get(name), name, taken) for name, item in loaded.items()}
    if type(loaded) in {list, tuple}:
        items = saved if isinstance(saved, list | tuple) and len(saved) == len(loaded) else [None] * len(loaded)
        return type(loaded)([_settled(*pair, key, taken) for pair in zip(loaded, items, strict=True)])
    return loaded


def _storages(state: Any) -> set[int]:
    """Return where the plain tensors in `state` have their memory; parts of sharded ones are copies already."""
    return {tensor.untyped_storage().data_ptr() for tensor in plain_tensors(state)} - {0}
