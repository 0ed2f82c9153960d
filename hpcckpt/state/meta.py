"""Modules on the meta device: parameters with a shape and no memory, which loading gives them.

torch's `load_state_dict(assign=True)` puts new parameters in their place, each name for itself: tied parameters come
apart, and an optimizer made before keeps the old ones. Here the old objects stay and take over the new ones' memory.
"""

import torch
from torch import nn


class Placeholders:
    """The parameters and buffers of a module that are on the meta device, before something is assigned to them."""

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[dict[str, torch.Tensor | None], str, str]] = []
        self._old: dict[int, torch.Tensor] = {}
        for path, part in module.named_modules():
            for tensors in (part._parameters, part._buffers):  # noqa: SLF001 - nn.Module has no other way to set them as they are
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        self._places.append((tensors, name, f"{path}.{name}" if path else name))
                        self._old[id(tensor)] = tensor
        self._before = [id(tensors[name]) for tensors, name, _ in self._places]

    def keep(self) -> tuple[str, ...]:
        """Put the old objects back with the new memory; return the names of those that got none."""
        new: dict[int, torch.Tensor] = {}
        for (tensors, name, _), old in zip(self._places, self._before, strict=True):
            tensor = tensors[name]
            if tensor is not None and not tensor.is_meta:
                new.setdefault(old, tensor)
        for key, tensor in new.items():
            try:
                torch.utils.swap_tensors(self._old[key], tensor)  # type: ignore[no-untyped-call]
            except RuntimeError:  # somebody holds a weak reference: the new object is used, in all places of the old one
                self._old[key] = tensor
        for (tensors, name, _), old in zip(self._places, self._before, strict=True):
            tensors[name] = self._old[old]
        return tuple(label for (_, _, label), old in zip(self._places, self._before, strict=True) if old not in new)
