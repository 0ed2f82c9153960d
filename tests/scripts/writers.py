"""Saves that several ranks write together, with one of them in trouble; `python writers.py RUN_DIR CASE RANK [key=value …]`.

Three saves, of which the third meets the case. What rank 0 alone would have written lies beside each file, as ALONE.
"""

import errno
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

import hpcckpt
from hpcckpt import content, crew
from hpcckpt.errors import FencedError, HpcckptError
from hpcckpt.state.pickled import write_as_torch
from hpcckpt.store import direct
from hpcckpt.store.checkpoints import CheckpointStore

folder, case, troubled, *overrides = sys.argv[1:]
saves = 0
writes = []
own_rank = -1


def is_troubled() -> bool:
    return saves == 3 and own_rank == int(troubled)


def write_all(descriptor, view, offset, write=direct.write_all):
    if is_troubled() and len(view) > 1024 * 1024:
        writes.append(offset)
        if case == "full" or (case == "full once" and len(writes) == 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        if case == "bug":
            raise ValueError("a bug")
        if case == "memory":
            raise MemoryError("no memory")
        if case == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    write(descriptor, view, offset)


def counted(kind, fill):
    def filling(*arguments):
        print(kind, *arguments[2:3], flush=True)
        return fill(*arguments)

    return filling


def committed(self, store, write=None, commit=content.Prepared.commit):
    """Write alone, too; what is saved is the live state, so the bytes have to be the same."""
    path = commit(self, store, write)
    if self.content:  # else it was copied before, and is written beside the training
        with Path(f"{path}.ALONE").open("wb") as file:
            write_as_torch(self.content, file)
    return path


def refuse_if_fenced(self, refuse=CheckpointStore.refuse_if_fenced):
    if is_troubled() and case == "fenced":
        raise FencedError("a newer attempt has started")
    refuse(self)


def readlink(path, read=os.readlink):
    if is_troubled() and case == "no plan":
        raise OSError(errno.ENOENT, "No such file or directory")
    return read(path)


class Odd:
    """Whatever is tracked beside the model."""

    def __init__(self, rank):
        self.troubled = rank == int(troubled)

    def state_dict(self):
        if is_troubled() and case == "no state":
            raise KeyError("no state")
        if case == "uncommon":
            return {"odd": torch.eye(3).to_sparse()}
        if case == "sizes":
            return {"odd": torch.ones((3 if self.troubled else 2) * 1024 * 1024)}
        return {"odd": torch.ones(3)}

    def load_state_dict(self, state):
        pass


class Large(torch.nn.Module):
    """Parameters that are no multiple of anything, 73 MiB of them."""

    def __init__(self):
        super().__init__()
        self.small = torch.nn.Parameter(torch.zeros(7))
        self.large = torch.nn.ParameterList(torch.randn(size) for size in (3_000_001, 8_000_003, 11, 8_000_007))


direct.write_all = write_all
content.Prepared.commit = committed
CheckpointStore.refuse_if_fenced = refuse_if_fenced
crew.os.readlink = readlink
crew.fill_at = counted("filled", crew.fill_at)
crew.fill = counted("filled", crew.fill)
if case == "two nodes":
    formed = crew.Crew.formed.__func__
    crew.Crew.formed = classmethod(lambda cls, ranks, wanted, _, note: formed(cls, ranks, wanted, ranks.rank % 2, note))
if case == "many small":
    crew._SENT_BYTES = 1000

with hpcckpt.Run.from_environment(folder, ["checkpoint.keep_last=2", "checkpoint.every_steps=1", *overrides]) as run:
    own_rank = run.rank
    torch.manual_seed(1)
    model = Large()
    if case == "sharded":
        fully_shard(model)
    run.track(odd=Odd(run.rank), model=model)
    loader = run.loader(torch.utils.data.TensorDataset(torch.arange(4.0 * run.world_size)), batch_size=1)
    began = 0.0
    for _ in run.epochs(1):
        try:
            for _ in run.batches(loader):
                torch.distributed.barrier()  # as DDP does: no rank is ahead of another
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1)
                saves += 1
                print("save", saves, flush=True)
                if is_troubled() and case == "differs":
                    with torch.no_grad():
                        model.large[1][4_000_000] += 1
                began = time.monotonic()
                run.step()
        except (HpcckptError, RuntimeError, MemoryError, ValueError) as error:
            print(f"heard {saves} in {time.monotonic() - began:.0f} s {type(error).__name__}: {error}", flush=True)
            raise
    if run.is_main:
        shutil.copy(folder + "/checkpoints/latest.json", folder + "/newest.json")
