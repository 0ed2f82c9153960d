"""`hpcckpt status RUN…`: how runs are doing, from their ledgers and one question to Slurm. Writes nothing."""

import argparse
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcckpt.exits import EXIT_OK, exit_code

if TYPE_CHECKING:
    from hpcckpt.layout import RunLayout

_EPILOG = """\
RUN is a run directory, or a folder that holds some: of a sweep, or runs/.

states: pending, running, waiting (for another attempt), finished, stopped, failed, unknown (Slurm does not answer, or another machine)
"""
_COLUMNS = ("run", "state", "job", "attempts", "epoch", "step", "checkpoint", "age", "reason")
# A run directory may lie so many folders below what is given.
_DEPTH = 3
_QUESTION_TIMEOUT_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a run; returns the exit code. Prints one line on stderr, never a traceback, for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="hpcckpt status", description="How runs are doing.", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run directory, or a folder of some")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    return exit_code(lambda: _status(options.runs, as_json=options.json), "hpcckpt status", "try again")


def _status(given: Sequence[Path], *, as_json: bool) -> int:
    from hpcckpt.layout import RunLayout
    from hpcckpt.store.ledger import Ledger

    folders = dict.fromkeys(folder for path in given for folder in _run_directories(path))
    ledgers = {RunLayout(folder): Ledger(RunLayout(folder).events).events() for folder in folders}
    jobs = _states(ledgers.values())
    rows = [_row(layout, events, jobs) for layout, events in ledgers.items()]
    print(json.dumps(rows, indent=2) if as_json else _table(rows))
    return EXIT_OK


def _run_directories(given: Path) -> list[Path]:
    from hpcckpt.errors import RunDirectoryError

    found = list(_below(given, _DEPTH)) if given.is_dir() else []
    if not found:
        what = "holds no run directory" if given.is_dir() else "there is no such folder"
        raise RunDirectoryError(f"{given}: {what}; give a run directory, or a folder of some")
    return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    from hpcckpt.layout import RunLayout

    layout = RunLayout(folder)
    if not os.access(folder, os.R_OK | os.X_OK):  # somebody else's
        return
    if layout.events.exists():
        yield folder
    own = (layout.checkpoints, layout.logs, layout.tensorboard)
    for path in sorted(folder.iterdir()) if depth else ():
        if path.is_dir() and not path.is_symlink() and path not in own and not path.name.startswith("."):
            yield from _below(path, depth - 1)


def _states(ledgers: Iterable[Sequence[Mapping[str, Any]]]) -> Mapping[str, str] | None:
    """Return the state of each job of Slurm that waits or runs; None: Slurm is not here, or does not answer."""
    from hpcckpt import scheduler
    from hpcckpt.errors import SchedulerError
    from hpcckpt.policy import current_job

    known = (current_job(events) for events in ledgers)
    job_ids = sorted({str(job.get("job_id")) for job in known if job is not None and job.get("cluster") != "local"})
    if not job_ids:
        return {}
    # --me would leave out what others have submitted; an id that Slurm has forgotten is no reason to fail.
    argv = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={','.join(job_ids)}"]
    try:
        done = scheduler.run_command(argv, timeout_s=_QUESTION_TIMEOUT_S)
    except SchedulerError:
        return None
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        return None
    return dict(line.split("|", maxsplit=1) for line in done.stdout.splitlines() if "|" in line)


def _row(layout: "RunLayout", events: Sequence[Mapping[str, Any]], jobs: Mapping[str, str] | None) -> dict[str, Any]:
    from hpcckpt.policy import current_job

    job = current_job(events) or _last(events, {"attempt"}) or {}
    state, reason = _state(events, job, jobs)
    latest = _latest(layout)
    path = layout.checkpoints / Path(str(latest.get("file"))).name
    age_s = max(0.0, time.time() - path.stat().st_mtime) if path.is_file() else None
    return {
        "run": str(layout.root),
        "state": state,
        "job": job.get("job_id"),
        "attempts": sum(event.get("event") == "attempt" for event in events),
        "epoch": latest.get("epoch"),
        "step": latest.get("step"),
        "checkpoint": latest.get("file"),
        "age_s": None if age_s is None else round(age_s, 1),
        "reason": reason,
    }


def _state(events: Sequence[Mapping[str, Any]], job: Mapping[str, Any], jobs: Mapping[str, str] | None) -> tuple[str, str]:
    """Return the state of a run, and why where it has come to an end."""
    from hpcckpt.policy import last_attempt, outcome
    from hpcckpt.scheduler import LIVE, WAITING

    job_id = str(job.get("job_id"))
    has_begun = any(event.get("event") == "attempt" and event.get("job_id") == job_id for event in events)
    _, word = last_attempt(events)
    live: bool | None = None
    if job.get("supervisor") is not None:
        live = _is_supervised(job)
    elif jobs is not None:
        live = jobs.get(job_id, "") in LIVE
    if live and (jobs or {}).get(job_id) in WAITING:
        return ("waiting" if has_begun or job.get("event") == "successor" else "pending"), ""
    if live and word not in ("finished", "ended", "left"):
        return ("waiting" if word == "requeue" and has_begun else "running" if has_begun else "pending"), ""
    if live is None and (not has_begun or word in (None, "requeue")):
        return "unknown", ""
    if not has_begun:
        return ("running", "") if live else ("stopped", f"job {job_id} ended before its processes began")
    ending, why = outcome(events)
    begin = max((index for index, event in enumerate(events) if event.get("event") == "attempt"), default=0)
    has_failed = word is None or {event.get("event") for event in events[begin:]} & {"failed", "lost"}
    state = {"finished": "finished", "requeue": "stopped"}.get(ending, "failed" if has_failed else "stopped")
    return state, why


def _latest(layout: "RunLayout") -> Mapping[str, Any]:
    """Return what the pointer says; nothing where it is missing or damaged, which is for the next attempt to deal with."""
    from hpcckpt.errors import CheckpointError
    from hpcckpt.store.durable import read_json

    try:
        return read_json(layout.latest) or {}
    except CheckpointError:
        return {}


def _is_supervised(job: Mapping[str, Any]) -> bool | None:
    """Return whether a local run goes on; None: another machine knows."""
    import socket

    from hpcckpt.launch import local

    return local.is_running(str(job["supervisor"])) if job.get("host", socket.gethostname()) == socket.gethostname() else None


def _last(events: Sequence[Mapping[str, Any]], kinds: Collection[str]) -> Mapping[str, Any] | None:
    return next((event for event in reversed(events) if event.get("event") in kinds), None)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [[_cell(row, column) for column in _COLUMNS] for row in rows]
    lines = [[column.upper() for column in _COLUMNS], *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column == "age":
        return "-" if row["age_s"] is None else _duration(float(row["age_s"]))
    text = "-" if row[column] is None else " ".join(str(row[column]).split())
    # A terminal obeys what a name or a message may hold.
    return "".join(character if character.isprintable() else "?" for character in text)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
