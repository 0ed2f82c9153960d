"""How a durable save grows: with the bytes, with the number of tensors, and with the ranks, of which one writes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkpoints import rank
from benchmarks.checkpoints.options import Options
from benchmarks.checkpoints.processes import together
from benchmarks.checkpoints.saves import measure
from benchmarks.checkpoints.saving import CONTENDERS
from benchmarks.checkpoints.states import GROWING, QUICK_GROWING
from benchmarks.figures import Case

NAMES = ("raw O_DIRECT + fsync", "hpcckpt, a commit", "torch.save + fsync")


def measured(options: Options) -> Iterator[tuple[str, Case]]:
    """Yield a name of state or of ranks, and what saves of it took."""
    contenders = {name: CONTENDERS[name] for name in NAMES}
    for name in [name for name in options.states or () if name in GROWING] or (QUICK_GROWING if options.quick else GROWING):
        yield name, measure(GROWING[name](), options, options.rounds or (2 if options.quick else 5), contenders)
    for world in (1, 2) if options.quick else (1, 2, 4):
        model = "tiny" if options.states and "tiny" in options.states else "resnet50"
        yield f"{world} rank{'s' * (world > 1)}", _ranks(model, world, options)


def _ranks(model: str, world: int, options: Options) -> Case:
    """Return what saves of a run on so many ranks took: until the last rank could go on."""
    case = Case({"model": model, "world": world})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        asked = rank.Saves(model, options.rounds or (2 if options.quick else 5), Path(folder), options.settle_s)
        with together(rank.save, world, asked) as processes:
            processes.begin()
            results = processes.results()
    for name in results[0]:
        for seconds in zip(*(result[name] for result in results), strict=True):
            case.add(name, wall_s=max(seconds))
    return case
