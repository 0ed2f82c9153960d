"""Getting memory into a file past the page cache (O_DIRECT), where the file system takes that.

What goes through the cache is slowed down and delayed as the kernel likes, and pushes the training data out of it.
"""

import errno
import fcntl
import mmap
import os

# Devices whose file system has refused O_DIRECT.
_BUFFERED_DEVICES: set[int] = set()
_NOT_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class Way:
    """How blocks of memory get into a file: past the page cache, or through it."""

    def __init__(self, descriptor: int) -> None:
        """Take a descriptor of an empty file that is open for writing; it stays the caller's."""
        self._descriptor = descriptor
        self._device = os.fstat(descriptor).st_dev
        self._is_direct = self._device not in _BUFFERED_DEVICES and self._set_direct(on=True)

    def write(self, view: memoryview, offset: int) -> None:
        """Write what begins at a page, in memory as in the file; none but the last is other than whole pages.

        Raises:
            OSError: it could not be written.
        """
        whole = len(view) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._is_direct:
            try:
                write_all(self._descriptor, view[:whole], offset)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                if offset == 0:
                    _BUFFERED_DEVICES.add(self._device)
                whole = 0
            if whole == len(view):
                return
            # The end of the file is no whole page.
            self._is_direct = not self._set_direct(on=False)
            offset, view = offset + whole, view[whole:]
        write_all(self._descriptor, view, offset)
        # Begins to write out what is new, and drops what has been written out.
        os.posix_fadvise(self._descriptor, 0, offset + len(view), os.POSIX_FADV_DONTNEED)

    def _set_direct(self, *, on: bool) -> bool:
        """Return whether it could be set."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError:
            _BUFFERED_DEVICES.add(self._device)
            return False
        return True


def write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view` there.

    Raises:
        OSError: it could not be written.
    """
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
