"""The process group, and the few things all ranks do together.

Each method that says "every rank must call it" is a collective: all ranks, the same order. They run over gloo on the
CPU whatever the training uses, so that they neither disturb NCCL's streams nor need a GPU.
"""

import ctypes
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist

from hpcckpt.distributed.rendezvous import DEFAULT_TIMEOUT_S, open_store
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import HpcckptError, RankFailedError, TaskEnvironmentError, UsageError

T = TypeVar("T")

# A slow epoch's end on one rank (a large save, an evaluation on rank 0 only) is no failure.
COLLECTIVE_TIMEOUT_S = 1800.0


def choose_device(task: TaskEnvironment) -> torch.device:
    """Return this rank's device: cuda:{local_rank}, cuda:0 where each task sees one GPU only, else the CPU."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible == 0:
        return torch.device("cpu")
    if visible == 1 or task.local_rank < visible:
        return torch.device("cuda", 0 if visible == 1 else task.local_rank)
    raise TaskEnvironmentError(
        f"rank {task.rank} is the task {task.local_rank} of its node, which has {visible} GPUs: "
        "ask for as many GPUs as tasks a node (slurm.gpus_per_node)"
    )


class Collectives:
    """What the ranks of a connected process group do together. Every rank must create one, with the same group."""

    def __init__(self, rank: int, world_size: int, group: "dist.ProcessGroup | None") -> None:
        self.rank = rank
        self.world_size = world_size
        self._control = group

    @classmethod
    def attached(cls, rank: int, world_size: int) -> Self:
        """Return those of the process group that the caller's script has made. Every rank must call it.

        Raises:
            UsageError: there is no process group, or it is another one than `rank` and `world_size` say.
        """
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
        if not dist.is_initialized():
            if world_size > 1:
                raise UsageError(
                    f"rank {rank} of {world_size}: there is no process group; call torch.distributed.init_process_group before, or give "
                    "world_size=1"
                )
            return cls(rank, world_size, None)
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise UsageError(
                f"rank {rank} of {world_size}: torch.distributed says rank {dist.get_rank()} of {dist.get_world_size()}; give its numbers"
            )
        gloo = dist.get_backend() == "gloo"
        # None is the default group. A reference of our own would keep it alive behind its end.
        return cls(rank, world_size, None if gloo or world_size == 1 else dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here. Every rank must call it."""
        if self.world_size > 1:
            dist.barrier(group=self._control)

    def broadcast(self, value: T) -> T:
        """Return rank 0's `value` on every rank. Every rank must call it; what the others pass is ignored."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        received: T = box[0]
        return received

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, in order of rank, on every rank. Every rank must call it."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def from_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result, or raise its exception, on every rank alike.

        Every rank must call it. So no rank waits for a rank 0 that failed.
        """
        value, error = _attempt(action) if self.is_main else (None, None)
        answer = self.broadcast(_packed(value, error))
        if error is not None:
            raise error
        value, failure = pickle.loads(answer)  # noqa: S301 - rank 0's own bytes
        if failure is not None:
            raise failure
        return value  # type: ignore[no-any-return]

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if any failed, raise on all: its own error where it failed, else one that names the rank.

        Every rank must call it.
        """
        value, error = _attempt(action)
        _raise_if_any_failed(self.gather(_told(error)), error)
        return value  # type: ignore[return-value]  # None only where T allows it

    def collect(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return what all of them returned, in order of rank; if any failed, raise as `together`.

        Every rank must call it.
        """
        value, error = _attempt(action)
        answers = self.gather((value, _told(error)))
        _raise_if_any_failed([failure for _, failure in answers], error)
        return [answer for answer, _ in answers]  # type: ignore[misc]  # as above


class Ranks(Collectives):
    """A connected process group. Every rank must create one, and close it."""

    def __init__(self, task: TaskEnvironment, device: torch.device, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        # gloo announces the address its host name resolves to, which Debian maps to 127.0.1.1.
        if task.world_size > 1 and task.num_nodes == 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend: Literal["nccl", "gloo"] = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with open_store(task, timeout_s) as store:
            self.store = store
            # Returns when every rank is here.
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("process_group", store),
                rank=task.rank,
                world_size=task.world_size,
                timeout=timedelta(seconds=max(timeout_s, COLLECTIVE_TIMEOUT_S)),
            )
            # NCCL connects at its first collective only, so this is where its ranks meet.
            control = None if backend == "gloo" else dist.new_group(backend="gloo")
        super().__init__(task.rank, task.world_size, control)
        self._open = True

    def close(self) -> None:
        """Leave the process group; harmless when called twice. Every rank must call it on a way out that all take."""
        if self._open:
            self._open = False
            # Rank 0 serves the store: it goes last.
            self.barrier()
            _keep_for_ever(dist.group.WORLD)
            dist.destroy_process_group()


def _keep_for_ever(group: object) -> None:
    """Never free a process group, which the end of the process does anyhow.

    Its last owner waits for its threads. Where that is a DDP model it waits with the interpreter's lock, which such a thread may need to
    drop a tensor of the last collective: neither goes on. (torch 2.13; seen in one of about ten stops on a busy machine.)
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _attempt(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 - passed on to every rank, where it is raised again
        return None, error


def _told(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def _raise_if_any_failed(failures: list[str | None], own: BaseException | None) -> None:
    if own is not None:
        raise own
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RankFailedError(f"rank {rank} failed: {failure}")


def _packed(value: object, error: BaseException | None) -> bytes:
    """Return (value, error) in bytes; an error that cannot be sent goes by its text, so that the others hear of it all the same."""
    ours = error is None or isinstance(error, HpcckptError) or type(error).__module__ == "builtins"
    try:
        return pickle.dumps((value, error if ours else RankFailedError(f"rank 0 failed: {type(error).__name__}: {error}")))
    except Exception as failure:  # noqa: BLE001 - pickle raises many kinds
        told = error or failure
        return pickle.dumps((None, RankFailedError(f"rank 0 failed: {type(told).__name__}: {told}")))
