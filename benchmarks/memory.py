"""How much memory processes take: of their own and shared, each page counted once; what can be had again from a file is left out."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TAKEN = ("Pss_Anon:", "Pss_Shmem:")
_PRIVATE = ("Private_Clean:", "Private_Dirty:", "Pss_Shmem:")
_EVERY_S = 0.02


def status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def reset_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def taken(pid: int) -> int:
    """Return the bytes that a process and its descendants take; 0 once it is gone."""
    return sum(_rollup(each, _TAKEN) for each in (pid, *_descendants(pid)))


def private(pid: int) -> int:
    """Return the bytes of a process that no other has, pages of files that it has mapped included, and its part of shared memory."""
    return _rollup(pid, _PRIVATE)


@contextmanager
def peak(pids: Iterable[int], before: int) -> Iterator[Callable[[], int]]:
    """Look at processes again and again within it; yields what returns the most bytes that they took beyond `before`.

    Looking costs them time: not for rounds that are timed.
    """
    pids = list(pids)
    most, over = [before], threading.Event()

    def watch() -> None:
        while not over.is_set():
            most[0] = max(most[0], sum(map(taken, pids)))
            time.sleep(_EVERY_S)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield lambda: max(most[0], sum(map(taken, pids))) - before
    finally:
        over.set()
        watching.join()


def _rollup(pid: int, fields: tuple[str, ...]) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(fields)) * 1024


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found + [below for child in found for below in _descendants(child)]
