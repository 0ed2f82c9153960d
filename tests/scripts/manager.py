"""A DDP training loop of its own around the checkpoint manager. One rank; prints one line a case.

python manager.py CHECKPOINT_DIR PHASE
"""

import gc
import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import hpcckpt


def outcome(action) -> str:
    try:
        return repr(action())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def built(seed=0):
    torch.manual_seed(seed)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def train(manager, model, optimizer, scheduler, epochs) -> None:
    """Go on behind the newest checkpoint; every rank draws numbers of its own."""
    start = manager.load(model, optimizer, scheduler=scheduler)[0] + 1
    print("start", start)
    if start == 0:
        torch.manual_seed(100 + rank)
    for epoch in range(start, epochs):
        for _ in range(2):
            optimizer.zero_grad()
            mse_loss(model(torch.randn(5, 4)), torch.zeros(5, 2)).backward()
            optimizer.step()
        scheduler.step()
        path = manager.save(model, optimizer, epoch, {"epoch": float(epoch)}, scheduler, is_best=epoch == 1)
        print(f"path{epoch}", path)


folder, phase = Path(sys.argv[1]), sys.argv[2]
rank, world_size = int(os.environ["SUBMITIT_LOCAL_GLOBALID"]), int(os.environ["SUBMITIT_LOCAL_NTASKS"])
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo", init_method=f"file://{folder}.{phase}.store", rank=rank, world_size=world_size)


def main() -> None:
    manager = hpcckpt.DDPCheckpointManager(folder, rank, world_size)
    model, optimizer, scheduler = built()
    if phase.startswith("train"):
        train(manager, model, optimizer, scheduler, int(phase.removeprefix("train")))
        print("weights", sum(float(value.double().sum()) for value in model.state_dict().values()).hex())
        print("rng", torch.rand(1).item())
    if phase == "faults":
        manager.save(model, optimizer, 0)
        if rank == 0:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        print("full", outcome(lambda: manager.save(model, optimizer, 1)))
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        print("newest", outcome(lambda: manager.load(model, optimizer)[0]))
        print("missing", outcome(lambda: manager.load(model, optimizer, filepath="gone.pt")))
        print("name", outcome(lambda: manager.save(model, optimizer, 1, filename="../x.pt")))
        print("misfit", outcome(lambda: manager.load(nn.Linear(1, 1) if rank == 1 else model)))
        print("tracked", outcome(lambda: manager.save(model, optimizer, 1, scheduler=None if rank == 0 else object())))
        print("metric", outcome(lambda: manager.save(model, optimizer, 1, {"loss": "low"})))
        print("numbers", outcome(lambda: hpcckpt.DDPCheckpointManager(folder, rank, world_size + 1)))
        if rank == 0:
            path = folder / "checkpoint_epoch0000.pt"
            path.write_bytes(path.read_bytes()[:-1])
        dist.barrier()
        print("damaged", outcome(lambda: manager.load(model, optimizer)))
        manager.save(model, optimizer, 2)
        print("after", outcome(lambda: manager.load(model, optimizer)[0]))


main()
# Freed before the process group ends: torch may abort where a DDP model outlives it.
gc.collect()
dist.barrier()
dist.destroy_process_group()
