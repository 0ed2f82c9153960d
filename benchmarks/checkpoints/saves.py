"""How long a durable save takes, beside what else a user would take.

All contenders run in one process, shuffled in every round, behind a warm-up; in between the disk is left to settle. Figures are
medians, ratios are those of each round to the raw O_DIRECT write of the same round. What was written is read back and compared.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import memory
from benchmarks.checkpoints.options import Options
from benchmarks.checkpoints.saving import CONTENDERS, Contender
from benchmarks.checkpoints.states import STATES, State, size_bytes
from benchmarks.figures import Case

# Of what takes a minute a round.
_MOST_ROUNDS = {"gpt2-medium": 3, "100000 x 1 KB": 1}


def measured(options: Options) -> Iterator[tuple[str, Case]]:
    """Yield the name of each state, and what was measured of it."""
    for name in options.states or (["resnet50", "tiny"] if options.quick else list(STATES)):
        rounds = options.rounds or min(3 if options.quick else 7, _MOST_ROUNDS.get(name, 7))
        yield name, measure(STATES[name](), options, rounds, CONTENDERS)


def measure(state: State, options: Options, rounds: int, contenders: Mapping[str, Contender]) -> Case:
    """Return what each contender took.

    Raises:
        SystemExit: one has written something else than the state.
    """
    finds = {name: contender.finds_damage for name, contender in contenders.items()}
    case = Case({"size_bytes": size_bytes(state), "finds": finds}, {name: {} for name in contenders})
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        for number in range(rounds + 1):
            for name in random.sample(list(contenders), len(contenders)):
                folder = Path(root) / "save"
                wall_s, cpu_s, memory_bytes = once(contenders[name], state, folder, options.settle_s)
                if number == 0 and not contenders[name].check(state, folder):
                    sys.exit(f"{name}: what was read back is not what was saved")
                shutil.rmtree(folder)
                if number:
                    case.add(name, wall_s=wall_s, cpu_s=cpu_s, memory_bytes=memory_bytes)
    return case


def once(contender: Contender, state: State, folder: Path, settle_s: float) -> tuple[float, float, int]:
    """Save once; returns seconds, CPU seconds, and how many bytes of memory were taken at most."""
    folder.mkdir()
    contender.prepare(folder)
    os.sync()
    time.sleep(settle_s)
    memory.reset_peak()
    before, cpu, began = memory.status("VmRSS"), time.process_time(), time.perf_counter()
    contender.save(state, folder)
    return time.perf_counter() - began, time.process_time() - cpu, max(memory.status("VmHWM") - before, 0)
