"""State whose tensors are spread over ranks: FSDP2 (`fully_shard`) and tensor parallelism, whose parameters are DTensors.

A file holds full tensors, so that any number of ranks, sharded or not, reads it. They are gathered one at a time, and
on loading each rank reads the file and keeps its own part: nothing is sent.

Not by torch.distributed.checkpoint.state_dict: its optimizer functions make an optimizer step where there is no state
yet, which leaves a step count of 1 and moments where an unsharded run has none.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def _class(module: str, name: str) -> tuple[type, ...]:
    """Return a class for isinstance, or none where its module was never imported: then no such object exists."""
    return (getattr(sys.modules[module], name),) if hasattr(sys.modules.get(module), name) else ()


def holds_shards(tensors: Iterable[object]) -> bool:
    """Return whether any of the tensors is spread over ranks."""
    kinds = _class("torch.distributed.tensor", "DTensor")
    return bool(kinds) and any(isinstance(tensor, kinds) for tensor in tensors)


def is_sharded(module: nn.Module) -> bool:
    """Return whether any parameter of `module` is spread over ranks, be it gathered at the moment or not."""
    kinds = _class("torch.distributed.fsdp", "FSDPModule")
    return holds_shards(module.parameters()) or (bool(kinds) and any(isinstance(part, kinds) for part in module.modules()))


def full_state(state: Any, *, keep: bool) -> Any:
    """Return `state` with every sharded tensor whole and on the CPU, once for each that stands in it twice.

    Every rank of the tensors' mesh must call it, with the same structure. Where `keep` is false the tensors are dropped
    as soon as they are whole, and the result is None.
    """
    kinds = _class("torch.distributed.tensor", "DTensor")
    whole: dict[int, torch.Tensor | None] = {}

    def visit(value: Any) -> Any:
        if kinds and isinstance(value, kinds):
            if id(value) not in whole:
                tensor = _full_tensor(value)
                whole[id(value)] = tensor.cpu() if keep else None
            return whole[id(value)]
        if isinstance(value, Mapping):
            return {key: visit(item) for key, item in value.items()}
        if type(value) in {list, tuple}:
            return type(value)([visit(item) for item in value])
        return value

    result = visit(state)
    return result if keep else None


def local_state(state: Any) -> Any:
    """Return `state` with this rank's part in the place of every sharded tensor; no collective."""
    kinds = _class("torch.distributed.tensor", "DTensor")
    if kinds and isinstance(state, kinds):
        local: Any = state
        return local.to_local()
    if isinstance(state, Mapping):
        return {key: local_state(value) for key, value in state.items()}
    if type(state) in {list, tuple}:
        return type(state)([local_state(value) for value in state])
    return state


def shard_like(full: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of `full`, spread as `own` is, in memory of its own; `full` itself where `own` is not spread.

    No collective: every rank has the whole tensor. One of another shape (a factored second moment) is spread likewise if it
    is as long in the dimensions that `own` is cut in, else every rank gets it in full.
    """
    kinds = _class("torch.distributed.tensor", "DTensor")
    if not kinds or not isinstance(own, kinds):
        return full
    from torch.distributed.tensor import Replicate, distribute_tensor

    spread: Any = own
    cut = [placement.dim % own.ndim for placement in spread.placements if hasattr(placement, "dim")]
    alike = full.shape == own.shape or all(dim < full.ndim and full.shape[dim] == own.shape[dim] for dim in cut)
    placements = spread.placements if alike else [Replicate()] * spread.device_mesh.ndim
    part = distribute_tensor(full.detach(), spread.device_mesh, placements, src_data_rank=None)
    # Without the copy a part would be a view that keeps the whole tensor, or the file it is mapped from, alive.
    copied = part.clone()
    return copied if own.is_meta else copied.to(own.device)


def _full_tensor(value: Any) -> torch.Tensor:
    device = value.device_mesh.device_type
    moved = value if value.device.type == device else value.to(device)  # parameters that FSDP keeps on the CPU
    tensor: torch.Tensor = moved.detach().full_tensor()
    return tensor
