"""How long it takes from a file to a model and an optimizer that train on.

Each load is in fresh processes, one or several on this machine, which begin together when all have model and optimizer; the clock stops
when each has changed everything once in place. Cold: nothing of the file is in the page cache; warm: all of it. What came of it is
compared in every round. Memory is looked at in a round that is not timed.
"""

import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import memory
from benchmarks.checkpoints.loading import LOADERS, Job, cool, load, make, warm
from benchmarks.checkpoints.options import Options
from benchmarks.checkpoints.processes import together
from benchmarks.figures import Case


def measured(options: Options) -> Iterator[tuple[str, Case]]:
    """Yield a name of model, number of processes and cache, and what was measured."""
    for model in options.states or (["resnet50"] if options.quick else ["gpt2", "resnet50"]):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, together(make, 1, (Path(folder), model)) as process:
            process.begin()
            (made,) = process.results()
            # Several on a node all begin at once behind a restart, which is mostly on another node: cold.
            cases = [(1, "cold"), (1, "warm"), (2, "cold")] if options.quick else [(1, "cold"), (1, "warm"), (2, "cold"), (4, "cold")]
            for world, cache in cases:
                job_size = made["size_bytes"] * world
                if world > 1 and 2.5 * job_size > _available_bytes():
                    print(f"{model}, {world} processes: left out, they would take more memory than there is", flush=True)
                    continue
                rounds = options.rounds or (1 if options.quick else 5 if world == 1 else 3)
                yield f"{model}, {world}, {cache}", _measure(Path(folder), model, world, cache, rounds, made)


def _measure(folder: Path, model: str, world: int, cache: str, rounds: int, made: dict[str, Any]) -> Case:
    facts = {"size_bytes": made["size_bytes"], "model": model, "world": world, "cache": cache}
    facts["finds"] = {name: "" if loader.is_limit else "digest" if loader.verifies else "no" for name, loader in LOADERS.items()}
    case = Case(facts, {name: {} for name in LOADERS})
    for name in LOADERS:
        case.add(name, peak_bytes=_once(case, folder, Job(name, model, folder), made, watch=True))
    for _ in range(rounds):
        for name in random.sample(list(LOADERS), len(LOADERS)):
            _once(case, folder, Job(name, model, folder), made)
    return case


def _once(case: Case, folder: Path, job: Job, made: dict[str, Any], *, watch: bool = False) -> float:
    """Load once on all processes, and note what it took; with `watch` return instead the memory taken at most beyond what came to life.

    Raises:
        SystemExit: something else than what was saved has come to life.
    """
    world = int(case.facts["world"])
    most = 0.0
    with together(load, world, job) as processes:
        files = folder / LOADERS[job.loader].reads
        (cool if case.facts["cache"] == "cold" else warm)(files)
        if watch:
            with memory.peak(processes.pids, sum(map(memory.taken, processes.pids))) as taken:
                processes.begin()
                results = processes.results()
                most = taken() - sum(result["came_bytes"] for result in results)
        else:
            began = processes.begin()
            results = processes.results()
            case.add(
                job.loader,
                wall_s=max(result["ended"] for result in results) - began,
                read_bytes=sum(result["read_bytes"] for result in results),
                resident_bytes=statistics.mean(result["resident_bytes"] for result in results),
                kept_bytes=sum(result["kept_bytes"] for result in results),
                private_bytes=sum(result["private_bytes"] for result in results),
            )
    if not LOADERS[job.loader].is_limit and any(result["digests"] != made["digests"] for result in results):
        sys.exit(f"{job.loader}: what was loaded is not what was saved")
    return max(most, 0.0)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
