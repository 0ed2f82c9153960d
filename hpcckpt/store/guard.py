"""Who may change a checkpoints folder: one live attempt, and only the newest.

Three means, each for what the others cannot see:

- the *generation*, a number that each attempt takes when it starts. An older incarnation on a lost node may hold any lock and
  still run; it looks at the number before each change and stops. Correctness rests on this and on the commit order alone.
- the *attempt lock*, held by rank 0 as long as its process lives: a second run in one directory is refused as it starts.
- the *pointer lock*, held for each change, so that looking at the number and changing a name cannot be torn apart.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from hpcckpt.errors import FencedError, RunDirectoryError
from hpcckpt.layout import TEMPORARY_PREFIX, RunLayout
from hpcckpt.store.durable import make_private_directory, read_json, write_json

LOCK_TIMEOUT_S = 60.0
# A process that was just killed may hold its lock a moment longer, on a network file system above all.
ATTEMPT_TIMEOUT_S = 10.0
# What flock(2) and fcntl(2) say on a file system that has none.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})

# (process, path) -> [descriptor, guards that share it]. A process closing any descriptor of a file gives up its lock on it.
_held: dict[tuple[int, Path], list[int]] = {}


class Guard:
    """The right of one attempt to change a checkpoints folder. `locking` is `checkpoint.locking`: flock, or off."""

    def __init__(self, layout: RunLayout, locking: str = "flock") -> None:
        self._layout = layout
        self._locking = locking
        self._release: Callable[[], object] = lambda: None
        # 0: has not claimed anything.
        self.generation = 0

    def claim(self, job_id: str | None, restart_count: int | None = None) -> int:
        """Take the next generation, from now on the only one that may change anything; returns it.

        A later start of the same job takes over from an earlier one, which Slurm ended or lost. Another live run is not
        interfered with.

        Raises:
            RunDirectoryError: a live run has the directory, or the directory or its locks cannot be had.
        """
        make_private_directory(self._layout.checkpoints, follow_symlink=False)
        if self._locking != "off":
            self._hold_attempt(job_id, restart_count)
        with self._locked():
            self.generation = int((read_json(self._layout.generation) or {"generation": 0})["generation"]) + 1
            write_json(
                self._layout.generation,
                {
                    "generation": self.generation,
                    "job_id": job_id,
                    "restart_count": restart_count,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "time": time.time(),
                },
            )
            # What an older attempt had begun to write: it may not commit it any more.
            for leftover in self._layout.checkpoints.glob(f"{TEMPORARY_PREFIX}*"):
                leftover.unlink(missing_ok=True)
        return self.generation

    def release(self) -> None:
        """Let another run have the directory; the end of the process does so, too."""
        self._release()

    def refuse_if_fenced(self) -> None:
        """Raise FencedError if a newer attempt has taken over."""
        newest = read_json(self._layout.generation) or {}
        if self.generation and newest.get("generation") != self.generation:
            raise FencedError(
                f"{self._layout.checkpoints}: attempt {self.generation} is not the newest any more: attempt {newest.get('generation')} "
                f"(job {newest.get('job_id')} on {newest.get('host')}) took over; this one stops without touching anything"
            )

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the pointer lock, as the newest attempt.

        Raises:
            FencedError: this is not the newest attempt.
            RunDirectoryError: the lock was not to be had.
        """
        with self._locked():
            self.refuse_if_fenced()
            yield

    def write_json(self, path: Path, value: Mapping[str, object]) -> None:
        """Write a small file, as the newest attempt: without locks somebody may have taken over since `owned` looked."""
        self.refuse_if_fenced()
        write_json(path, value)

    def _hold_attempt(self, job_id: str | None, restart_count: int | None) -> None:
        # A lock of fcntl(2), not of flock(2): forked children, a DataLoader's workers say, do not inherit it and so cannot keep
        # it when this process is killed.
        key = (os.getpid(), self._layout.checkpoints.resolve())
        if key not in _held:
            descriptor = os.open(self._layout.attempt_lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                held = self._wait_for_attempt(descriptor, job_id, restart_count)
            except BaseException:
                os.close(descriptor)
                raise
            if not held:
                os.close(descriptor)
                return
            _held[key] = [descriptor, 0]
        _held[key][1] += 1
        self._release = weakref.finalize(self, _let_go, key)

    def _wait_for_attempt(self, descriptor: int, job_id: str | None, restart_count: int | None) -> bool:
        deadline = time.monotonic() + ATTEMPT_TIMEOUT_S
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    raise self._no_locks(self._layout.attempt_lock, error) from None
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            holder = read_json(self._layout.generation) or {}
            known = (holder.get("restart_count"), restart_count)
            if job_id is not None and holder.get("job_id") == job_id and (None in known or known[0] != known[1]):
                return False  # its node is lost, and the lock with it; the generation fences it off
            if time.monotonic() > deadline:
                who = f"process {holder.get('pid')}" if holder.get("job_id") is None else f"job {holder['job_id']}"
                raise RunDirectoryError(
                    f"{self._layout.checkpoints}: {who} on {holder.get('host')} is running in this directory; wait for it, end it, or "
                    "choose another directory"
                )
            time.sleep(0.05)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._locking == "off":
            yield
            return
        # No soft lock in place of flock: a dead host's would never be given back.
        lock = FileLock(self._layout.lock, timeout=LOCK_TIMEOUT_S, mode=0o600, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            holder = read_json(self._layout.generation) or {}
            raise RunDirectoryError(
                f"{self._layout.lock}: another process held this lock for {LOCK_TIMEOUT_S:g} s; the last attempt was job "
                f"{holder.get('job_id')} on {holder.get('host')}: end it if it hangs, then submit again"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise self._no_locks(self._layout.lock, error) from None
        try:
            yield
        finally:
            lock.release()

    @staticmethod
    def _no_locks(path: Path, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(
            f"{path}: cannot be locked ({error.strerror or error}); put run_dir on a file system that has flock (Lustre: mounted with "
            "-o flock), or set checkpoint.locking=off and never start two runs in one directory"
        )


def _let_go(key: tuple[int, Path]) -> None:
    held = _held.get(key)
    if held is not None and key[0] == os.getpid():
        held[1] -= 1
        if held[1] == 0:
            del _held[key]
            os.close(held[0])
