"""How an attempt ends early: the checkpoint is there, now go on elsewhere or say why not, and leave.

Order, on all ranks: rank 0 decides and all hear it -> all leave the process group -> the others exit with 0 -> rank 0
writes the ledger, asks Slurm, and exits. The request comes last because Slurm answers it with SIGTERM for every process.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

from hpcckpt import policy, scheduler
from hpcckpt.config import RequeueConfig
from hpcckpt.distributed import Ranks
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import SchedulerError
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.ledger import Ledger

# submitit's local controller starts all tasks again when one leaves with this code.
LOCAL_REQUEUE_EXIT_CODE = 144
# How long a controller that does not answer may delay the question why the job is stopped.
ASK_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Stop:
    """What all ranks know about the end of this attempt."""

    cause: policy.Cause
    decision: policy.StopDecision


def decide(
    ranks: Ranks,
    task: TaskEnvironment,
    config: RequeueConfig,
    ledger: Ledger,
    store: CheckpointStore,
    signals: tuple[str, ...],
    step: int,
) -> Stop:
    """Return why this attempt stops and what comes next, the same on every rank. Every rank must call it.

    Args:
        ranks: the process group.
        task: this rank's place.
        config: `requeue.*`.
        ledger: counts requeues and progress.
        store: knows whether a newer attempt has taken over.
        signals: names of the signals this rank received; those of all ranks count.
        step: optimizer steps behind this stop.

    Raises:
        FencedError: on every rank; a newer attempt has taken over, and this one must not requeue it.
    """
    received = {name for names in ranks.gather(signals) for name in names}

    def on_main() -> Stop:
        store.refuse_if_fenced()
        job = None
        if task.launcher == "slurm" and task.job_id is not None:
            try:
                job = scheduler.patiently(lambda: scheduler.job_fields(str(task.job_id)), ASK_PATIENCE_S)
            except SchedulerError as error:
                # The cause is for the record; the requeue below meets the controller again and then counts.
                ledger.append("scheduler_error", problem=str(error))
        left_s = scheduler.remaining_s(job, datetime.now()) if job else None  # noqa: DTZ005 - Slurm prints local time
        cause = policy.stop_cause(received, job, left_s, config.lead_time_s)
        events = ledger.events()
        decision = policy.decide_stop(
            cause,
            enabled=config.enabled,
            requeues=policy.count_requeues(events),
            max_requeues=config.max_requeues,
            stalled=policy.count_stalled(events),
            max_stalled=config.max_stalled,
        )
        ledger.append(
            "stop", cause=cause, signals=sorted(received), step=step, remaining_s=left_s, requeue=decision.requeue, reason=decision.reason
        )
        return Stop(cause, decision)

    return ranks.from_main(on_main)


def leave(
    stop: Stop, task: TaskEnvironment, config: RequeueConfig, ledger: Ledger, store: CheckpointStore, step: int, how_to_go_on: str
) -> NoReturn:
    """End this process, rank 0 after asking for the next attempt. Every rank must call it, outside the process group.

    Raises:
        FencedError: on rank 0, where a newer attempt has started; nothing was asked for or noted.
        SystemExit: else always; 0 when requeued (144 under submitit's local launcher, which restarts on it).
    """
    if task.rank == 0:
        store.refuse_if_fenced()
    if task.launcher == "local" and stop.decision.requeue:
        if task.rank == 0:
            ledger.append("requeue", step=step, job_id=task.job_id)
            print(f"hpcckpt: saved at step {step}; requeueing ({stop.cause})", flush=True)
        raise SystemExit(LOCAL_REQUEUE_EXIT_CODE)
    if task.rank != 0:
        # Rank 0's code is the job's: a bad one from here would let srun kill rank 0 before it has asked.
        raise SystemExit(0)
    if not stop.decision.requeue:
        _end(ledger, step, stop.decision.reason, stop.decision.exit_code, how_to_go_on)
    if task.launcher != "slurm" or task.job_id is None:
        _end(ledger, step, "there is no Slurm job to requeue", policy.EXIT_NOT_REQUEUED, how_to_go_on)
    # Before the request: behind it SIGTERM is on its way.
    ledger.append("requeue", step=step, job_id=task.job_id)
    print(f"hpcckpt: saved at step {step}; requeueing job {task.job_id} ({stop.cause})", flush=True)
    try:
        scheduler.requeue(task.job_id, patience_s=config.lead_time_s)
    except SchedulerError as error:
        _end(ledger, step, f"Slurm did not requeue it ({error})", policy.EXIT_NOT_REQUEUED, how_to_go_on)
    raise SystemExit(0)


def _end(ledger: Ledger, step: int, reason: str, exit_code: int, how_to_go_on: str) -> NoReturn:
    ledger.append("ended", step=step, reason=reason, exit_code=exit_code)
    print(f"hpcckpt: saved at step {step} and not requeued: {reason}. {how_to_go_on}", flush=True)
    raise SystemExit(exit_code)
