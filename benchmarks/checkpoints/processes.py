"""Processes that begin together, each as fresh as a started one: forks of one that has only imported what all of them need."""

import logging
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

# What training imports late, at its first optimizer say, would take longer than a small load.
_PRELOADED = [
    *("benchmarks.checkpoints.loading", "benchmarks.checkpoints.rank", "benchmarks.checkpoints.__main__", "hpcckpt.run"),
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.parallel", "torch.profiler", "numpy"),
    *("torch.optim.swa_utils", "torch.utils.data.datapipes", "torch.distributed.checkpoint.state_dict"),
]
_TIMEOUT_S = 600.0


class Processes:
    """Of one function: each calls it with its rank, their number, an argument, and what lets all begin."""

    def __init__(self, function: Callable[..., Any], world: int, argument: Any) -> None:
        """Start them, and wait until all are ready."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._world = world
        self._pipes: list[Connection] = []
        self._processes = []
        job = uuid.uuid4().hex
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(function, rank, world, job, argument, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._received()

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [int(process.pid or 0) for process in self._processes]

    def begin(self) -> float:
        """Let all begin; returns the time of it (CLOCK_MONOTONIC)."""
        began = time.monotonic()
        for pipe in self._pipes:
            pipe.send(None)
        return began

    def results(self) -> list[Any]:
        """Return what each came to.

        Raises:
            RuntimeError: one has failed.
        """
        return self._received()

    def close(self) -> None:
        """Let them end."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_TIMEOUT_S)
            process.kill()

    def _received(self) -> list[Any]:
        found = []
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if not pipe.poll(_TIMEOUT_S):
                raise RuntimeError(f"process {process.pid} does not answer")
            try:
                found.append(pipe.recv())
            except EOFError:
                process.join(_TIMEOUT_S)
                raise RuntimeError(f"process {process.pid} has failed (exit code {process.exitcode}); its traceback is above") from None
        return found


@contextmanager
def together(function: Callable[..., Any], world: int, argument: Any) -> Iterator[Processes]:
    """Yield processes that are ready; see `Processes`."""
    processes = Processes(function, world, argument)
    try:
        yield processes
    finally:
        processes.close()


def _main(function: Callable[..., Any], rank: int, world: int, job: str, argument: Any, pipe: Connection) -> None:
    # As submitit's local launcher would.
    os.environ |= {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": job,
        "SUBMITIT_LOCAL_NTASKS": str(world),
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
        "GLOO_SOCKET_IFNAME": "lo",
    }

    # What runs say of themselves is not asked for; errors are.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.getLogger("hpcckpt").setLevel(logging.ERROR)

    def ready() -> None:
        pipe.send(None)
        pipe.recv()

    pipe.send(function(rank, world, job, argument, ready))
    try:
        pipe.recv()
    except EOFError:
        os._exit(0)  # no barrier of ranks, no threads to wait for
