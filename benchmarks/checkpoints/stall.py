"""What one save costs a training loop that goes on beside it.

A loop makes steps of the same work on one thread, and changes the whole state behind each. One save is asked for behind the first; the
loop goes on until that is durable. Its extra time is what it took beyond as many steps of a loop without any save in the same rounds.
In the round before the first that counts, everything is changed as soon as the save lets it be, and what was written is compared.
"""

import itertools
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import memory
from benchmarks.checkpoints.beside import BASE, WAYS, WHY_NO_SNAPSHOT, Way
from benchmarks.checkpoints.models import digests, state_of, trained, update
from benchmarks.checkpoints.options import Options
from benchmarks.checkpoints.states import State, size_bytes
from benchmarks.figures import Case

_SMALL = 256  # of matrices: a training's operations are many, and Python is between them


def measured(options: Options) -> Iterator[tuple[str, Case]]:
    """Yield the name of each model, and what a save of it cost the loop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in options.states or (["resnet50"] if options.quick else ["gpt2", "resnet50"]):
            yield name, _measure(name, options)
    finally:
        torch.set_num_threads(threads)


def _measure(name: str, options: Options) -> Case:
    model, optimizer = trained(name)
    state = state_of(model, optimizer)
    least_steps, step_s = (3, 0.05) if options.quick else (5, 0.4)
    finds = {contender: "" if make.is_limit else make.finds_damage for contender, make in WAYS.items()}
    case = Case({"size_bytes": size_bytes(state), "finds": finds})
    if WHY_NO_SNAPSHOT:
        print(WHY_NO_SNAPSHOT, flush=True)
    work = _work(step_s)
    ways: dict[str, Way] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        folder = Path(root) / "save"
        try:
            for contender, make in WAYS.items():
                before = memory.taken(os.getpid())
                ways[contender] = make(state, optimizer)
                _try(contender, ways[contender], state, folder, before)  # it has memory to find
                case.add(contender, peak_bytes=_try(contender, ways[contender], state, folder, before))
            loops: list[tuple[str, float, int]] = []
            for _ in range(options.rounds or (2 if options.quick else 7)):
                loops += [
                    (contender, *_loop(case, contender, ways[contender], state, folder, work, least_steps, options.settle_s))
                    for contender in random.sample(list(ways), len(ways))
                ]
        finally:
            for way in ways.values():
                way.close()
    base_s = statistics.median(loop_s / steps for contender, loop_s, steps in loops if contender == BASE)
    case.facts["step_s"] = base_s
    for contender, loop_s, steps in loops:
        case.add(contender, loop_s=loop_s, steps=steps, extra_s=loop_s - steps * base_s)
    return case


def _try(contender: str, way: Way, state: State, folder: Path, before: int) -> int:
    """Save, change everything at once, and compare what was written; returns how many bytes of memory beyond `before` were taken.

    Raises:
        SystemExit: something else than the state was written.
    """
    folder.mkdir()
    way.prepare(folder)
    expected = digests(state)
    with memory.peak([os.getpid()], before) as most:
        way.save(folder)
        way.before_step()
        update(state, 1.0)
        way.wait()
        taken = most()
    found = way.saved(folder)
    if found is not None and digests(found) != expected:
        sys.exit(f"{contender}: what was saved is not the state at the call")
    shutil.rmtree(folder)
    return max(taken, 0)


def _loop(
    case: Case, contender: str, way: Way, state: State, folder: Path, work: Callable[[], None], least_steps: int, settle_s: float
) -> tuple[float, int]:
    """Make steps with one save among them; returns seconds and the number of steps."""
    folder.mkdir()
    way.prepare(folder)
    os.sync()
    time.sleep(settle_s)
    called = call_s = 0.0
    faults = 0
    began = time.perf_counter()
    for steps in itertools.count():
        if steps == 1:
            before, called = _faults(), time.perf_counter()
            way.save(folder)
            call_s, faults = time.perf_counter() - called, _faults() - before
        if steps >= least_steps and not way.is_busy:
            break
        work()
        way.before_step()
        update(state, 1.0)
    loop_s = time.perf_counter() - began
    durable_at = way.wait()
    case.add(contender, call_s=call_s, call_faults=faults)
    if durable_at is not None:
        case.add(contender, durable_s=durable_at - called)
    shutil.rmtree(folder)
    return loop_s, steps


def _faults() -> int:
    """Return how many pages this process had to ask for: why a copy into memory that is not warm takes several times as long."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _work(step_s: float) -> Callable[[], None]:
    """Return what takes about so long on one thread of this machine."""
    left, right, result = (torch.randn(_SMALL, _SMALL) for _ in range(3))

    def multiply(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right, out=result)
        return time.perf_counter() - began

    one_s = min(multiply(20) for _ in range(5)) / 20
    times = max(1, round(step_s / one_s))

    def work() -> None:
        multiply(times)

    return work
