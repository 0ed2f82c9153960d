"""A training script of somebody who has sbatch scripts of his own; the templates of slurm/templates/ run it in the tests.

It makes a step every fifth of a second until somebody makes the file `go` in the run directory. With HOLD_START=1 its first start waits
before hpcckpt is imported until a signal is there.
"""

import os
import signal
import sys
import time
from pathlib import Path

RUN_DIR = Path(os.environ["RUN_DIR"])
EPOCHS, STEPS = 3, 96


def wait_for_signal() -> None:
    """Be a Python that is still starting when the signal comes: it has no handler yet, and the signal is not lost."""
    starting = RUN_DIR / "starting"
    if os.environ.get("HOLD_START") == "1" and not starting.exists():
        RUN_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
        starting.touch()
        while not signal.sigpending():
            time.sleep(0.01)


def main() -> None:
    """Train, on as many ranks as there are."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import TensorDataset

    import hpcckpt

    with hpcckpt.Run.from_environment(run_dir=RUN_DIR, overrides=sys.argv[1:]) as run:
        layer = torch.nn.Linear(4, 1)
        model = DistributedDataParallel(layer) if run.world_size > 1 else layer
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = torch.randn(STEPS // EPOCHS * 4, 4, generator=torch.Generator().manual_seed(0))
        loader = run.loader(TensorDataset(data), batch_size=4 // run.world_size, shuffle=True)
        run.track(model=model, optimizer=optimizer)
        for _ in run.epochs(EPOCHS):
            for (x,) in run.batches(loader):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                if not (RUN_DIR / "go").exists():
                    time.sleep(0.2)
                if run.is_main:
                    (RUN_DIR / "begun").touch()
                run.step()


if __name__ == "__main__":
    wait_for_signal()
    main()
