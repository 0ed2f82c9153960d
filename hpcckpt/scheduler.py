"""Slurm's commands, and every other child process. Sole owner of `subprocess`.

Nothing here decides. Commands get arguments as a list, never a shell; each has a deadline.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from hpcckpt.environment import submission_environ
from hpcckpt.errors import SchedulerError, SubmissionError

T = TypeVar("T")

COMMAND_TIMEOUT_S = 60.0
# What scontrol says when asking again is no use.
_FORBIDDEN = ("disabled", "denied", "Invalid job id", "not supported")
# States of a job that was requeued.
_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
# First words of the lines of `scontrol show job` that tell state and times.
_STATE_LINES = frozenset({"JobState", "RunTime", "StartTime", "PreemptEligibleTime", "PreemptTime"})


@dataclass(frozen=True)
class Completed:
    """What a command did; returncode is negative for the signal that ended it."""

    returncode: int
    stdout: str
    stderr: str


def run_command(
    argv: Sequence[str], *, environ: Mapping[str, str] | None = None, stdin: str = "", timeout_s: float = COMMAND_TIMEOUT_S
) -> Completed:
    """Run a command to its end, with `stdin` as its standard input.

    Raises:
        SchedulerError: the program is not there, or did not end in time (it is killed then).
    """
    try:
        done = subprocess.run(
            list(argv),
            # A user's own format of times could not be read.
            env={**(os.environ if environ is None else environ), "SLURM_TIME_FORMAT": "standard"},
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise SchedulerError(f"{argv[0]}: no such program on PATH; is this a machine with Slurm's commands?") from None
    except OSError as error:
        raise SchedulerError(f"{argv[0]}: cannot be started ({error.strerror}); is it the right one on PATH?") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"`{' '.join(argv)}` gave no answer in {timeout_s:g} s; is Slurm's controller up?") from None
    return Completed(done.returncode, done.stdout, done.stderr.strip())


def has_slurm() -> bool:
    """Return whether jobs can be submitted to Slurm from here."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def job_fields(job_id: str) -> dict[str, str] | None:
    """Return `scontrol show job` as a mapping, or None when Slurm does not know the job any more.

    Raises:
        SchedulerError: scontrol is missing or the controller does not answer.
    """
    done = run_command(["scontrol", "show", "job", job_id])
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return None
        raise SchedulerError(f"scontrol show job {job_id}: {done.stderr or done.returncode}; is Slurm's controller up?")
    return parse_job_fields(done.stdout)


def parse_job_fields(text: str) -> dict[str, str]:
    """Return the Key=Value words of `scontrol show job` that tell a job's state and times.

    Only of lines that hold nothing a user has written: a job's name or comment may read "JobState=CANCELLED".
    """
    words = [line.split() for line in text.split("\n\n", maxsplit=1)[0].splitlines()]
    chosen = [word for line in words if line and line[0].partition("=")[0] in _STATE_LINES for word in line]
    return dict(word.split("=", maxsplit=1) for word in chosen if "=" in word)


def remaining_s(fields: Mapping[str, str], now: datetime) -> float | None:
    """Return seconds from `now` (local time, as Slurm prints) to the job's time limit; None when it has none.

    Of StartTime and TimeLimit: EndTime is the limit only while a job runs undisturbed.
    """
    limit_s = parse_time_limit(fields.get("TimeLimit", ""))
    try:
        started = datetime.fromisoformat(fields.get("StartTime", ""))
    except ValueError:
        return None
    return None if limit_s is None else limit_s - (now - started).total_seconds()


def parse_time_limit(text: str) -> float | None:
    """Return seconds of Slurm's [days-]hours:minutes:seconds; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24.0 + hours) * 60 + minutes) * 60 + seconds


def is_live(job_id: str) -> bool:
    """Return whether a job still waits or runs (its processes may still write).

    Raises:
        SchedulerError: as `job_fields`.
    """
    fields = job_fields(job_id)
    return fields is not None and fields.get("JobState", "") in {
        "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "STAGE_OUT", "SIGNALING", "STOPPED",
        "RESIZING", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
    }  # fmt: skip


def patiently(action: Callable[[], T], patience_s: float) -> T:
    """Return what `action` returns, trying again for `patience_s` while it raises SchedulerError; then that is raised."""
    deadline = time.monotonic() + patience_s
    delay_s = 0.5
    while True:
        try:
            return action()
        except SchedulerError:
            # A program that is not there will not come; a busy controller will.
            if time.monotonic() + delay_s > deadline or shutil.which("scontrol") is None:
                raise
        time.sleep(delay_s)
        delay_s = min(delay_s * 2, 10.0)


def requeue(job_id: str, patience_s: float = 0.0) -> None:
    """Ask Slurm to start this job anew: same id, same script. The caller is the job's own rank 0.

    Slurm answers and at once sends SIGTERM to every process of the job, scontrol included, so an scontrol that died
    of a signal, or whose answer did not come, tells nothing: then the job's own state does. A busy controller is asked again
    for `patience_s`; one that forbids it is not.

    Raises:
        SchedulerError: Slurm refused (its message is passed on) or did not answer.
    """
    refusal: list[SchedulerError] = []

    def ask() -> None:
        try:
            done = run_command(["scontrol", "requeue", job_id])
        except SchedulerError as error:
            problem, unknown = str(error), True
        else:
            if done.returncode == 0:
                return
            problem, unknown = done.stderr or f"ended with {done.returncode}", done.returncode < 0
        failure = SchedulerError(f"scontrol requeue {job_id}: {problem}")
        if any(word in problem for word in _FORBIDDEN):
            refusal.append(failure)
        elif not _was_requeued(job_id, unknown=unknown):
            raise failure

    patiently(ask, patience_s)
    if refusal:
        raise refusal[0]


def _was_requeued(job_id: str, *, unknown: bool) -> bool:
    """Return whether a request arrived all the same; after an answer that never came, a job that is being ended is one."""
    state = (job_fields(job_id) or {}).get("JobState")
    return state in _WAITING or (unknown and state == "COMPLETING")


def check_script(script: str) -> None:
    """Let sbatch check a batch script without submitting it.

    Raises:
        SubmissionError: sbatch would refuse it; its own message is passed on.
        SchedulerError: sbatch is missing or gave no answer.
    """
    done = run_command(["sbatch", "--test-only"], environ=submission_environ(os.environ), stdin=script)
    if done.returncode != 0:
        raise SubmissionError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
