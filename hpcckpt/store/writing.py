"""Writing a checkpoint file from memory that has the shape of the file, but for what is not data: headers, CRCs, padding.

Those are put in on the way, each byte is hashed while it is in the CPU's cache, and blocks go from where they lie to the disk.
Torch is not needed: this runs in a process beside the training's, and in the training's own for small files, or without a process.
"""

import contextlib
import errno
import functools
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Self

from hpcckpt.archive import Record, archived, placed
from hpcckpt.companion import Companion
from hpcckpt.store.digest import BLOCK_BYTES, Blocks
from hpcckpt.store.direct import Way
from hpcckpt.store.image import Image

_TASK: Final = "hpcckpt.store.writing:fill"
_SEPARATOR: Final = "\n"
# What is smaller a thread has written before a process has started, and without the interpreter's lock for most of that.
_WORTH_BYTES: Final = 32 * 1024 * 1024
# The last image that was written from, in the process beside: mapping it anew costs a fault for each of its pages.
_MAPPED: dict[tuple[int, int], mmap.mmap] = {}


@dataclass(frozen=True)
class Laid:
    """What lies in an image: a file of `size_bytes`, and behind it names and sizes of its entries; none where it is complete already."""

    size_bytes: int
    entries: int = 0
    names_bytes: int = 0

    @classmethod
    def out(cls, entries: Sequence[tuple[str, int]], reserved: Callable[[int], Image]) -> tuple[Self, list[int]]:
        """Lay out entries (name, size in bytes) in an image that `reserved` gives of a size; returns also where the data of each belong."""
        starts, size_bytes = placed(entries)
        names = _SEPARATOR.join(name for name, _ in entries).encode()
        sizes = array("Q", (size for _, size in entries)).tobytes()
        end = size_bytes + len(sizes) + len(names)
        reserved(end).memory[size_bytes:end] = sizes + names
        return cls(size_bytes, len(entries), len(names)), starts

    def read(self, memory: mmap.mmap) -> list[tuple[str, int]]:
        """Return the entries."""
        sizes, at = array("Q"), self.size_bytes
        sizes.frombytes(memory[at : at + 8 * self.entries])
        at += 8 * self.entries
        return list(zip(memory[at : at + self.names_bytes].decode().split(_SEPARATOR), sizes, strict=True)) if self.entries else []


class Writer:
    """Writes images into files, large ones by a process beside this one. One thread at a time may use it."""

    def __init__(self, signals: Sequence[str] = ("USR1", "TERM")) -> None:
        """Start nothing yet; `signals` as `Companion` takes them."""
        self._signals = signals
        self._companion: Companion | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none."""
        return None if self._companion is None else self._companion.pid

    def write(self, image: Image, laid: Laid, descriptor: int) -> tuple[int, str]:
        """Fill an empty file with what lies in an image, durably; returns (size in bytes, digest).

        Raises:
            OSError: it could not be written.
        """
        companion = self._companion_for(laid)
        if companion is not None:
            request = {"size_bytes": laid.size_bytes, "entries": laid.entries, "names_bytes": laid.names_bytes}
            try:
                answer = companion.ask(request, (image.fileno(), descriptor))
            except EOFError:  # killed, for memory perhaps; nothing is lost, since the image is here
                self.close()
                os.ftruncate(descriptor, 0)
            else:
                return laid.size_bytes, str(answer["digest"])
        return laid.size_bytes, written(image.memory, laid, descriptor)

    def close(self) -> None:
        """End the process; harmless when called twice."""
        if self._companion is not None:
            self._companion.close()
            self._companion = None

    def _companion_for(self, laid: Laid) -> Companion | None:
        if self._companion is None and laid.size_bytes >= _WORTH_BYTES:
            # Without a process, or where Python is no program, the training's own does it.
            with contextlib.suppress(OSError, ValueError):
                self._companion = Companion(_TASK, self._signals)
        return self._companion


def written(memory: mmap.mmap, laid: Laid, descriptor: int, is_gone: Callable[[], bool] = lambda: False) -> str:
    """Fill an empty file with what lies in memory, durably; returns its digest.

    Raises:
        OSError: it could not be written, or whom it is for `is_gone`.
    """
    way, digest, flushed = Way(descriptor), Blocks(), 0
    with memoryview(memory)[: laid.size_bytes] as view, ThreadPoolExecutor(1, "hpcckpt-writer") as pool:
        writes: list[Future[None]] = []
        try:
            for end in _completed(view, laid.read(memory), digest):
                while end - flushed >= BLOCK_BYTES or (end == laid.size_bytes and flushed < end):
                    block_end = min(flushed + BLOCK_BYTES, end)
                    if block_end - flushed == laid.size_bytes:
                        _write_block(way, view, flushed, block_end)
                    else:
                        writes.append(_submitted(pool, _write_block, way, view, flushed, block_end))
                    flushed = block_end
                    if is_gone():
                        raise OSError(errno.EPIPE, "whom the file is for is gone")
                if any(write.done() and write.exception() for write in writes):
                    break
        finally:
            pool.shutdown(cancel_futures=is_gone())
        for write in writes:
            write.result()
    os.fsync(descriptor)
    if os.fstat(descriptor).st_size != laid.size_bytes:
        raise OSError(errno.EIO, f"{os.fstat(descriptor).st_size} bytes are there of {laid.size_bytes} that were written")
    return digest.text()


def fill(request: dict[str, Any], descriptors: list[int], is_gone: Callable[[], bool]) -> dict[str, Any]:
    """Fill a file from an image: what the process beside the training does."""
    image, target = descriptors
    return {"digest": written(_mapped(image), Laid(**request), target, is_gone)}


def _completed(view: memoryview, entries: list[tuple[str, int]], digest: Blocks) -> Iterator[int]:
    """Put in what is not data yet, and yield how far the file is complete, and in the digest."""
    if not entries:  # as it is
        for end in range(BLOCK_BYTES, len(view) + BLOCK_BYTES, BLOCK_BYTES):
            digest.update(view[end - BLOCK_BYTES : end])
            yield min(end, len(view))
        return
    starts, _ = placed(entries)
    records = (
        Record(name, size, functools.partial(_slice, view, start, start + size))
        for (name, size), start in zip(entries, starts, strict=True)
    )
    offset = 0
    for piece in archived(records):
        end = offset + len(piece)
        if not isinstance(piece, memoryview):  # else it is there already
            view[offset:end] = piece
        digest.update(view[offset:end])
        offset = end
        yield offset


def _submitted(pool: ThreadPoolExecutor, act: Callable[..., None], *arguments: object) -> Future[None]:
    try:
        return pool.submit(act, *arguments)
    except RuntimeError as error:  # a limit of threads
        raise OSError(errno.EAGAIN, str(error)) from None


def _slice(view: memoryview, start: int, end: int) -> memoryview:
    return view[start:end]


def _write_block(way: Way, view: memoryview, start: int, end: int) -> None:
    way.write(view[start:end], start)


def _mapped(descriptor: int) -> mmap.mmap:
    status = os.fstat(descriptor)
    key = (status.st_ino, status.st_size)
    if key not in _MAPPED:
        _MAPPED.clear()
        _MAPPED[key] = mmap.mmap(descriptor, status.st_size)
    return _MAPPED[key]
