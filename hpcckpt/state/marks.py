"""Whether modules have changed since a mark was made: what a training step does, and nothing between two of them should.

Values count, not that something was written: DDP sends rank 0's buffers to all ranks before each forward pass, and an average may
be swapped in for an evaluation and out again. Of buffers a copy is kept; of parameters, which may fill a device, the sum of their
bits. (A tensor's version would say nothing of what is written through `.data`, as many averages of weights are.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.parameter import UninitializedParameter

from hpcckpt.distributed import is_sharded


@dataclass(frozen=True)
class Mark:
    """Modules at one moment."""

    sums: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[torch.Tensor, ...]]


def marked(modules: Mapping[str, torch.nn.Module]) -> Mark:
    """Return a mark of these modules, by name; those whose parameters are spread over ranks are left out."""
    whole = {name: module for name, module in modules.items() if not is_sharded(module)}
    return Mark(
        {name: _sums(module) for name, module in whole.items()},
        {name: tuple(buffer.detach().clone() for buffer in module.buffers()) for name, module in whole.items()},
    )


def changed_since(mark: Mark, modules: Mapping[str, torch.nn.Module]) -> list[str]:
    """Return the names of those that are not as they were at the mark."""
    return [name for name in mark.sums if _has_changed(mark, name, modules[name])]


def _has_changed(mark: Mark, name: str, module: torch.nn.Module) -> bool:
    before, now = mark.buffers[name], tuple(module.buffers())
    return (
        len(before) != len(now)
        or not all(_is_same(old, new) for old, new in zip(before, now, strict=True))
        or _sums(module) != mark.sums[name]
    )


def _sums(module: torch.nn.Module) -> tuple[int, ...]:
    # One that is lazy has no values yet.
    parameters = (parameter for parameter in module.parameters() if not isinstance(parameter, UninitializedParameter))
    # All are begun before the first is waited for.
    return tuple(int(total) for total in [_bits(parameter.detach()).sum(dtype=torch.int64) for parameter in parameters])


def _bits(values: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(values) if values.is_complex() else values
    if real.is_contiguous() and real.nbytes % 8 == 0:  # six times as fast on a CPU
        return real.view(-1).view(torch.int64)
    return real.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()])


def _is_same(old: torch.Tensor, new: torch.Tensor) -> bool:
    # NaN is a value like others here.
    return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device and _bits_equal(old, new.detach())


def _bits_equal(old: torch.Tensor, new: torch.Tensor) -> bool:
    return bool(torch.equal(old, new)) or bool(torch.all((old == new) | ((old != old) & (new != new))))  # noqa: PLR0124 - NaN alone differs from itself
