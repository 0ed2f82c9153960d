"""A rank whose loader has workers; `python workers.py RUN_DIR HOW PERSISTENT`.

Its workers write their process ids to <run_dir>/workers; HOW it ends: kill (waits to be), raise, break, end, or slow (its
workers wait in a sample).
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

import hpcckpt


class Numbers(Dataset):
    """Notes which processes it is asked in."""

    def __init__(self, folder: Path, *, slow: bool) -> None:
        self.folder, self.slow = folder, slow

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> float:
        (self.folder / str(os.getpid())).touch()
        if self.slow and index > 11:
            time.sleep(2)
        return float(index)


def main(run: hpcckpt.Run, how: str, *, persistent: bool) -> None:
    model = torch.nn.Linear(1, 1)
    run.track(model=model)
    folder = Path(run.run_dir) / "workers"
    folder.mkdir(exist_ok=True)
    dataset = Numbers(folder, slow=how == "slow")
    loader = run.loader(dataset, 2, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork")
    for _ in run.epochs(2):
        for number, _batch in enumerate(run.batches(loader)):
            run.step()
            if number == 2:
                (Path(run.run_dir) / "ready").touch()
                while how in ("kill", "slow") or (how == "signal" and not (Path(run.run_dir) / "go").exists()):
                    time.sleep(0.02)
                if how == "raise":
                    raise ArithmeticError("not finite")
                if how == "break":
                    break
    if how == "break":
        (Path(run.run_dir) / "broken").touch()


if __name__ == "__main__":
    with hpcckpt.Run.from_environment(sys.argv[1], ["requeue.enabled=false"]) as the_run:
        main(the_run, sys.argv[2], persistent=sys.argv[3] == "persistent")
