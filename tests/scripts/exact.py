"""Training that shows the smallest difference: dropout, momentum, a schedule, an uneven last batch. One rank.

    python exact.py RUN_DIR [key=value …]

HPCCKPT_TEST_STOPS="0@5 1@9" has rank 0 signal itself within step 5, and rank 1 within step 9, each once a run;
HPCCKPT_TEST_KILLS has them killed, HPCCKPT_TEST_RAISES has them raise. args.step_s slows steps down. args.wrap=fsdp2 has the
parameters spread over the ranks.
Writes the ids each rank trained on to <run_dir>/ids.<rank>, one line a step.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import hpcckpt

SAMPLES, BATCH_SIZE, EPOCHS = 52, 4, 2


class Numbers(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return index, torch.randn(8, generator=generator), torch.randn(3, generator=generator)


def signal_if_planned(run: hpcckpt.Run, step: int | str) -> None:
    for plan, number in (("STOPS", signal.SIGUSR1), ("KILLS", signal.SIGKILL)):
        mark = Path(run.run_dir, f"{plan}.{run.rank}@{step}")
        if f"{run.rank}@{step}" in os.environ.get(f"HPCCKPT_TEST_{plan}", "").split() and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), number)
    if f"{run.rank}@{step}" in os.environ.get("HPCCKPT_TEST_RAISES", "").split():
        raise ZeroDivisionError("a bug in the training script")


def wrapped(run: hpcckpt.Run, model: nn.Sequential) -> nn.Module:
    if run.args.get("wrap") != "fsdp2":
        return DistributedDataParallel(model)
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def main(run: hpcckpt.Run) -> None:
    model = wrapped(run, nn.Sequential(nn.Linear(8, 33), nn.Dropout(0.3), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    loader = run.loader(Numbers(), BATCH_SIZE, shuffle=True, num_workers=int(run.args.get("workers", 0)))
    with Path(run.run_dir, f"ids.{run.rank}").open("a") as ids:
        for epoch in run.epochs(int(run.args.get("epochs", EPOCHS))):
            if run.args.get("poll_first"):
                signal_if_planned(run, f"first{run.restart_count}")
                for _ in range(50):
                    time.sleep(0.01)
                    run.poll()
            for index, x, y in run.batches(loader):
                loss = mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                print(epoch, *index.tolist(), file=ids, flush=True)
                run.log(loss=loss.detach())
                time.sleep(run.args.get("step_s", 0))
                signal_if_planned(run, run.global_step + 1)
                run.step()
            scheduler.step()
            torch.rand(1)  # an evaluation that draws
            signal_if_planned(run, "poll")
            run.poll()
            run.report(norm=float(sum(parameter.detach().square().sum() for parameter in model.parameters())))


if __name__ == "__main__":
    with hpcckpt.Run.from_environment(sys.argv[1], sys.argv[2:]) as the_run:
        main(the_run)
