"""What the ranks have to hold the same: a model's buffers, the order of samples. One rank; prints one line a case.

python agreeing.py RUN_DIR
"""

import random
import sys

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, RandomSampler, TensorDataset, WeightedRandomSampler

import hpcckpt
from hpcckpt.distributed import share_buffers
from hpcckpt.errors import UsageError

NAMES = ("float32", "float64", "float16", "bfloat16", "complex64", "int64", "int32", "int8", "uint8", "bool")
DTYPES = {name: getattr(torch, name) for name in NAMES}
LAYOUTS = {
    "dense": lambda whole: whole,
    "transposed": lambda whole: whole.t(),
    "with gaps": lambda whole: whole[:, ::2],
    "transposed with gaps": lambda whole: whole[::3].t(),
    "last of each row": lambda whole: whole[:, -1],
    "one value": lambda whole: whole[1, 1],
    "empty": lambda whole: whole[:0],
}


def values(rank, dtype):
    """Return what a rank has: no two ranks the same anywhere, nor where they go through another type."""
    numbers = torch.arange(24).reshape(4, 6) + rank
    if dtype is torch.bool:
        return numbers % 2 == 0
    return numbers + 2**60 if dtype is torch.int64 else (numbers / 3).to(dtype) if dtype.is_floating_point else numbers.to(dtype)


class Buffers(nn.Module):
    """One parameter, so that DDP takes it, and a buffer of each kind and layout, each a view of a whole of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.wholes = {}
        for kind, dtype in DTYPES.items():
            for layout, view in LAYOUTS.items():
                self.wholes[kind, layout] = whole = torch.zeros(4, 6, dtype=dtype)
                self.register_buffer(f"{layout}, {kind}", view(whole))

    def fill(self, rank):
        for (kind, _), whole in self.wholes.items():
            whole.copy_(values(rank, DTYPES[kind]))


def is_shared(module, kind, layout):
    """Whether a buffer has rank 0's values, and what lies between them is this rank's still."""
    expected = values(run.rank, DTYPES[kind])
    view = LAYOUTS[layout]
    view(expected).copy_(view(values(0, DTYPES[kind])))
    return torch.equal(module.wholes[kind, layout], expected)


def buffers():
    module = Buffers()
    model = DistributedDataParallel(module)
    before = {name: (buffer, buffer.data_ptr(), buffer.stride()) for name, buffer in module.named_buffers()}
    module.fill(run.rank)
    share_buffers(nn.Sequential(model))
    for name, (buffer, address, stride) in before.items():
        layout, kind = name.split(", ")
        now = module.get_buffer(name)
        print(f"{name}:", is_shared(module, kind, layout), now is buffer and (now.data_ptr(), now.stride()) == (address, stride))


def left_alone():
    own = DistributedDataParallel(nn.BatchNorm1d(2), broadcast_buffers=False)
    ignoring = nn.BatchNorm1d(2)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["running_mean"])
    ignored = DistributedDataParallel(ignoring)
    for model in (own, ignored):
        model.module.running_mean.fill_(run.rank + 1)
        model.module.running_var.fill_(run.rank + 1)
        share_buffers(model)
    print("not broadcast:", own.module.running_mean.tolist(), own.module.running_var.tolist())
    print("ignored:", ignored.module.running_mean.tolist(), ignored.module.running_var.tolist())


class Sampler:
    """Gives what a function of the epoch does."""

    def __init__(self, order, size=12):
        self.order, self.size, self.epoch = order, size, 0

    def __len__(self):
        return self.size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(self.order(self.epoch))


def shuffled_by(draws):
    indices = list(range(12))
    draws.shuffle(indices)
    return indices


def samplers(rank):
    """Return arguments of `run.loader`, by case."""
    numbers = list(range(12))
    seeded = torch.Generator().manual_seed(rank)
    return {
        "seeded by rank": {"sampler": Sampler(lambda _: shuffled_by(random.Random(rank)))},
        "shifted on one rank": {"sampler": Sampler(lambda _: numbers[-rank:] + numbers[:-rank])},
        "another length": {"sampler": Sampler(lambda _: numbers[: 12 - 2 * rank])},
        "other batches": {"batch_sampler": Sampler(lambda _: [numbers[: 6 + rank], numbers[6 + rank :]], 2)},
        "from the second epoch on": {"sampler": Sampler(lambda epoch: shuffled_by(random.Random(rank * epoch)))},
        "python": {"sampler": Sampler(lambda _: shuffled_by(random))},
        "numpy": {"sampler": Sampler(lambda _: np.random.permutation(12).tolist())},  # noqa: NPY002 - the global generator
        "torch": {"sampler": RandomSampler(numbers)},
        "weighted": {"sampler": WeightedRandomSampler(torch.arange(1.0, 13.0), 12)},
        "generator": {"sampler": RandomSampler(numbers, generator=seeded)},
        "batches": {"batch_sampler": BatchSampler(RandomSampler(numbers), 3, drop_last=False)},
    }


def seen(loader):
    """Return the samples that this rank is given."""
    try:
        return [int(number) for (x,) in run.batches(loader) for number in x]
    except UsageError as error:
        return f"UsageError: {error}"


def orders():
    for draws in (random, np.random, torch):  # each rank elsewhere in its own draws
        (draws.manual_seed if draws is torch else draws.seed)(run.rank)
    loaders = {case: run.loader(TensorDataset(torch.arange(12)), **given) for case, given in samplers(run.rank).items()}
    run.track(model=nn.Linear(1, 1))
    for epoch in run.epochs(2):
        for case, loader in loaders.items():
            print(f"{case}, epoch {epoch}:", seen(loader))


with hpcckpt.Run.from_environment(sys.argv[1]) as run:
    buffers()
    left_alone()
    orders()
