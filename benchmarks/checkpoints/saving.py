"""How a state can be made durable: ours, the peers', and what the disk can do. All do the same work: data on the disk, name in the folder.

Each contender gets a folder of its own and leaves in it what it wrote. `check` returns whether that is the state, bit for bit.
"""

import ctypes
import importlib.util
import io
import mmap
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.serialization import config as torch_config

from benchmarks.checkpoints.states import State, flat, tensors_of
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention
from hpcckpt.state.pickled import write_as_torch
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import sync_directory, write_durably

_CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Contender:
    """One way of saving. `digest`: whether it can tell later that bytes have changed; `checksums`: whether `unzip -t` can."""

    save: Callable[[State, Path], None]
    check: Callable[[State, Path], bool]
    digest: bool = False
    checksums: bool = False
    is_limit: bool = False
    prepare: Callable[[Path], None] = lambda _: None

    @property
    def finds_damage(self) -> str:
        """Say by what damaged bytes can be told; nothing of a limit."""
        return "" if self.is_limit else "digest" if self.digest else "CRC" if self.checksums else "no"


def durable(path: Path) -> None:
    """Sync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _same(found: Any, state: State) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(tensors_of(found), tensors_of(state), strict=True))


def _loads(name: str) -> Callable[[State, Path], bool]:
    return lambda state, folder: _same(torch.load(folder / name, weights_only=True, mmap=True), state)


def _raw_buffered(state: State, folder: Path) -> None:
    with (folder / "a").open("wb", buffering=0) as file:
        for tensor in tensors_of(state):
            size = tensor.numel() * tensor.element_size()
            view = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr()))
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    sync_directory(folder)


def _raw_direct(state: State, folder: Path) -> None:
    """As many bytes as the state has, from memory that is warm."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = os.open(folder / "a", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    with memoryview(_warm()) as view:
        for offset in range(0, size, _CHUNK_BYTES):
            count = min(size - offset, _CHUNK_BYTES)
            if os.pwrite(descriptor, view[:count], offset) != count:
                raise OSError("a short write")
    os.fsync(descriptor)
    os.close(descriptor)
    sync_directory(folder)


_buffer: list[mmap.mmap] = []


def _warm() -> mmap.mmap:
    if not _buffer:
        _buffer.append(mmap.mmap(-1, _CHUNK_BYTES))
        _buffer[0][:] = os.urandom(_CHUNK_BYTES)
    return _buffer[0]


def _ours_file(state: State, folder: Path) -> None:
    write_durably(folder / "a.pt", lambda file: write_as_torch(state, file))


def begun(folder: Path) -> CheckpointStore:
    """Return the store of a run directory that is claimed, as an attempt does once."""
    layout = RunLayout(folder)
    layout.checkpoints.mkdir(mode=0o700)
    store = CheckpointStore(layout, Retention(keep_last=2))
    store.claim(None)
    return store


_stores: list[CheckpointStore] = []


def _begin(folder: Path) -> None:
    while _stores:
        _stores.pop().release()
    _stores.append(begun(folder))


def _ours_commit(state: State, _: Path) -> None:
    _stores[0].commit(0, 7, epoch_finished=True, write=lambda file: write_as_torch(state, file), manifest={"metrics": {}})


def _torch_save(state: State, folder: Path) -> None:
    torch.save(state, folder / "a.pt")
    durable(folder / "a.pt")
    sync_directory(folder)


def _torch_save_without_crc(state: State, folder: Path) -> None:
    with torch_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        _torch_save(state, folder)


def _safetensors(state: State, folder: Path) -> None:
    safetensors.torch.save_file(flat(state), folder / "a.safetensors")
    durable(folder / "a.safetensors")
    sync_directory(folder)


def _check_safetensors(state: State, folder: Path) -> bool:
    found, expected = safetensors.torch.load_file(folder / "a.safetensors"), flat(state)
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def _dcp(state: State, folder: Path) -> None:
    # It syncs its files by itself.
    dcp.save(state, checkpoint_id=folder / "a", no_dist=True)
    sync_directory(folder / "a")
    sync_directory(folder)


def _check_dcp(state: State, folder: Path) -> bool:
    found = {"model": {name: torch.empty_like(value) for name, value in state["model"].items()}}
    dcp.load(found, checkpoint_id=folder / "a", no_dist=True)
    return all(torch.equal(found["model"][name], value) for name, value in state["model"].items())


def _through_memory(state: State, folder: Path) -> None:
    """Lightning's way: the whole file in memory, then a temporary file, then its name (lightning.fabric.utilities.cloud_io)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with (folder / "part").open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    (folder / "part").rename(folder / "a.pt")
    sync_directory(folder)


def _two_files(state: State, folder: Path) -> None:
    """Hugging Face's way: the model as safetensors, the optimizer by torch.save (transformers.Trainer)."""
    safetensors.torch.save_file(state["model"], folder / "model.safetensors")
    torch.save({key: value for key, value in state.items() if key != "model"}, folder / "optimizer.pt")
    durable(folder / "model.safetensors")
    durable(folder / "optimizer.pt")
    sync_directory(folder)


def _check_two_files(state: State, folder: Path) -> bool:
    found = safetensors.torch.load_file(folder / "model.safetensors")
    rest = torch.load(folder / "optimizer.pt", weights_only=True, mmap=True)
    return all(torch.equal(found[name], value) for name, value in state["model"].items()) and _same(
        rest, {key: value for key, value in state.items() if key != "model"}
    )


def _torchsnapshot(state: State, folder: Path) -> None:
    import torchsnapshot  # type: ignore[import-not-found]

    torchsnapshot.Snapshot.take(str(folder / "a"), {"state": torchsnapshot.StateDict(**state)})
    for path in (folder / "a").rglob("*"):
        durable(path)
    sync_directory(folder)


def _ours_is_sound(state: State, path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None and _same(torch.load(path, weights_only=True, mmap=True), state)


CONTENDERS: dict[str, Contender] = {
    "raw O_DIRECT + fsync": Contender(_raw_direct, lambda *_: True, is_limit=True),
    "raw buffered + fsync": Contender(_raw_buffered, lambda *_: True, is_limit=True),
    "hpcckpt, a file": Contender(_ours_file, lambda state, folder: _ours_is_sound(state, folder / "a.pt"), digest=True, checksums=True),
    "hpcckpt, a commit": Contender(
        _ours_commit,
        lambda state, folder: _ours_is_sound(state, folder / "checkpoints" / "checkpoint_epoch0000.pt"),
        digest=True,
        checksums=True,
        prepare=_begin,
    ),
    "torch.save + fsync": Contender(_torch_save, _loads("a.pt"), checksums=True),
    "torch.save without CRC + fsync": Contender(_torch_save_without_crc, _loads("a.pt")),
    "safetensors + fsync": Contender(_safetensors, _check_safetensors),
    "torch.distributed.checkpoint": Contender(_dcp, _check_dcp),
    "through memory (Lightning)": Contender(_through_memory, _loads("a.pt"), checksums=True),
    "two files (Hugging Face)": Contender(_two_files, _check_two_files),
}
if importlib.util.find_spec("torchsnapshot") is not None:
    CONTENDERS["torchsnapshot"] = Contender(_torchsnapshot, lambda *_: True)
