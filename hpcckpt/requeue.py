"""How a run goes on in another attempt: the checkpoint is there, now ask for the next start once, or say why not.

Two may come to that: rank 0's training, where all ranks have stopped together, and rank 0's watch, where they have not come to
the stop before the job's time is over. Whoever comes second gets the first one's answer. Behind a job whose ranks died, its batch
script does it (`hpcckpt.after`).

The ladder: `scontrol requeue`, which keeps the job's id; where Slurm forbids it, a successor of the same batch script that
begins when this job is over; else the command that goes on, and an exit code that is not 0. Nothing is asked for a second time where
an answer is unknown: the job's own state is looked at.
"""

import os
import shlex
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from hpcckpt import policy, scheduler
from hpcckpt.config import RequeueConfig
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import RequeueForbiddenError, SchedulerError
from hpcckpt.layout import RunLayout
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.ledger import Ledger

# submitit's local controller starts all tasks again when one leaves with this code.
LOCAL_REQUEUE_EXIT_CODE = 144
# How long a controller that does not answer may delay the question why the job is stopped.
ASK_PATIENCE_S = 15.0
# Slurm shows times by the second; what began longer ago began in another one.
SAME_SECOND_S = 3.0


@dataclass(frozen=True)
class Outlook:
    """What Slurm says of the job. Times in seconds from when it was asked; None where it does not tell."""

    job: dict[str, str] | None = None
    remaining_s: float | None = None
    end_s: float | None = None
    asked: float = 0.0

    def aged(self) -> "Outlook":
        """Return it as it would be now, if nothing else has changed."""
        age_s, now = time.monotonic() - self.asked, time.monotonic()
        older = [None if left_s is None else left_s - age_s for left_s in (self.remaining_s, self.end_s)]
        return Outlook(self.job, older[0], older[1], now)


@dataclass(frozen=True)
class Stop:
    """What all ranks know about the end of this attempt."""

    cause: policy.Cause
    decision: policy.StopDecision


class Requeue:
    """Rank 0's way to the next attempt. Its methods may be called from any thread.

    Args:
        layout: of the run.
        ledger: counts requeues and progress, and is told.
        task: this rank's place: job and start.
        config: `requeue.*`.
        store: knows whether a newer attempt has taken over.
        adopt: called with the job id of a successor before that can start; None: nothing to do.
    """

    def __init__(
        self,
        layout: RunLayout,
        ledger: Ledger,
        task: TaskEnvironment,
        config: RequeueConfig,
        store: CheckpointStore,
        adopt: Callable[[str], object] | None = None,
    ) -> None:
        self._layout, self._task, self._config = layout, task, config
        self._ledger, self._store, self._adopt = ledger, store, adopt
        self._lock = threading.Lock()
        self._exit_code: int | None = None
        self._seen = Outlook()
        self._signalled_s = 0.0

    def look(self, patience_s: float = ASK_PATIENCE_S) -> Outlook:
        """Ask Slurm about the job; the last answer where it gives none, noted in the ledger."""
        job_id = self._task.job_id
        if self._task.launcher == "local" or job_id is None:
            return self._seen
        try:
            job = scheduler.patiently(lambda: scheduler.job_fields(job_id, timeout_s=max(patience_s, 1.0)), patience_s)
        except SchedulerError as error:
            self._ledger.append("scheduler_error", problem=str(error))
            return self._seen.aged()
        now = datetime.now()  # noqa: DTZ005 - Slurm prints local time
        times = (scheduler.remaining_s(job, now), scheduler.end_s(job, now)) if job else (None, None)
        self._seen = Outlook(job, *times, time.monotonic())
        return self._seen

    def killed_in_s(self, signals: Collection[str], signalled_s: float) -> float | None:
        """Return in how many seconds Slurm will end the processes, at the latest, given the signals so far; None where unknown."""
        if self._task.launcher == "local" or self._task.job_id is None:
            return None
        self._signalled_s = signalled_s
        # The second time there is something to go by already.
        outlook = self.look(ASK_PATIENCE_S if self._seen.job is None else 1.0)
        cause = self._cause(signals, outlook)
        if outlook.job is None and set(signals) & {self._config.signal}:
            cause = "time_limit"  # nobody answers: be prepared
        return policy.killed_in_s(cause, outlook.remaining_s, outlook.end_s, signalled_s, self._config.lead_time_s)

    def decide(self, signals: Collection[str], step: int | None, waited_s: float | None = None) -> Stop:
        """Return why this attempt stops and what comes next; noted in the ledger.

        Args:
            signals: names of the signals that any rank received.
            step: optimizer steps behind this stop; None where the ranks did not come to one.
            waited_s: from the first signal to the stop.

        Raises:
            FencedError: a newer attempt has taken over, and this one must not requeue it.
        """
        self._store.refuse_if_fenced()
        self._signalled_s = waited_s or self._signalled_s
        outlook = self.look()
        cause = self._cause(signals, outlook)
        if cause == "terminated" and outlook.job is None:
            # Who preempts many jobs at once is slow to answer, and without an answer this one would be over.
            outlook = self.look(self._config.lead_time_s)
            cause = self._cause(signals, outlook)
        decision, left_s = self._decision(cause), outlook.remaining_s
        # How much earlier than asked Slurm has sent the warning.
        early_s = None
        if cause == "time_limit" and left_s is not None and waited_s is not None:
            early_s = round(left_s + waited_s - self._config.lead_time_s, 1)
        self._ledger.append(
            "stop",
            cause=cause,
            signals=sorted(signals),
            step=step,
            remaining_s=left_s,
            early_s=early_s,
            waited_s=waited_s,
            requeue=decision.requeue,
            reason=decision.reason,
        )
        return Stop(cause, decision)

    def decide_failed(
        self, fate: policy.Fate, stopping: policy.Cause | None = None
    ) -> tuple[policy.Cause | policy.Fate, policy.StopDecision]:
        """Return what became of processes that ended without having asked for anything, and whether the run goes on.

        Args:
            fate: what is known of it.
            stopping: why all ranks had agreed to be requeued before that, if they had.
        """
        seen = self._cause((), self.look())
        # They may have ended because of what Slurm does to the job.
        cause = seen if seen in ("preemption", "requeued", "cancelled") else stopping or fate
        failures = policy.count_failures(self._ledger.events())
        return cause, policy.decide_failed(cause, failures=failures, on_failure=self._config.on_failure) or self._decision(cause)

    def go_on(self, cause: str, decision: policy.StopDecision, what: str) -> int:
        """Ask for the next attempt, or say why there is none; returns this process's exit code. Asks once, however often it is called.

        Args:
            cause: for the ledger.
            decision: of `decide` or `decide_failed`.
            what: what has happened so far, for the log: "saved at step 5".

        Raises:
            FencedError: a newer attempt has started; nothing was asked for or noted.
        """
        with self._lock:
            if self._exit_code is None:
                self._store.refuse_if_fenced()
                self._exit_code = self._ask(cause, decision, what)
            return self._exit_code

    def _cause(self, signals: Collection[str], outlook: Outlook) -> policy.Cause:
        no_grace = True
        if outlook.job and policy.is_preempted_at_its_end(outlook.job):
            # The one case in which a job's own times do not tell a preemption from a user who cancels within it.
            no_grace = self._signalled_s > SAME_SECOND_S or scheduler.grace_s(outlook.job.get("Partition", "")) == 0
        return policy.stop_cause(signals, outlook.job, outlook.remaining_s, self._config.lead_time_s, self._task.start, no_grace=no_grace)

    def settle(self) -> None:
        """Have nothing asked for any more: the run is through. Waits for who is asking."""
        with self._lock:
            self._exit_code = self._exit_code or 0

    def _decision(self, cause: policy.Cause | policy.Fate) -> policy.StopDecision:
        events = self._ledger.events()
        config = self._config
        return policy.decide_stop(
            cause,
            enabled=config.enabled,
            requeues=policy.count_requeues(events),
            max_requeues=config.max_requeues,
            stalled=policy.count_stalled(events),
            max_stalled=config.max_stalled,
        )

    def _ask(self, cause: str, decision: policy.StopDecision, what: str) -> int:
        def end(reason: str, exit_code: int) -> int:
            self._ledger.append("ended", reason=reason, exit_code=exit_code)
            print(f"hpcckpt: {what} and not requeued: {reason}. To go on: {self._how_to_go_on()}", flush=True)
            return exit_code

        def note(**fields: object) -> None:
            # Before the request: behind it SIGTERM is on its way.
            self._ledger.append("requeue", cause=cause, job_id=job_id, **fields)

        job_id = self._task.job_id
        if not decision.requeue:
            return end(decision.reason, decision.exit_code)
        if self._task.launcher == "local":
            note()
            print(f"hpcckpt: {what}; requeueing ({cause})", flush=True)
            return LOCAL_REQUEUE_EXIT_CODE
        if job_id is None:
            return end("there is no Slurm job to requeue", policy.EXIT_NOT_REQUEUED)
        # Since the decision it may have been cancelled, and a requeue would bring it back from the dead; or requeued.
        now = self._cause((), self.look())
        if now == "cancelled":
            return end("the job was cancelled", policy.EXIT_CANCELLED)
        if now == "requeued":
            note(by="Slurm")
            print(f"hpcckpt: {what}; Slurm has requeued job {job_id} already ({cause})", flush=True)
            return 0
        note()
        print(f"hpcckpt: {what}; requeueing job {job_id} ({cause})", flush=True)
        asked = time.monotonic()
        try:
            scheduler.requeue(job_id, self._config.lead_time_s, self._task.start)
        except RequeueForbiddenError as refusal:
            patience_s = max(0.0, asked + self._config.lead_time_s - time.monotonic())
            return self._succeed(job_id, patience_s, refusal, end)
        except SchedulerError as error:
            return end(f"Slurm did not requeue it ({error})", policy.EXIT_NOT_REQUEUED)
        return 0

    def _succeed(self, job_id: str, patience_s: float, refusal: SchedulerError, end: Callable[[str, int], int]) -> int:
        try:
            successor = scheduler.submit_successor(job_id, patience_s)
        except SchedulerError as error:
            return end(f"Slurm did not requeue it ({refusal}), nor take a successor ({error})", policy.EXIT_NOT_REQUEUED)
        self._ledger.append("successor", job_id=successor, of=job_id, refusal=str(refusal))
        try:
            if self._adopt is not None:
                self._adopt(successor)
        except OSError as error:
            return end(f"its successor, job {successor}, has nothing to run ({error.strerror or error}): end it", policy.EXIT_NOT_REQUEUED)
        print(f"hpcckpt: requeueing is not allowed ({refusal}); job {successor} goes on when this one is over", flush=True)
        return 0

    def _how_to_go_on(self) -> str:
        if policy.current_job(self._ledger.events()) is None:  # a script of one's own
            return "start the same command again"
        # Relative paths are those of the directory it was submitted from.
        return f"cd {shlex.quote(os.getcwd())} && python -m hpcckpt.submit conf={shlex.quote(str(self._layout.config))}"
