"""The whole promise in a minute, on this machine: train, be interrupted by a real SIGUSR1, requeue, resume, compare.

Started by `make demo`. Two runs of conf/digits.yaml on submitit's local launcher with two gloo ranks each: one is
interrupted on its way, the other is not. Both must end with the same bits.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

EPOCHS, STEPS_AN_EPOCH = 20, 24
INTERRUPT_AT = 150
STEP_S = 0.02
TIMEOUT_S = 300.0


def main() -> int:
    """Run the demonstration; returns the exit code, 0 if everything that was promised was seen."""
    folder = Path(tempfile.mkdtemp(prefix="hpcckpt-demo-"))
    say(f"1. Training on real handwritten digits, two ranks; SIGUSR1 comes at about step {INTERRUPT_AT}")
    interrupted = train(folder / "interrupted", STEP_S, interrupt_at=INTERRUPT_AT)
    say("2. The same training again without an interruption, to compare")
    whole = train(folder / "whole", 0.0)
    say("3. What came of it")
    problems = compare(folder, interrupted, whole)
    for problem in problems:
        print(f"   NOT AS PROMISED: {problem}")
    if problems:
        print(f"   everything is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def train(run_dir: Path, step_s: float, interrupt_at: int | None = None) -> list[dict[str, Any]]:
    """Submit a run and return its ledger; with `interrupt_at` show it live, and signal its rank 0 on the way."""
    command = [sys.executable, "-m", "hpcckpt.submit", "conf=conf/digits.yaml", "cluster=local", f"run_dir={run_dir}"]
    watching = subprocess.Popen([*command, f"args.epochs={EPOCHS}", f"args.step_s={step_s}"], stdout=subprocess.PIPE, text=True)
    if interrupt_at is not None:
        threading.Thread(target=interrupt, args=(run_dir, interrupt_at), daemon=True).start()
    for line in watching.stdout or ():
        if line.startswith("hpcckpt:") and interrupt_at is not None:
            print("  ", line.removeprefix("hpcckpt: "), end="", flush=True)
    if watching.wait() != 0:
        raise SystemExit(f"demo: the run in {run_dir} failed; see {run_dir}/logs")
    return lines(run_dir / "events.jsonl")


def interrupt(run_dir: Path, step: int) -> None:
    """Send SIGUSR1 to rank 0 once its checkpoints show that it is past `step`."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        events = lines(run_dir / "events.jsonl")
        if any(event["event"] == "saved" and event["step"] >= step - STEPS_AN_EPOCH for event in events):
            pid = next(event["pid"] for event in events if event["event"] == "attempt")
            # Somewhere within the epoch, not at its end.
            time.sleep(STEP_S * STEPS_AN_EPOCH / 2)
            print(f"   >>> kill -USR1 {pid}", flush=True)
            os.kill(pid, signal.SIGUSR1)
            return
        time.sleep(0.02)


def compare(folder: Path, interrupted: list[dict[str, Any]], whole: list[dict[str, Any]]) -> list[str]:
    """Print what was seen, and return what differs from the promise."""
    import torch

    first, second = final(folder / "interrupted"), final(folder / "whole")
    steps = [line["step"] for line in lines(folder / "interrupted" / "metrics.jsonl") if line["kind"] == "log"]
    attempts = sum(event["event"] == "attempt" for event in interrupted)
    stop = next((event for event in interrupted if event["event"] == "stop"), None)
    restored = [event["step"] for event in interrupted if event["event"] == "restored"]
    weights, others = first["model_state_dict"], second["model_state_dict"]
    same = weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    print(f"   accuracy on the test images: {first['metrics']['accuracy']:.1%}")
    print(f"   attempts: {attempts}; stopped at step {stop and stop['step']}, went on behind step {restored[-1]}")
    print(
        f"   steps: {len(steps)} of {EPOCHS * STEPS_AN_EPOCH}, each trained once: none lost, none repeated"
        if is_whole(steps)
        else f"   {steps}"
    )
    print(f"   weights equal, bit for bit, to those of the run that was not interrupted: {'yes' if same else 'NO'}")
    problems = []
    if attempts != 2 or stop is None or restored != [0, stop["step"]]:
        problems.append("the run was not interrupted and resumed exactly once")
    if not is_whole(steps):
        problems.append("steps were lost or repeated")
    if not same:
        problems.append("the weights differ")
    if sum(event["event"] == "attempt" for event in whole) != 1:
        problems.append("the run to compare with was interrupted")
    return problems


def is_whole(steps: list[int]) -> bool:
    """Return whether each step is there once, in order."""
    return steps == list(range(1, EPOCHS * STEPS_AN_EPOCH + 1))


def final(run_dir: Path) -> Any:
    """Return the newest checkpoint, read by plain torch."""
    import torch

    pointer = json.loads((run_dir / "checkpoints" / "latest.json").read_text())
    return torch.load(run_dir / "checkpoints" / pointer["file"], weights_only=True)


def lines(path: Path) -> list[dict[str, Any]]:
    """Return a file's JSON lines; a line that is being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
