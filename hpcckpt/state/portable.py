"""Only tensors and primitives go into a file, so that `torch.load(weights_only=True)` reads it anywhere.

Checked when an object is tracked, not when a job is resumed: a state that cannot be loaded back must fail in the first
second of a run.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hpcckpt.errors import CheckpointSaveError

# How a subclass (NumPy's float64, an Enum with a __str__ of its own) becomes the plain type.
_PLAIN: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__, bytes: bytes.__bytes__}
# pickle writes longer ones with an opcode that weights_only does not read.
_INT_BITS = 2032


def portable(value: Any, where: str, *, meta: bool = False) -> Any:
    """Return `value` with plain containers and primitives; tensors are passed on as they are.

    Subclasses of float, int, str and bytes (NumPy's float64 among them) become the plain type, and so do mappings but for
    Counter, whose methods MultiStepLR calls after it was loaded.

    Raises:
        CheckpointSaveError: something else is in it, or a tensor without content unless `meta` allows it; names its place.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, torch.Tensor) and type(detached := value.detach()) is torch.Tensor:  # weights_only reads no subclasses
        if detached.is_meta and not meta:
            raise CheckpointSaveError(f"{where} is on the meta device, which holds no values: give it memory (to_empty) and values before")
        return detached
    for kind, plain in _PLAIN.items():
        if isinstance(value, kind):
            return _readable(plain(value), where)
    if isinstance(value, Mapping):
        items = {_key(key, where): portable(item, f"{where}.{key}", meta=meta) for key, item in value.items()}
        return Counter(items) if isinstance(value, Counter) else items
    if isinstance(value, tuple):
        return tuple(portable(item, f"{where}[{index}]", meta=meta) for index, item in enumerate(value))
    if isinstance(value, list):
        return [portable(item, f"{where}[{index}]", meta=meta) for index, item in enumerate(value)]
    item = getattr(value, "item", None)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and item is not None:
        return item()
    raise CheckpointSaveError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which plain torch.load would refuse to read: let its "
        "state_dict return tensors, numbers, strings, lists and dicts only"
    )


def _readable(value: Any, where: str) -> Any:
    """Return `value`, unless pickle spells it in a way that weights_only does not know."""
    if value == b"" or (isinstance(value, int) and value.bit_length() > _INT_BITS):
        kind = "empty bytes" if value == b"" else f"an integer of {value.bit_length()} bits"
        raise CheckpointSaveError(f"{where} holds {kind}, which plain torch.load would refuse to read: use None, or a string")
    return value


def _key(key: Any, where: str) -> Any:
    if isinstance(key, tuple):
        return tuple(_key(part, where) for part in key)
    if isinstance(key, torch.Tensor):  # is found by identity, which does not survive a file
        raise CheckpointSaveError(f"{where} has a tensor for a key; use strings or numbers")
    return portable(key, f"{where} (a key)")
