"""A process of our own that works for this one, without its interpreter's lock, and is gone when this one is.

It is started, not forked: a copy of a process with threads, CUDA or NCCL in it cannot be trusted (docs/decisions/0016-async-save.md).
It imports no torch, and sees no signal: Slurm sends those to every process of a job.
"""

import contextlib
import importlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from hpcckpt.signals import children_protected, ignore_all

_START: Final = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from hpcckpt.companion import serve; serve(*sys.argv[2:])"
_LIMIT_BYTES: Final = 64 * 1024
_MOST_DESCRIPTORS: Final = 8
_CLOSE_TIMEOUT_S: Final = 5.0


class Companion:
    """The process, seen from here. One thread at a time may use it."""

    def __init__(self, task: str, signals: Sequence[str] = ("USR1", "TERM")) -> None:
        """Start it; it is asked as soon as it is ready.

        Args:
            task: "module:function", called there with each request, its descriptors, and what says whether this process is gone.
            signals: names of what Slurm may send while it starts.

        Raises:
            OSError: it cannot be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                with children_protected(signals):
                    self._process = subprocess.Popen(
                        [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), task, str(os.getpid())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                    )
            except BaseException:
                ours.close()
                raise
        self._socket = ours

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """Return its answer. The descriptors are its own copies.

        Raises:
            OSError: what it has met.
            EOFError: it is gone.
            RuntimeError: it met something else.
        """
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], list(descriptors))
            answer = self._socket.recv(_LIMIT_BYTES)
        except (BrokenPipeError, ConnectionError):
            answer = b""
        if not answer:
            raise EOFError(f"process {self.pid} is gone (exit code {self._ended()})")
        value = json.loads(answer)
        if "errno" in value:
            raise OSError(value["errno"], value["strerror"])
        if "failed" in value:
            raise RuntimeError(value["failed"])
        return dict(value["answer"])

    def close(self) -> None:
        """End it; harmless when called twice. A request that it is at is given up."""
        self._socket.close()
        self._ended()

    def _ended(self) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_CLOSE_TIMEOUT_S)
        self._process.kill()
        return self._process.wait()


def serve(descriptor: str, task: str, parent: str) -> None:
    """Answer requests until nobody can ask any more. In the companion."""
    ignore_all()
    module, _, name = task.partition(":")
    act: Callable[[dict[str, Any], list[int], Callable[[], bool]], dict[str, Any]] = getattr(importlib.import_module(module), name)
    with socket.socket(fileno=int(descriptor)) as asker:

        def is_gone() -> bool:
            # A worker that the parent has forked may hold the other end open.
            readable = select.select([asker], [], [], 0)[0]
            return os.getppid() != int(parent) or bool(readable and not asker.recv(1, socket.MSG_PEEK))

        while True:
            while not select.select([asker], [], [], 1.0)[0]:
                if is_gone():
                    return
            request, descriptors, *_ = socket.recv_fds(asker, _LIMIT_BYTES, _MOST_DESCRIPTORS)
            if not request:
                return
            try:
                answer: dict[str, Any] = {"answer": act(json.loads(request), descriptors, is_gone)}
            except OSError as error:
                answer = {"errno": error.errno or 0, "strerror": error.strerror or str(error)}
            except Exception as error:  # noqa: BLE001 - raised where it was asked for
                answer = {"failed": f"{type(error).__name__}: {error}"}
            finally:
                for given in descriptors:
                    os.close(given)
            try:
                asker.send(json.dumps(answer).encode())
            except OSError:
                return
