"""Memory as large as a checkpoint file, kept and used again, which another process can have too.

A file that is in memory only (memfd_create(2)). Mostly its pages are there before it is used: fresh ones cost more than the copy
into them, and ones that are not to be had end the process where they are touched.
"""

import contextlib
import ctypes
import errno
import mmap
import os
from typing import Final

from hpcckpt.store.memory import available_bytes

# Not to be taken from others by us: the training's next batch has to fit, too.
_LEFT_BYTES: Final = 256 * 1024 * 1024
# Sizes differ a little from save to save (the words in it, the generators).
_ROUND_BYTES: Final = 4 * 1024 * 1024
_MADV_POPULATE_WRITE: Final = 23  # of Linux 5.14; not among mmap's constants


class Image:
    """Shared memory that grows and never shrinks. It is freed when the last process that has it mapped or open lets go."""

    def __init__(self) -> None:
        """Make an empty one.

        Raises:
            OSError: there are none here, or no descriptors are left.
        """
        self._descriptor = os.memfd_create("hpcckpt", os.MFD_CLOEXEC)
        self._memory: mmap.mmap | None = None
        self.size_bytes = 0

    @property
    def memory(self) -> mmap.mmap:
        """All of it as it is now: when it grows, that is another object over the same memory."""
        if self._memory is None:
            raise ValueError("this image has no memory yet; reserve some")
        return self._memory

    def fileno(self) -> int:
        """Return the descriptor: for /proc/PID/fd, and for another process."""
        return self._descriptor

    def reserve(self, size_bytes: int, *, touched: bool = True) -> None:
        """Have at least so much. What is in it stays. Not `touched`, pages are there when they are used only.

        Raises:
            OSError: there is not so much memory (ENOMEM); the image is as it was.
        """
        if size_bytes <= self.size_bytes:
            return
        size = size_bytes + -size_bytes % _ROUND_BYTES
        wanted, available = size - self.size_bytes, available_bytes()
        if available is not None and wanted + _LEFT_BYTES > available:
            raise OSError(errno.ENOMEM, f"{wanted} bytes of memory are wanted, and {available} can be had")
        if touched:
            os.posix_fallocate(self._descriptor, self.size_bytes, wanted)
        else:
            os.ftruncate(self._descriptor, size)
        memory = mmap.mmap(self._descriptor, size)
        self._unmap()
        self._memory, self.size_bytes = memory, size

    def warm(self) -> None:
        """Have this process's page tables filled, which the first copy would have to do; other threads run meanwhile."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(self.size_bytes), _MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Let go of it; harmless when called twice."""
        self._unmap()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _unmap(self) -> None:
        if self._memory is not None:
            with contextlib.suppress(BufferError):  # a view of it, in an error's traceback say: it goes with that
                self._memory.close()
            self._memory = None
