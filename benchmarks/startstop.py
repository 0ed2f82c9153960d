"""How long a start and a stop take: `python -m benchmarks.startstop [--quick]`.

From the start of a process to its first training step, beside the same script without hpcckpt; what a login node's commands take, which
import no torch; and from a signal to the end of the process: the step in progress, the save, and the rest.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import figures, tables
from benchmarks.figures import Case

_SECTION = "start and stop"
_TIMEOUT_S = 120.0
# Both print when their first step begins; the second argument is the run directory.
_PLAIN = """
import sys, time
import torch

model = torch.nn.Linear(64, 10)
optimizer = torch.optim.AdamW(model.parameters())
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(640, 64)), batch_size=64, shuffle=True)
for epoch in range(1):
    for (batch,) in loader:
        print(time.monotonic(), flush=True)
        break
"""
_OURS = """
import os, sys, time
import torch
import hpcckpt

with hpcckpt.Run.from_environment(sys.argv[1]) as run:
    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = run.loader(torch.utils.data.TensorDataset(torch.zeros(640, 64)), batch_size=64, shuffle=True)
    run.track(model=model, optimizer=optimizer)
    for epoch in run.epochs(2):
        for (batch,) in run.batches(loader):
            if epoch or not sys.argv[2:]:
                print(time.monotonic(), flush=True)
                os._exit(0)
            optimizer.step()
            run.step()
"""
# Prints where each step ends; a step takes a tenth of a second.
_STOPPED = """
import sys, time
import hpcckpt
from benchmarks.checkpoints.models import trained

with hpcckpt.Run.from_environment(sys.argv[1], ["checkpoint.async_save=" + sys.argv[3]]) as run:
    model, optimizer = trained(sys.argv[2])
    import torch
    loader = run.loader(torch.utils.data.TensorDataset(torch.zeros(1000)), batch_size=1)
    run.track(model=model, optimizer=optimizer)
    for epoch in run.epochs(1):
        for _ in run.batches(loader):
            time.sleep(0.1)
            print(time.monotonic(), flush=True)
            run.step()
"""
# Ends at the next step, and saves nothing: what ending a Python with torch takes.
_LEAVING = """
import signal, sys, time
from benchmarks.checkpoints.models import trained

told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
model, optimizer = trained(sys.argv[2])
while not told:
    time.sleep(0.1)
    print(time.monotonic(), flush=True)
"""


def start(rounds: int, folder: Path) -> Case:
    """Return what starts took up to the first step."""
    case = Case({"labels": {"first_step_s": "first step after, s (least to greatest)"}})
    plain, ours = _script(folder, "plain", _PLAIN), _script(folder, "ours", _OURS)
    begun = folder / "begun"
    _first_step([str(ours), str(begun), "train"])  # leaves a checkpoint to go on from
    ways: dict[str, Callable[[int], Sequence[str]]] = {
        "torch alone": lambda _: [str(plain)],
        "hpcckpt, a new run": lambda number: [str(ours), str(folder / f"new{number}")],
        "hpcckpt, going on": lambda _: [str(ours), str(begun)],
    }
    case.contenders = {name: {} for name in ways}
    for number in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            case.add(name, first_step_s=_first_step(ways[name](number)))
    return case


def commands(rounds: int, folder: Path) -> Case:
    """Return what a login node's commands took, and whether they import torch."""
    case = Case({"labels": {"wall_s": "s (least to greatest)", "imports_torch": "imports torch (1) or not (0)"}})
    (folder / "x.yaml").write_text("entrypoint: training:main\n")
    run = folder / "watched"
    (run / "checkpoints").mkdir(parents=True)
    (run / "events.jsonl").write_text('{"event": "submitted", "job_id": "7", "cluster": "local"}\n')
    cli = ["-m", "hpcckpt.cli.main"]
    given = {
        "python -c pass": ["-c", "pass"],
        "import hpcckpt": ["-c", "import hpcckpt"],
        "hpcckpt status": [*cli, "status", str(run)],
        "hpcckpt submit --dry-run": [*cli, "submit", "--dry-run", "cluster=slurm", f"conf={folder / 'x.yaml'}"],
    }
    case.contenders = {name: {} for name in given}
    for _ in range(rounds):
        for name in random.sample(list(given), len(given)):
            began = time.monotonic()
            _python(given[name], folder)
            case.add(name, wall_s=time.monotonic() - began)
    for name, arguments in given.items():
        lines = _python(["-X", "importtime", *arguments], folder).stderr.splitlines()
        case.add(name, imports_torch=float(any(line.rpartition("|")[2].strip() == "torch" for line in lines)))
    return case


def stop(rounds: int, folder: Path, model: str) -> Case:
    """Return what stops took from SIGUSR1 on, a tenth of a second of a step at most among it."""
    labels = {"whole_s": "signal to end, s", "step_s": "rest of the step, s", "save_s": "save, s", "rest_s": "the rest, s"}
    case = Case({"labels": labels, "model": model})
    ours, leaving = str(_script(folder, "stopped", _STOPPED)), str(_script(folder, "leaving", _LEAVING))
    ways = {
        "torch alone, nothing saved": (leaving, "nothing"),
        "hpcckpt, async_save: true": (ours, "true"),
        "hpcckpt, async_save: false": (ours, "false"),
    }
    case.contenders = {name: {} for name in ways}
    for number in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            script, how = ways[name]
            run = folder / f"stopped-{how}-{number}"
            case.add(name, **_stopped([script, str(run), model, how], run / "events.jsonl"))
            shutil.rmtree(run, ignore_errors=True)
    return case


def _stopped(arguments: Sequence[str], ledger: Path) -> dict[str, float]:
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=_environ()) as process:
        ends = process.stdout
        assert ends is not None  # noqa: S101 - a pipe was asked for
        try:
            made = [_time(line) for line in (ends.readline() for _ in range(8))]
            time.sleep(random.random() * 0.1)  # noqa: S311 - anywhere in the step
            told = time.monotonic()
            process.send_signal(signal.SIGUSR1)
            made += [_time(line) for line in ends]
            process.wait(_TIMEOUT_S)
            ended = time.monotonic()
        finally:
            process.kill()
    events = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    save_s = sum(event["save_s"] for event in events if event["event"] == "saved" and event["reason"] == "stop")
    step_s = max(next(end for end in reversed(made) if end) - told, 0.0)
    return {"whole_s": ended - told, "step_s": step_s, "save_s": save_s, "rest_s": ended - told - step_s - save_s}


def _time(line: str) -> float:
    """Return the time that a line says; 0 of one that says something else."""
    try:
        return float(line)
    except ValueError:
        return 0.0


def _first_step(arguments: Sequence[str]) -> float:
    """Return the seconds from the start of a Python to what it prints last."""
    began = time.monotonic()
    printed = _python(arguments, Path.cwd()).stdout.split()
    return float(printed[-1]) - began


def _python(arguments: Sequence[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, *arguments]
    return subprocess.run(argv, cwd=folder, env=_environ(), capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)


def _environ() -> dict[str, str]:
    """Return this process's environment, in which modules of this checkout are found from any folder."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def _script(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def main() -> None:
    """Measure, and print tables; figures of all rounds go to a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startstop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds")
    parser.add_argument("--rounds", type=int, default=None, help="how often (7; with --quick 2)")
    parser.add_argument("--json", type=Path, default=None, help="where the figures of all rounds go, beside those of other programs")
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 7)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases: dict[str, Callable[[], Case]] = {
            "start": lambda: start(rounds, folder),
            "commands": lambda: commands(rounds, folder),
            "stop": lambda: stop(rounds, folder, "tiny" if options.quick else "resnet50"),
        }
        for name, measured in cases.items():
            case = measured()
            print(f"\n{name}\n\n{tables.table(_SECTION, case)}", flush=True)
            figures.keep(options.json, _SECTION, name, case)


if __name__ == "__main__":
    main()
