"""A training function with a bug on one rank."""

import torch

import hpcckpt


def on_rank_2(run: hpcckpt.Run) -> None:
    model = torch.nn.Linear(1, 1)
    run.track(model=model)
    for _ in run.epochs(2):
        if run.rank == 2:
            raise ZeroDivisionError("a bug in the training script")
        run.step()
