"""What several writers of one file are worth: `python -m benchmarks.writers [--quick] [--blocks N] [--rate-mb-s R] [--rounds N]`.

Each writer gets so much bandwidth and no more, as on a striped file system. Real ranks, each its own process, save one state by
`checkpoint.writers=all`; each process is held to a fixed rate, by sleeping behind each write for what is left of the time that it is to
take. One writer is rank 0 alone, as it writes where no others are wanted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import torch

import hpcckpt
from hpcckpt.layout import RunLayout
from hpcckpt.store import direct
from hpcckpt.store.digest import BLOCK_BYTES
from hpcckpt.store.durable import file_digest


class State(torch.nn.Module):
    """Random weights that make a file of nearly so many blocks; no tensor begins or ends with one."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        numbers = (blocks * BLOCK_BYTES - 1024 * 1024) // 4
        sizes = [numbers // 10 + 1001 * (index - 4) for index in range(9)]
        self.weights = torch.nn.ParameterList(torch.randn(size) for size in (*sizes, numbers - sum(sizes)))


def throttle(rate: float) -> None:
    """Hold this process to so many bytes a second."""
    write_all = direct.write_all

    def slowly(descriptor: int, view: memoryview, offset: int) -> None:
        end = time.monotonic() + len(view) / rate
        write_all(descriptor, view, offset)
        time.sleep(max(end - time.monotonic(), 0))

    direct.write_all = slowly


def save(folder: str, blocks: int, rate: float, rounds: int) -> None:
    """Be one rank: save again and again."""
    throttle(rate)
    torch.manual_seed(0)
    options = ["checkpoint.writers=all", "checkpoint.async_save=false", "checkpoint.every_steps=1", "checkpoint.keep_last=2"]
    with hpcckpt.Run.from_environment(folder, options) as run:
        run.track(model=State(blocks))
        loader = run.loader(torch.utils.data.TensorDataset(torch.arange(float(rounds * run.world_size))), batch_size=1)
        for _ in run.epochs(1):
            for _ in run.batches(loader):
                run.step()


def measured(folder: Path, writers: int, options: argparse.Namespace) -> tuple[list[float], int]:
    """Return how long each save took with so many ranks, and the size of a file.

    Raises:
        SystemExit: a rank failed, or a file is not what its manifest says.
    """
    job = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": uuid.uuid4().hex, "SUBMITIT_LOCAL_NTASKS": str(writers)}
    given = [str(folder), str(options.blocks), str(options.rate_mb_s * 1e6), str(options.rounds + 1)]
    ranks = []
    for rank in range(writers):
        place = {"SUBMITIT_LOCAL_GLOBALID": str(rank), "SUBMITIT_LOCAL_LOCALID": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.writers", "--rank", *given]
        ranks.append(subprocess.Popen(command, env={**os.environ, **job, **place}, stdout=subprocess.DEVNULL))
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit(f"{writers} writers: a rank failed")
    layout = RunLayout(folder)
    saved = [event for event in map(json.loads, layout.events.read_text().splitlines()) if event["event"] == "saved"]
    newest = json.loads(layout.latest.read_text())
    if file_digest(layout.checkpoints / newest["file"], newest["digest"]) != (newest["size_bytes"], newest["digest"]):
        sys.exit(f"{writers} writers: what was read back is not what was saved")
    # The first one warms up, the last one is that of the epoch's end.
    return [event["save_s"] for event in saved[1 : options.rounds + 1]], newest["size_bytes"]


def main() -> None:
    """Measure, and print a table."""
    if sys.argv[1:2] == ["--rank"]:
        folder, blocks, rate, rounds = sys.argv[2:]
        save(folder, int(blocks), float(rate), int(rounds))
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.writers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small file, one and two writers, one round: seconds")
    parser.add_argument("--blocks", type=int, default=None, help="size of the file in blocks of 16 MiB (24; with --quick 4)")
    parser.add_argument("--rate-mb-s", type=float, default=None, help="what each writer gets (40)")
    parser.add_argument("--rounds", type=int, default=None, help="how often (5; with --quick 1)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (the temporary folder)")
    options = parser.parse_args()
    blocks, rate, rounds, counts = (4, 40.0, 1, (1, 2)) if options.quick else (24, 40.0, 5, (1, 2, 4))
    options.blocks, options.rate_mb_s = options.blocks or blocks, options.rate_mb_s or rate
    options.rounds = options.rounds or rounds
    lines, alone = [], 0.0
    for writers in counts:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            walls, size = measured(Path(folder) / "run", writers, options)
        median = statistics.median(walls)
        alone = alone or median
        lines.append(
            f"| {writers} | {median:.3g} ({min(walls):.3g} to {max(walls):.3g}) | {size / median / 1e6:.0f} | {alone / median:.2f} |"
        )
        if writers == 1:
            print(f"{size / 1e6:.0f} MB, {options.rate_mb_s:g} MB/s for each writer, {options.rounds} rounds\n", flush=True)
    print("| writers | median s of a commit (least to greatest) | MB/s | times one |\n|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
