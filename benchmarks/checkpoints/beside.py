"""How a state can be saved while a training goes on: ours, the peers', and what copying and waiting alone would cost.

Each is made once and keeps what it needs from save to save. `save` returns as soon as the training may go on; `before_step` as soon as it
may change the state; `wait` says when the save was durable.
"""

import ctypes
import importlib
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from typing_extensions import override

from benchmarks.checkpoints.saving import CONTENDERS, Contender, begun, durable
from benchmarks.checkpoints.states import State, size_bytes, tensors_of
from hpcckpt.background import Background
from hpcckpt.state.later import changed_by_steps
from hpcckpt.store.checkpoints import CheckpointStore


class Way:
    """A way of saving; this one saves nothing, and is what the others are compared with."""

    # Whether what it saves can be told from damaged bytes later.
    finds_damage = ""
    is_limit = False

    def __init__(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        self._state, self._optimizer = state, optimizer
        self._durable_at: float | None = None

    def prepare(self, folder: Path) -> None:
        """Do what a training does once."""

    def save(self, folder: Path) -> None:
        """Save; the clock runs."""

    def before_step(self) -> None:
        """Wait for what must not change yet; the clock runs."""

    @property
    def is_busy(self) -> bool:
        """Whether a save is not durable yet."""
        return False

    def wait(self) -> float | None:
        """Return when the last save was durable, once it is; None of what saves nothing."""
        return self._durable_at

    def saved(self, _folder: Path, /) -> State | None:
        """Return what was saved; None where that cannot be told."""
        return None

    def close(self) -> None:
        """Let go of everything."""


class Ours(Way):
    """As `hpcckpt.checkpoint` saves."""

    finds_damage = "digest"
    is_lazy = False

    def __init__(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(state, optimizer)
        self._background = Background(("USR1", "TERM"), print)
        self._store: CheckpointStore | None = None

    @override
    def prepare(self, folder: Path) -> None:
        if self._store is not None:
            self._store.release()
        self._store = begun(folder)

    @override
    def save(self, folder: Path) -> None:
        later = changed_by_steps([self._optimizer]) if self.is_lazy else None
        write, store = self._background.stage(self._state, later), self._store
        if write is None or store is None:
            raise SystemExit("there is no memory to copy the state into")

        def commit() -> None:
            store.commit(0, 7, epoch_finished=True, write=write, manifest={"metrics": {}})
            self._durable_at = time.perf_counter()

        self._background.start(commit)

    @override
    def before_step(self) -> None:
        self._background.before_step()

    @property
    @override
    def is_busy(self) -> bool:
        return self._background.is_busy

    @override
    def wait(self) -> float | None:
        self._background.settle()
        return super().wait()

    @override
    def saved(self, folder: Path, /) -> State:
        content: State = torch.load(folder / "checkpoints" / "checkpoint_epoch0000.pt", weights_only=True, mmap=True)
        return content

    @override
    def close(self) -> None:
        self._background.close()
        if self._store is not None:
            self._store.release()


class OursLazy(Ours):
    """As `checkpoint.staging: lazy` has it."""

    is_lazy = True


class Waiting(Way):
    """The training stands still for all of the save."""

    contender: Contender
    file = "a.pt"

    @override
    def prepare(self, folder: Path) -> None:
        self.contender.prepare(folder)

    @override
    def save(self, folder: Path) -> None:
        self.contender.save(self._state, folder)
        self._durable_at = time.perf_counter()

    @override
    def saved(self, folder: Path, /) -> State | None:
        if self.is_limit:
            return None
        content: State = torch.load(folder / self.file, weights_only=True, mmap=True)
        return content


class OursWaiting(Waiting):
    """As `checkpoint.async_save: false` has it."""

    contender = CONTENDERS["hpcckpt, a commit"]
    file = "checkpoints/checkpoint_epoch0000.pt"
    finds_damage = "digest"


class TorchSave(Waiting):
    """What most scripts do, with what it takes to survive a power cut."""

    contender = CONTENDERS["torch.save + fsync"]
    finds_damage = "CRC"


class RawDirect(Waiting):
    """As many bytes as the state has."""

    contender = CONTENDERS["raw O_DIRECT + fsync"]
    is_limit = True


class Memcpy(Way):
    """One copy of the state into memory that is warm, by one thread."""

    is_limit = True

    def __init__(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(state, optimizer)
        self._buffer = torch.zeros(size_bytes(state), dtype=torch.uint8)

    @override
    def save(self, folder: Path) -> None:
        target = self._buffer.data_ptr()
        for tensor in tensors_of(self._state):
            size = tensor.numel() * tensor.element_size()
            ctypes.memmove(target, tensor.data_ptr(), size)
            target += size


class Dcp(Way):
    """torch.distributed.checkpoint with a stager that is kept, a thread that writes, and files that it syncs by itself."""

    finds_damage = "no"
    kind = AsyncCheckpointerType.THREAD
    shares_memory = False
    stages_beside = False

    def __init__(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(state, optimizer)
        if self.kind is AsyncCheckpointerType.PROCESS and not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=self.shares_memory,
                use_async_staging=self.stages_beside,
                use_non_blocking_copy=False,
            )
        )
        self._staged: Future[Any] | None = None
        self._writing: Future[Any] | None = None

    @override
    def save(self, folder: Path) -> None:
        self._durable_at = None
        answer = dcp.async_save(
            self._state, checkpoint_id=folder / "a", async_checkpointer_type=self.kind, async_stager=self._stager, no_dist=True
        )
        if isinstance(answer, AsyncSaveResponse):
            self._staged, self._writing = answer.staging_completion, answer.upload_completion
        else:
            self._writing = answer

        def finish(_: object) -> None:
            durable(folder / "a")
            durable(folder)
            self._durable_at = time.perf_counter()

        self._writing.add_done_callback(finish)

    @override
    def before_step(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    @property
    @override
    def is_busy(self) -> bool:
        return self._writing is not None and self._durable_at is None

    @override
    def wait(self) -> float | None:
        if self._writing is not None:
            self._writing.result()
        # Callbacks run behind those who wait for the result.
        while self.is_busy:
            time.sleep(0.001)
        return super().wait()

    @override
    def saved(self, folder: Path, /) -> State:
        found: State = _empty_like(self._state)
        dcp.load(found, checkpoint_id=folder / "a", no_dist=True)
        return found

    @override
    def close(self) -> None:
        self.wait()
        self._stager.close()


class DcpProcess(Dcp):
    """A process writes, from memory that it shares."""

    kind = AsyncCheckpointerType.PROCESS
    shares_memory = True


class DcpStagedBeside(Dcp):
    """The copy is made by a thread, too, and waited for before the state changes."""

    stages_beside = True


class Torchsnapshot(Way):
    """torchsnapshot's async_take, and a thread that syncs what it has written."""

    finds_damage = "no"

    def __init__(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(state, optimizer)
        self._library: Any = importlib.import_module("torchsnapshot")
        self._writing: threading.Thread | None = None

    @override
    def save(self, folder: Path) -> None:
        pending = self._library.Snapshot.async_take(str(folder / "a"), {"state": self._library.StateDict(**self._state)})

        def finish() -> None:
            pending.wait()
            for path in (folder / "a").rglob("*"):
                durable(path)
            durable(folder)
            self._durable_at = time.perf_counter()

        self._writing = threading.Thread(target=finish)
        self._writing.start()

    @property
    @override
    def is_busy(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    @override
    def wait(self) -> float | None:
        if self._writing is not None:
            self._writing.join()
        return super().wait()

    @override
    def saved(self, folder: Path, /) -> State:
        found = self._library.StateDict(**_empty_like(self._state))
        self._library.Snapshot(str(folder / "a")).restore({"state": found})
        return dict(found)


BASE = "no save"
WAYS: dict[str, type[Way]] = {
    BASE: Way,
    "one copy in memory": Memcpy,
    "raw O_DIRECT + fsync, waiting": RawDirect,
    "hpcckpt": Ours,
    "hpcckpt, lazy": OursLazy,
    "hpcckpt, waiting": OursWaiting,
    "torch.save + fsync, waiting": TorchSave,
    "DCP async_save, thread": Dcp,
    "DCP async_save, thread, staged beside": DcpStagedBeside,
    "DCP async_save, process": DcpProcess,
}
SNAPSHOT = "torchsnapshot async_take"
try:
    importlib.import_module("torchsnapshot")
except Exception as error:  # noqa: BLE001 - an old library on a new torch fails in its own ways
    WHY_NO_SNAPSHOT = f"{SNAPSHOT}: left out, it cannot be imported ({type(error).__name__}: {error})"
else:
    WHY_NO_SNAPSHOT = ""
    WAYS[SNAPSHOT] = Torchsnapshot


def _empty_like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value)
    if isinstance(value, dict):
        return {key: _empty_like(item) for key, item in value.items()}
    return value
