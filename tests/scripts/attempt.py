"""One rank of a Slurm job that does one thing; `python attempt.py RUN_DIR WHAT`."""

import os
import resource
import signal
import sys

import torch

import hpcckpt


def main(run: hpcckpt.Run, what: str) -> None:
    model = torch.nn.Linear(100, 100)
    run.track(model=model)
    for _ in run.epochs(2):
        for _ in range(3):
            if what == "leave":
                sys.exit(3)
            if what == "full disk":
                # As a full disk: whatever is longer than this cannot be written.
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
                os.kill(os.getpid(), signal.SIGUSR1)
            run.step()


if __name__ == "__main__":
    with hpcckpt.Run.from_environment(sys.argv[1]) as the_run:
        main(the_run, sys.argv[2])
