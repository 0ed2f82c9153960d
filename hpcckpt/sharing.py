"""The file that all ranks load is read once on each node, and verified there; the ranks of a node load it from that one's memory."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcckpt.distributed import Collectives
from hpcckpt.errors import CheckpointCorruptError
from hpcckpt.store.shelf import Shelf


@contextmanager
def shared(ranks: Collectives, shelf: Shelf, path: Path, digest: str) -> Iterator[str | None]:
    """Yield what to open in place of the file, None where this rank has to open the file itself.

    Every rank must enter it, and do within it what ends together.

    Args:
        ranks: all of them.
        shelf: of this rank; rank 0's has the file already, if it could be kept.
        path: the file.
        digest: what rank 0 has found; "": it is read by each rank, since nothing is known of it.

    Raises:
        CheckpointCorruptError: a node has read something else than rank 0; on every rank.
    """
    try:
        yield _source(ranks, shelf, path, digest) if digest else None
    finally:
        shelf.close()


def _source(ranks: Collectives, shelf: Shelf, path: Path, digest: str) -> str | None:
    nodes = ranks.gather(_node())
    reader = nodes.index(nodes[ranks.rank])
    sources = ranks.collect(lambda: _read(shelf, path, digest) if ranks.rank == reader else None)
    source = sources[reader]
    with suppress(OSError):
        if source is not None:
            os.close(os.open(source, os.O_RDONLY | os.O_CLOEXEC))
            return source
    return None  # processes here do not see each other


def _read(shelf: Shelf, path: Path, digest: str) -> str | None:
    """Return what to open in place of the file, after reading it here. The first rank of each node."""
    if (source := shelf.source(path)) is not None:
        return source
    try:
        found = shelf.read(path, digest)[1]
    except OSError as error:
        raise CheckpointCorruptError(f"{path}: cannot be read on {socket.gethostname()} ({error.strerror or error})") from None
    if found != digest:
        raise CheckpointCorruptError(
            f"{path}: read on {socket.gethostname()} it is not what rank 0 has read; look at that node's mount, then submit again"
        )
    return shelf.source(path)


def first_of_node(ranks: Collectives) -> bool:
    """Return whether this rank is the first one of its node. Every rank must call it."""
    nodes = ranks.gather(_node())
    return nodes.index(nodes[ranks.rank]) == ranks.rank


def _node() -> str:
    """Return a name that processes share that see each other's: those of one kernel and one process namespace."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"
