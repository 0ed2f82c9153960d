"""Trains one epoch each time it is started, and says what the restore took; `python restoring.py RUN_DIR CASE`."""

import hashlib
import os
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import hpcckpt
from hpcckpt import sharing
from hpcckpt.store import image
from hpcckpt.store.shelf import Shelf

folder, case = sys.argv[1:]
rank = int(os.environ["SUBMITIT_LOCAL_GLOBALID"])
EPOCHS = int(case) if case.isdecimal() else 3


def read_bytes() -> int:
    """Return how many bytes this process has read from files, in whatever way but by mapping them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def rollup(key: str) -> int:
    """Return how much memory this process has, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith(key))


def said_otherwise(self: Shelf, path: Path, like: str = "") -> tuple[int, str]:
    size, digest = read(self, path, like)
    return size, digest if rank == 0 else "xxh3-16m:of another file"


if case in ("nodes", "another file", "gone"):
    sharing._node = lambda: f"node {rank}"
read = Shelf.read
if case == "another file":
    Shelf.read = said_otherwise
if case == "gone" and rank:
    Shelf.read = lambda self, path, like="": read(self, path.with_name("gone"), like)
if case == "no memory":
    image.available_bytes = lambda: 0
if case == "not to be seen" and rank:
    Shelf.source = lambda *_: "/proc/0/fd/0"
    sharing._source.__globals__["os"] = type("Os", (), {**vars(os), "open": lambda *_: os.open("/proc/0/fd/0", os.O_RDONLY)})

before, shared_before = read_bytes(), rollup("Pss_Shmem")
with hpcckpt.Run.from_environment(folder, ["checkpoint.async_save=false"]) as run:
    net = torch.nn.Sequential(torch.nn.Linear(1000, 1500), torch.nn.Linear(1500, 1000))
    model = DistributedDataParallel(net) if run.world_size > 1 else net
    optimizer = torch.optim.AdamW(model.parameters())
    run.track(model=model, optimizer=optimizer)
    loader = run.loader(torch.utils.data.TensorDataset(torch.randn(4 * run.world_size, 1000)), batch_size=1)
    for epoch in run.epochs(EPOCHS):
        if epoch:
            print("read", read_bytes() - before, "shared", rollup("Pss_Shmem") - shared_before, flush=True)
        for (batch,) in run.batches(loader):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            run.step()
    state = [*net.state_dict().values(), *(value for kept in optimizer.state.values() for value in kept.values())]
    print("state", hashlib.sha256(b"".join(value.numpy().tobytes() for value in state)).hexdigest(), flush=True)
