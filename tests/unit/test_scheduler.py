"""Slurm's commands, as real processes: scripts on a PATH of their own that answer as Slurm does."""

import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcckpt import scheduler
from hpcckpt.errors import SchedulerError, SubmissionError

Fake = Callable[[str, str], None]
JOB = """JobId=7 JobName=my run
   Requeue=1 Restarts=0
   JobState={state} Reason=None
   RunTime=00:00:04 TimeLimit=01:00:00
   StartTime=2026-01-01T10:00:00 EndTime=2026-01-01T11:00:00
   PreemptEligibleTime=2026-01-01T10:00:00 PreemptTime=None"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Return a function that puts a shell script on PATH, where nothing else is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(tmp_path)

    def write(name: str, body: str) -> None:
        script = folder / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o700)

    return write


def answers(requeue: str, state: str) -> str:
    """Return an scontrol whose `requeue` does one thing and whose `show` gives the job's state."""
    return f'echo "$*" >> calls\ncase $1 in requeue) {requeue};; show) echo "{JOB.format(state=state)}";; esac'


def test_a_requeue_that_slurm_accepts_is_done_once(fake: Fake, tmp_path: Path) -> None:
    fake("scontrol", answers("exit 0", "RUNNING"))
    scheduler.requeue("7_2")
    assert (tmp_path / "calls").read_text() == "requeue 7_2\n"


def test_a_refusal_is_passed_on_in_slurms_words(fake: Fake) -> None:
    fake("scontrol", answers("echo 'Requested operation is presently disabled for job 7' >&2; exit 1", "PENDING"))
    with pytest.raises(SchedulerError, match="scontrol requeue 7: Requested operation is presently disabled for job 7"):
        scheduler.requeue("7")


def test_a_refusal_without_words_tells_the_exit_code(fake: Fake) -> None:
    fake("scontrol", answers("exit 4", "RUNNING"))
    with pytest.raises(SchedulerError, match="scontrol requeue 7: ended with 4"):
        scheduler.requeue("7")


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the time of waiting pass at once; what was slept is noted."""
    slept: list[float] = []
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept)))
    return slept


BUSY = "echo 'Socket timed out on send/recv operation' >&2; exit 1"


@pytest.mark.parametrize("failure", [BUSY, "kill -TERM $$", "exit 1"], ids=["busy", "killed", "no words"])
def test_a_requeue_that_did_not_arrive_is_asked_for_once_more_and_no_more(fake: Fake, tmp_path: Path, failure: str) -> None:
    fake("scontrol", answers(f"[ -e tried ] && exit 0; echo > tried; {failure}", "RUNNING"))
    scheduler.requeue("7", patience_s=60)
    assert (tmp_path / "calls").read_text() == "requeue 7\nshow job 7\nrequeue 7\n"


def test_a_controller_that_does_not_tell_the_jobs_state_either_is_asked_again(fake: Fake, tmp_path: Path) -> None:
    fake("scontrol", f'echo "$*" >> calls\n[ -e tried ] && exit 0\n[ $1 = show ] && echo > tried\n{BUSY}')
    scheduler.requeue("7", patience_s=60)
    assert (tmp_path / "calls").read_text() == "requeue 7\nshow job 7\nrequeue 7\n"


@pytest.mark.parametrize(
    "words",
    [
        "Requested operation is presently disabled for job 7",
        "slurm_requeue error: Access/permission denied",
        "slurm_requeue error: Invalid job id specified",
        "slurm_requeue error: Requested operation not supported on this system",
    ],
)
@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_a_requeue_that_slurm_forbids_is_asked_for_once_only(fake: Fake, tmp_path: Path, words: str, state: str) -> None:
    fake("scontrol", answers(f"echo '{words}' >&2; exit 1", state))
    began = time.monotonic()
    with pytest.raises(SchedulerError, match=f"^scontrol requeue 7: {words}$"):
        scheduler.requeue("7", patience_s=60)
    assert (tmp_path / "calls").read_text() == "requeue 7\n"
    assert time.monotonic() - began < 10


def test_a_controller_that_stays_busy_is_given_up_when_patience_is_over(fake: Fake, tmp_path: Path, naps: list[float]) -> None:
    fake("scontrol", answers(BUSY, "RUNNING"))
    with pytest.raises(SchedulerError, match=r"^scontrol requeue 7: Socket timed out on send/recv operation$"):
        scheduler.requeue("7", patience_s=10)
    assert naps == [0.5, 1.0, 2.0, 4.0]
    assert (tmp_path / "calls").read_text() == "requeue 7\nshow job 7\n" * 5


def test_a_busy_controller_is_asked_once_without_patience(fake: Fake, tmp_path: Path) -> None:
    fake("scontrol", answers(BUSY, "RUNNING"))
    with pytest.raises(SchedulerError, match="Socket timed out"):
        scheduler.requeue("7")
    assert (tmp_path / "calls").read_text() == "requeue 7\nshow job 7\n"


def test_a_requeue_whose_answer_was_lost_is_done_if_the_job_is_pending(fake: Fake, tmp_path: Path) -> None:
    fake("scontrol", answers(BUSY, "PENDING"))
    scheduler.requeue("7", patience_s=60)
    assert (tmp_path / "calls").read_text() == "requeue 7\nshow job 7\n"


def test_a_requeue_that_got_no_answer_in_time_is_done_if_the_job_is_pending(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scheduler.run_command
    monkeypatch.setattr(scheduler, "run_command", lambda argv, **_: run(argv, timeout_s=1 if "requeue" in argv else 60))
    fake("scontrol", answers("exec /bin/sleep 100", "PENDING"))
    scheduler.requeue("7", patience_s=60)
    assert (tmp_path / "calls").read_text() == "requeue 7\nshow job 7\n"


def refusing(times: int, problem: Exception) -> Callable[[], int]:
    """Return an action that raises some times and then returns how often it was called."""
    calls: list[None] = []

    def act() -> int:
        calls.append(None)
        if len(calls) <= times:
            raise problem
        return len(calls)

    return act


def test_patience_waits_longer_each_time_but_never_beyond_its_end(fake: Fake, naps: list[float]) -> None:
    fake("scontrol", "exit 0")
    assert scheduler.patiently(refusing(7, SchedulerError("busy")), 100.0) == 8
    assert naps == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    del naps[:]
    with pytest.raises(SchedulerError, match="busy"):
        scheduler.patiently(refusing(99, SchedulerError("busy")), 10.0)
    assert naps == [0.5, 1.0, 2.0, 4.0]


def test_patience_is_for_slurm_only_where_there_is_one(fake: Fake, naps: list[float]) -> None:
    with pytest.raises(SchedulerError, match="busy"):
        scheduler.patiently(refusing(1, SchedulerError("busy")), 100.0)
    fake("scontrol", "exit 0")
    with pytest.raises(KeyError):
        scheduler.patiently(refusing(1, KeyError()), 100.0)
    assert naps == []


def test_times_are_asked_for_in_slurms_own_format(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("tool", 'echo "$SLURM_TIME_FORMAT"')
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert scheduler.run_command(["tool"]).stdout == "standard\n"
    assert scheduler.run_command(["tool"], environ={**os.environ, "SLURM_TIME_FORMAT": "%a"}).stdout == "standard\n"


@pytest.mark.parametrize("state", ["PENDING", "REQUEUED", "COMPLETING"])
def test_an_scontrol_that_was_killed_has_done_it_if_the_job_no_longer_runs(fake: Fake, state: str) -> None:
    fake("scontrol", answers("kill -TERM $$", state))
    scheduler.requeue("7")


def test_an_scontrol_that_was_killed_has_not_done_it_if_the_job_still_runs(fake: Fake) -> None:
    fake("scontrol", answers("kill -TERM $$", "RUNNING"))
    with pytest.raises(SchedulerError, match="ended with -15"):
        scheduler.requeue("7")


def test_an_scontrol_that_was_killed_has_not_done_it_if_slurm_does_not_know_the_job(fake: Fake) -> None:
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    fake("scontrol", f"case $1 in requeue) kill -TERM $$;; show) {unknown};; esac")
    with pytest.raises(SchedulerError, match="ended with -15"):
        scheduler.requeue("7")


def test_a_command_that_does_not_answer_is_given_up(fake: Fake) -> None:
    fake("scontrol", "exec /bin/sleep 100")
    began = time.monotonic()
    with pytest.raises(SchedulerError, match=r"`scontrol ping` gave no answer in 0.2 s; is Slurm's controller up\?"):
        scheduler.run_command(["scontrol", "ping"], timeout_s=0.2)
    assert time.monotonic() - began < 10


def test_a_missing_program_is_named(fake: Fake) -> None:
    fake("other", "exit 0")
    with pytest.raises(SchedulerError, match="scontrol: no such program on PATH"):
        scheduler.requeue("7")


def test_a_program_that_cannot_be_started_is_named(fake: Fake, tmp_path: Path) -> None:
    fake("scontrol", "exit 0")
    (tmp_path / "bin" / "scontrol").chmod(0o600)
    with pytest.raises(SchedulerError, match="scontrol: cannot be started"):
        scheduler.requeue("7")


def test_what_a_command_says_is_kept_apart_and_may_be_any_bytes(fake: Fake) -> None:
    fake("tool", "/bin/cat; printf 'warn\\377ing\\n' >&2; exit 3")
    done = scheduler.run_command(["tool"], stdin="in\n")
    assert done == scheduler.Completed(3, "in\n", "warn\ufffding")


def test_arguments_reach_a_command_as_they_are(fake: Fake, tmp_path: Path) -> None:
    fake("tool", 'for argument; do echo "$argument"; done')
    hostile = ["a b", "$(touch x)", ";touch x", "'", '"', "*"]
    assert scheduler.run_command(["tool", *hostile]).stdout.splitlines() == hostile
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("programs", "there"), [(["sbatch", "srun"], True), (["sbatch"], False), (["srun"], False), ([], False)])
def test_slurm_is_there_where_a_job_can_be_submitted_and_started(fake: Fake, programs: list[str], there: bool) -> None:
    for name in programs:
        fake(name, "exit 0")
    assert scheduler.has_slurm() is there


def test_the_fields_of_a_job_are_its_words() -> None:
    fields = scheduler.parse_job_fields(JOB.format(state="RUNNING"))
    assert fields["JobState"] == "RUNNING"
    assert fields["PreemptTime"] == "None"


def test_what_a_user_wrote_into_a_job_is_not_taken_for_its_state() -> None:
    text = (
        "JobId=7 JobName=x JobState=CANCELLED\n   UserId=me(1) GroupId=me(1)\n   JobState=RUNNING Reason=None\n"
        "   RunTime=00:00:04 TimeLimit=00:05:00\n   StartTime=2026-01-01T00:00:00 EndTime=2026-01-01T00:05:00\n"
        "   Comment=PreemptTime=now JobState=FAILED\n   WorkDir=/a StartTime=Unknown\n"
    )
    fields = scheduler.parse_job_fields(text)
    assert fields["JobState"] == "RUNNING"
    assert fields["StartTime"] == "2026-01-01T00:00:00"
    assert fields["TimeLimit"] == "00:05:00"
    assert "PreemptTime" not in fields


def test_a_job_that_slurm_forgot_has_no_fields_and_is_not_live(fake: Fake) -> None:
    fake("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert scheduler.job_fields("7") is None
    assert scheduler.is_live("7") is False


def test_a_controller_that_is_down_is_no_forgotten_job(fake: Fake) -> None:
    fake("scontrol", "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    with pytest.raises(SchedulerError, match=r"show job 7: Unable to contact slurm controller .*; is Slurm's controller up\?"):
        scheduler.is_live("7")


@pytest.mark.parametrize(
    ("state", "live"),
    [
        ("PENDING", True),
        ("RUNNING", True),
        ("SUSPENDED", True),
        ("COMPLETING", True),
        ("CONFIGURING", True),
        ("REQUEUE_HOLD", True),
        ("COMPLETED", False),
        ("FAILED", False),
        ("CANCELLED", False),
        ("TIMEOUT", False),
        ("NODE_FAIL", False),
        ("OUT_OF_MEMORY", False),
    ],
)
def test_a_job_is_live_as_long_as_its_processes_may_write(fake: Fake, state: str, live: bool) -> None:
    fake("scontrol", answers("exit 1", state))
    assert scheduler.is_live("7") is live


@pytest.mark.parametrize(
    ("start", "limit", "left_s"),
    [
        pytest.param("2026-01-01T10:00:00", "01:00:00", 1800, id="half of an hour"),
        pytest.param("2026-01-01T10:00:00", "1-00:00:00", 84600, id="a day"),
        pytest.param("2025-12-31T10:00:00", "1-00:10:00", -1200, id="over"),
        pytest.param("Unknown", "01:00:00", None, id="not started"),
        pytest.param("2026-01-01T10:00:00", "UNLIMITED", None, id="unlimited"),
        pytest.param("2026-01-01T10:00:00", "Partition_Limit", None, id="the partition's"),
        pytest.param("", "", None, id="not told"),
    ],
)
def test_what_is_left_of_a_jobs_time(start: str, limit: str, left_s: float | None) -> None:
    now = datetime.fromisoformat("2026-01-01T10:30:00")
    assert scheduler.remaining_s({"StartTime": start, "TimeLimit": limit}, now) == left_s


def test_what_is_left_of_a_jobs_time_knows_of_suspensions_and_of_no_time_zone() -> None:
    fields = {"StartTime": "2026-01-01T10:00:00", "TimeLimit": "01:00:00", "RunTime": "00:20:00"}
    assert scheduler.remaining_s(fields, datetime.fromisoformat("2026-01-01T15:00:00")) == 2400


def test_a_job_without_times_has_no_limit() -> None:
    assert scheduler.remaining_s({}, datetime.fromisoformat("2026-01-01")) is None


def test_a_script_is_tested_through_standard_input_in_a_clean_environment(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("sbatch", 'echo "$*" > arguments; /bin/cat > script; /usr/bin/env > environ')
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_CPU_BIND", "none")
    monkeypatch.setenv("SBATCH_SIGNAL", "TERM@1")
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    script = "#!/bin/bash\n#SBATCH --comment='ü $HOME'\nsrun true\n"
    scheduler.check_script(script)
    assert (tmp_path / "arguments").read_text() == "--test-only\n"
    assert (tmp_path / "script").read_text() == script
    seen = dict(line.split("=", 1) for line in (tmp_path / "environ").read_text().splitlines() if "=" in line)
    assert {name for name in seen if name.startswith(("SLURM", "SBATCH"))} == {"SBATCH_PARTITION", "SLURM_CONF", "SLURM_TIME_FORMAT"}
    assert seen["SLURM_TIME_FORMAT"] == "standard"


def test_a_script_that_sbatch_refuses_is_refused_in_one_line_of_its_words(fake: Fake) -> None:
    fake("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; echo 'allocation failure: Invalid' >&2; exit 1")
    with pytest.raises(SubmissionError) as caught:
        scheduler.check_script("#!/bin/bash\n")
    assert str(caught.value) == "sbatch refused the job: sbatch: error: invalid partition specified: x allocation failure: Invalid"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "TIMEOUT"])
def test_an_unknown_refusal_for_a_job_that_is_being_ended_is_no_requeue(fake: Fake, state: str) -> None:
    fake("scontrol", answers("echo 'Job/step already completing or completed' >&2; exit 1", state))
    with pytest.raises(SchedulerError, match="already completing"):
        scheduler.requeue("7")
