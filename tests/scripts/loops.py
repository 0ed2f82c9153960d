"""Every shape of loop that a stop can fall into. One rank; `python loops.py RUN_DIR args.shape=… [key=value …]`

HPCCKPT_TEST_STOP=N signals this rank at its N-th call of `here`. What was trained on and evaluated goes to <run_dir>/trace.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hpcckpt


class Trace:
    """Counts places where a signal may come, and notes what was trained on."""

    def __init__(self, run: hpcckpt.Run) -> None:
        self.run_dir = Path(run.run_dir)
        self.places = 0

    def here(self) -> None:
        self.places += 1
        if str(self.places) == os.environ.get("HPCCKPT_TEST_STOP"):
            os.kill(os.getpid(), signal.SIGUSR1)

    def note(self, *words: object) -> None:
        with (self.run_dir / "trace").open("a") as file:
            print(*words, file=file)


def main(run: hpcckpt.Run) -> None:
    shape = run.args.shape
    model, trace = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.3), nn.Linear(3, 1)), Trace(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    train = run.loader(TensorDataset(torch.arange(12.0).unsqueeze(1)), 2, shuffle=True)
    other = run.loader(TensorDataset(torch.arange(100.0, 106.0).unsqueeze(1)), 2, shuffle=True)
    held_out = run.loader(TensorDataset(torch.arange(1000.0, 1008.0).unsqueeze(1)), 2)

    def one_step(kind: str, epoch: int, x: torch.Tensor) -> None:
        loss = model(x / 1000).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.note(kind, epoch, *x.flatten().tolist())

    def evaluate(epoch: int) -> None:
        seen = []
        for (x,) in run.batches(held_out):
            seen += x.flatten().tolist()
            torch.rand(1)
            trace.here()
            run.poll()
        trace.note("evaluated", epoch, len(seen))

    if shape == "warm-up":
        for _ in range(3):
            trace.here()
            run.poll()
            run.poll()
    for epoch in run.epochs(3):
        torch.rand(1)
        if shape == "poll first":
            trace.here()
            run.poll()
            run.poll()
        if shape == "evaluate first":
            evaluate(epoch)
        for number, (x,) in enumerate(run.batches(train)):
            if shape == "accumulate":
                trace.here()
                run.poll()
                loss = model(x / 1000).square().sum()
                loss.backward()
                trace.note("train", epoch, *x.flatten().tolist())
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                    run.step()
                continue
            one_step("train", epoch, x)
            trace.here()
            run.step()
            if shape == "break" and number == 3:
                break
        scheduler.step()
        if shape == "two loaders":
            for (x,) in run.batches(other):
                one_step("other", epoch, x)
                trace.here()
                run.step()
        if shape in ("evaluate", "evaluate first", "break", "accumulate"):
            evaluate(epoch)
        trace.here()
        run.poll()
    trace.here()
    run.poll()


if __name__ == "__main__":
    with hpcckpt.Run.from_environment(sys.argv[1], sys.argv[2:]) as the_run:
        main(the_run)
