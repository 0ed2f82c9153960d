"""One job on this machine through submitit's local executor: real processes, real signals, real restarts."""

import contextlib
import os
from pathlib import Path
from typing import NoReturn

from hpcckpt.config import RunConfig
from hpcckpt.errors import SchedulerError
from hpcckpt.layout import RunLayout
from hpcckpt.policy import outcome
from hpcckpt.signals import ignore_termination
from hpcckpt.store.ledger import Ledger
from hpcckpt.task import RankTask


def start(config: RunConfig, layout: RunLayout) -> tuple[str, str]:
    """Start a local job in a session of its own, so that neither Ctrl-C nor a closed terminal ends it.

    submitit's controller starts tasks anew at most five times, so a supervisor starts further controllers as long as the
    run wants to go on. Returns the first job id (its controller's pid) and the supervisor, for `is_running`.

    Raises:
        SchedulerError: the job could not be started.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _supervise(config, layout, writer)
    supervisor = _process(pid)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        word, _, text = pipe.read().partition(":")
    if word != "started":
        raise SchedulerError(f"the local job could not be started: {text or 'its first process ended'}")
    return text, supervisor


def is_running(supervisor: str) -> bool:
    """Return whether a supervisor lives; a zombie does not, and a later process of the same pid is another one."""
    return _process(int(supervisor.partition("@")[0])) == supervisor


def how_to_end(supervisor: str) -> str:
    """Return the command that ends a local run: SIGTERM for the supervisor's group, which is all of the run's processes."""
    return f"kill -- -{supervisor.partition('@')[0]}"


def job_ids(layout: RunLayout) -> list[str]:
    """Return the job ids of the last submission, in order; more than one after many restarts."""
    ids: list[str] = []
    for event in Ledger(layout.events).events():
        if event.get("event") == "submitted":
            ids = [str(event.get("job_id"))]
        elif event.get("event") == "resubmitted":
            ids.append(str(event.get("job_id")))
    return ids


def _process(pid: int) -> str:
    """Return "pid@start time" of a living process, "" for any other."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in ("Z", "X") else f"{pid}@{fields[19]}"


def _supervise(config: RunConfig, layout: RunLayout, writer: int) -> NoReturn:
    """Be the parent of local controllers; never returns. Runs in a forked process, which has no threads to lose."""
    code = 1
    try:
        os.setsid()
        # `kill -- -GROUP` is for the ranks, which save and end; this process sees them through.
        ignore_termination()
        with open(os.devnull, "r+b") as null:
            # Else whoever reads our caller's output through a pipe would wait for the end of the run.
            for descriptor in (0, 1, 2):
                os.dup2(null.fileno(), descriptor)
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = config.requeue.signal
        ledger = Ledger(layout.events)
        known = len(ledger.events())
        job_id = _one_job(config, layout)
        os.write(writer, f"started:{job_id}".encode())
        os.close(writer)
        while True:
            os.waitpid(int(job_id), 0)
            if outcome(ledger.events(known))[0] != "requeue":
                break
            known = len(ledger.events())
            job_id = _one_job(config, layout)
            ledger.append("resubmitted", job_id=job_id)
        code = 0
    except BaseException as error:  # noqa: BLE001 - the only way out of a forked process is _exit
        with contextlib.suppress(OSError):
            os.write(writer, f"failed:{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)


def _one_job(config: RunConfig, layout: RunLayout) -> str:
    import submitit

    executor = submitit.LocalExecutor(layout.logs)
    executor.update_parameters(
        tasks_per_node=config.slurm.tasks_per_node,
        gpus_per_node=config.slurm.gpus_per_node,
        timeout_min=config.slurm.time_min,
        signal_delay_s=config.requeue.lead_time_s,
        setup=list(config.slurm.setup),
        stderr_to_stdout=True,
    )
    return str(executor.submit(RankTask(str(layout.root))).job_id)
