"""What a companion does in tests."""

import os
import signal
import sys
import time


def echo(request, descriptors, is_gone):
    """Answer with what was asked."""
    return {"request": request, "said": [os.pread(descriptor, 100, 0).decode() for descriptor in descriptors], "gone": is_gone()}


def fail(request, _descriptors, _is_gone):
    """Meet an error."""
    if request["kind"] == "full":
        raise OSError(28, "No space left on device")
    raise KeyError(request["kind"])


def about(_request, _descriptors, _is_gone):
    """Say what this process is."""
    return {"torch": "torch" in sys.modules, "pid": os.getpid(), "open": sorted(os.listdir("/proc/self/fd"))}


def work(request, descriptors, is_gone):
    """Go on until nobody waits any more, and say so in a file."""
    os.write(descriptors[0], b"begun\n")
    while not is_gone():
        time.sleep(0.01)
    os.write(descriptors[0], b"gone\n")
    return request


def die(_request, _descriptors, _is_gone):
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)
