"""Only tensors and primitives go into a file, so that `torch.load(weights_only=True)` reads it anywhere.

Checked when an object is tracked, not when a job is resumed: a state that cannot be loaded back must fail in the first
second of a run.
"""

from collections.abc import Mapping
from typing import Any

import torch

from hpcckpt.errors import CheckpointSaveError


def portable(value: Any, where: str) -> Any:
    """Return `value` with plain containers and primitives; tensors are passed on as they are.

    Subclasses of float, int and str (NumPy's float64 among them) become the plain type.

    Raises:
        CheckpointSaveError: something else is in it; names its place and type.
    """
    if value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach()
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, Mapping):
        return {_key(key, where): portable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(portable(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, list):
        return [portable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    item = getattr(value, "item", None)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and item is not None:
        return item()
    raise CheckpointSaveError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which plain torch.load would refuse to read: let its "
        "state_dict return tensors, numbers, strings, lists and dicts only"
    )


def _key(key: Any, where: str) -> Any:
    if isinstance(key, str | int | float | tuple) or key is None:
        return portable(key, f"{where} (a key)")
    raise CheckpointSaveError(f"{where} has a key of type {type(key).__qualname__}; use strings or numbers")
