"""Process group, rendezvous and agreement. Sole owner of `torch.distributed`."""

from hpcckpt.distributed.agreement import Agreement, Wish
from hpcckpt.distributed.ddp import fix_bucket_order
from hpcckpt.distributed.ranks import Ranks, choose_device

__all__ = ["Agreement", "Ranks", "Wish", "choose_device", "fix_bucket_order"]
