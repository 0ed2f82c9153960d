"""Decisions: what stays, when to save, why a run stops and whether it goes on."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcckpt.lead_time import check_lead_time
from hpcckpt.policy import (
    EXIT_CANCELLED,
    EXIT_GAVE_UP,
    EXIT_NOT_REQUEUED,
    SLACK_S,
    CheckpointInfo,
    Retention,
    StopDecision,
    count_failures,
    count_requeues,
    count_stalled,
    current_job,
    decide_failed,
    decide_start,
    decide_stop,
    fate_of,
    is_epoch_due,
    is_step_due,
    killed_in_s,
    last_attempt,
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
NO_GRACE = {"PreemptTime": "2026-01-01T00:00:00", "EndTime": "2026-01-01T00:00:00"}


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
        pytest.param(["TERM"], COMPLETING | NO_GRACE, 3000, "preemption", id="preempted without a grace time, and cancelled by it"),
        pytest.param(["TERM"], COMPLETING | {"Restarts": "3"}, 3000, "requeued", id="preempted without a grace time, and requeued"),
        pytest.param(["TERM"], COMPLETING | {"Restarts": "2"}, 3000, "cancelled", id="cancelled in its third life"),
        pytest.param(["TERM"], COMPLETING | {"Restarts": "many"}, 3000, "cancelled", id="a number that is none"),
        pytest.param(["TERM"], COMPLETING | {"Reason": "None"}, -3600, "cancelled", id="scancel of a job that was suspended for long"),
        pytest.param(["TERM"], COMPLETING | {"Reason": "TimeLimit"}, 2, "time_limit", id="the limit, by a clock that goes late"),
        pytest.param(["stop file"], RUNNING, 3000, "stop_file", id="the stop file"),
        pytest.param(["USR1", "stop file"], RUNNING, 100, "stop_file", id="the stop file near the limit"),
        pytest.param(["TERM", "stop file"], PREEMPTED, 3000, "stop_file", id="the stop file in a preemption"),
        pytest.param(["stop file"], COMPLETING, 3000, "cancelled", id="the stop file, and scancel"),
        pytest.param(["stop file", "stop file: requeue"], None, None, "stop_file", id="the stop file, rewritten: the end wins"),
        pytest.param(["stop file: requeue"], RUNNING, 3000, "by_hand", id="the stop file asks for a requeue"),
        pytest.param([], None, None, "terminated", id="no signal known"),
        pytest.param(["USR1"], None, None, "by_hand", id="no Slurm, warned"),
        pytest.param(["TERM"], None, None, "terminated", id="no Slurm, terminated"),
        pytest.param(["USR2"], None, None, "by_hand", id="no Slurm, another signal than the one that is asked for"),
        pytest.param(["TERM", "USR2"], None, None, "by_hand", id="no Slurm, SIGTERM and another signal"),
    ],
)
def test_why_a_run_stops(signals: list[str], job: dict[str, str] | None, remaining_s: float | None, cause: str) -> None:
    assert stop_cause(signals, job, remaining_s, LEAD_S, start=2) == cause
    if cause != "requeued":
        assert stop_cause(signals, job, remaining_s, LEAD_S) == cause, "where it is not known which start this is"


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
        pytest.param("stop_file", True, 0, 0, False, "file `stop`", EXIT_NOT_REQUEUED, id="stop file"),
        pytest.param("failure", True, 0, 0, True, "failure", 0, id="failure, where that is allowed"),
        pytest.param("out_of_memory", True, 0, 3, False, "requeue.max_stalled", EXIT_GAVE_UP, id="failure, and stalled"),
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


@given(
    st.sampled_from(["time_limit", "preemption", "cancelled", "by_hand", "terminated", "stop_file", "failure", "killed"]),
    st.booleans(),
    *[st.integers(0, 5)] * 4,
)
def test_exit_code_0_is_for_runs_that_go_on_and_only_those(cause: str, enabled: bool, n: int, cap: int, stalled: int, most: int) -> None:
    decision = decide_stop(cause, enabled=enabled, requeues=n, max_requeues=cap, stalled=stalled, max_stalled=most)
    assert (decision.exit_code == 0) == decision.requeue


def by_hand(job_id: str) -> dict[str, object]:
    """Return the beginning of an attempt in a job that no submission tells of."""
    return {"event": "attempt", "job_id": job_id}


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
        pytest.param([by_hand("7"), REQUEUE, by_hand("7"), REQUEUE], 2, id="one job of a script of one's own"),
        pytest.param([by_hand("7"), REQUEUE, by_hand("7"), REQUEUE, by_hand("8"), REQUEUE], 1, id="and another one"),
        pytest.param(
            [by_hand("7"), REQUEUE, {"event": "successor", "job_id": "8"}, by_hand("8"), REQUEUE], 2, id="which is the successor of that"
        ),
        pytest.param([SUBMITTED, {"event": "lost", "restarted": True}], 1, id="started again by Slurm, after a node failure"),
        pytest.param([SUBMITTED, {"event": "lost", "restarted": False}, REQUEUE], 1, id="killed, and then requeued"),
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
LOST, KILLED = {"event": "lost", "fate": "node_failure"}, {"event": "lost", "fate": "out_of_memory"}
OOM = "a process of it was killed (out of memory)"
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
        pytest.param([ATTEMPT, FAILED, REQUEUE], "requeue", UNFOLLOWED, id="requeued behind a failure"),
        pytest.param([ATTEMPT, REQUEUE, FAILED], "unfinished", "rank 1 failed: ValueError: x", id="a rank failed on its way out"),
        pytest.param([ATTEMPT, LOST], "unfinished", "its processes ended without a word (node failure)", id="lost"),
        pytest.param([ATTEMPT, FAILED, KILLED], "unfinished", f"{OOM}; rank 1 failed: ValueError: x", id="others fail of one killed"),
        pytest.param([ATTEMPT, KILLED, REQUEUE], "requeue", UNFOLLOWED, id="requeued behind a kill"),
        pytest.param([ATTEMPT, KILLED, REQUEUE, ENDED], "unfinished", OOM, id="and refused"),
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


@pytest.mark.parametrize(
    ("cause", "remaining_s", "end_s", "signalled_s", "left_s"),
    [
        pytest.param("time_limit", 100.0, 100.0, 3.0, 100.0, id="the limit"),
        pytest.param("time_limit", None, None, 3.0, LEAD_S - 3.0, id="Slurm does not answer: what the warning leaves at least"),
        pytest.param("by_hand", 3000.0, 3000.0, 3.0, 3000.0, id="by hand: the limit comes all the same"),
        pytest.param("by_hand", None, None, 3.0, None, id="by hand, no limit"),
        pytest.param("preemption", 3000.0, 20.0, 3.0, 20.0, id="the end of the grace time"),
        pytest.param("preemption", 3000.0, None, 3.0, None, id="a grace time that is not told"),
        pytest.param("preemption", 3000.0, -3.0, 3.0, 7.0, id="no grace time: what there is between SIGTERM and SIGKILL"),
        pytest.param("preemption", 3000.0, -99.0, 3.0, 0.0, id="and that is over"),
        pytest.param("requeued", 3000.0, None, 3.0, None, id="nothing more to ask for"),
        pytest.param("cancelled", 3000.0, 0.0, 3.0, None, id="nothing to hurry for"),
        pytest.param("stop_file", 3000.0, 3000.0, 3.0, None, id="nothing to go on with"),
    ],
)
def test_how_long_the_processes_live(
    cause: str, remaining_s: float | None, end_s: float | None, signalled_s: float, left_s: float | None
) -> None:
    assert killed_in_s(cause, remaining_s, end_s, signalled_s, LEAD_S) == left_s


@pytest.mark.parametrize(
    ("requeues", "stalled", "said"),
    [(1, 0, None), (10, 2, None), (11, 0, "requeue.max_requeues"), (1, 3, "requeue.max_stalled")],
)
def test_whether_a_job_that_slurm_has_started_again_trains(requeues: int, stalled: int, said: str | None) -> None:
    decision = decide_start(requeues=requeues, max_requeues=10, stalled=stalled, max_stalled=3)
    assert (decision is None) == (said is None)
    if decision is not None and said is not None:
        assert not decision.requeue
        assert decision.exit_code == EXIT_GAVE_UP
        assert said in decision.reason


@given(requeues=st.integers(0, 20), cap=st.integers(0, 20), stalled=st.integers(0, 9), most=st.integers(1, 9))
def test_what_was_requeued_by_itself_is_let_in_by_its_next_start(requeues: int, cap: int, stalled: int, most: int) -> None:
    """A requeue that ends at its own start would have cost the wait in the queue for nothing."""
    asked = decide_stop("time_limit", enabled=True, requeues=requeues, max_requeues=cap, stalled=stalled, max_stalled=most)
    if asked.requeue:
        assert decide_start(requeues=requeues + 1, max_requeues=cap, stalled=stalled, max_stalled=most) is None


@pytest.mark.parametrize(
    ("cause", "failures", "on_failure", "said"),
    [
        pytest.param("failure", 0, 0, "a failure is requeued 0 times (requeue.on_failure)", id="not by itself"),
        pytest.param("killed", 0, 1, None, id="once"),
        pytest.param("killed", 1, 1, "a failure is requeued 1 times (requeue.on_failure), and it was 1 times", id="not twice"),
        pytest.param("preemption", 5, 0, None, id="what Slurm takes away is no failure"),
        pytest.param("cancelled", 5, 0, None, id="and a cancelled job is decided about as ever"),
    ],
)
def test_whether_a_failure_is_requeued(cause: str, failures: int, on_failure: int, said: str | None) -> None:
    decision = decide_failed(cause, failures=failures, on_failure=on_failure)
    assert (None if decision is None else decision.reason) == said
    assert decision is None or (not decision.requeue and decision.exit_code == 1)


def test_failures_are_counted_since_the_last_submission():
    failure = {"event": "requeue", "cause": "failure"}
    assert count_failures([SUBMITTED, failure, REQUEUE, failure, {"event": "failed"}]) == 2
    assert count_failures([SUBMITTED, failure, SUBMITTED, REQUEUE]) == 0


def test_the_last_attempt_is_known_with_its_last_word():
    first, second = {"event": "attempt", "generation": 1}, {"event": "attempt", "generation": 2}
    assert last_attempt([SUBMITTED]) == (None, None)
    assert last_attempt([first, {"event": "saved"}, {"event": "stop"}]) == (first, None)
    assert last_attempt([first, REQUEUE, second]) == (second, None)
    assert last_attempt([first, REQUEUE, second, {"event": "failed"}, {"event": "note"}]) == (second, "failed")
    # What rank 0 has decided stands, also when it came before the others failed.
    assert last_attempt([first, REQUEUE, {"event": "failed"}]) == (first, "requeue")
    assert last_attempt([first, {"event": "failed"}, REQUEUE]) == (first, "requeue")


@pytest.mark.parametrize(
    ("state", "fate"),
    [("NODE_FAIL", "node_failure"), ("OUT_OF_MEMORY", "out_of_memory"), ("CANCELLED by 1000", "cancelled"), ("PREEMPTED", "preemption"),
     ("REQUEUED", "killed"), ("", "killed"), ("COMPLETED", "killed")],
)  # fmt: skip
def test_what_accounting_says_of_an_end(state: str, fate: str) -> None:
    assert fate_of(state) == fate


def test_a_run_is_in_the_job_of_its_last_submission_or_of_the_successor_of_that():
    assert current_job([]) is None
    submitted, successor = {"event": "submitted", "job_id": "7"}, {"event": "successor", "job_id": "8"}
    assert current_job([submitted, {"event": "attempt"}]) == submitted
    assert current_job([submitted, successor, {"event": "attempt"}]) == successor
    assert current_job([submitted, successor, submitted | {"job_id": "9"}])["job_id"] == "9"


SAVED, WAITED = {"event": "saved", "save_s": 20.0}, {"event": "stop", "waited_s": 5.0}


@pytest.mark.parametrize(
    ("events", "lead_time_s", "time_min", "refused", "warned"),
    [
        pytest.param([], 1, 600, "", "", id="nothing measured yet"),
        pytest.param([SAVED, WAITED], 29, 600, "requeue.lead_time_s=60", "", id="too short"),
        pytest.param([SAVED, WAITED], 30, 600, "", "requeue.lead_time_s=60", id="tight"),
        pytest.param([SAVED, WAITED], 45, 600, "", "", id="enough"),
        pytest.param(
            [SAVED | {"stall_s": 0.1}, WAITED], 49, 600, "requeue.lead_time_s=100", "", id="too short for one that is on its way, too"
        ),
        pytest.param([SAVED | {"stall_s": 0.1}, WAITED], 50, 600, "", "the one before that is still on its way", id="tight for it"),
        pytest.param([SAVED, {"event": "stop", "waited_s": None}], 25, 600, "", "requeue.lead_time_s=50", id="no wait known"),
        pytest.param([SAVED, *[{"event": "saved", "save_s": 1.0}] * 5], 10, 600, "", "", id="faster of late"),
        pytest.param([SAVED], 120, 5, "", "may leave 120 s to train in", id="a short job"),
        pytest.param([SAVED], 120, 6, "", "", id="not so short"),
        pytest.param([SAVED], 120, 2, "", "may leave 0 s to train in", id="hardly a job"),
    ],
)
def test_whether_the_lead_time_is_long_enough(
    events: list[dict[str, object]], lead_time_s: int, time_min: int, refused: str, warned: str
) -> None:
    lead = check_lead_time(events, lead_time_s=lead_time_s, time_min=time_min)
    assert (lead.refusal is None) == (not refused)
    assert (lead.warning is None) == (not warned)
    assert refused in (lead.refusal or "")
    assert warned in (lead.warning or "")
