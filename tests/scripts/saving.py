"""Trains while saves are on their way, which go on, or fail, when the test says so; `python saving.py RUN_DIR CASE [key=value …]`.

"late": the first save is written when step 8 was made, and not before; "signal": when a signal has come.
"""

import os
import signal
import sys
import time

import torch

import hpcckpt
from hpcckpt import background
from hpcckpt.errors import CheckpointSaveError

folder, case, *overrides = sys.argv[1:]
steps_done = 0
stopping = False
written = []
write = background.Writer.write


def held(self, image, laid, descriptor):
    """Write when it is time to; or fail."""
    written.append(steps_done)
    first = len(written) == 1
    deadline = time.monotonic() + 60
    while first and not {"late": steps_done >= 8, "signal": stopping, "signal failure": stopping}.get(case, True):
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.005)
    if first and "failure" in case:
        raise OSError(28, "No space left on device")
    return write(self, image, laid, descriptor)


background.Writer.write = held

with hpcckpt.Run.from_environment(folder, ["checkpoint.keep_last=100", "checkpoint.every_steps=2", *overrides]) as run:
    model = torch.nn.Linear(30, 30)
    run.track(model=model)
    loader = run.loader(torch.utils.data.TensorDataset(torch.arange(48.0 * run.world_size)), batch_size=4)
    for _ in run.epochs(1):
        try:
            for _ in run.batches(loader):
                torch.distributed.barrier()  # as DDP does: no rank is ahead of another
                with torch.no_grad():
                    model.weight += 1
                steps_done += 1
                print("step", steps_done, flush=True)
                if steps_done == 5:
                    if case.startswith("signal"):
                        os.kill(os.getpid(), signal.SIGUSR1)
                        stopping = True
                    if case == "exception":
                        raise ValueError("a mistake in the script")
                    if case == "exit":
                        sys.exit(7)
                if case == "failure" and steps_done == 7:
                    deadline = time.monotonic() + 60
                    while run.is_main and not run._attempt._background.has_failed:
                        assert time.monotonic() < deadline, "in vain"
                run.step()
        except CheckpointSaveError as error:
            print("heard", steps_done, error, flush=True)
            raise
