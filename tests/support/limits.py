"""Limits that the kernel sets to this process."""

import resource
from contextlib import contextmanager


@contextmanager
def full_disk(at_byte):
    """The kernel refuses to write any file beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at_byte, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
