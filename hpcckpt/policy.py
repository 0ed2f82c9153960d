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
# What the shell reports for a process that SIGTERM ended.
EXIT_CANCELLED = 143

# How much earlier than asked the warning before a time limit may be acted on: Slurm's own 60 s, and a long step.
SLACK_S = 90

Cause = Literal["time_limit", "preemption", "cancelled", "by_hand", "terminated"]


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


def stop_cause(signals: Collection[str], job: Mapping[str, str] | None, remaining_s: float | None, lead_time_s: int) -> Cause:
    """Return why a rank was signalled.

    Slurm shows a job that is preempted as RUNNING with a PreemptTime, and one that was cancelled or has run out of time as
    COMPLETING already while its processes still have their KillWait; what is left of its time tells those two apart
    (measured, see docs/decisions/0003-causes.md).

    Args:
        signals: names without SIG, of what any rank has received.
        job: `scontrol show job`, or None where there is no Slurm or it did not answer.
        remaining_s: seconds to the job's time limit, or None where unknown.
        lead_time_s: `requeue.lead_time_s`; Slurm looks every 30 s and sends the signal up to 60 s earlier.
    """
    fields = job or {}
    state = fields.get("JobState", "")
    over = remaining_s is not None and remaining_s <= 0
    # First: a job that is cancelled while it is being preempted shows both. And what Slurm requeues after a preemption's grace
    # time, it requeues itself.
    if state.startswith("CANCELLED") or (state == "COMPLETING" and not over):
        return "cancelled"
    if fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", ""):
        return "preemption"
    if remaining_s is not None and remaining_s <= lead_time_s + SLACK_S:
        return "time_limit"
    return "by_hand" if set(signals) - {"TERM"} else "terminated"


@dataclass(frozen=True)
class StopDecision:
    """What happens after the checkpoint at a stop."""

    requeue: bool
    reason: str
    exit_code: int


def decide_stop(cause: Cause, *, enabled: bool, requeues: int, max_requeues: int, stalled: int, max_stalled: int) -> StopDecision:
    """Return whether the run goes on in another attempt.

    Args:
        cause: why it was stopped.
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
    if not enabled:
        return StopDecision(False, "requeue.enabled is false", EXIT_NOT_REQUEUED)
    if requeues >= max_requeues:
        return StopDecision(False, f"requeued {requeues} times already (requeue.max_requeues)", EXIT_GAVE_UP)
    if stalled >= max_stalled:
        return StopDecision(False, f"{stalled} attempts in a row got no step further (requeue.max_stalled)", EXIT_GAVE_UP)
    return StopDecision(True, cause, 0)


def count_requeues(events: Iterable[Mapping[str, Any]]) -> int:
    """Return how often the run was requeued since its last submission."""
    return sum(event.get("event") == "requeue" for event in _since_submission(events))


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


def _since_submission(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what belongs to the last submission: a job can be faster than the command that has started it."""
    stretch: list[Mapping[str, Any]] = []
    for event in events:
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
    for event in events:
        attempt = [] if event.get("event") == "attempt" else [*attempt, event]
    by_kind = {event.get("event"): event for event in reversed(attempt)}  # the first of each kind
    if "failed" in by_kind:  # the first: the other ranks fail of it
        return "unfinished", f"rank {by_kind['failed'].get('rank')} failed: {by_kind['failed'].get('error')}"
    if "finished" in by_kind:
        return "finished", ""
    if "ended" in by_kind:
        return "unfinished", str(by_kind["ended"].get("reason"))
    if "left" in by_kind:
        return "unfinished", "the training function returned before its last epoch"
    if "requeue" in by_kind:
        return "requeue", "it was requeued, but no attempt followed"
    return "unfinished", "its processes ended without a word (killed, or out of memory?)"
