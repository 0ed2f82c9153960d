"""One job on this machine through submitit's local executor: real processes, real signals, real restarts."""

import contextlib
import os
from pathlib import Path
from typing import NoReturn

from hpcckpt.config import RunConfig
from hpcckpt.errors import SchedulerError
from hpcckpt.layout import RunLayout
from hpcckpt.store.ledger import Ledger
from hpcckpt.task import RankTask

# The last event of an attempt that another attempt of the same run follows.
_GOES_ON = "requeue"


def start(config: RunConfig, layout: RunLayout) -> str:
    """Start a local job in a session of its own, so that neither Ctrl-C nor a closed terminal ends it.

    submitit's controller starts tasks anew at most five times, so a parent process starts further controllers as long as
    the run wants to go on.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        _supervise(config, layout, writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        outcome, _, text = pipe.read().partition(":")
    if outcome != "started":
        raise SchedulerError(f"the local job could not be started: {text or 'its first process ended'}")
    return text


def _supervise(config: RunConfig, layout: RunLayout, writer: int) -> NoReturn:
    """Be the parent of local controllers; never returns. Runs in a forked process."""
    code = 1
    try:
        os.setsid()
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = config.requeue.signal
        # Threads of the login process's Python would not have survived the fork; it has none.
        job_id = _one_job(config, layout)
        os.write(writer, f"started:{job_id}".encode())
        os.close(writer)
        with open(os.devnull, "r+b") as null:
            for descriptor in (0, 1, 2):
                os.dup2(null.fileno(), descriptor)
        while True:
            os.waitpid(int(job_id), 0)
            if Ledger(layout.events).last().get("event") != _GOES_ON:
                break
            job_id = _one_job(config, layout)
            Ledger(layout.events).append("resubmitted", job_id=job_id)
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


def is_running(job_id: str) -> bool:
    """Return whether a local job's controller runs; a zombie does not."""
    try:
        status = Path(f"/proc/{int(job_id)}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
