"""Whether modules have changed since a mark was made: what a training step does, and nothing between two of them should.

In-place operations count up a tensor's version, so for parameters a mark costs a number each. Buffers may be written without
being changed (DDP sends rank 0's to all ranks before each forward pass), so of them a copy is kept, and compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hpcckpt.distributed import is_sharded


@dataclass(frozen=True)
class Mark:
    """Modules at one moment."""

    versions: Mapping[str, tuple[tuple[int, int], ...]]
    buffers: Mapping[str, tuple[torch.Tensor, ...]]


def marked(modules: Mapping[str, torch.nn.Module]) -> Mark:
    """Return a mark of these modules, by name; those whose parameters are spread over ranks are left out."""
    whole = {name: module for name, module in modules.items() if not is_sharded(module)}
    return Mark(
        {name: _versions(module) for name, module in whole.items()},
        {name: tuple(buffer.detach().clone() for buffer in module.buffers()) for name, module in whole.items()},
    )


def changed_since(mark: Mark, modules: Mapping[str, torch.nn.Module]) -> list[str]:
    """Return the names of those that are not as they were at the mark."""
    return [name for name in mark.versions if _has_changed(mark, name, modules[name])]


def _has_changed(mark: Mark, name: str, module: torch.nn.Module) -> bool:
    before, now = mark.buffers[name], tuple(module.buffers())
    return (
        _versions(module) != mark.versions[name]
        or len(before) != len(now)
        or not all(_is_same(old, new) for old, new in zip(before, now, strict=True))
    )


def _versions(module: torch.nn.Module) -> tuple[tuple[int, int], ...]:
    # The address, too: a parameter may be replaced. An inference tensor has no version, and is not trained.
    return tuple((parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version) for parameter in module.parameters())  # noqa: SLF001


def _is_same(old: torch.Tensor, new: torch.Tensor) -> bool:
    # NaN is a value like others here.
    return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device and _bits_equal(old, new.detach())


def _bits_equal(old: torch.Tensor, new: torch.Tensor) -> bool:
    return bool(torch.equal(old, new)) or bool(torch.all((old == new) | ((old != old) & (new != new))))  # noqa: PLR0124 - NaN alone differs from itself
