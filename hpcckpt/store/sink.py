"""A file that is written once, from its beginning to its end, at the speed of the disk.

A small one is one buffer and one write. A large one is written by a thread, past the page cache (O_DIRECT: what goes through
the cache is slowed down and delayed as the kernel likes, and pushes the training data out of it), while the next buffer is
filled. Where the file system does not take O_DIRECT, which the first write of each process finds out, the cache is
emptied right behind the writing. Or all of it is written by somebody else, from memory that is a whole file already.
"""

import contextlib
import errno
import io
import mmap
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Final

from hpcckpt.store.digest import BLOCK_BYTES, Blocks
from hpcckpt.store.direct import Way, write_all

_BUFFER_BYTES: Final = BLOCK_BYTES
# One is filled, one is written, and one evens out the two.
_BUFFERS = 3
# Copied and hashed at a time, while it is in the CPU's cache.
_PIECE_BYTES = 1024 * 1024
# Fresh memory costs more than the copy into it, so buffers are kept.
_SPARE: list[mmap.mmap] = []


class Sink(io.RawIOBase):
    """A write-only file that knows size and digest of what went through it. It belongs to one thread.

    It also remembers its failure: torch.save turns a full disk into a RuntimeError about positions.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over a descriptor of an empty file that is open for writing."""
        super().__init__()
        self._descriptor = descriptor
        self._digest = Blocks()
        # None where a write was interrupted: a buffer was handed over, and no other one came back.
        self._buffer: mmap.mmap | None
        try:
            self._buffer = take_buffer()
        except BaseException:
            os.close(descriptor)
            raise
        self._filled_bytes = 0
        self._writer: _Writer | None = None
        self.size_bytes = 0
        # The digest, where somebody else has written the file.
        self._entrusted: str | None = None
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any, /) -> int:
        """Take in all of `data`, which may change afterwards.

        Raises:
            OSError: this or an earlier part could not be written.
        """
        if self.failure is not None:
            raise self.failure
        with memoryview(data) as whole, whole.cast("B") as view:
            start, size = 0, len(view)
            while start < size:
                count = min(size - start, _PIECE_BYTES, _BUFFER_BYTES - self._filled_bytes)
                end = self._filled_bytes + count
                with memoryview(self._current()) as buffer:
                    buffer[self._filled_bytes : end] = view[start : start + count]
                    self._digest.update(buffer[self._filled_bytes : end])
                self._filled_bytes = end
                start += count
                if end == _BUFFER_BYTES:
                    self._hand_over()
        self.size_bytes += size
        return size

    def entrust(self, write: Callable[[int], tuple[int, str]]) -> None:
        """Have all of the file written by `write`, which is given the descriptor, leaves it durable, and returns (size in bytes, digest).

        Raises:
            OSError: from it.
        """
        if self.failure is not None:
            raise self.failure
        try:
            self.size_bytes, self._entrusted = write(self._descriptor)
            self._refuse_another_size()
        except OSError as error:
            self.failure = error
            raise

    def finish(self) -> None:
        """Have everything written and durable.

        Raises:
            OSError: something could not be written.
        """
        if self.failure is not None:
            raise self.failure
        if self._entrusted is not None:
            return
        try:
            if self._writer is not None:
                self._hand_over()
                self._writer.stop()
                writer, self._writer = self._writer, None
                writer.raise_failure()
            else:
                with memoryview(self._current()) as buffer:
                    write_all(self._descriptor, buffer[: self._filled_bytes], self.size_bytes - self._filled_bytes)
            os.fsync(self._descriptor)
            self._refuse_another_size()
        except OSError as error:
            self.failure = error
            raise

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close the file, whatever is written of it."""
        if self.closed:
            return
        super().close()
        try:
            if self._writer is not None:
                self._writer.stop()
        finally:
            # An interruption of that leaves all to the thread, which may still write.
            if self._writer is None or not self._writer.is_alive:
                if self._buffer is not None:
                    give_back(self._buffer)
                os.close(self._descriptor)

    @property
    def digest(self) -> str:
        """The digest so far, with its algorithm."""
        return self._digest.text() if self._entrusted is None else self._entrusted

    def _refuse_another_size(self) -> None:
        there = os.fstat(self._descriptor).st_size
        if there != self.size_bytes:
            raise OSError(errno.EIO, f"{there} bytes are there of {self.size_bytes} that were written")

    def _current(self) -> mmap.mmap:
        if self._buffer is None:
            raise ValueError("this file was interrupted while it was written; write it anew")
        return self._buffer

    def _hand_over(self) -> None:
        """Let the buffer be written, and go on with another one."""
        try:
            self._writer = self._writer or _Writer(self._descriptor)
            buffer, self._buffer = self._current(), None
            self._buffer = self._writer.exchange(buffer, self._filled_bytes)
        except OSError as error:
            self.failure = error
            raise
        self._filled_bytes = 0


class _Writer:
    """A thread that writes buffers one behind the other; all but the last are full."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._filled: queue.SimpleQueue[tuple[mmap.mmap, int] | None] = queue.SimpleQueue()
        self._empty: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._way = Way(descriptor)
        for _ in range(_BUFFERS - 1):
            self._empty.put(take_buffer())
        self._thread = threading.Thread(target=self._run, name="hpcckpt-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit of threads
            raise OSError(errno.EAGAIN, str(error)) from None

    @property
    def is_alive(self) -> bool:
        """Whether the thread may still write."""
        return self._thread.is_alive()

    def exchange(self, buffer: mmap.mmap, filled_bytes: int) -> mmap.mmap:
        """Take a buffer to be written, and return an empty one as soon as there is one."""
        if self._failure is not None:
            self._empty.put(buffer)
            raise self._failure
        self._filled.put((buffer, filled_bytes))
        return self._empty.get()

    def stop(self) -> None:
        """Return when everything is written, or given up; nothing can be handed over any more."""
        if self._thread.is_alive():
            self._filled.put(None)
            self._thread.join()
        while not self._empty.empty():
            give_back(self._empty.get())

    def raise_failure(self) -> None:
        """Raise what the thread met."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        offset = 0
        while (given := self._filled.get()) is not None:
            buffer, filled_bytes = given
            if self._failure is None:
                try:
                    with memoryview(buffer) as view:
                        self._way.write(view[:filled_bytes], offset)
                except BaseException as error:  # noqa: BLE001 - raised where it is heard
                    self._failure = error
            offset += filled_bytes
            self._empty.put(buffer)


def give_back(buffer: mmap.mmap) -> None:
    """Keep a buffer for who needs one next."""
    if len(_SPARE) < _BUFFERS:
        _SPARE.append(buffer)


def take_buffer() -> mmap.mmap:
    """Return memory for a block, at a page's beginning, with anything in it."""
    with contextlib.suppress(IndexError):
        return _SPARE.pop()
    # Of pages, as O_DIRECT wants it; a forked process has its own.
    return mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
