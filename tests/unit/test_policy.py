"""Decisions: what stays, when to save, why a run stops and whether it goes on."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcckpt.policy import (
    EXIT_CANCELLED,
    EXIT_GAVE_UP,
    EXIT_NOT_REQUEUED,
    SLACK_S,
    CheckpointInfo,
    Retention,
    StopDecision,
    count_requeues,
    count_stalled,
    decide_stop,
    is_epoch_due,
    is_step_due,
    outcome,
    stop_cause,
)

NAN = math.nan
LEAD_S = 120


def epochs(*scores: float | None) -> list[CheckpointInfo]:
    """Return one checkpoint for the end of each epoch, ten steps apart; None: without the metric."""
    return [
        CheckpointInfo(f"e{epoch}", epoch, 10 * (epoch + 1), epoch_finished=True, metrics={} if score is None else {"loss": score})
        for epoch, score in enumerate(scores)
    ]


def names(infos: Sequence[CheckpointInfo]) -> list[str]:
    return [info.name for info in infos]


scores = st.none() | st.sampled_from([0.0, 0.5, 1.0, NAN, math.inf, -math.inf]) | st.floats(-5, 5)
checkpoints = st.lists(st.tuples(st.integers(0, 30), st.booleans(), scores), unique_by=lambda row: row[:2]).map(
    lambda rows: [
        CheckpointInfo(f"{step}{'e' if end else ''}", step // 5, step, end, {} if score is None else {"loss": score})
        for step, end, score in rows
    ]
)
retentions = st.builds(
    Retention,
    keep_last=st.integers(1, 5),
    keep_best=st.integers(0, 3),
    keep_every_epochs=st.none() | st.integers(1, 4),
    monitor=st.sampled_from([None, "loss"]),
    mode=st.sampled_from(["min", "max"]),
)


@given(retentions, checkpoints, st.data())
def test_a_protected_checkpoint_is_never_surplus(retention: Retention, infos: list[CheckpointInfo], data: st.DataObject) -> None:
    protected = data.draw(st.sets(st.sampled_from(names(infos)))) if infos else set()
    assert not protected & set(names(retention.surplus(infos, protected)))


@given(retentions, checkpoints)
def test_the_newest_the_best_and_the_regular_ones_always_stay(retention: Retention, infos: list[CheckpointInfo]) -> None:
    gone = names(retention.surplus(infos, ()))
    newest = sorted(infos, key=lambda info: info.order)[-retention.keep_last :]
    best = retention.best(infos)[: retention.keep_best]
    every = retention.keep_every_epochs
    regular = [info for info in infos if every and info.epoch_finished and (info.epoch + 1) % every == 0]
    stay = names([*newest, *best, *regular])
    assert not set(stay) & set(gone)
    assert set(stay) | set(gone) == set(names(infos))


@given(retentions, checkpoints, st.data())
def test_what_is_surplus_depends_on_no_order_and_comes_oldest_first(
    retention: Retention, infos: list[CheckpointInfo], data: st.DataObject
) -> None:
    gone = retention.surplus(infos, ())
    assert retention.surplus(data.draw(st.permutations(infos)), ()) == gone
    assert gone == sorted(gone, key=lambda info: info.order)


@given(retentions, checkpoints)
def test_deleting_twice_deletes_nothing_more(retention: Retention, infos: list[CheckpointInfo]) -> None:
    gone = retention.surplus(infos, ())
    assert retention.surplus([info for info in infos if info not in gone], ()) == []


@given(retentions, checkpoints)
def test_a_checkpoint_without_a_number_is_never_best(retention: Retention, infos: list[CheckpointInfo]) -> None:
    assert not [info for info in retention.best(infos) if math.isnan(info.metrics.get("loss", NAN))]


@pytest.mark.parametrize(
    ("mode", "infos", "best_first"),
    [
        pytest.param("min", epochs(3.0, 1.0, 2.0), ["e1", "e2", "e0"], id="smallest first"),
        pytest.param("max", epochs(3.0, 1.0, 2.0), ["e0", "e2", "e1"], id="largest first"),
        pytest.param("min", epochs(1.0, 1.0, 1.0), ["e0", "e1", "e2"], id="tie goes to the earlier one, min"),
        pytest.param("max", epochs(1.0, 1.0, 1.0), ["e0", "e1", "e2"], id="tie goes to the earlier one, max"),
        pytest.param("min", epochs(NAN, 5.0, None), ["e1"], id="NaN and none are not rated, min"),
        pytest.param("max", epochs(NAN, 5.0, None), ["e1"], id="NaN and none are not rated, max"),
        pytest.param("min", epochs(0.0, -math.inf, math.inf), ["e1", "e0", "e2"], id="infinities are numbers"),
        pytest.param("min", epochs(NAN, NAN), [], id="nothing but NaN"),
    ],
)
def test_which_checkpoint_is_best(mode: str, infos: list[CheckpointInfo], best_first: list[str]) -> None:
    assert names(Retention(monitor="loss", mode=mode).best(infos)) == best_first


def test_nothing_is_best_where_nothing_is_monitored() -> None:
    assert Retention(monitor=None).best(epochs(1.0, 2.0)) == []


@pytest.mark.parametrize(
    ("retention", "infos", "gone"),
    [
        pytest.param(Retention(keep_last=3), epochs(*[None] * 3), [], id="no more than are kept"),
        pytest.param(Retention(keep_last=3), epochs(*[None] * 5), ["e0", "e1"], id="all but the last three"),
        pytest.param(Retention(2, 1, None, "loss"), epochs(1.0, 2.0, 3.0, 4.0), ["e1"], id="the best one stays"),
        pytest.param(Retention(2, 2, None, "loss", "max"), epochs(1.0, 5.0, 4.0, 2.0, 2.0), ["e0"], id="the best two stay, max"),
        pytest.param(Retention(2, 0, None, "loss"), epochs(1.0, 2.0, 3.0), ["e0"], id="keep_best 0 keeps no best one"),
        pytest.param(Retention(2, 1, None, "loss"), epochs(NAN, 2.0, 3.0, 4.0), ["e0"], id="NaN is not the best one"),
        pytest.param(Retention(2, 1, 3), epochs(*[None] * 7), ["e0", "e1", "e3", "e4"], id="the end of every third epoch stays"),
    ],
)
def test_what_may_go(retention: Retention, infos: list[CheckpointInfo], gone: list[str]) -> None:
    assert names(retention.surplus(infos, ())) == gone


def test_a_stop_within_an_epoch_is_no_regular_checkpoint() -> None:
    within = [CheckpointInfo(f"s{step}", 0, step, epoch_finished=False) for step in range(1, 5)]
    assert names(Retention(keep_last=2, keep_every_epochs=1).surplus(within, ())) == ["s1", "s2"]


def test_the_end_of_an_epoch_is_newer_than_a_stop_at_its_last_step() -> None:
    end, stop = CheckpointInfo("end", 0, 10, epoch_finished=True), CheckpointInfo("stop", 0, 10, epoch_finished=False)
    assert names(Retention(keep_last=1).surplus([end, stop], ())) == ["stop"]


@pytest.mark.parametrize(
    ("epoch", "every", "is_last", "due"),
    [(0, 1, False, True), (0, 2, False, False), (1, 2, False, True), (2, 2, True, True), (4, 5, False, True), (5, 5, False, False)],
)
def test_when_the_end_of_an_epoch_is_saved(epoch: int, every: int, is_last: bool, due: bool) -> None:
    assert is_epoch_due(epoch, every, is_last=is_last) is due


@pytest.mark.parametrize(("step", "every", "due"), [(1, None, False), (1, 1, True), (9, 10, False), (10, 10, True), (11, 10, False)])
def test_when_a_step_is_saved(step: int, every: int | None, due: bool) -> None:
    assert is_step_due(step, every) is due


RUNNING, COMPLETING = {"JobState": "RUNNING", "PreemptTime": "None"}, {"JobState": "COMPLETING", "PreemptTime": "None"}
PREEMPTED = RUNNING | {"PreemptTime": "2026-01-01T00:00:00"}


@pytest.mark.parametrize(
    ("signals", "job", "remaining_s", "cause"),
    [
        pytest.param(["USR1"], RUNNING, 119, "time_limit", id="warned on time"),
        pytest.param(["USR1"], RUNNING, LEAD_S + SLACK_S, "time_limit", id="warned as early as Slurm may"),
        pytest.param(["USR1"], RUNNING, LEAD_S + SLACK_S + 1, "by_hand", id="warned long before the limit"),
        pytest.param(["USR1"], RUNNING, None, "by_hand", id="warned, no limit"),
        pytest.param(["TERM"], RUNNING, 3000, "terminated", id="SIGTERM out of the blue"),
        pytest.param(["TERM", "USR1"], RUNNING, 3000, "by_hand", id="both, long before the limit"),
        pytest.param(["TERM"], RUNNING, 20, "time_limit", id="SIGTERM just before the limit"),
        pytest.param(["USR1", "TERM"], COMPLETING, -1, "time_limit", id="over the limit, in KillWait"),
        pytest.param(["USR1", "TERM"], COMPLETING, 0, "time_limit", id="at the limit"),
        pytest.param(["TERM"], COMPLETING, 3000, "cancelled", id="scancel"),
        pytest.param(["TERM"], COMPLETING, 30, "cancelled", id="scancel near the limit"),
        pytest.param(["TERM"], COMPLETING, None, "cancelled", id="scancel of a job without a limit"),
        pytest.param(["USR1", "TERM"], {"JobState": "CANCELLED"}, -1, "cancelled", id="already cancelled, over the limit"),
        pytest.param(["TERM"], {"JobState": "CANCELLED by 0"}, 20, "cancelled", id="cancelled by root"),
        pytest.param(["TERM"], PREEMPTED, 3000, "preemption", id="preempted"),
        pytest.param(["USR1"], PREEMPTED, 20, "preemption", id="preempted near the limit"),
        pytest.param(["TERM"], PREEMPTED, None, "preemption", id="preempted, no limit"),
        pytest.param(["TERM"], PREEMPTED | {"JobState": "COMPLETING"}, 3000, "cancelled", id="cancelled in its preemption's grace time"),
        pytest.param(["TERM"], PREEMPTED | {"JobState": "COMPLETING"}, 30, "cancelled", id="the same near the limit"),
        pytest.param(["TERM"], PREEMPTED | {"JobState": "COMPLETING"}, None, "cancelled", id="the same without a limit"),
        pytest.param(["USR1", "TERM"], PREEMPTED | {"JobState": "CANCELLED"}, 3000, "cancelled", id="the same, already CANCELLED"),
        pytest.param(["TERM"], PREEMPTED | {"JobState": "CANCELLED"}, -1, "cancelled", id="the same, CANCELLED and over the limit"),
        pytest.param(["TERM"], PREEMPTED | {"JobState": "COMPLETING"}, -1, "preemption", id="preempted and over the limit"),
        *[
            pytest.param(["TERM"], RUNNING | {"PreemptTime": none}, 3000, "terminated", id=f"PreemptTime is {none!r} where there is none")
            for none in ("None", "Unknown", "N/A", "")
        ],
        pytest.param(["TERM"], {"JobState": "RUNNING"}, 3000, "terminated", id="no PreemptTime at all"),
        pytest.param(["TERM"], {}, None, "terminated", id="a job that tells nothing"),
        pytest.param(["USR2"], RUNNING, 119, "time_limit", id="another warning, on time"),
        pytest.param(["USR2", "TERM"], RUNNING, 3000, "by_hand", id="another signal and SIGTERM, long before the limit"),
        pytest.param([], None, None, "terminated", id="no signal known"),
        pytest.param(["USR1"], None, None, "by_hand", id="no Slurm, warned"),
        pytest.param(["TERM"], None, None, "terminated", id="no Slurm, terminated"),
        pytest.param(["USR2"], None, None, "by_hand", id="no Slurm, another signal than the one that is asked for"),
        pytest.param(["TERM", "USR2"], None, None, "by_hand", id="no Slurm, SIGTERM and another signal"),
    ],
)
def test_why_a_run_stops(signals: list[str], job: dict[str, str] | None, remaining_s: float | None, cause: str) -> None:
    assert stop_cause(signals, job, remaining_s, LEAD_S) == cause


@pytest.mark.parametrize(
    ("cause", "enabled", "requeues", "stalled", "requeue", "said", "exit_code"),
    [
        pytest.param("time_limit", True, 0, 0, True, "time_limit", 0, id="time limit"),
        pytest.param("preemption", True, 0, 0, True, "preemption", 0, id="preemption"),
        pytest.param("by_hand", True, 0, 0, True, "by_hand", 0, id="by hand"),
        pytest.param("time_limit", True, 9, 2, True, "time_limit", 0, id="below both caps"),
        pytest.param("time_limit", True, 10, 0, False, "requeue.max_requeues", EXIT_GAVE_UP, id="requeued often enough"),
        pytest.param("time_limit", True, 11, 0, False, "requeue.max_requeues", EXIT_GAVE_UP, id="requeued too often"),
        pytest.param("preemption", True, 0, 3, False, "requeue.max_stalled", EXIT_GAVE_UP, id="stalled"),
        pytest.param("time_limit", False, 0, 0, False, "requeue.enabled", EXIT_NOT_REQUEUED, id="not wanted"),
        pytest.param("terminated", True, 0, 0, False, "SIGTERM", EXIT_CANCELLED, id="terminated"),
        pytest.param("cancelled", True, 0, 0, False, "cancelled", EXIT_CANCELLED, id="cancelled"),
    ],
)
def test_whether_a_run_goes_on(cause: str, enabled: bool, requeues: int, stalled: int, requeue: bool, said: str, exit_code: int) -> None:
    decision = decide_stop(cause, enabled=enabled, requeues=requeues, max_requeues=10, stalled=stalled, max_stalled=3)
    assert decision == StopDecision(requeue, decision.reason, exit_code)
    assert said in decision.reason


@given(st.booleans(), st.integers(0, 200), st.integers(0, 200), st.integers(0, 9), st.integers(1, 9))
def test_a_cancelled_run_stays_cancelled_whatever_else(enabled: bool, requeues: int, cap: int, stalled: int, stalled_cap: int) -> None:
    decision = decide_stop("cancelled", enabled=enabled, requeues=requeues, max_requeues=cap, stalled=stalled, max_stalled=stalled_cap)
    assert not decision.requeue
    assert decision.exit_code == EXIT_CANCELLED


@given(st.sampled_from(["time_limit", "preemption", "cancelled", "by_hand", "terminated"]), st.booleans(), *[st.integers(0, 5)] * 4)
def test_exit_code_0_is_for_runs_that_go_on_and_only_those(cause: str, enabled: bool, n: int, cap: int, stalled: int, most: int) -> None:
    decision = decide_stop(cause, enabled=enabled, requeues=n, max_requeues=cap, stalled=stalled, max_stalled=most)
    assert (decision.exit_code == 0) == decision.requeue


SUBMITTED, REQUEUE = {"event": "submitted"}, {"event": "requeue"}


def attempt(*steps: int) -> list[dict[str, object]]:
    """Return the ledger of an attempt: the step it restored, and those it saved; without any, it never restored."""
    restored = [{"event": "restored", "step": step} for step in steps[:1]]
    return [{"event": "attempt"}, *restored, *[{"event": "saved", "step": step} for step in steps[1:]]]


@pytest.mark.parametrize(
    ("events", "count"),
    [
        pytest.param([], 0, id="nothing yet"),
        pytest.param([SUBMITTED, REQUEUE, {"event": "saved"}, REQUEUE], 2, id="twice"),
        pytest.param([SUBMITTED, REQUEUE, REQUEUE, SUBMITTED, REQUEUE], 1, id="since the last submission"),
        pytest.param([SUBMITTED, REQUEUE, {"event": "resubmitted"}, {"unknown": 1}, {}], 1, id="other events count nothing"),
    ],
)
def test_requeues_are_counted_since_the_last_submission(events: list[dict[str, object]], count: int) -> None:
    assert count_requeues(events) == count


@pytest.mark.parametrize(
    ("events", "count"),
    [
        pytest.param([], 0, id="nothing yet"),
        pytest.param([SUBMITTED], 0, id="only submitted"),
        pytest.param([SUBMITTED, *attempt(0, 40)], 0, id="the first attempt got further"),
        pytest.param([SUBMITTED, *attempt(0, 0)], 1, id="the first attempt got no further"),
        pytest.param([SUBMITTED, *attempt(0)], 1, id="the first attempt saved nothing"),
        pytest.param([SUBMITTED, *attempt()], 1, id="the first attempt never restored"),
        pytest.param([*attempt(0, 40), *attempt(40, 40), *attempt(40), *attempt(40, 40)], 3, id="three in a row"),
        pytest.param([*attempt(0, 40), *attempt(), REQUEUE, *attempt(), REQUEUE, *attempt()], 3, id="three that never restored"),
        pytest.param([*attempt(0, 40), *attempt(40), *attempt(), *attempt(40, 40)], 3, id="one between that never restored"),
        pytest.param([*attempt(40), *attempt(), *attempt(40, 60)], 0, id="progress now"),
        pytest.param([*attempt(40), *attempt(40, 50), *attempt(50)], 1, id="an attempt between that got further"),
        pytest.param([*attempt(40, 50), *attempt(20, 30), *attempt(50, 50)], 1, id="further than its own beginning, not the furthest"),
        pytest.param([*attempt(40, 40, 41)], 0, id="first the step it began with, then one behind it"),
        pytest.param([*attempt(0, 10, 20), *attempt(20, 10)], 1, id="a step before its own beginning"),
        pytest.param([*attempt(0, 10), *attempt(), {"event": "saved", "step": 99}], 1, id="a save without a restore counts nothing"),
        pytest.param([{"event": "attempt"}, {"event": "restored"}, {"event": "saved", "step": 1}], 0, id="without a step it began at 0"),
        pytest.param([{"event": "attempt"}, {"event": "restored"}, {"event": "saved"}], 1, id="without steps nothing is further"),
        pytest.param([{"event": "restored", "step": 0}, {"event": "saved", "step": 1}], 0, id="events before any attempt"),
        pytest.param([*attempt(0), {"unknown": 1}, {}, {"event": "stop", "step": 9}], 1, id="other events count nothing"),
    ],
)
def test_stalled_attempts_are_counted_in_a_row(events: list[dict[str, object]], count: int) -> None:
    assert count_stalled(events) == count


@given(st.lists(st.booleans(), max_size=8))
def test_stalled_attempts_are_those_behind_the_last_that_got_further(further: list[bool]) -> None:
    events = [event for progress in further for event in attempt(*((5, 6) if progress else (5, 5)))]
    assert count_stalled(events) == len(further) - max((number for number, progress in enumerate(further, 1) if progress), default=0)


ATTEMPT, FINISHED, LEFT = {"event": "attempt"}, {"event": "finished"}, {"event": "left"}
ENDED = {"event": "ended", "reason": "the job was cancelled"}
FAILED, FOLLOWED = {"event": "failed", "rank": 1, "error": "ValueError: x"}, {"event": "failed", "rank": 0, "error": "lost rank 1"}
SILENT = "its processes ended without a word (killed, or out of memory?)"
UNFOLLOWED = "it was requeued, but no attempt followed"


@pytest.mark.parametrize(
    ("events", "ending", "why"),
    [
        pytest.param([], "unfinished", SILENT, id="nothing"),
        pytest.param([SUBMITTED, ATTEMPT], "unfinished", SILENT, id="begun and silent"),
        pytest.param([SUBMITTED, *attempt(0, 40)], "unfinished", SILENT, id="saved and silent"),
        pytest.param([SUBMITTED, ATTEMPT, FINISHED], "finished", "", id="finished"),
        pytest.param([ATTEMPT, FINISHED, SUBMITTED], "finished", "", id="finished before the submission was noted"),
        pytest.param([ATTEMPT, LEFT], "unfinished", "the training function returned before its last epoch", id="left early"),
        pytest.param([ATTEMPT, ENDED], "unfinished", "the job was cancelled", id="ended"),
        pytest.param([ATTEMPT, FAILED], "unfinished", "rank 1 failed: ValueError: x", id="failed"),
        pytest.param([ATTEMPT, FAILED, FOLLOWED], "unfinished", "rank 1 failed: ValueError: x", id="the first that failed is named"),
        pytest.param([ATTEMPT, FINISHED, FAILED], "unfinished", "rank 1 failed: ValueError: x", id="rank 0 finished, another failed"),
        pytest.param([ATTEMPT, FAILED, FINISHED], "unfinished", "rank 1 failed: ValueError: x", id="a rank failed, then rank 0 finished"),
        pytest.param([ATTEMPT, FAILED, ENDED], "unfinished", "rank 1 failed: ValueError: x", id="failed wins over ended"),
        pytest.param([ATTEMPT, REQUEUE], "requeue", UNFOLLOWED, id="requeued"),
        pytest.param([ATTEMPT, REQUEUE, ENDED], "unfinished", "the job was cancelled", id="asked for it, but Slurm refused"),
        pytest.param([ATTEMPT, REQUEUE, ATTEMPT], "unfinished", SILENT, id="requeued, and silent in the next attempt"),
        pytest.param([ATTEMPT, REQUEUE, ATTEMPT, FINISHED], "finished", "", id="requeued, then finished"),
        pytest.param([ATTEMPT, FAILED, ATTEMPT, FINISHED], "finished", "", id="failed in an attempt before"),
        pytest.param([ATTEMPT, FINISHED, ATTEMPT, ENDED], "unfinished", "the job was cancelled", id="finished in an attempt before"),
        pytest.param([ATTEMPT, REQUEUE, SUBMITTED, {}, {"unknown": 1}], "requeue", UNFOLLOWED, id="other events tell nothing"),
    ],
)
def test_how_the_last_attempt_ended(events: list[dict[str, object]], ending: str, why: str) -> None:
    assert outcome(events) == (ending, why)


def test_a_new_submission_has_a_new_budget_even_where_its_job_was_faster_than_its_own_line():
    stalled = [{"event": "attempt", "job_id": "7"}, {"event": "restored", "step": 5}, {"event": "requeue", "job_id": "7"}]
    newest = [{"event": "attempt", "job_id": "8"}, {"event": "restored", "step": 5}]
    for ledger in (
        [{"event": "submitted", "job_id": "7"}, *stalled * 3, {"event": "submitted", "job_id": "8"}, *newest],
        [*stalled[:1], {"event": "submitted", "job_id": "7"}, *stalled[1:], *stalled * 2, *newest, {"event": "submitted", "job_id": "8"}],
    ):
        assert count_stalled(ledger) == 1
        assert count_requeues(ledger) == 0
        assert count_stalled(ledger[: -len(newest) - 1]) == 3
