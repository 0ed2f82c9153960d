"""Every wrapper saves, every wrapper loads what was saved: `save FOLDER`, then `load FOLDER [what to spoil …]`, on any number of ranks.

A line of JSON in FOLDER/table.jsonl is one cell: by whom a file was saved and loaded, and what was equal. `sharded FOLDER`, on
four ranks, prints what the table has no column for.
"""

import functools
import itertools
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hpcckpt.distributed import Ranks
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import CheckpointSaveError
from hpcckpt.state.tracked import Tracked

STEPS = 3


class Net(nn.Module):
    """Shapes that four ranks cannot share evenly, tied weights, buffers, a submodule with a wrapper's name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.module = nn.Linear(5, 6, bias=False)
        self.first = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.register_buffer("scale", torch.rand(()))

    def forward(self, x):
        return self.last(self.frozen(self.module(self.body(self.first(x))))) * self.scale


compiled = functools.partial(torch.compile, backend="eager")


def with_compiled_part(model):
    model.body[0] = compiled(model.body[0])
    return model


def sharded(model, *, root=True):
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    fully_shard(model.body, mesh=mesh)
    if root:
        fully_shard(model, mesh=mesh)
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "compile": compiled,
    "DDP of compile": lambda model: DistributedDataParallel(compiled(model)),
    "compile of DDP": lambda model: compiled(DistributedDataParallel(model)),
    "compiled submodule": with_compiled_part,
    "FSDP2": sharded,
    "compile of FSDP2": lambda model: compiled(sharded(model)),
    "FSDP2 below a plain root": lambda model: sharded(model, root=False),
}
# Further forms of the one before: tried at one world size only, to save time.
AT_TWO_RANKS = ("compile of FSDP2", "FSDP2 below a plain root")


class Training:
    def __init__(self, wrapper, seed):
        torch.manual_seed(seed)
        self.model = WRAPPERS[wrapper](Net())
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
                {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0, "amsgrad": True},
            ],
            lr=0.01,
        )
        self.tracked, self.weights = Tracked(), Tracked()
        self.weights.add("model", self.model)
        self.tracked.add("model", self.model)
        self.tracked.add("optimizer", self.optimizer)

    def step(self, number):
        """All ranks take the same batch: means over powers of two of equal gradients are exact."""
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        self.model(inputs).square().mean().backward()
        self.optimizer.step()


def plain_step(path):
    """What torch alone makes of a file: no wrapper, no code of ours. Its optimizer trains in the memory it was given."""
    content = torch.load(path, weights_only=True)
    training = Training("plain", 0)
    training.model.load_state_dict(content["model_state_dict"])
    training.optimizer.load_state_dict(content["optimizer_state_dict"])
    training.step(STEPS)
    return training.model.state_dict()


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def spoil(training, what):
    with torch.no_grad():
        tensor = next(training.model.parameters()) if what == "weight" else next(iter(training.optimizer.state.values()))["exp_avg"]
        tensor.mul_(1.0 + 1e-6)


def save(folder):
    for number, wrapper in enumerate(WRAPPERS):
        training = Training(wrapper, 1000 * ranks.world_size + number)
        for step in range(STEPS):
            training.step(step)
        state = training.tracked.state(is_main=ranks.is_main)
        if ranks.is_main:
            torch.save(state, folder / f"{ranks.world_size} {wrapper}.pt")
        else:
            assert state == {}
        torch._dynamo.reset()


def load(folder, spoiled):
    def is_tried(wrapper):
        return ranks.world_size == 2 or wrapper not in AT_TWO_RANKS

    paths = [path for path in sorted(folder.glob("*.pt")) if is_tried(path.stem.partition(" ")[2])]
    files = {path: (torch.load(path, weights_only=True, mmap=True), plain_step(path)) for path in paths}
    for wrapper in filter(is_tried, WRAPPERS):
        # One for all files, each of which has other numbers: the first is loaded into an optimizer without any state, the
        # next over what the one before left.
        training = Training(wrapper, 7)
        for what, path in itertools.product(spoiled, files):
            content, expected = files[path]
            training.tracked.load(content)
            if what:
                spoil(training, what)
            found = training.tracked.state(is_main=ranks.is_main)
            # Before the next step, which changes what `found` shares its memory with.
            same = {key.removesuffix("_state_dict"): equal(content[key], value) for key, value in found.items()}
            training.step(STEPS)
            after = training.weights.state(is_main=ranks.is_main)
            if ranks.is_main:
                saved_ranks, _, saved_by = path.stem.partition(" ")
                states = [found["model_state_dict"], *found["optimizer_state_dict"]["state"].values()]
                cell = {
                    "saved": [int(saved_ranks), saved_by],
                    "loaded": [ranks.world_size, wrapper],
                    "spoiled": what,
                    "tensors": sum(isinstance(value, torch.Tensor) for state in states for value in state.values()),
                    **same,
                    "step": equal(dict(expected), after["model_state_dict"]),
                }
                with (folder / "table.jsonl").open("a") as table:
                    table.write(json.dumps(cell) + "\n")
        torch._dynamo.reset()


def in_two_dimensions(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


def hybrid(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


class Factored(torch.optim.SGD):
    """Keeps a mean of each row, as Adafactor does, which cannot train sharded parameters itself."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state, size = self.state[parameter], parameter.grad.abs().mean(dim=-1, keepdim=True)
                state["rows"] = state["rows"] * 0.5 + size if "rows" in state else size
                parameter.sub_(parameter.grad / (state["rows"] + 1) * group["lr"])


def small_training(wrap, make, seed):
    torch.manual_seed(seed)
    model = wrap(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)))
    return model, make(model.parameters())


def small_steps(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def tracking(model, optimizer):
    tracked = Tracked()
    tracked.add("model", model)
    tracked.add("optimizer", optimizer)
    return tracked


def goes_on(folder, wrap, make):
    """Whether a sharded training goes on with the same bits, and a plain one takes the same file."""
    before, after = small_training(wrap, make, 1), small_training(wrap, make, 2)
    small_steps(*before, 3)
    path = folder / "state.pt"
    state = tracking(*before).state(is_main=ranks.is_main)
    ranks.from_main(lambda: torch.save(state, path))
    content = torch.load(path, weights_only=True, mmap=True)
    plain = small_training(lambda model: model, make, 3)
    for training in (after, plain):
        tracking(*training).load(content)
    small_steps(*before, 2)
    small_steps(*after, 2)
    states = [tracking(*training).state(is_main=ranks.is_main) for training in (before, after, plain)]
    ranks.barrier()
    return ranks.broadcast(ranks.is_main and equal(states[0], states[1]) and equal(states[2], content) and not equal(states[0], content))


class Odd:
    def __init__(self):
        self.state = {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        pass


def an_error_of_rank_0():
    """An object that only rank 0 reads fails; the ranks that gather with it get through all the same."""
    odd, tracked = Odd(), Tracked()
    tracked.add("odd", odd)
    tracked.add("model", sharded(Net()))
    odd.state = {"a": {1}}
    try:
        result = repr(tracked.state(is_main=ranks.is_main))
    except CheckpointSaveError as error:
        result = str(error)
    return " ".join(text.partition(",")[0] for text in ranks.gather(result))


def further_forms(folder):
    makers = {
        "two dimensions": (in_two_dimensions, torch.optim.AdamW),
        "hybrid": (hybrid, torch.optim.AdamW),
        "SGD": (fully_shard, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)),
        "NAdam": (fully_shard, torch.optim.NAdam),
        "state of another shape": (fully_shard, Factored),
    }
    for name, form in makers.items():
        print(name, goes_on(folder, *form))
    print("error", an_error_of_rank_0())


ranks = Ranks(TaskEnvironment.from_environ(os.environ), torch.device("cpu"))
if sys.argv[1] == "save":
    save(Path(sys.argv[2]))
elif sys.argv[1] == "sharded":
    further_forms(Path(sys.argv[2]))
else:
    load(Path(sys.argv[2]), sys.argv[3:] or [""])
ranks.close()
