"""Limits that the kernel sets to this process, and what it has of some things."""

import os
import resource
from contextlib import contextmanager, suppress


@contextmanager
def full_disk(at_byte):
    """The kernel refuses to write any file beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at_byte, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def memory_files():
    """Return the files in memory that this process has open, each with its bytes of memory."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:"):
                status = os.stat(f"/proc/self/fd/{name}")
                found[status.st_ino] = status.st_blocks * 512  # a mapping has a descriptor of its own
    return found
