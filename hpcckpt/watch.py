"""Rank 0's watch beside the training: a thread that sees what the training is too busy for.

The training looks at a note at its next step. That may be too late: a rank that hangs keeps all of them from the next step, and no handler
of a signal runs while the main thread waits in C code. So this thread

- sees each signal as it comes, asks Slurm how much time is left, and calls `overdue` when that is nearly over and nobody has stopped;
- looks every few seconds whether somebody has made the file `stop`.
"""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hpcckpt.policy import REQUEUE_FILE, RESERVE_S, STOP_FILE
from hpcckpt.signals import SignalLatch

# How often the stop file is looked for.
POLL_S = 2.0


class Watch:
    """Watches from its making to `close`. Rank 0 only, from the main thread.

    Args:
        stop_file: `RunLayout.stop`.
        latch: asked to stop the training where the file says so; tells of signals.
        killed_in_s: given the names of the signals so far, returns how many seconds are left, or None; asks Slurm, so may take its time.
        overdue: called once, with those names, when `RESERVE_S` are left and `close` was not called.
    """

    def __init__(
        self,
        stop_file: Path,
        latch: SignalLatch,
        killed_in_s: Callable[[set[str]], float | None],
        overdue: Callable[[set[str]], None],
    ) -> None:
        self._stop_file, self._latch = stop_file, latch
        self._killed_in_s, self._overdue = killed_in_s, overdue
        self._closing = threading.Event()
        self._words: list[str] | None = None
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        latch.wake(self._writer)
        self._thread = threading.Thread(target=self._watch, name="hpcckpt-watch", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """End the watch; harmless when called twice. Waits for `overdue`, if that is being called, for `timeout_s` at most."""
        self._latch.sleep()
        if self._closing.is_set():
            return
        self._closing.set()
        os.write(self._writer, b"\0")
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            os.close(self._reader)
            os.close(self._writer)

    def take_back(self) -> None:
        """Remove the stop file: what it asks for is done, or not to be asked of the next attempt."""
        with contextlib.suppress(OSError):
            self._stop_file.unlink(missing_ok=True)

    def _watch(self) -> None:
        # First of all: a signal that came before the pipe was there.
        names = set(self._latch.received())
        while not self._closing.is_set():
            # Asked again when the time is over: an operator may have given more.
            left_s = self._killed_in_s(names) if names else None
            if left_s is not None and left_s <= RESERVE_S:
                if not self._closing.is_set():
                    self._overdue(names)
                return
            names |= self._new(names, None if left_s is None else time.monotonic() + left_s - RESERVE_S)

    def _new(self, names: set[str], deadline: float | None) -> set[str]:
        """Wait for another signal or another word of the stop file; returns at `deadline` or `close` without one."""
        while not self._closing.is_set() and (deadline is None or time.monotonic() < deadline):
            left_s = POLL_S if deadline is None else min(POLL_S, max(0.0, deadline - time.monotonic()))
            ready, _, _ = select.select([self._reader], [], [], left_s)
            new = self._latch.names_of(os.read(self._reader, 4096)) if ready else self._asked()
            new |= set(self._latch.received())  # something may have taken the pipe away
            if new - names:
                return new - names
        return set()

    def _asked(self) -> set[str]:
        """Look for the stop file, and latch what it says."""
        before = self._words
        try:
            self._words = words = self._stop_file.read_text(encoding="utf-8", errors="replace").split()
        except OSError:  # not there, as a rule
            self._words = None
            return set()
        if words != before:  # it may be being written
            return set()
        name = REQUEUE_FILE if words == ["requeue"] else STOP_FILE
        self._latch.request(name)
        return {name}
