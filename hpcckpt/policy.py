"""Decisions as values: when to save, what to delete, whether to requeue. Nothing here acts.

No clock, no files, no torch: every input is an argument, so every case is a row in a test's table.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# sysexits(3) EX_TEMPFAIL: saved, but somebody has to start the job again.
EXIT_NOT_REQUEUED = 75
# A run that gave up by itself; other than 1, which is a traceback.
EXIT_GAVE_UP = 76
EXIT_FAILED = 1
# What the shell reports for a process that SIGTERM ended.
EXIT_CANCELLED = 143

# What the stop file says, among the names of signals.
STOP_FILE = "stop file"
REQUEUE_FILE = "stop file: requeue"

# Events that end an attempt in the ledger: what it has decided, which stands whatever its ranks fail of on their way out, and the others.
_DECIDED = frozenset({"requeue", "ended", "finished", "left"})
_LAST_WORDS = _DECIDED | {"failed", "lost"}

# How much earlier than asked Slurm may send the warning before a time limit, and how much later it may be acted on: a long step.
SLURM_EARLY_S = 60
SLACK_S = SLURM_EARLY_S + 30

# How long before the end of its job's time rank 0 asks for the next attempt, whether or not all ranks have come to the stop by then.
RESERVE_S = 5.0

# How long Slurm leaves a job between SIGTERM and SIGKILL, at least: KillWait, 30 s by default.
KILL_WAIT_S = 10.0

# Why a running attempt is asked to stop.
# requeued: Slurm has done so already, as it does where a preemption has no grace time, or an operator has.
Cause = Literal["time_limit", "preemption", "requeued", "cancelled", "by_hand", "stop_file", "terminated"]
# Why an attempt came to its end, and be it without a word.
Fate = Literal["time_limit", "preemption", "cancelled", "node_failure", "out_of_memory", "failure", "killed"]

# How `sacct` calls a job's end, and what it was. REQUEUED: by scontrol, so by the run itself or an operator.
_FATES: Mapping[str, Fate] = {
    "NODE_FAIL": "node_failure", "BOOT_FAIL": "node_failure", "OUT_OF_MEMORY": "out_of_memory", "PREEMPTED": "preemption",
    "TIMEOUT": "time_limit", "DEADLINE": "time_limit", "CANCELLED": "cancelled", "FAILED": "failure",
}  # fmt: skip


@dataclass(frozen=True)
class Position:
    """A place in training: behind optimizer step `step`, within `epoch` or at its end."""

    epoch: int
    step: int
    epoch_finished: bool

    def __str__(self) -> str:
        """Return it in words."""
        return f"{'the end of epoch' if self.epoch_finished else 'epoch'} {self.epoch}, step {self.step}"


@dataclass(frozen=True)
class CheckpointInfo:
    """What retention and lookup need to know of one checkpoint."""

    name: str
    epoch: int
    step: int
    epoch_finished: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    # Said by whoever saved it, where no metric is monitored.
    is_best: bool = False

    @property
    def order(self) -> tuple[int, int, bool]:
        """Position in training; the end of an epoch comes behind a stop at its last step."""
        return (self.step, self.epoch, self.epoch_finished)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay; the rest may go once a newer one is durable. `keep_last` None: all of them."""

    keep_last: int | None = 3
    keep_best: int = 1
    keep_every_epochs: int | None = None
    monitor: str | None = None
    mode: str = "min"

    def best(self, infos: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
        """Return those that have the monitored metric, best first; NaN is never best, ties go to the earlier one.

        Without a monitored metric: those that were saved as the best, the last one first.
        """
        if self.monitor is None:
            return sorted((info for info in infos if info.is_best), key=lambda info: info.order, reverse=True)
        key = self.monitor
        rated = [info for info in infos if not math.isnan(info.metrics.get(key, math.nan))]
        sign = 1 if self.mode == "min" else -1
        return sorted(rated, key=lambda info: (sign * info.metrics[key], info.order))

    def surplus(self, infos: Sequence[CheckpointInfo], protected: Collection[str]) -> list[CheckpointInfo]:
        """Return what may be deleted, oldest first; never a name in `protected`."""
        if self.keep_last is None:
            return []
        ordered = sorted(infos, key=lambda info: info.order)
        keep = {info.name for info in ordered[-self.keep_last :]} | set(protected)
        keep |= {info.name for info in self.best(ordered)[: self.keep_best]}
        if self.keep_every_epochs is not None:
            keep |= {info.name for info in ordered if info.epoch_finished and (info.epoch + 1) % self.keep_every_epochs == 0}
        return [info for info in ordered if info.name not in keep]


def is_epoch_due(epoch: int, every_epochs: int, *, is_last: bool) -> bool:
    """Return whether the end of `epoch` (0-based) is a checkpoint; the last epoch always is."""
    return is_last or (epoch + 1) % every_epochs == 0


def is_step_due(step: int, every_steps: int | None) -> bool:
    """Return whether optimizer step `step` (1-based, since the beginning of the run) is a checkpoint."""
    return every_steps is not None and step % every_steps == 0


def stop_cause(
    signals: Collection[str],
    job: Mapping[str, str] | None,
    remaining_s: float | None,
    lead_time_s: int,
    start: int | None = None,
    *,
    no_grace: bool = True,
) -> Cause:
    """Return why a rank was signalled.

    Slurm shows a job in the grace time of a preemption as RUNNING with a PreemptTime. One that was cancelled, has run out of time, or is
    preempted without a grace time is COMPLETING already while its processes still have their KillWait; what is left of its time, and
    how often it was started, tell those apart (measured, see docs/decisions/0003-causes.md).

    Args:
        signals: names without SIG, of what any rank has received; `STOP_FILE` and `REQUEUE_FILE` for what the stop file says.
        job: `scontrol show job`, or None where there is no Slurm or it did not answer.
        remaining_s: seconds to the job's time limit, or None where unknown.
        lead_time_s: `requeue.lead_time_s`; Slurm looks every 30 s and sends the signal up to 60 s earlier.
        start: which start of the job this is; None: not known.
        no_grace: whether there is no grace time in a preemption, or none any more. Else a job that is ended in the second in which its
            preemption began was cancelled in it.
    """
    fields = job or {}
    state = fields.get("JobState", "")
    restarts = fields.get("Restarts", "")
    if start is not None and restarts.isdigit() and int(restarts) > start:
        return "requeued"
    over = fields["Reason"] == "TimeLimit" if state == "COMPLETING" and "Reason" in fields else remaining_s is not None and remaining_s <= 0
    preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", "")
    ends_by_preemption = preempted and no_grace and is_preempted_at_its_end(fields)
    # First: a job that is cancelled within the grace time of its preemption shows both.
    if state.startswith("CANCELLED") or (state == "COMPLETING" and not over and not ends_by_preemption):
        return "cancelled"
    if STOP_FILE in signals:
        return "stop_file"
    if preempted:
        return "preemption"
    if remaining_s is not None and remaining_s <= lead_time_s + SLACK_S:
        return "time_limit"
    return "by_hand" if set(signals) - {"TERM"} else "terminated"


def is_preempted_at_its_end(job: Mapping[str, str]) -> bool:
    """Return whether Slurm shows one time for a job's preemption and its end; by the second, which is what it shows."""
    return job.get("JobState") == "COMPLETING" and "EndTime" in job and job.get("PreemptTime") == job["EndTime"]


def killed_in_s(cause: Cause, remaining_s: float | None, end_s: float | None, signalled_s: float, lead_time_s: int) -> float | None:
    """Return in how many seconds, at the latest, Slurm ends the processes of a job that has been signalled; None where unknown.

    Args:
        cause: why it was.
        remaining_s: to the time limit.
        end_s: to the EndTime that Slurm shows, which for a job in preemption is the end of its grace time.
        signalled_s: since the signal.
        lead_time_s: of the warning before a time limit: what there is at least where Slurm does not answer.
    """
    if cause == "preemption" and end_s is not None:
        return end_s if end_s > 0 else max(0.0, end_s + KILL_WAIT_S)
    if cause in ("time_limit", "by_hand") and remaining_s is not None:
        return remaining_s
    return lead_time_s - signalled_s if cause == "time_limit" else None


@dataclass(frozen=True)
class StopDecision:
    """What happens after the checkpoint at a stop."""

    requeue: bool
    reason: str
    exit_code: int


def decide_stop(cause: Cause | Fate, *, enabled: bool, requeues: int, max_requeues: int, stalled: int, max_stalled: int) -> StopDecision:
    """Return whether the run goes on in another attempt.

    Args:
        cause: why it was stopped, or what became of it.
        enabled: `requeue.enabled`.
        requeues: how often this run was requeued before.
        max_requeues: `requeue.max_requeues`.
        stalled: attempts in a row, this one included, that got no step further.
        max_stalled: `requeue.max_stalled`.
    """
    if cause == "cancelled":
        return StopDecision(False, "the job was cancelled", EXIT_CANCELLED)
    if cause == "terminated":
        return StopDecision(False, "SIGTERM without a time limit or preemption in sight", EXIT_CANCELLED)
    if cause == "requeued":
        return StopDecision(True, cause, 0)
    if cause == "stop_file":
        return StopDecision(False, "the file `stop` in the run directory asked for it", EXIT_NOT_REQUEUED)
    if not enabled:
        return StopDecision(False, "requeue.enabled is false", EXIT_NOT_REQUEUED)
    exhausted = _exhausted(requeues, max_requeues, stalled, max_stalled)
    return StopDecision(True, cause, 0) if exhausted is None else exhausted


def decide_start(*, requeues: int, max_requeues: int, stalled: int, max_stalled: int) -> StopDecision | None:
    """Return why a job that Slurm has started again should not train; None: it should.

    Who is killed without warning cannot decide that it was once too often; the next one can.

    Args:
        requeues: how often this run was started again, this time included.
        max_requeues: `requeue.max_requeues`.
        stalled: attempts in a row before this one that got no step further.
        max_stalled: `requeue.max_stalled`.
    """
    return _exhausted(requeues - 1, max_requeues, stalled, max_stalled)


def decide_failed(cause: Cause | Fate, *, failures: int, on_failure: int) -> StopDecision | None:
    """Return why a run whose processes failed is not started again; None: `decide_stop` decides, as behind any other end.

    Args:
        cause: what became of it.
        failures: how often it was requeued behind a failure before.
        on_failure: `requeue.on_failure`.
    """
    if cause not in ("failure", "killed", "out_of_memory") or failures < on_failure:
        return None
    done = f", and it was {failures} times" if failures else ""
    return StopDecision(False, f"a failure is requeued {on_failure} times (requeue.on_failure){done}", EXIT_FAILED)


def _exhausted(requeues: int, max_requeues: int, stalled: int, max_stalled: int) -> StopDecision | None:
    if requeues >= max_requeues:
        return StopDecision(False, f"requeued {requeues} times already (requeue.max_requeues)", EXIT_GAVE_UP)
    if stalled >= max_stalled:
        return StopDecision(False, f"{stalled} attempts in a row got no step further (requeue.max_stalled)", EXIT_GAVE_UP)
    return None


def fate_of(state: str) -> Fate:
    """Return what a job's state in `sacct` says of how it ended; "killed" where that is nothing of the kind."""
    return _FATES.get(state.partition(" ")[0], "killed")


def count_requeues(events: Iterable[Mapping[str, Any]]) -> int:
    """Return how often the run was started again since its last submission: requeued by itself, or by Slurm after it was lost."""
    return sum(event.get("event") == "requeue" or bool(event.get("restarted")) for event in _since_submission(events))


def count_failures(events: Iterable[Mapping[str, Any]]) -> int:
    """Return how often the run was requeued behind a failure since its last submission."""
    return sum(event.get("event") == "requeue" and event.get("cause") == "failure" for event in _since_submission(events))


def last_attempt(events: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any] | None, str | None]:
    """Return the last attempt, and the kind of event it ended with; None: it still runs, or ended without a word."""
    attempt, word = None, None
    for event in events:
        if event.get("event") == "attempt":
            attempt, word = event, None
        elif event.get("event") in (_DECIDED if word in _DECIDED else _LAST_WORDS) and not _is_of_another(event, attempt):
            word = str(event["event"])
    return attempt, word


def stopping(events: Iterable[Mapping[str, Any]]) -> Cause | None:
    """Return why the last attempt had agreed to be requeued, if it had."""
    marks = [event for event in events if event.get("event") == "attempt" or (event.get("event") == "stop" and event.get("requeue"))]
    return marks[-1].get("cause") if marks else None


def _is_of_another(event: Mapping[str, Any], attempt: Mapping[str, Any] | None) -> bool:
    """Whether an event is one of another attempt than that: of one that was overtaken and still runs on a lost node."""
    mine, its = (attempt or {}).get("generation"), event.get("generation")
    return mine is not None and its is not None and its != mine


def count_stalled(events: Iterable[Mapping[str, Any]]) -> int:
    """Return how many attempts in a row since the last submission, the newest included, saved nothing behind the step they began with.

    Args:
        events: the ledger, oldest first. An attempt that was stopped before it restored anything got no step further.
    """
    attempts: list[bool] = []
    start: int | None = None
    for event in _since_submission(events):
        kind = event.get("event")
        if kind == "attempt":
            attempts.append(False)
            start = None
        elif kind == "restored":
            start = int(event.get("step", 0))
        elif kind == "saved" and attempts and start is not None and int(event.get("step", 0)) > start:
            attempts[-1] = True
    return next((stalled for stalled, progressed in enumerate(reversed(attempts)) if progressed), len(attempts))


def current_job(events: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return what tells of the job that a run waits or runs in, as far as the ledger knows: a submission, or a successor's."""
    return next((event for event in reversed(list(events)) if event.get("event") in ("submitted", "successor")), None)


def _since_submission(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what belongs to the last submission: a job can be faster than the command that has started it.

    A job that nothing tells of was submitted by hand, with a script of one's own.
    """
    known = list(events)
    told = {event.get("job_id") for event in known if event.get("event") in ("submitted", "resubmitted", "successor")}
    stretch: list[Mapping[str, Any]] = []
    job: object = None
    for event in known:
        if event.get("event") == "attempt":
            if job is not None and event.get("job_id") not in {job, None, *told}:
                stretch = []
            job = event.get("job_id")
        if event.get("event") == "submitted":
            own = [index for index, earlier in enumerate(stretch) if earlier.get("job_id") == event.get("job_id", "")]
            stretch = stretch[own[0] :] if own else []
        stretch.append(event)
    return stretch


def outcome(events: Iterable[Mapping[str, Any]]) -> tuple[Literal["finished", "requeue", "unfinished"], str]:
    """Return how the last attempt in a stretch of the ledger ended, and in a few words why it did not finish.

    The submission's own events may stand anywhere in it: a job can be faster than the command that has started it.
    """
    attempt: list[Mapping[str, Any]] = []
    begun: Mapping[str, Any] | None = None
    for event in events:
        if event.get("event") == "attempt":
            attempt, begun = [], event
        elif not _is_of_another(event, begun):
            attempt.append(event)
    by_kind = {event.get("event"): event for event in reversed(attempt)}  # the first of each kind
    if next((event["event"] for event in reversed(attempt) if event.get("event") in _LAST_WORDS), None) == "requeue":
        return "requeue", "it was requeued, but no attempt followed"
    if by_kind.get("lost", {}).get("fate") in ("killed", "out_of_memory"):  # the other ranks fail of it
        also = f"; rank {by_kind['failed'].get('rank')} failed: {by_kind['failed'].get('error')}" if "failed" in by_kind else ""
        return "unfinished", f"a process of it was killed ({by_kind['lost']['fate'].replace('_', ' ')}){also}"
    if "failed" in by_kind:  # the first: the other ranks fail of it
        return "unfinished", f"rank {by_kind['failed'].get('rank')} failed: {by_kind['failed'].get('error')}"
    if "finished" in by_kind:
        return "finished", ""
    if "ended" in by_kind:
        return "unfinished", str(by_kind["ended"].get("reason"))
    if "left" in by_kind:
        return "unfinished", "the training function returned before its last epoch"
    if "lost" in by_kind:
        return "unfinished", f"its processes ended without a word ({str(by_kind['lost'].get('fate')).replace('_', ' ')})"
    return "unfinished", "its processes ended without a word (killed, or out of memory?)"
