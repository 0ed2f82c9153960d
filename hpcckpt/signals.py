"""Signals are latched, nothing else.

A Python signal handler runs between two bytecodes of the main thread, wherever that happens to be: inside a save,
inside a collective, inside the logging lock. So ours notes the signal and returns, and training looks at the note at
its next step. Everything that takes time or a lock happens there.

Each signal has a note of its own: Slurm sends SIGCONT and SIGTERM together, and the order in which Python runs their
handlers varies. SIGCONT needs no handler at all.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from hpcckpt.errors import UsageError


class SignalLatch:
    """Latches signals from `install` to `restore`; also a context manager.

    Only the main thread may install it, since only there Python runs handlers.
    """

    def __init__(self, names: Sequence[str] = ("USR1", "TERM")) -> None:
        self._signals = [signal.Signals[f"SIG{name}"] for name in names]
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_waker: int | None = None
        self._counts: dict[int, int] = {}
        self._requests: set[str] = set()
        self._first: float | None = None
        # Read on every step: a plain attribute, no call.
        self.fired = False

    def install(self) -> None:
        """Take the signals over; again after a library (NCCL, submitit) may have taken them away.

        Raises:
            UsageError: called from another thread than the main one.
        """
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("signals can only be latched from the main thread; create the Run there")
        for number in self._signals:
            previous = signal.signal(number, self._note)
            if previous != self._note:
                self._previous.setdefault(number, previous)
        # A launcher may have blocked them, so that they do not end a process that is still starting.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)

    def wake(self, descriptor: int) -> None:
        """Have the number of each signal written to a pipe at once, also while the main thread is in C code that does not return.

        Only the main thread may call it. `descriptor` does not block.
        """
        self._previous_waker = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)

    def sleep(self) -> None:
        """Write to no pipe any more; harmless when called twice."""
        if self._previous_waker is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._previous_waker)
            self._previous_waker = None

    def request(self, word: str) -> None:
        """Latch what somebody asks for by other means than a signal, under a name of its own. Any thread may call it."""
        self._requests.add(word)
        self._fire()

    def names_of(self, numbers: bytes) -> set[str]:
        """Return which of our signals are among those that `wake`'s pipe has given."""
        return {number.name.removeprefix("SIG") for number in self._signals if number in numbers}

    def restore(self, *, spare: bool = False) -> None:
        """Put the former handlers back; harmless when called twice.

        With `spare` a warning that nobody had a handler for is ignored from now on, as long as it is not SIGTERM: the default would end
        a process that is finished.
        """
        self.sleep()
        while self._previous:
            number, handler = self._previous.popitem()
            # None: installed from C, which Python cannot put back.
            former = signal.SIG_DFL if handler is None else handler
            signal.signal(number, signal.SIG_IGN if spare and former == signal.SIG_DFL and number != signal.SIGTERM else former)

    def ignore(self) -> None:
        """Let the signals pass from now on, to the very end of the process.

        Python puts its own handlers back to the default as it shuts down, and the default ends the process: a warning that comes
        as a finished run exits would make it a failed one. What is ignored stays ignored.
        """
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)

    def received(self) -> tuple[str, ...]:
        """Return the names, without SIG, of the signals that came, and the requests."""
        names = (signal.Signals(number).name.removeprefix("SIG") for number in sorted(self._counts))
        return (*names, *sorted(self._requests))

    def waited_s(self) -> float:
        """Return the seconds since the first signal or request; 0 before."""
        return 0.0 if self._first is None else time.monotonic() - self._first

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._counts[number] = self._counts.get(number, 0) + 1
        self._fire()

    def _fire(self) -> None:
        if self._first is None:
            self._first = time.monotonic()
        self.fired = True

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


@contextlib.contextmanager
def children_protected(names: Sequence[str] = ("USR1", "TERM")) -> Iterator[None]:
    """Make processes that are started inside never see these signals: Slurm sends them to DataLoader workers too.

    A blocked mask is inherited over fork and exec alike, where a handler or a worker_init_fn would come too late.
    What arrives meanwhile is delivered to this process on leaving, or to another of its threads at once. A child that must end on SIGTERM
    has to call `obey_parent_only`, as DataLoader's workers do here.
    """
    numbers = {signal.Signals[f"SIG{name}"] for name in names}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only() -> None:
    """In a child that was started inside of `children_protected`: end on a SIGTERM of the parent, and on no other.

    Slurm sends SIGTERM to every process of a job that is cancelled or preempted. A DataLoader whose workers die of it raises
    in the training before that can save; one whose workers cannot be terminated at all waits for them for ever.
    """
    # Late: signals are latched before torch is there. With forkserver the parent is not the rank.
    from torch.multiprocessing import parent_process

    rank = parent_process()
    parent = os.getppid() if rank is None else rank.pid

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)  # as asked: any other code DataLoader reports as a worker's failure

    threading.Thread(target=wait, name="hpcckpt-sigterm", daemon=True).start()


def ignore_all() -> None:
    """Let every signal pass this process that is sent from outside and would end it, but SIGKILL."""
    names = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "IO", "PWR", "XCPU")
    numbers = {signal.Signals[f"SIG{name}"] for name in names}
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def ignore_termination() -> None:
    """Let SIGTERM pass this process and, until they decide otherwise, those it starts."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def interrupt_raises() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt inside, also where a parent made us ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
