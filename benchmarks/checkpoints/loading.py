"""How a saved state comes to life again: ours, the peers' ways, and what the disk can do.

`make` writes what is read, `load` loads it one way into a model and an optimizer as a script has them at its start. Each in a process
of its own.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import hpcckpt
from benchmarks import memory
from benchmarks.checkpoints.models import digests, fresh, state_of, trained
from benchmarks.checkpoints.states import flat, size_bytes, tensors_of

_CHUNK_BYTES = 16 * 1024 * 1024
# Copies of the state for saves are not what is measured here.
_SETTINGS = ["checkpoint.async_save=false"]

Live = tuple[torch.nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True)
class Place:
    """Where a process is among the others."""

    folder: Path
    rank: int
    world: int
    job: str


@dataclass(frozen=True)
class Loader:
    """One way. `reads` is one of `MADE`; `prepare` makes what a start has before it loads, and returns what loads."""

    reads: str
    prepare: Callable[[Place, Live], Callable[[], object]]
    verifies: bool = False
    is_limit: bool = False


@dataclass(frozen=True)
class Job:
    """What processes are asked to load."""

    loader: str
    model: str
    folder: Path


def load(rank: int, world: int, job: str, asked: Job, ready: Callable[[], None]) -> dict[str, Any]:
    """Load as a restarted script does, and change everything once in place; returns what it took. In a process of its own."""
    torch.set_num_threads(1)
    loader = LOADERS[asked.loader]
    model, optimizer = fresh(asked.model)
    act = loader.prepare(Place(asked.folder / loader.reads, rank, world, job), (model, optimizer))
    memory.reset_peak()
    resident, read = memory.status("VmRSS"), _read_bytes()
    taken, private = memory.taken(os.getpid()), memory.private(os.getpid())
    ready()
    act()
    state = state_of(model, optimizer)
    with torch.no_grad():
        for tensor in tensors_of(state):
            tensor.mul_(1)
    ended = time.monotonic()
    came = size_bytes(state["optimizer"])
    return {
        "ended": ended,
        "read_bytes": _read_bytes() - read,
        "resident_bytes": memory.status("VmHWM") - resident - came,
        "kept_bytes": memory.taken(os.getpid()) - taken - came,
        "private_bytes": memory.private(os.getpid()) - private - came,
        "came_bytes": came,
        "digests": {} if loader.is_limit else digests(state),
    }


def make(_rank: int, _world: int, _job: str, asked: tuple[Path, str], ready: Callable[[], None]) -> dict[str, Any]:
    """Write what each way reads; returns digests and sizes. In a process of its own."""
    root, name = asked
    ready()
    live = trained(name)
    state = state_of(*live)
    expected = digests(state)
    for kind, save in MADE.items():
        (root / kind).mkdir()
        save(root / kind, live)
    os.sync()
    return {"digests": expected, "size_bytes": size_bytes(state)}


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1])


def _save_managed(folder: Path, live: Live) -> None:
    hpcckpt.DDPCheckpointManager(folder / "checkpoints", 0, 1).save(*live, epoch=0)


def _managed(place: Place, live: Live) -> Callable[[], object]:
    if place.world > 1:
        _connect(place)
    manager = hpcckpt.DDPCheckpointManager(place.folder / "checkpoints", place.rank, place.world)
    return lambda: manager.load(*live)


def _save_run(folder: Path, live: Live) -> None:
    with hpcckpt.Run.from_environment(folder / "run", _SETTINGS) as run:
        run.track(model=live[0], optimizer=live[1])
        for _ in run.epochs(1):
            pass


def _run(place: Place, live: Live) -> Callable[[], object]:
    run = hpcckpt.Run.from_environment(place.folder / "run", _SETTINGS)
    run.track(model=live[0], optimizer=live[1])
    epochs = run.epochs(2)
    _kept.append(epochs)  # its end would be the run's
    return lambda: next(epochs)


_kept: list[Iterator[int]] = []


def _save_torch(folder: Path, live: Live) -> None:
    torch.save(state_of(*live), folder / "a.pt")


def _torch_load(place: Place, live: Live, **arguments: Any) -> Callable[[], object]:
    def act() -> None:
        content = torch.load(place.folder / "a.pt", map_location="cpu", weights_only=True, **arguments)
        live[0].load_state_dict(content["model"])
        live[1].load_state_dict(content["optimizer"])

    return act


def _save_safetensors(folder: Path, live: Live) -> None:
    safetensors.torch.save_file(flat(state_of(*live)), folder / "a.safetensors")


def _safetensors(place: Place, live: Live) -> Callable[[], object]:
    def act() -> None:
        found = safetensors.torch.load_file(place.folder / "a.safetensors")
        live[0].load_state_dict({name.removeprefix("model."): found[name] for name in found if name.startswith("model.")})
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in found.items():
            if name.startswith("optimizer."):
                _, number, moment = name.split(".")
                state.setdefault(int(number), {})[moment] = tensor
        live[1].load_state_dict({"state": state, "param_groups": live[1].state_dict()["param_groups"]})

    return act


def _save_dcp(folder: Path, live: Live) -> None:
    dcp.save(_as_dcp_has_it(live), checkpoint_id=folder / "a", no_dist=True)


def _dcp(place: Place, live: Live) -> Callable[[], object]:
    def act() -> None:
        state = _as_dcp_has_it(live)
        dcp.load(state, checkpoint_id=place.folder / "a", no_dist=True)
        live[0].load_state_dict(state["model"])
        set_optimizer_state_dict(*live, state["optimizer"])

    return act


def _as_dcp_has_it(live: Live) -> dict[str, Any]:
    return {"model": live[0].state_dict(), "optimizer": get_optimizer_state_dict(*live)}


def _raw_direct(place: Place, _: Live) -> Callable[[], object]:
    """Read all bytes past the page cache into memory that is warm."""
    buffer = mmap.mmap(-1, _CHUNK_BYTES)
    buffer[:] = bytes(_CHUNK_BYTES)
    return lambda: _read_all(place.folder / "a.pt", os.O_DIRECT, buffer)


def _raw_buffered(place: Place, _: Live) -> Callable[[], object]:
    """Read all bytes through the page cache into memory that is warm."""
    buffer = mmap.mmap(-1, _CHUNK_BYTES)
    buffer[:] = bytes(_CHUNK_BYTES)
    return lambda: _read_all(place.folder / "a.pt", 0, buffer)


def _read_all(path: Path, flags: int, buffer: mmap.mmap) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    offset = 0
    while count := os.preadv(descriptor, [buffer], offset):
        offset += count
    os.close(descriptor)


def _connect(place: Place) -> None:
    store = dist.FileStore(str(place.folder / f"store-{place.job}"), place.world)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world)


def cool(folder: Path) -> None:
    """Have nothing of a folder's files in the page cache. They must have been synced."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm(folder: Path) -> None:
    """Have all of a folder's files in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(_CHUNK_BYTES):
                    pass


MADE: dict[str, Callable[[Path, Live], None]] = {
    "torch": _save_torch,
    "manager": _save_managed,
    "run": _save_run,
    "safetensors": _save_safetensors,
    "dcp": _save_dcp,
}
LOADERS: dict[str, Loader] = {
    "raw O_DIRECT read": Loader("torch", _raw_direct, is_limit=True),
    "raw buffered read": Loader("torch", _raw_buffered, is_limit=True),
    "hpcckpt, manager": Loader("manager", _managed, verifies=True),
    "hpcckpt, run": Loader("run", _run, verifies=True),
    "torch.load": Loader("torch", _torch_load),
    "torch.load(mmap=True)": Loader("torch", lambda place, live: _torch_load(place, live, mmap=True)),
    "safetensors": Loader("safetensors", _safetensors),
    "torch.distributed.checkpoint": Loader("dcp", _dcp),
}
