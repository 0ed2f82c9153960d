"""Real ranks at the price of a fork: a process that has imported torch, and started no thread, becomes one rank after the other.

Starting Python with torch takes seconds, and a test that interrupts a run at each of its steps starts ranks by the hundred. Each rank
of each attempt is a process of its own all the same, with its own process group, its own signals and its own exit code.
"""

import ctypes
import importlib
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpcckpt import config
from support import fault_roles
from support.faults import Server

TIMEOUT_S = 120.0
PR_SET_PDEATHSIG = 1  # prctl.h
# What training imports late, some of it for longer than a whole attempt takes.
LATE = (
    *("numpy", "hpcckpt.run", "multiprocessing.popen_fork", "multiprocessing.resource_sharer"),
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.parallel", "torch.optim.swa_utils"),
    *("torch.profiler._cupti_monitor", "torch.testing", "torch.utils.data.datapipes"),
)


@dataclass
class Attempt:
    """Ranks that ran once to their end."""

    codes: list[int]
    outputs: list[str]


class ForkedRanks(Server):
    """Starts a script as N ranks, as submitit's local launcher would, each a fork of a warmed process."""

    def __init__(self, environ):
        # Not super(): that starts the server of another module, and this one is all that differs.
        self.folder = tempfile.mkdtemp(prefix="hpcckpt-")
        self.path = f"{self.folder}/server"
        self.children = []
        self.attempts = 0
        environ["PYTHONPATH"] = f"{environ['PYTHONPATH']}:{Path(__file__).parents[1]}"
        command = [sys.executable, "-X", "faulthandler", "-m", "support.forked_ranks", self.path]
        self.process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, argv, world_size, environ=None, job_id=None, timeout_s=TIMEOUT_S):
        """Run the ranks once; one that hangs fails the test with everything that was printed."""
        self.attempts += 1
        job_id = job_id or uuid.uuid4().hex
        logs = [f"{self.folder}/{self.attempts}.{rank}" for rank in range(world_size)]
        started = []
        for rank, log in enumerate(logs):
            place = {
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_JOB_ID": job_id,
                "SUBMITIT_LOCAL_NTASKS": str(world_size),
                "SUBMITIT_LOCAL_GLOBALID": str(rank),
                "SUBMITIT_LOCAL_LOCALID": str(rank),
            }
            started.append(self.start("rank", argv=[*map(str, argv)], log=log, environ={**place, **(environ or {})}))
        deadline = time.monotonic() + timeout_s
        for child in started:
            try:
                child.rest(max(deadline - time.monotonic(), 0.1))
            except TimeoutError:
                # To the logs, where it hangs.
                self.end_children()
                pytest.fail(f"{argv}: a rank did not end in {timeout_s:g} s\n" + "\n".join(Path(log).read_text() for log in logs))
            child.connection.close()
            self.children.remove(child)
        outputs = [Path(log).read_text() for log in logs]
        for log in logs:
            Path(log).unlink()
        return Attempt([child.exit_code for child in started], outputs)


def rank(_line, argv, log, environ):
    """Be `python argv…` in this environment."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank would note the signal that ends its server, and live on
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environ)
    sys.argv[:] = argv
    code = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    for thread in threading.enumerate():  # any exit would wait for them
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    multiprocessing.util._exit_function()  # ends workers of loaders that are still alive, as any exit would
    os._exit(code)


def main(path):
    """Warm up, and fork for whoever connects."""
    for name in LATE:
        importlib.import_module(name)
    # OmegaConf builds its grammar when the first value is read.
    config.resolve(config.parse("entrypoint: __main__:main", ["args.some=${name}"], where="here", defaults={"name": "warm"}))
    # A fork has one thread of its parent's, and for ever the locks of the others.
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "an import has started threads"
    fault_roles.ROLES["rank"] = rank
    fault_roles.serve(path)


if __name__ == "__main__":
    main(sys.argv[1])
