"""Process group, rendezvous, agreement and sharded tensors. Sole owner of `torch.distributed`."""

from hpcckpt.distributed.agreement import Agreement
from hpcckpt.distributed.ddp import fix_bucket_order, has_varying_buckets, share_buffers
from hpcckpt.distributed.protocol import Wish
from hpcckpt.distributed.ranks import Collectives, Ranks, choose_device
from hpcckpt.distributed.sharded import full_state, holds_shards, is_sharded, local_state, shard_like
from hpcckpt.distributed.whereabouts import Whereabouts

__all__ = [
    "Agreement",
    "Collectives",
    "Ranks",
    "Whereabouts",
    "Wish",
    "choose_device",
    "fix_bucket_order",
    "full_state",
    "has_varying_buckets",
    "holds_shards",
    "is_sharded",
    "local_state",
    "shard_like",
    "share_buffers",
]
