"""The `module.` that DataParallel and DistributedDataParallel put before every key of a state dict.

These functions go by the spelling of the keys, for scripts that move state dicts about by hand. Loading a file into a model
needs none of them: `load_checkpoint_universal` and `load_weights` go by the model's own structure, and so know a wrapper's
prefix from a submodule that its author called `module`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from hpcckpt.errors import CheckpointMismatchError

_NAME = "module"
_PREFIX = f"{_NAME}."


def remove_module_prefix(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a copy without one leading `module.` of each key that has it.

    Goes key by key: of a dict put together by hand, of a wrapped backbone and a plain head say, the wrapped part alone
    changes. Order is kept, and so is the `_metadata` that modules read layer versions from. An unwrapped model with a
    submodule that is really called `module` has no prefix to remove: that is the caller's to know, or take
    `load_checkpoint_universal`, which asks the model.

    Args:
        state_dict: name -> tensor; it is not changed, and the tensors are not copied.

    Raises:
        CheckpointMismatchError: two keys would become one, `module.weight` beside `weight` say.
    """
    return _renamed(state_dict, lambda key: key.removeprefix(_PREFIX), "removed", _metadata_without)


def add_module_prefix(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a copy with `module.` before each key that lacks it, as a DataParallel or DistributedDataParallel model takes it.

    A second call changes nothing. For a model with a submodule that is really called `module` see `remove_module_prefix`.

    Args:
        state_dict: name -> tensor; it is not changed, and the tensors are not copied.

    Raises:
        CheckpointMismatchError: two keys would become one, `weight` beside `module.weight` say.
    """
    return _renamed(state_dict, lambda key: key if key.startswith(_PREFIX) else _PREFIX + key, "added", _metadata_with)


def normalize_state_dict(state_dict: Mapping[str, Any], remove_prefix: bool = True) -> OrderedDict[str, Any]:  # noqa: FBT001, FBT002
    """Return a copy without the prefix, as `remove_module_prefix`; with `remove_prefix=False` a copy as it is.

    Raises:
        CheckpointMismatchError: two keys would become one.
    """
    return remove_module_prefix(state_dict) if remove_prefix else _renamed(state_dict, str, "kept", dict)


def _renamed(
    state_dict: Mapping[str, Any],
    rename: Callable[[str], str],
    what: str,
    metadata_of: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> OrderedDict[str, Any]:
    renamed: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        new = rename(key)
        if new in renamed:
            raise CheckpointMismatchError(
                f"state dict: with {_PREFIX!r} {what}, {key!r} and another key both become {new!r}, and one tensor would be lost; "
                "rename one of them, or let load_checkpoint_universal match the names to the model"
            )
        renamed[new] = value
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        # Where torch keeps it: an attribute of the state dict, beside its items.
        renamed._metadata = OrderedDict(metadata_of(metadata))  # type: ignore[attr-defined]  # noqa: SLF001
    return renamed


def _metadata_without(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions by module path, which have no dot at the end: the wrapped module's own takes the wrapper's place."""
    outer = {path: entry for path, entry in metadata.items() if path != _NAME and not path.startswith(_PREFIX)}
    inner = {path[len(_PREFIX) :]: entry for path, entry in metadata.items() if path == _NAME or path.startswith(_PREFIX)}
    return {**outer, **inner}


def _metadata_with(metadata: Mapping[str, Any]) -> dict[str, Any]:
    # Where there is one of `module`, the model was wrapped in part or in full, and "" is the wrapper's own.
    stays = ("", _NAME) if _NAME in metadata else ()
    kept = {path: entry for path, entry in metadata.items() if path in stays or path.startswith(_PREFIX)}
    added = {f"{_PREFIX}{path}".removesuffix("."): entry for path, entry in metadata.items() if path not in kept}
    return {**added, **kept}
