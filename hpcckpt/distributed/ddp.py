"""One order of DDP's gradient buckets for the whole run, so that a resumed run adds the same numbers in the same order.

DDP lays its buckets out anew after the first backward pass, in the order in which gradients arrived. An uninterrupted
run does so once, at its start; a resumed one begins again with the first layout. A ring all-reduce adds the ranks'
gradients in an order that depends on an element's place in the bucket, and with three or more ranks floating-point
sums depend on the order: the resumed step differs in its last bits, and so does everything after it. Measured in
docs/decisions/0002-ddp-bucket-order.md.

So the layout is settled before the first step, the same on every start: two passes over a stand-in for the model's
forward whose gradients are all zero and arrive last parameter first, which is what DDP itself assumes until it knows
better. Only public interfaces are used, and no parameter, optimizer or random number generator changes.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class _StandIn(nn.Module):
    """Has a zero gradient for each parameter, and the last parameter's first."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._those = parameters  # a plain list: they stay the wrapped module's

    def forward(self) -> torch.Tensor:
        """Return 0.0; autograd runs what was recorded last first, and empty slices cost nothing."""
        total = torch.zeros((), device=self._those[0].device)
        for parameter in self._those:
            total = total + parameter.reshape(-1)[:0].float().sum().to(total.device)
        return total


def fix_bucket_order(module: nn.Module) -> bool:
    """Settle the buckets of every DistributedDataParallel in `module`, none of which has trained yet.

    Every rank must call it. Gradients are None afterwards, as they were before. Returns whether there was anything to
    do: one or two ranks add in one order only, and DDP keeps its first layout with find_unused_parameters. Left alone
    are static graphs and sparse gradients, for which the stand-in would be another graph than the model's.
    """
    settled = False
    for candidate in module.modules():
        if isinstance(candidate, DistributedDataParallel) and _can_be_settled(candidate):
            _settle(candidate)
            settled = True
    return settled


def share_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers, as the next forward pass of each DistributedDataParallel in `module` would.

    Every rank must call it. Since the last pass BatchNorm's statistics are each rank's own, and a checkpoint has rank 0's: an
    evaluation that goes around DDP would see others behind a restart.
    """
    for part in module.modules():
        if isinstance(part, DistributedDataParallel) and part.broadcast_buffers and part.process_group.size() > 1:
            named = part.module.named_buffers()
            buffers = [buffer.detach() for name, buffer in named if name not in part.parameters_to_ignore and buffer.numel()]
            kinds = dict.fromkeys((buffer.dtype, buffer.device) for buffer in buffers)
            for kind in kinds:
                _broadcast([buffer for buffer in buffers if (buffer.dtype, buffer.device) == kind], part.process_group)


def _broadcast(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    # Through a dense copy: of a tensor with gaps gloo would write into them, and NCCL takes none.
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
    for tensor, values in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view(tensor.shape))


def has_varying_buckets(module: nn.Module) -> bool:
    """Return whether a DistributedDataParallel in `module` lays its buckets out anew on each start, in an order that counts."""
    parts = [part for part in module.modules() if isinstance(part, DistributedDataParallel)]
    return any(_order_counts(part) and _would_be_misrepresented(part) for part in parts)


def _can_be_settled(module: DistributedDataParallel) -> bool:
    return _order_counts(module) and not _would_be_misrepresented(module)


def _order_counts(module: DistributedDataParallel) -> bool:
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return trains and module.process_group.size() > 2 and not module.find_unused_parameters


def _would_be_misrepresented(module: DistributedDataParallel) -> bool:
    return bool(module.static_graph) or any(getattr(part, "sparse", False) for part in module.modules())


def _settle(module: DistributedDataParallel) -> None:
    wrapped = module.module
    module.module = _StandIn([parameter for parameter in wrapped.parameters() if parameter.requires_grad])
    try:
        with torch.enable_grad():
            # The first backward pass records the order, the second forward pass applies it.
            for _ in range(2):
                # The stand-in has no buffers to broadcast, and DDP counts those of the model; each forward sets it back.
                module.require_forward_param_sync = False
                module().backward()
    finally:
        module.module = wrapped
        module.zero_grad(set_to_none=True)
