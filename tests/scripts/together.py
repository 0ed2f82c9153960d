"""What all ranks do together, when one of them fails. One rank; prints one line a case."""

import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpcckpt.distributed import Ranks, fix_bucket_order
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import CheckpointSaveError


def outcome(action) -> str:
    try:
        return repr(action())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class OddError(Exception):
    def __init__(self, one, two) -> None:
        super().__init__(f"{one} {two}")


def fail(error: Exception) -> None:
    raise error


def buckets(ddp: DistributedDataParallel) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for bucket in ddp.reducer._get_zeros_like_grad_buckets() for parameter in bucket.parameters()]


task = TaskEnvironment.from_environ(os.environ)
ranks = Ranks(task, torch.device("cpu"))
print("value", outcome(lambda: ranks.from_main(lambda: f"from {task.rank}")))
print("error", outcome(lambda: ranks.from_main(lambda: fail(CheckpointSaveError("disk full")))))
print("builtin", outcome(lambda: ranks.from_main(lambda: fail(FileNotFoundError("no such thing")))))
print("foreign", outcome(lambda: ranks.from_main(lambda: fail(OddError(1, 2)))))
print("unsendable", outcome(lambda: ranks.from_main(lambda: fail(ValueError(lambda: None)))))
print("unsendable-value", outcome(lambda: ranks.from_main(lambda: lambda: None)).partition(":")[0])
print("together", outcome(lambda: ranks.together(lambda: fail(ValueError("bad file")) if task.rank == 1 else task.rank)))
print("fine", outcome(lambda: ranks.together(lambda: task.rank)))
print("gather", ranks.gather(task.rank * 10))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2))
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
ddp = DistributedDataParallel(model)
rng = torch.get_rng_state()
print("settled", fix_bucket_order(ddp))
settled = buckets(ddp)
print("untouched", all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()))
print("no-gradients", all(parameter.grad is None for parameter in model.parameters()))
print("same-generator", torch.equal(rng, torch.get_rng_state()))
for _ in range(3):
    ddp(torch.ones(4, 3)).sum().backward()
print("same-buckets-later", buckets(ddp) == settled)
print("really-training", all(parameter.grad.abs().sum() > 0 for parameter in model.parameters()))
for name, other in {
    "unused": DistributedDataParallel(nn.Linear(2, 2), find_unused_parameters=True),
    "static": DistributedDataParallel(nn.Linear(2, 2), static_graph=True),
    "sparse": DistributedDataParallel(nn.EmbeddingBag(4, 2, sparse=True)),
    "plain": nn.Linear(2, 2),
}.items():
    print(f"left-alone-{name}", not fix_bucket_order(other))
compiled = torch.compile(DistributedDataParallel(nn.Linear(3, 2)), backend="eager")
print("compiled", fix_bucket_order(compiled), tuple(compiled(torch.ones(4, 3)).shape))
ranks.close()
ranks.close()
