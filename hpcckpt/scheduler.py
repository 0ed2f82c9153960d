"""Slurm's commands, and every other child process. Sole owner of `subprocess`.

Nothing here decides. Commands get arguments as a list, never a shell; each has a deadline.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from hpcckpt.environment import submission_environ
from hpcckpt.errors import RequeueForbiddenError, SchedulerError, SubmissionError

T = TypeVar("T")

COMMAND_TIMEOUT_S = 60.0
# For what is good to know and not waited for.
QUICK_TIMEOUT_S = 5.0
# What scontrol says when asking again is no use.
_FORBIDDEN = ("disabled", "denied", "Only batch jobs", "Invalid job id", "not supported")
# Options of sbatch that a script may leave to the command line: each with its short form, and the variable that tells its value.
_SIZES = {
    "nodes": ("-N", "SLURM_JOB_NUM_NODES"),
    "ntasks-per-node": ("--ntasks-per-node", "SLURM_NTASKS_PER_NODE"),
    "cpus-per-task": ("-c", "SLURM_CPUS_PER_TASK"),
}
# What sbatch says where asking again may help.
_BUSY = ("timed out", "Unable to contact", "temporarily", "try again", "Connection refused", "Zero Bytes", "Communication connection")
# States of a job that waits, for the first time or after a requeue; and of one whose processes may still write.
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
LIVE = WAITING | {"RUNNING", "SUSPENDED", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING"}
# First words of the lines of `scontrol show job` that tell state and times.
_STATE_LINES = frozenset({"JobState", "Partition", "Requeue", "RunTime", "StartTime", "PreemptEligibleTime", "PreemptTime"})


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


def job_fields(job_id: str, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, str] | None:
    """Return `scontrol show job` as a mapping, or None when Slurm does not know the job any more.

    Raises:
        SchedulerError: scontrol is missing or the controller does not answer.
    """
    done = run_command(["scontrol", "show", "job", job_id], timeout_s=timeout_s)
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

    Of RunTime and TimeLimit, which know of suspensions and of no time zone; else of StartTime. EndTime is the limit only while a job
    runs undisturbed.
    """
    limit_s, ran_s = parse_time_limit(fields.get("TimeLimit", "")), parse_time_limit(fields.get("RunTime", ""))
    if ran_s is not None:
        return None if limit_s is None else limit_s - ran_s
    try:
        started = datetime.fromisoformat(fields.get("StartTime", ""))
    except ValueError:
        return None
    return None if limit_s is None else limit_s - (now - started).total_seconds()


def end_s(fields: Mapping[str, str], now: datetime) -> float | None:
    """Return seconds from `now` to the EndTime that Slurm shows: of a job in preemption, the end of its grace time."""
    try:
        return (datetime.fromisoformat(fields.get("EndTime", "")) - now).total_seconds()
    except ValueError:
        return None


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
    return fields is not None and fields.get("JobState", "") in LIVE


def patiently(action: Callable[[], T], patience_s: float) -> T:
    """Return what `action` returns, trying again for `patience_s` while it raises SchedulerError; then that is raised.

    Where Slurm forbids it, asking again is no use.
    """
    deadline = time.monotonic() + patience_s
    delay_s = 0.5
    while True:
        try:
            return action()
        except RequeueForbiddenError:
            raise
        except SchedulerError:
            # A program that is not there will not come; a busy controller will.
            if time.monotonic() + delay_s > deadline or shutil.which("scontrol") is None:
                raise
        time.sleep(delay_s)
        delay_s = min(delay_s * 2, 10.0)


def requeue(job_id: str, patience_s: float = 0.0, start: int | None = None) -> None:
    """Ask Slurm to start this job anew: same id, same script. The caller is the job's own rank 0.

    Slurm answers and at once sends SIGTERM to every process of the job, scontrol included, so an scontrol that died
    of a signal, or whose answer did not come, tells nothing: then the job's own state does. A busy controller is asked again
    for `patience_s`; one that forbids it is not. `start`: which start of the job this is, if known.

    Raises:
        RequeueForbiddenError: Slurm refused (its message is passed on).
        SchedulerError: it did not answer; whether the job will start anew is not known.
    """

    def ask() -> None:
        try:
            done = run_command(["scontrol", "requeue", job_id])
        except SchedulerError as error:
            problem, unknown = str(error), True
        else:
            if done.returncode == 0:
                return
            problem, unknown = done.stderr or f"ended with {done.returncode}", done.returncode < 0
        failure = f"scontrol requeue {job_id}: {problem}"
        if any(word in problem for word in _FORBIDDEN):
            raise RequeueForbiddenError(failure)
        if not _was_requeued(job_id, start, unknown=unknown):
            raise SchedulerError(failure)

    patiently(ask, patience_s)


def _was_requeued(job_id: str, start: int | None, *, unknown: bool) -> bool:
    """Return whether a request arrived all the same.

    Behind an answer that never came a job that is being ended may be one; how often it was started tells, since one that is preempted
    without a grace time is being ended as well.
    """
    fields = job_fields(job_id) or {}
    restarts, state = fields.get("Restarts", ""), fields.get("JobState")
    if start is not None and restarts.isdigit():
        return int(restarts) > start
    return state in WAITING or (unknown and state == "COMPLETING")


def submit_successor(job_id: str, patience_s: float = 0.0) -> str:
    """Submit this job's batch script once more, to begin when the job is over; returns the new job's id. The caller is rank 0 of the job.

    Asked twice, or where the first answer was lost, there is still one: it is known by its dependency on this job. The script is
    what Slurm has of the job, with the partition, account, quality of service, time limit and name that it runs with, and the nodes and
    CPUs where the script does not say; of an array's task, an array of that one. Other options of sbatch's command line are lost.

    Raises:
        RequeueForbiddenError: Slurm refused (its message is passed on).
        SchedulerError: it did not answer.
    """
    environ = submission_environ(os.environ)
    if environ.get("GLOO_SOCKET_IFNAME") == "lo":  # set for ranks of one node; the successor may get more
        del environ["GLOO_SOCKET_IFNAME"]
    _, _, task = job_id.partition("_")

    def answer(*argv: str, stdin: str = "") -> str:
        done = run_command(argv, environ=environ, stdin=stdin)
        if done.returncode != 0:
            problem = f"{argv[0]} for a successor of job {job_id}: {done.stderr or f'ended with {done.returncode}'}"
            is_final = argv[0] == "sbatch" and done.stderr and not any(word in done.stderr for word in _BUSY)
            raise RequeueForbiddenError(problem) if is_final else SchedulerError(problem)
        return done.stdout

    def ask() -> str:
        # The name comes last: it may hold anything. Of a heterogeneous job the first line is the leader's, and so are options of sbatch.
        now, _, _ = answer("squeue", "--noheader", f"--jobs={job_id}", "--format=%P|%a|%q|%l|%Z|%j").lstrip().partition("\n")
        values = dict(zip(("partition", "account", "qos", "time", "chdir", "job-name"), now.split("|", maxsplit=5), strict=False))
        for line in answer("squeue", "--noheader", "--me", "--format=%F|%i|%E|%j").splitlines():
            parent, successor, dependency, name = line.split("|", maxsplit=3)
            if name == values.get("job-name") and re.search(rf"\bafterany:{job_id}\b(?!_)", dependency):
                return f"{parent}_{task}" if task else successor
        script = answer("scontrol", "write", "batch_script", job_id, "-")
        if "SLURM_HET_SIZE" not in os.environ:  # its groups have sizes of their own
            values |= {option: os.environ.get(name, "") for option, (short, name) in _SIZES.items() if not _says(script, option, short)}
        options = [f"--{option}={value}" for option, value in values.items() if value not in ("", "(null)", "N/A", "UNLIMITED")]
        where = [f"--array={task}"] if task else []
        told = answer("sbatch", "--parsable", f"--dependency=afterany:{job_id}", *options, *where, stdin=script)
        submitted = told.strip().partition(";")[0]
        return f"{submitted}_{task}" if task else submitted

    return patiently(ask, patience_s)


def _says(script: str, option: str, short: str) -> bool:
    """Return whether a batch script gives an option of sbatch by itself."""
    return re.search(rf"^#SBATCH\b.*\s(--{option}\b|{short}\b)", script, re.MULTILINE) is not None


def former_state(job_id: str) -> str:
    """Return how accounting calls the end of the former start of a job that was started again; "" where it does not tell."""
    argv = ["sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=State"]
    try:
        lines = run_command(argv, timeout_s=QUICK_TIMEOUT_S).stdout.split("\n")
    except SchedulerError:
        return ""
    states = [line.strip() for line in lines if line.strip()]
    return states[-2] if len(states) > 1 else ""


def grace_s(partition: str) -> int | None:
    """Return the grace time of preemptions in a partition; None where Slurm does not tell."""
    try:
        told = run_command(["scontrol", "show", "partition", partition], timeout_s=QUICK_TIMEOUT_S).stdout
    except SchedulerError:
        return None
    match = re.search(r"\bGraceTime=(\d+)", told)
    return None if match is None else int(match[1])


def unreachable_nodes(nodelist: str, timeout_s: float = 3.0) -> list[str]:
    """Return those of a job's nodes on which Slurm's daemon does not listen any more; nodes of which nothing is known are left out.

    Slurm itself notices a node that is gone after minutes (SlurmdTimeout). Where none of the nodes can be reached, nodes are not to be
    reached from here at all, and nothing is known.
    """
    if not nodelist:
        return []
    try:
        done = run_command(["scontrol", "--oneliner", "show", "node", nodelist])
        port = re.search(r"SlurmdPort\s*=\s*(\d+)", run_command(["scontrol", "show", "config"]).stdout)
    except SchedulerError:
        return []
    lost, reached = [], False
    for line in done.stdout.splitlines():
        words = dict(word.split("=", maxsplit=1) for word in line.split() if "=" in word)
        number = words.get("Port") or (port[1] if port else "")
        if number.isdigit() and "NodeAddr" in words:
            try:
                socket.create_connection((words["NodeAddr"], int(number)), timeout_s).close()
                reached = True
            except socket.gaierror:
                continue
            except OSError:
                lost.append(words.get("NodeName", words["NodeAddr"]))
    return lost if reached else []


def was_out_of_memory(job_id: str) -> bool:
    """Return whether accounting says of a step of this job that the kernel ended it for its memory."""
    try:
        done = run_command(["sacct", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=State"], timeout_s=QUICK_TIMEOUT_S)
    except SchedulerError:
        return False
    return "OUT_OF_MEMORY" in done.stdout


def check_script(script: str) -> None:
    """Let sbatch check a batch script without submitting it.

    Raises:
        SubmissionError: sbatch would refuse it; its own message is passed on.
        SchedulerError: sbatch is missing or gave no answer.
    """
    done = run_command(["sbatch", "--test-only"], environ=submission_environ(os.environ), stdin=script)
    if done.returncode != 0:
        raise SubmissionError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
