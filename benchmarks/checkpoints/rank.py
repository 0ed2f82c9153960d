"""One rank of a run whose saves are timed; see `growth`."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hpcckpt
from benchmarks.checkpoints.models import state_of, trained, update
from benchmarks.checkpoints.saving import CONTENDERS
from benchmarks.checkpoints.states import State

OURS = "hpcckpt, a run"
BESIDE = ("torch.save + fsync", "raw O_DIRECT + fsync")
_SETTINGS = ["checkpoint.every_steps=1", "checkpoint.async_save=false"]


@dataclass(frozen=True)
class Saves:
    """What ranks are asked to save, and how often."""

    model: str
    rounds: int
    folder: Path
    settle_s: float


def save(rank: int, world: int, _job: str, asked: Saves, ready: Callable[[], None]) -> dict[str, list[float]]:
    """Train a little, and return how long this rank stood still for each save, by contender. In a process of its own."""
    torch.set_num_threads(1)
    took: dict[str, list[float]] = {name: [] for name in (OURS, *BESIDE)}
    with hpcckpt.Run.from_environment(asked.folder / "run", _SETTINGS) as run:
        bare, optimizer = trained(asked.model)
        model = DistributedDataParallel(bare)
        run.track(model=model, optimizer=optimizer)
        # One more than counts: the first has buffers to make.
        steps = asked.rounds + 1
        loader = run.loader(torch.utils.data.TensorDataset(torch.arange(float((steps + 1) * world))), batch_size=1)
        ready()
        for _ in run.epochs(1):
            stepped = 0.0
            for number, _ in enumerate(run.batches(loader)):
                if number:
                    took[OURS].append(time.perf_counter() - stepped)
                    if number == steps:
                        break
                state = state_of(bare, optimizer)
                update(state, 1.0)
                for name in BESIDE:
                    _settle(rank, asked.settle_s)
                    took[name].append(_beside(name, rank, state, asked.folder / "beside"))
                _settle(rank, asked.settle_s)
                stepped = time.perf_counter()
                run.step()
    return {name: seconds[1:] for name, seconds in took.items()}


def _settle(rank: int, settle_s: float) -> None:
    if rank == 0:
        os.sync()
        time.sleep(settle_s)
    dist.barrier()


def _beside(name: str, rank: int, state: State, folder: Path) -> float:
    """Save as a script would, on rank 0 with a barrier behind it."""
    if rank == 0:
        folder.mkdir()
    began = time.perf_counter()
    if rank == 0:
        CONTENDERS[name].save(state, folder)
    dist.barrier()
    took_s = time.perf_counter() - began
    if rank == 0:
        shutil.rmtree(folder)
    return took_s
