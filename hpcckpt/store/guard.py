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
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hpcckpt.errors import FencedError, HpcckptError, RunDirectoryError
from hpcckpt.layout import TEMPORARY_PREFIX, RunLayout
from hpcckpt.store.durable import make_private_directory, read_json, write_json

LOCK_TIMEOUT_S = 60.0
# A process that was just killed may hold its lock a moment longer, on a network file system above all.
ATTEMPT_TIMEOUT_S = 10.0
# What flock(2) and fcntl(2) say on a file system that has none.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


@dataclass
class _Holding:
    """This process's hold on one folder. A process closing any descriptor of a file gives up its locks on it: so one for all."""

    descriptor: int
    users: int = 0
    generation: int = 0
    token: str = ""


_held: dict[tuple[int, Path], _Holding] = {}


class Guard:
    """The right of one attempt to change a checkpoints folder. `locking` is `checkpoint.locking`: flock, or off."""

    def __init__(self, layout: RunLayout, locking: str = "flock") -> None:
        self._layout = layout
        self._locking = locking
        self._holding: _Holding | None = None
        self._release: Callable[[], object] = lambda: None
        # 0: has not claimed anything.
        self.generation = 0
        self._token = ""

    def claim(self, job_id: str | None, incarnation: Sequence[int] = (), *, share: bool = False) -> int:
        """Take the next generation, from now on the only one that may change anything; returns it.

        A later start of the same job takes over from an earlier one, which Slurm ended or lost. Another live run is not
        interfered with.

        Args:
            job_id: of the scheduler; None without one.
            incarnation: which start of the job this is, `TaskEnvironment.incarnation`.
            share: take part in what this process has claimed already, if it has.

        Raises:
            RunDirectoryError: a live run has the directory, or the directory or its locks cannot be had.
            FencedError: a later start of this job has claimed it.
        """
        make_private_directory(self._layout.checkpoints, follow_symlink=False)
        try:
            if self._locking != "off":
                self._hold(job_id, incarnation)
            if share and self._holding is not None and self._holding.generation:
                self.generation, self._token = self._holding.generation, self._holding.token
                return self.generation
            with self._locked():
                self._take(job_id, incarnation)
        except OSError as error:
            self.release()
            if isinstance(error, HpcckptError):
                raise
            reason = error.strerror or error
            raise RunDirectoryError(
                f"{self._layout.checkpoints}: cannot be claimed ({reason}); free some space or mend that, then submit again"
            ) from error
        except BaseException:
            self.release()
            raise
        return self.generation

    def _take(self, job_id: str | None, incarnation: Sequence[int]) -> None:
        newest = read_json(self._layout.generation) or {"generation": 0}
        if job_id is not None and newest.get("job_id") == job_id and list(incarnation) < newest.get("incarnation", []):
            raise FencedError(
                f"{self._layout.checkpoints}: start {list(incarnation)} of job {job_id} comes too late: start {newest['incarnation']} has "
                "claimed it; this one stops without touching anything"
            )
        self.generation, self._token = int(newest["generation"]) + 1, secrets.token_hex(8)
        write_json(
            self._layout.generation,
            {
                "generation": self.generation,
                # Should the number be lost, two attempts can have the same one.
                "token": self._token,
                "job_id": job_id,
                "incarnation": list(incarnation),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": time.time(),
            },
        )
        if self._holding is not None:
            self._holding.generation, self._holding.token = self.generation, self._token
        # What an older attempt had begun to write: it may not commit it any more.
        for leftover in self._layout.checkpoints.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)

    def release(self) -> None:
        """Let another run have the directory; the end of the process does so, too."""
        self._release()
        self._holding = None

    def refuse_if_fenced(self) -> None:
        """Raise FencedError if a newer attempt has taken over."""
        newest = read_json(self._layout.generation) or {}
        if self.generation and (newest.get("generation"), newest.get("token")) != (self.generation, self._token):
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
            if self._holding is not None:
                # Where a lost incarnation still had it when this one took over, or something here has closed the file.
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._holding.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.refuse_if_fenced()
            yield

    def write_json(self, path: Path, value: Mapping[str, object]) -> None:
        """Write a small file, as the newest attempt: without locks somebody may have taken over since `owned` looked."""
        self.refuse_if_fenced()
        write_json(path, value)

    def _hold(self, job_id: str | None, incarnation: Sequence[int]) -> None:
        # A lock of fcntl(2), not of flock(2): forked children, a DataLoader's workers say, do not inherit it and so cannot keep
        # it when this process is killed.
        if self._holding is not None:
            return
        key = (os.getpid(), self._layout.checkpoints.resolve())
        if key not in _held:
            descriptor = os.open(self._layout.attempt_lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._wait_for_attempt(descriptor, job_id, list(incarnation))
            except BaseException:
                os.close(descriptor)
                raise
            _held[key] = _Holding(descriptor)
        _held[key].users += 1
        self._holding = _held[key]
        self._release = weakref.finalize(self, _let_go, key)

    def _wait_for_attempt(self, descriptor: int, job_id: str | None, incarnation: list[int]) -> None:
        """Wait for the attempt lock, or for the certainty that whoever holds it is an earlier start of the same job."""
        deadline = time.monotonic() + ATTEMPT_TIMEOUT_S
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    raise self._no_locks(self._layout.attempt_lock, error) from None
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            holder = read_json(self._layout.generation) or {}
            if job_id is not None and holder.get("job_id") == job_id:
                known = holder.get("incarnation", [])
                # A launcher that does not count starts (submitit's local one) starts again on the same machine only.
                if known < incarnation or (known == incarnation == [] and holder.get("host") == socket.gethostname()):
                    return  # its node is lost, and the lock with it; the generation fences it off
            if time.monotonic() > deadline:
                who = f"process {holder.get('pid')}" if holder.get("job_id") is None else f"job {holder['job_id']}"
                raise RunDirectoryError(
                    f"{self._layout.checkpoints}: {who} on {holder.get('host')} is running in this directory; wait for it, end it, or "
                    f"choose another directory (where its node is lost and it is surely over, remove {self._layout.attempt_lock.name})"
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
        held.users -= 1
        if held.users == 0:
            del _held[key]
            os.close(held.descriptor)
