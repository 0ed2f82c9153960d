"""Training that is interrupted in another place each time it is started: `entrypoint=interrupted:main`.

Which place comes next is counted in <run_dir>/interruptions. The signal goes to one rank only, another one each time, as if Slurm's did
not reach the others; `args.places` names the places, of which there may be more than one at a time ("step evaluation").
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import hpcckpt

SAMPLES, BATCH_SIZE = 64, 4


class Interruptions:
    """Signals this rank, where it is its turn, in the place whose turn it is; tracked, so that saves and restores are such places, too."""

    def __init__(self, run: hpcckpt.Run) -> None:
        counter = Path(run.run_dir) / "interruptions"
        # All ranks read before rank 0 adds its own, behind the barrier of `epochs`.
        number = counter.stat().st_size if counter.exists() else 0
        places = run.args.places
        self.left = places[number].split() if number < len(places) else []
        self.is_mine = run.rank == number % run.world_size
        self.counter = counter if run.is_main else None
        self.is_last = run.rank == run.world_size - 1
        self.has_stepped = False

    def note(self) -> None:
        """Count this attempt."""
        if self.counter is not None:
            with self.counter.open("a") as file:
                file.write(".")

    def count_step(self) -> None:
        """Count a step, made for the first time or again."""
        if self.counter is not None:
            with self.counter.with_name("steps").open("a") as file:
                file.write(".")

    def hang(self) -> None:
        """Hang for ever where that is the place, on the last rank."""
        while "hang" in self.left and self.is_last:
            time.sleep(0.1)

    def here(self, place: str) -> None:
        """Be interrupted, if this is the place; all ranks forget it."""
        if place in self.left:
            self.left.remove(place)
            if self.is_mine:
                os.kill(os.getpid(), signal.SIGUSR1)

    def state_dict(self) -> dict[str, Any]:
        if self.has_stepped:  # else it is only looked at whether it has one
            self.here("save")
        return {"nothing": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"nothing": 0}
        self.here("restore")


def stuck(run: hpcckpt.Run) -> None:
    """Never come to a step."""
    run.track(model=torch.nn.Linear(1, 1))
    for _ in run.epochs(1):
        while True:
            run.poll()
            time.sleep(0.05)


def main(run: hpcckpt.Run) -> None:
    """Train: `args.epochs`, `args.step_s`, `args.places`."""
    args: Any = run.args
    places = Interruptions(run)
    places.here("start")
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    loader = run.loader(TensorDataset(torch.randn(SAMPLES, 4, generator=generator)), batch_size=BATCH_SIZE, shuffle=True)
    run.track(model=model, optimizer=optimizer, interruptions=places)
    for number, _ in enumerate(run.epochs(args.epochs)):
        if number == 0:
            places.note()
        places.here("epoch")
        for (x,) in run.batches(loader):
            places.here("batch")
            if places.has_stepped:
                places.hang()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            time.sleep(args.step_s)
            places.here("step")
            places.has_stepped = True
            places.count_step()
            run.step()
        for _ in range(3):
            places.here("evaluation")
            run.poll()
        places.here("end")
