"""How long a durable save takes, beside what else a user would take: `python -m benchmarks.checkpoints [--quick] [--state NAME …]`.

All contenders run in one process, shuffled in every round, behind a warm-up; in between the disk is left to settle. Figures are
medians, ratios are those of each round to the raw O_DIRECT write of the same round. What was written is read back and compared.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.checkpoints.saving import CONTENDERS, Contender
from benchmarks.checkpoints.states import STATES, State, size_bytes

LIMIT = "raw O_DIRECT + fsync"


@dataclass
class Measured:
    """What the rounds of one contender came to."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)

    def ratio(self, other: "Measured") -> float:
        """Return the median of the ratios of rounds."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.wall_s, other.wall_s, strict=True))


def once(contender: Contender, state: State, folder: Path, settle_s: float) -> tuple[float, float, int]:
    """Save once; returns seconds, CPU seconds, and how many bytes of memory were taken at most."""
    folder.mkdir()
    contender.prepare(folder)
    os.sync()
    time.sleep(settle_s)
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu, began = _memory("VmRSS"), time.process_time(), time.perf_counter()
    contender.save(state, folder)
    return time.perf_counter() - began, time.process_time() - cpu, max(_memory("VmHWM") - before, 0)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def measure(state: State, root: Path, rounds: int, settle_s: float) -> dict[str, Measured]:
    """Return what each contender took.

    Raises:
        SystemExit: one has written something else than the state.
    """
    found = {name: Measured() for name in CONTENDERS}
    for number in range(rounds + 1):
        for name in random.sample(list(CONTENDERS), len(CONTENDERS)):
            folder = root / "save"
            wall_s, cpu_s, memory_bytes = once(CONTENDERS[name], state, folder, settle_s)
            if number == 0 and not CONTENDERS[name].check(state, folder):
                sys.exit(f"{name}: what was read back is not what was saved")
            shutil.rmtree(folder)
            if number:
                found[name].wall_s.append(wall_s)
                found[name].cpu_s.append(cpu_s)
                found[name].memory_bytes.append(memory_bytes)
    return found


def table(found: Mapping[str, Measured], size: int) -> str:
    """Return a table in Markdown."""
    lines = ["| | median s (least to greatest) | times raw | CPU s | memory ÷ state | finds damage |", "|---|---|---|---|---|---|"]
    for name, measured in found.items():
        walls, contender = measured.wall_s, CONTENDERS[name]
        finds = "" if contender.is_limit else "digest" if contender.digest else "CRC" if contender.checksums else "no"
        lines.append(
            f"| {name} | {statistics.median(walls):.3g} ({min(walls):.3g} to {max(walls):.3g}) | {measured.ratio(found[LIMIT]):.2f} "
            f"| {statistics.median(measured.cpu_s):.2g} | {statistics.median(measured.memory_bytes) / size:.2f} | {finds} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print tables; figures of all rounds go to a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small states, three rounds: a minute")
    parser.add_argument("--state", action="append", choices=STATES, help="only this one; may be given again")
    parser.add_argument("--rounds", type=int, default=None, help="how often (7; with --quick 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (the temporary folder)")
    parser.add_argument("--settle-s", type=float, default=0.5, help="how long the disk is left alone before each save (0.5)")
    parser.add_argument("--json", type=Path, default=None, help="where the figures of all rounds go")
    options = parser.parse_args()
    names = options.state or (["resnet50", "tiny"] if options.quick else list(STATES))
    rounds = options.rounds or (3 if options.quick else 7)
    machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(), "torch": torch.__version__}
    machine |= {name: metadata.version(name) for name in ("safetensors", "hpcckpt")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    figures = {}
    for name in names:
        state = STATES[name]()
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(state, Path(folder), rounds, options.settle_s)
        print(f"\n{name}: {size_bytes(state) / 1e9:.3g} GB\n\n{table(found, size_bytes(state))}", flush=True)
        figures[name] = {contender: asdict(measured) for contender, measured in found.items()}
        del state
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
