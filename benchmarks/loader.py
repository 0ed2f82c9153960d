"""What a resumable loader costs: `python benchmarks/loader.py [ROUNDS]`, a minute or two on two cores.

1. Opening it at the end of an epoch of ten million samples against its beginning, up to the first batch.
2. Memory of the order, in the rank's process and in workers.
3. A batch through `run.batches` against one through a bare DataLoader with a sampler of the same kind.

Everything compared runs interleaved in one process; medians. The figures are in benchmarks/README.md.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import hpcckpt
from hpcckpt.data import Share, make_loader

SAMPLES = 10_000_000
BATCH_SIZE = 256


class Range(Dataset[int]):
    """Ten million samples that need no memory."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


class Noisy(Dataset[torch.Tensor]):
    """Images that are drawn upon, some 100 microseconds each: the cheap end of what augmentation costs."""

    def __init__(self) -> None:
        self.images = torch.rand(512, 3, 64, 64)

    def __len__(self) -> int:
        return 8192

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.images[index % len(self.images)]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return image + 0.1 * torch.randn_like(image)


def timed_s(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    gc.collect()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def opened(consumed: int) -> None:
    """Open a loader at a place of the epoch and take one batch."""
    loader, place, _ = make_loader(Range(), Share(0, 1, 0, 0), batch_size=BATCH_SIZE, shuffle=True)
    if consumed:
        place.restore(3, {"consumed": consumed, "num_samples": SAMPLES})
    place.begin(place.create(3))
    next(iter(loader))


def opening(rounds: int) -> dict[str, float]:
    """Return medians of opening at the beginning and at the end."""
    begin, end = [], []
    for _ in range(rounds):
        begin.append(timed_s(lambda: opened(0)))
        end.append(timed_s(lambda: opened(SAMPLES - 10 * BATCH_SIZE)))
    return {
        "beginning_s": statistics.median(begin),
        "end_s": statistics.median(end),
        "ratio": statistics.median(there / here for here, there in zip(begin, end, strict=True)),
    }


def memory() -> dict[str, float]:
    """Return what the order takes, in bytes a sample: in this process, and in each of three workers."""
    loader, place, _ = make_loader(Range(), Share(0, 1, 0, 0), batch_size=BATCH_SIZE, shuffle=True, num_workers=3)
    gc.collect()
    before = psutil.Process().memory_full_info().uss
    place.begin(place.create(0))
    held = psutil.Process().memory_full_info().uss - before
    batches = iter(loader)
    for _ in range(20):
        next(batches)
    workers = [child.memory_full_info().uss for child in psutil.Process().children()]
    del batches
    bare = iter(DataLoader(TensorDataset(torch.arange(1000)), num_workers=3))
    next(bare)
    others = [child.memory_full_info().uss for child in psutil.Process().children()]
    return {"process": held / SAMPLES, "worker": (statistics.median(workers) - statistics.median(others)) / SAMPLES}


def batches(run: hpcckpt.Run, dataset: Dataset[Any], num_workers: int, count: int, rounds: int) -> dict[str, float]:
    """Return medians of microseconds a batch: through the run, and bare."""
    arguments = {"batch_size": 64, "num_workers": num_workers}
    ours = run.loader(dataset, shuffle=True, **arguments)
    bare = DataLoader(dataset, sampler=DistributedSampler(dataset, 1, 0), **arguments)

    def through(loader: Iterator[Any]) -> float:
        next(loader)  # workers are started
        began = time.perf_counter()
        for _ in range(count):
            next(loader)
        return (time.perf_counter() - began) / count * 1e6

    mine, theirs = [], []
    for _ in range(rounds):
        theirs.append(through(iter(bare)))
        mine.append(through(run.batches(ours)))
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    return {"run_us": statistics.median(mine), "bare_us": statistics.median(theirs), "ratio": ratio}


def main(rounds: int) -> None:
    """Print all figures as JSON."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create 3 worker processes")  # that is the point
    figures: dict[str, Any] = {"opening": opening(rounds), "memory_bytes_per_sample": memory()}
    with tempfile.TemporaryDirectory() as folder, hpcckpt.Run.from_environment(Path(folder)) as run:
        run.track(model=torch.nn.Linear(1, 1))
        for _ in run.epochs(1):
            tensors = TensorDataset(torch.rand(100_000, 16), torch.arange(100_000))
            figures["tensors, in the process"] = batches(run, tensors, 0, 500, rounds)
            figures["images with noise, in the process"] = batches(run, Noisy(), 0, 50, rounds)
            figures["images with noise, two workers"] = batches(run, Noisy(), 2, 80, rounds)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
