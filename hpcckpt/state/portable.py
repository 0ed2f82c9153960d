"""Only tensors and primitives go into a file, so that `torch.load(weights_only=True)` reads it anywhere.

Checked when an object is tracked, not when a job is resumed: a state that cannot be loaded back must fail in the first
second of a run.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from hpcckpt.errors import CheckpointSaveError

# How a subclass (NumPy's float64, an Enum with a __str__ of its own) becomes the plain type.
_PLAIN: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__, bytes: bytes.__bytes__}
# pickle writes longer ones with an opcode that weights_only does not read.
_INT_BITS = 2032
# How much of a storage may go into a file for nothing.
_SPARED_BYTES = 64 * 1024


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


def compacted(content: Any) -> Any:
    """Return `content` with small views of large storages copied, so that torch.save does not write the whole storages.

    Only storages of which less than half is used. The same view stays one tensor under all of its names.
    """
    views: dict[Any, dict[Any, torch.Tensor]] = {}
    for tensor in plain_tensors(content):
        storage = tensor.untyped_storage()
        if storage.nbytes() > _SPARED_BYTES:
            views.setdefault((tensor.device, storage.data_ptr()), {}).setdefault(_view(tensor), tensor)
    copies: dict[Any, torch.Tensor] = {}
    for place, tensors in views.items():
        whole = max(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        used = sum(min(tensor.numel(), _span(tensor)) * tensor.element_size() for tensor in tensors.values())
        if 2 * used < whole and whole - used > _SPARED_BYTES:
            copies |= {(place, view): _copy(tensor) for view, tensor in tensors.items()}
    return _replaced(content, copies) if copies else content


def plain_tensors(content: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors with memory of their own layout in any nesting of containers: dense, not quantized, of no subclass."""
    if isinstance(content, torch.Tensor):
        is_plain = type(content) in {torch.Tensor, torch.nn.Parameter} and content.layout == torch.strided
        if is_plain and not content.is_meta and not content.is_quantized:
            yield content
    elif isinstance(content, Mapping):
        for item in content.values():
            yield from plain_tensors(item)
    elif isinstance(content, list | tuple):
        for item in content:
            yield from plain_tensors(item)


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what tells views of one storage apart."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _span(tensor: torch.Tensor) -> int:
    """Return the number of elements from a view's first to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor, span = tensor.detach(), _span(tensor)
    if span >= tensor.numel():
        return tensor.clone()
    # Expanded: what it shows is more than what it is.
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride(), 0)


def _replaced(content: Any, copies: Mapping[Any, torch.Tensor]) -> Any:
    if isinstance(content, torch.Tensor):
        if next(plain_tensors(content), None) is None:
            return content
        return copies.get(((content.device, content.untyped_storage().data_ptr()), _view(content)), content)
    if isinstance(content, Mapping) and not isinstance(content, Counter):
        return {key: _replaced(item, copies) for key, item in content.items()}
    if type(content) in {list, tuple}:
        return type(content)([_replaced(item, copies) for item in content])
    return content
