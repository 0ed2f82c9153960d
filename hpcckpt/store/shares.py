"""A checkpoint file that several processes fill together, each its share: a run of whole blocks of the digest.

Every process holds the same state, so each can make any part of the file. Shares begin at blocks, hence at pages, so that each goes
past the page cache, and each comes with the leaves of its blocks. The end of the file needs the CRCs of all: it is written last.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from hpcckpt.archive import Layout
from hpcckpt.store.digest import BLOCK_BYTES, Leaf
from hpcckpt.store.direct import Way
from hpcckpt.store.sink import give_back, take_buffer

# One is filled, one is written, and one evens out the two.
_BUFFERS: Final = 3
_PIECE_BYTES: Final = 1024 * 1024

Load = Callable[[int], memoryview]


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of a file, from `first` up to `last`; `first` is the beginning of a block."""

    first: int
    last: int


@dataclass
class Rest:
    """The last block of a share that ends within one: what is hashed of it, and what of that is not written, being no whole page."""

    leaf: xxhash.xxh3_128 = field(default_factory=Leaf)
    hashed_bytes: int = 0
    unwritten: bytes = b""


@dataclass
class Filled:
    """What is known of a share that was written."""

    # Digests of its blocks, in their order.
    leaves: list[bytes]
    # Those that stand in it, by number of their entry.
    crcs: dict[int, int]
    # Of the data of large entries that were read for it.
    seen: bytes
    # None where it ends with a block.
    rest: Rest | None = None


def divided(layout: Layout, writers: int) -> list[Share]:
    """Return one share for each writer, in the order of the file; no more than there are blocks, and at least one.

    The last one ends within a block, where the central directory begins: that comes when all CRCs are known.
    """
    blocks = -(-layout.size_bytes // BLOCK_BYTES)
    count = max(min(writers, blocks), 1)
    fewer, more = divmod(blocks, count)
    last = layout.central_at // BLOCK_BYTES
    borders = [min(number * fewer + min(number, more), last) * BLOCK_BYTES for number in range(count)]
    return [Share(first, last) for first, last in zip(borders, [*borders[1:], layout.central_at], strict=True)]


def fill(descriptor: int, layout: Layout, share: Share, load: Load, large: Sequence[int]) -> Filled:
    """Write a share into an open file, but for what is left in `rest`.

    Args:
        descriptor: of the file.
        layout: of its entries.
        share: what is to be written.
        load: gives the data of an entry by its number.
        large: the entries that `seen` is of.

    Raises:
        OSError: it could not be written.
    """
    seen, checked = Leaf(), frozenset(large)
    crcs: dict[int, int] = {}

    def see(number: int, piece: memoryview) -> None:
        if number in checked:
            seen.update(piece)

    leaves, rest = _written(descriptor, share.first, layout.part(share.first, share.last, load, crcs, see))
    return Filled(leaves, crcs, seen.digest(), rest if rest.hashed_bytes else None)


def fill_at(path: Path, layout: Layout, share: Share, load: Load, large: Sequence[int]) -> Filled:
    """Write a share into a file that somebody else has made, durably; as `fill`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        filled = fill(descriptor, layout, share, load, large)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return filled


def seen_for(layout: Layout, share: Share, load: Load, large: Sequence[int]) -> bytes:
    """Return what `fill` returns as `seen` where it has these data, without writing."""
    seen, checked = Leaf(), frozenset(large)
    for number, low, high in layout.read_for(share.first, share.last):
        if number in checked:
            seen.update(load(number)[low:high])
    return seen.digest()


def fill_end(descriptor: int, layout: Layout, rest: Rest | None, crcs: Mapping[int, int]) -> list[bytes]:
    """Write the end of the file, behind all shares, and return the leaves of its blocks.

    Args:
        descriptor: of the file.
        layout: of its entries.
        rest: of the last share.
        crcs: of all shares.

    Raises:
        OSError: it could not be written.
    """
    rest = rest or Rest()
    offset, data = layout.central_at - len(rest.unwritten), memoryview(rest.unwritten + layout.ending(crcs))
    way, buffer = Way(descriptor), take_buffer()
    with memoryview(buffer) as view:
        for at in range(0, len(data), len(view)):
            part = data[at : at + len(view)]
            view[: len(part)] = part
            way.write(view[: len(part)], offset + at)
    give_back(buffer)
    leaves, ending = [], data[len(rest.unwritten) :]
    while ending:
        part = ending[: BLOCK_BYTES - rest.hashed_bytes]
        rest.leaf.update(part)
        leaves.append(rest.leaf.digest())
        ending, rest = ending[len(part) :], Rest()
    return leaves


def _written(descriptor: int, offset: int, pieces: Iterable[bytes | memoryview]) -> tuple[list[bytes], Rest]:
    """Write pieces one behind the other, from `offset` on, by a thread; returns the digest of each whole block, and what is left."""
    leaves: list[bytes] = []
    writes: list[Future[None]] = []
    buffers = [take_buffer() for _ in range(_BUFFERS)]
    way, leaf, filled_bytes = Way(descriptor), Leaf(), 0
    pool = ThreadPoolExecutor(1, "hpcckpt-share")

    def hand_over(size: int) -> None:
        number = len(writes)
        writes.append(pool.submit(way.write, memoryview(buffers[number % _BUFFERS])[:size], offset + number * BLOCK_BYTES))
        # The next buffer is free when what was last in it is written.
        if len(writes) >= _BUFFERS:
            writes[-_BUFFERS].result()

    try:
        for piece in pieces:
            data = memoryview(piece)
            while data:
                count = min(len(data), _PIECE_BYTES, BLOCK_BYTES - filled_bytes)
                with memoryview(buffers[len(writes) % _BUFFERS])[filled_bytes : filled_bytes + count] as place:
                    place[:] = data[:count]
                    leaf.update(place)  # while it is in the CPU's cache
                filled_bytes += count
                data = data[count:]
                if filled_bytes == BLOCK_BYTES:
                    hand_over(BLOCK_BYTES)
                    leaves.append(leaf.digest())
                    leaf, filled_bytes = Leaf(), 0
        paged_bytes = filled_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        rest = Rest(leaf, filled_bytes, bytes(buffers[len(writes) % _BUFFERS][paged_bytes:filled_bytes]))
        if paged_bytes:
            hand_over(paged_bytes)
        for write in writes:
            write.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for buffer in buffers:
            give_back(buffer)
    return leaves, rest
