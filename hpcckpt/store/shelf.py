"""A checkpoint file that is read once: verified on the way from the disk into memory, and opened from there, by other processes too.

What lies in the page cache is taken from there; the rest is read past it, in two pieces at a time, while the digest of the one before is
taken. Memory that is shared, and not a mapped file: that would be read again, page by page, and ends a process whose file is cut short.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from hpcckpt.store.digest import BLOCK_BYTES, begun_like
from hpcckpt.store.durable import file_digest, reading
from hpcckpt.store.image import Image
from hpcckpt.store.memory import available_bytes

_READERS: Final = 2
_libc = ctypes.CDLL(None)


class Shelf:
    """Keeps the file that was read last, until it is closed. It belongs to one thread."""

    def __init__(self, *, keeps: bool = True) -> None:
        """Begin with nothing in it; where it does not keep anything, it only reads."""
        self._keeps = keeps
        self._coming: _Coming | None = None
        self._image: Image | None = None
        self._path: Path | None = None
        self.digest = ""

    def begin(self, path: Path, like: str) -> None:
        """Begin to read a file that will probably be asked for, in the background; nobody may change it any more."""
        if self._keeps:
            self._coming = _Coming(path, like)

    def read(self, path: Path, like: str = "") -> tuple[int, str]:
        """Return (size in bytes, digest) of a file, as `file_digest`, and keep the file, if there is memory for it.

        Raises:
            OSError: it cannot be read.
        """
        coming, self._coming = self._coming, None
        found = None if coming is None else coming.result(path, like)
        self._clear()
        if found is None and self._keeps:
            found = _kept(path, like)
        if found is None:
            return file_digest(path, like)
        self._image, size, self.digest = found
        self._path = path
        return size, self.digest

    def source(self, path: Path) -> str | None:
        """Return under which name the kept bytes of a file can be opened, by any process of this user here; None if it is not kept."""
        if self._image is None or self._path != path:
            return None
        return f"/proc/{os.getpid()}/fd/{self._image.fileno()}"

    def close(self) -> None:
        """Let go of what is kept, and keep nothing from now on; who has opened it has it as long as he likes."""
        self._clear()
        self._keeps = False

    def _clear(self) -> None:
        if self._coming is not None:
            self._coming.result(None, "")
            self._coming = None
        if self._image is not None:
            self._image.close()
        self._image, self._path, self.digest = None, None, ""


class _Coming:
    """A file that is being read."""

    def __init__(self, path: Path, like: str) -> None:
        self._path, self._like = path, like
        self._found: tuple[Image, int, str] | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="hpcckpt-shelf", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # a limit of threads: it is read when it is asked for
            self._thread = None

    def result(self, path: Path | None, like: str) -> tuple[Image, int, str] | None:
        """Return what was read, if that is what is asked for and could be kept; once."""
        if self._thread is not None:
            self._thread.join()
        found, self._found = self._found, None
        if found is not None and (path, like) != (self._path, self._like):
            found[0].close()
            return None
        return found

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # whoever asks for it meets the same
            self._found = _kept(self._path, self._like)


def _kept(path: Path, like: str) -> tuple[Image, int, str] | None:
    """Return a file in memory, its size in bytes and its digest; None where there is no memory for it."""
    with reading(path) as descriptor:
        size = os.fstat(descriptor).st_size
        image = _image_of(size)
        if image is None:
            return None
        digest = begun_like(like)
        try:
            with memoryview(image.memory) as view:
                for block in _read(descriptor, view, size):
                    digest.update(block)
            os.ftruncate(image.fileno(), size)
        except BaseException:
            image.close()
            raise
        return image, size, digest.text()


def _image_of(size: int) -> Image | None:
    """Return memory for so many bytes; None where there is too little for this and what it is loaded into, or nothing to keep."""
    free = available_bytes()
    if not size or (free is not None and free < 2 * size):
        return None
    with contextlib.suppress(OSError):
        image = Image()
        try:
            image.reserve(size, touched=False)
        except OSError:
            image.close()
            raise
        return image
    return None


def _read(descriptor: int, view: memoryview, size: int) -> Iterator[memoryview]:
    """Read a file into memory that has room to the end of its last page, and yield its blocks."""
    direct = _opened_direct(descriptor)
    try:
        with ThreadPoolExecutor(_READERS, "hpcckpt-reader") as pool:
            reads: deque[Future[memoryview]] = deque()
            for start in range(0, size, BLOCK_BYTES):
                end = min(start + BLOCK_BYTES, size)
                way = None if direct is None or _is_cached(descriptor, start, end) else direct
                reads.append(pool.submit(_read_block, descriptor, way, view, start, end))
                if len(reads) > _READERS:
                    yield reads.popleft().result()
            while reads:
                yield reads.popleft().result()
    finally:
        if direct is not None:
            os.close(direct)


def _opened_direct(descriptor: int) -> int | None:
    """Return another descriptor of the same file, past the page cache; None where there is no such."""
    with contextlib.suppress(OSError):
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    return None


def _is_cached(descriptor: int, start: int, end: int) -> bool:
    """Return whether most of a block is in the page cache, as mincore(2) says; where nothing says so, it is not."""
    pages = -(-(end - start) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    # Nothing of it is touched: a file that is cut short meanwhile harms nobody.
    with contextlib.suppress(OSError, ValueError), mmap.mmap(descriptor, end - start, flags=mmap.MAP_PRIVATE, offset=start) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(first)
        del first
        if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(end - start), found) == 0:
            return 2 * sum(value & 1 for value in bytes(found)) > pages
    return False


def _read_block(descriptor: int, direct: int | None, view: memoryview, start: int, end: int) -> memoryview:
    """Read a block, which begins at a page."""
    block = view[start:end]
    done = 0
    if direct is not None:
        with contextlib.suppress(OSError):  # what is wrong with it, reading through the cache says
            done = os.preadv(direct, [view[start : end + -end % mmap.PAGESIZE]], start)
    while done < len(block):
        count = os.preadv(descriptor, [block[done:]], start + done)
        if count == 0:
            raise OSError(errno.EIO, f"has no more than {start + done} bytes any more")
        done += count
    return block
