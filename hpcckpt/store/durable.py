"""Writing a file so that its name never shows anything but a complete, durable content.

Order: temporary file in the same directory -> data -> fsync -> rename -> fsync of the directory. A crash at any
instant leaves the old content under the name, or the new one. (rename(2), fsync(2): without the last step the rename
itself may be lost with the power.)
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hpcckpt.errors import CheckpointCorruptError, RunDirectoryError
from hpcckpt.layout import TEMPORARY_PREFIX
from hpcckpt.store.digest import begun_like
from hpcckpt.store.sink import Sink

_JSON_LIMIT_BYTES = 16 * 1024 * 1024
_CHECKSUM = "checksum"
_READ_BYTES = 4 * 1024 * 1024


def make_private_directory(path: Path, *, follow_symlink: bool = True) -> None:
    """Create a directory of mode 0700, and parents as the umask has them, or accept one that is ours.

    Raises:
        RunDirectoryError: it cannot be made, is no directory, is a symlink that is not to be followed, or belongs to somebody else.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be made ({error.strerror}); choose another run_dir") from None
    if not follow_symlink and path.is_symlink():
        raise RunDirectoryError(f"{path}: is a symlink; set run_dir to a place where it can be a directory")
    if status.st_uid != os.geteuid():
        raise RunDirectoryError(f"{path}: belongs to user {status.st_uid}, not to you; choose another run_dir")
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"{path}: is not writable; choose another run_dir, or mend its mode")


@dataclass
class Draft:
    """A complete and durable file that has no name yet."""

    path: Path
    temporary: Path
    size_bytes: int = 0
    digest: str = ""
    has_name: bool = False

    def publish(self) -> None:
        """Give it its name, durably."""
        os.rename(self.temporary, self.path)
        self.has_name = True
        sync_directory(self.path.parent)


@contextlib.contextmanager
def drafted(path: Path, write: Callable[[IO[bytes]], None]) -> Iterator[Draft]:
    """Let `write` fill a file beside `path`; it takes that name when it is published, and is gone when it is not.

    Raises:
        OSError: from the file system; `path` is as it was.
    """
    draft = Draft(path, path.parent / f"{TEMPORARY_PREFIX}{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with Sink(descriptor) as file:
            try:
                write(file)  # type: ignore[arg-type]  # RawIOBase has all that a writer calls
            finally:
                if file.failure is not None:
                    raise file.failure from None  # what torch makes of it says less
            file.finish()
            draft.size_bytes, draft.digest = file.size_bytes, file.digest
        yield draft
    finally:
        if not draft.has_name:
            with contextlib.suppress(OSError):
                os.unlink(draft.temporary)


def write_durably(path: Path, write: Callable[[IO[bytes]], None]) -> tuple[int, str]:
    """Let `write` fill a file that then appears at `path`, durable; returns (size in bytes, digest).

    Raises:
        OSError: from the file system; `path` is as it was.
    """
    with drafted(path, write) as draft:
        draft.publish()
    return draft.size_bytes, draft.digest


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file durably; as `write_durably`."""

    def write(file: IO[bytes]) -> None:
        file.write(data)

    write_durably(path, write)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a small JSON object durably, with a checksum of itself; as `write_durably`."""
    read_back = json.loads(json.dumps(value))  # keys that are numbers become strings
    write_bytes(path, json.dumps({**read_back, _CHECKSUM: _checksum(read_back)}, indent=1).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object that `write_json` wrote, or None when there is no file; does not follow a symlink.

    Raises:
        CheckpointCorruptError: it is another content, is absurdly large, or is no regular file of ours.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointCorruptError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with open(descriptor, "rb") as file:
            value = json.loads(file.read(_JSON_LIMIT_BYTES))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path}: is not what hpcckpt wrote there ({error}); move it away, then submit again") from None
    if not isinstance(value, dict) or value.pop(_CHECKSUM, None) != _checksum(value):
        what = "its checksum is another one" if isinstance(value, dict) else "no JSON object"
        raise CheckpointCorruptError(f"{path}: is not what hpcckpt wrote there ({what}); move it away, then submit again")
    return value


def _checksum(value: Mapping[str, object]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@contextlib.contextmanager
def reading(path: Path, *, follow_symlink: bool = False) -> Iterator[int]:
    """Open a file and mark it as being read, for other processes' `is_being_read`; yields the descriptor.

    Waits for no FIFO's writer. The mark is a shared flock: where there is none, there is no mark.

    Raises:
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags if follow_symlink else flags | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def is_being_read(path: Path) -> bool:
    """Return whether any process is within `reading(path)`."""
    try:
        # For writing too: NFS has an exclusive lock on nothing less.
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(descriptor)
    return False


def file_digest(path: Path, like: str = "") -> tuple[int, str]:
    """Return (size in bytes, digest) of a file, which is marked as being read meanwhile; does not follow a symlink.

    `like`: a digest of the algorithm that is wanted; this version's without one.

    Raises:
        OSError: it cannot be read.
    """
    size, digest = 0, begun_like(like)
    with reading(path) as descriptor:
        buffer = bytearray(_READ_BYTES)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                size += count
    return size, digest.text()


def sync_directory(path: Path) -> None:
    """Make renames and unlinks in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
