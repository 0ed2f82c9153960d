"""Trains with DDP, an optimizer and a buffer, and saves every second step; `python lazily.py RUN_DIR CASE [key=value …]`.

"changing": behind the save of step 4 parameters are changed by something else than the optimizer.
"""

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

import hpcckpt

folder, case, *overrides = sys.argv[1:]
with hpcckpt.Run.from_environment(folder, ["checkpoint.keep_last=100", "checkpoint.every_steps=2", *overrides]) as run:
    net = torch.nn.Sequential(torch.nn.Linear(40, 700), torch.nn.BatchNorm1d(700), torch.nn.Linear(700, 700), torch.nn.Linear(700, 1))
    model = DistributedDataParallel(net) if run.world_size > 1 else net
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    data = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    loader = run.loader(torch.utils.data.TensorDataset(data), batch_size=16 // run.world_size, shuffle=True)
    for _ in run.epochs(3):
        for (batch,) in run.batches(loader):
            if case == "changing" and run.global_step == 4:
                with torch.no_grad():
                    net[2].weight.mul_(0.5)
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            run.step()
        scheduler.step()
