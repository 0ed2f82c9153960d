"""Checkpoints beside those of other libraries: `python -m benchmarks.checkpoints [saves] [stall] [restore] [growth] [--quick]`.

saves: how long a durable save takes. stall: what a save costs the training that goes on beside it. restore: how long it takes until
model and optimizer live again. growth: durable saves over bytes, tensors and ranks. Each is a module of its own.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import figures, tables
from benchmarks.checkpoints import growth, restore, saves, stall
from benchmarks.checkpoints.models import MODELS
from benchmarks.checkpoints.options import Options
from benchmarks.checkpoints.states import GROWING, STATES

_PROGRAMS: dict[str, Callable[[Options], Iterator[tuple[str, figures.Case]]]] = {
    "saves": saves.measured,
    "stall": stall.measured,
    "restore": restore.measured,
    "growth": growth.measured,
}


def main() -> None:
    """Measure, and print tables; figures of all rounds go to a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="what", help=f"{', '.join(_PROGRAMS)} (saves)")
    parser.add_argument("--quick", action="store_true", help="small states, a few rounds")
    parser.add_argument("--state", action="append", choices=dict.fromkeys([*STATES, *GROWING]), help="only this one; may be given again")
    parser.add_argument("--rounds", type=int, default=None, help="how often (5 to 7, less of what takes long; with --quick 2 or 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (the temporary folder)")
    parser.add_argument("--settle-s", type=float, default=0.5, help="how long the disk is left alone before each save (0.5)")
    parser.add_argument("--json", type=Path, default=None, help="where the figures of all rounds go, beside those of other programs")
    given = parser.parse_args()
    chosen = given.what or ["saves"]
    states = tuple(given.state) if given.state else None
    if wrong := [what for what in chosen if what not in _PROGRAMS]:
        parser.error(f"{wrong[0]}: give some of {', '.join(_PROGRAMS)}")
    if {"stall", "restore"} & set(chosen) and (alone := [name for name in states or () if name not in MODELS]):
        parser.error(f"{alone[0]}: is no model; stall and restore have {', '.join(MODELS)}")
    options = Options(given.quick, states, given.rounds, given.folder, given.settle_s)
    print(", ".join(f"{key} {value}" for key, value in figures.machine().items()))
    for what in chosen:
        for name, case in _PROGRAMS[what](options):
            print(f"\n{tables.title(what, name, case)}\n\n{tables.table(what, case)}", flush=True)
            figures.keep(given.json, what, name, case)


if __name__ == "__main__":
    main()
