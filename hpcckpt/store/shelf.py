"""A checkpoint file that is read once: verified on the way from the disk into memory, and opened from there, by other processes too.

What lies in the page cache is taken from there; the rest is read past it, in two blocks at a time, while the one before is hashed and
copied to where it is kept. Not read straight to there: that takes twice as long, since the disk's work is cut up by pages of 4 KiB, each of
which is cleared before. Memory that is shared, and not a mapped file: that would be read again, page by page, and ends a process whose file
is cut short.
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
from hpcckpt.store.direct import write_all
from hpcckpt.store.durable import file_digest, reading
from hpcckpt.store.image import Image
from hpcckpt.store.memory import available_bytes

_READERS: Final = 2
# Two are read, one is copied, and one evens them out.
_BUFFERS: Final = 4
# Hashed and copied at a time, while it is in the CPU's cache.
_PIECE_BYTES: Final = 1024 * 1024
_HUGE_BYTES: Final = 2 * 1024 * 1024
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
        digest = None if image is None else _copied(descriptor, size, image, like)
        return None if image is None or digest is None else (image, size, digest)


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


def _copied(descriptor: int, size: int, image: Image, like: str) -> str | None:
    """Copy a file into an image, and return its digest; None where the image does not take it, which is closed then.

    Raises:
        OSError: the file cannot be read.
    """
    digest, offset = begun_like(like), 0
    try:
        for block in _blocks(descriptor, size):
            for start in range(0, len(block), _PIECE_BYTES):
                piece = block[start : start + _PIECE_BYTES]
                digest.update(piece)
                try:
                    write_all(image.fileno(), piece, offset)
                except OSError:  # a limit that reserving did not meet
                    image.close()
                    return None
                offset += len(piece)
        # As long as the file, to the byte: readers of zip files begin at the end.
        os.ftruncate(image.fileno(), size)
    except BaseException:
        image.close()
        raise
    return digest.text()


def _blocks(descriptor: int, size: int) -> Iterator[memoryview]:
    """Yield a file's blocks, one behind the other; each is good until the next one is asked for."""
    direct = _opened_direct(descriptor)
    try:
        with ThreadPoolExecutor(_READERS, "hpcckpt-reader") as pool:
            reads: deque[tuple[memoryview, Future[memoryview]]] = deque()
            for start in range(0, size, BLOCK_BYTES):
                if len(reads) < _BUFFERS:
                    buffer = _buffer(min(size, BLOCK_BYTES))
                else:
                    buffer, read = reads.popleft()
                    yield read.result()
                reads.append((buffer, pool.submit(_read_block, descriptor, direct, buffer, start, min(start + BLOCK_BYTES, size))))
            for _, read in reads:
                yield read.result()
    finally:
        if direct is not None:
            os.close(direct)


def _buffer(size: int) -> memoryview:
    """Return memory for so many bytes, of whole pages; of huge ones where there are some, which halves the disk's time."""
    memory = mmap.mmap(-1, size + -size % mmap.PAGESIZE + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_BYTES
    return memoryview(memory)[start : start + size + -size % mmap.PAGESIZE]


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


def _read_block(descriptor: int, direct: int | None, buffer: memoryview, start: int, end: int) -> memoryview:
    """Read a block, which begins at a page, into the beginning of a buffer."""
    block = buffer[: end - start]
    done = 0
    if direct is not None and not _is_cached(descriptor, start, end):
        with contextlib.suppress(OSError):  # what is wrong with it, reading through the cache says
            done = min(os.preadv(direct, [buffer[: end - start + -(end - start) % mmap.PAGESIZE]], start), len(block))
    while done < len(block):
        count = os.preadv(descriptor, [block[done:]], start + done)
        if count == 0:
            raise OSError(errno.EIO, f"has no more than {start + done} bytes any more")
        done += count
    return block
