"""The ladder to the next attempt, over commands that answer as Slurm does; tests/slurm has the whole of it on a real one."""

import threading
import time
from pathlib import Path

import pytest

from hpcckpt.config import RequeueConfig
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import FencedError
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention, StopDecision
from hpcckpt.requeue import Requeue
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.ledger import Ledger
from support.fake_slurm import SCRIPT, FakeSlurm

FORBIDDEN = "echo 'Requested operation is presently disabled for job 7' >&2; exit 1"
BUSY = "echo 'Unable to contact slurm controller' >&2; exit 1"
GO_ON = StopDecision(True, "time_limit", 0)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    commands = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", str(commands.bin))
    return commands


class Case:
    """A claimed run directory, and one way to the next attempt."""

    def __init__(self, folder: Path, launcher: str = "slurm", job_id: str | None = "7", lead_time_s: int = 2) -> None:
        self.layout = RunLayout(folder / "run")
        self.store = CheckpointStore(self.layout, Retention())
        self.store.claim("7", (0,))
        self.adopted: list[str] = []
        task = TaskEnvironment(launcher, job_id=job_id, restart_count=0, incarnation=(0,))
        self.requeue = Requeue(
            self.layout, Ledger(self.layout.events), task, RequeueConfig(lead_time_s=lead_time_s), self.store, self.adopted.append
        )

    def go_on(self, decision: StopDecision = GO_ON) -> int:
        return self.requeue.go_on("time_limit", decision, "saved at step 5")

    def events(self, kind: str = "") -> list[dict[str, object]]:
        return [event for event in Ledger(self.layout.events).events() if kind in ("", event["event"])]


@pytest.fixture
def case(slurm, tmp_path):  # noqa: ARG001 - its commands are on PATH
    return Case(tmp_path)


def test_slurm_is_asked_once_however_many_ask(case, slurm):
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(case.go_on())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert codes == [0] * 4
    assert slurm.asked("scontrol") == ["scontrol requeue 7"]
    assert [(event["event"], event["cause"]) for event in case.events()] == [("requeue", "time_limit")]


def test_the_request_is_noted_before_it_is_made(case, slurm, tmp_path):
    slurm.scontrol(requeue=f"cp {case.layout.events} {tmp_path}/then")
    case.go_on()
    assert '"requeue"' in (tmp_path / "then").read_text()


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_an_attempt_that_was_overtaken_requeues_nothing_and_notes_nothing(slurm, tmp_path, launcher):
    case = Case(tmp_path, launcher)
    CheckpointStore(case.layout, Retention()).claim("7", (1,))
    with pytest.raises(FencedError, match=r"attempt 1 is not the newest any more: attempt 2 \(job 7 on "):
        case.go_on()
    assert slurm.asked("s") == []
    assert case.events() == []


def test_a_job_that_slurm_has_requeued_itself_is_not_requeued_again(case, slurm, capsys):
    slurm.scontrol(state="COMPLETING", restarts=1)  # a preemption without grace time; or a node that Slurm has lost
    assert case.go_on() == 0
    assert slurm.asked("scontrol") == []
    assert [(event["event"], event["by"]) for event in case.events()] == [("requeue", "Slurm")]
    assert "Slurm has requeued job 7 already" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_is_cancelled_behind_the_decision_stays_cancelled(case, slurm, state, capsys):
    slurm.scontrol(state=state)
    assert case.go_on() == 143
    assert slurm.asked("scontrol") == []
    assert "saved at step 5 and not requeued: the job was cancelled" in capsys.readouterr().out
    assert [event["event"] for event in case.events()] == ["ended"]


def test_where_requeueing_is_forbidden_one_successor_goes_on(case, slurm, tmp_path, monkeypatch, capsys):
    for leaked in ("SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_SIGNAL"):
        monkeypatch.setenv(leaked, "7")
    slurm.scontrol(requeue=FORBIDDEN)
    slurm.sbatch("cat > {folder}/submitted; env > {folder}/environ; echo 8")
    assert case.go_on() == case.go_on() == 0
    (asked,) = slurm.asked("sbatch")
    assert (
        asked
        == "sbatch --parsable --dependency=afterany:7 --partition=gpu --account=lab --time=2:00:00 --chdir=/home/me/work --job-name=my run"
    )
    assert (tmp_path / "submitted").read_text() == SCRIPT
    environ = (tmp_path / "environ").read_text()
    assert "SLURM_JOB_ID" not in environ
    assert "SLURM_NTASKS" not in environ
    assert "SBATCH_SIGNAL" not in environ
    assert case.adopted == ["8"]
    (successor,) = case.events("successor")
    assert (successor["job_id"], successor["of"]) == ("8", "7")
    assert "presently disabled" in capsys.readouterr().out


def test_a_successor_has_the_size_that_was_given_on_sbatchs_command_line_only(case, slurm, tmp_path, monkeypatch):
    for name, value in (("SLURM_JOB_NUM_NODES", "3"), ("SLURM_CPUS_PER_TASK", "6"), ("SLURM_NTASKS_PER_NODE", "2")):
        monkeypatch.setenv(name, value)
    (tmp_path / "script").write_text("#!/bin/bash\n#SBATCH -N 2-4 --ntasks-per-node=2\nsrun --cpus-per-task=6 python train.py\n")
    slurm.scontrol(requeue=FORBIDDEN)
    case.go_on()
    (asked,) = slurm.asked("sbatch")
    assert "--cpus-per-task=6" in asked
    assert "--nodes" not in asked
    assert "--ntasks-per-node" not in asked


def test_a_successor_of_a_heterogeneous_job_takes_its_options_from_the_leader(case, slurm, monkeypatch):
    """squeue has a line for each group, and the variables of a rank tell the size of all groups together."""
    monkeypatch.setenv("SLURM_HET_SIZE", "2")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    leader, other = ("|lab|(null)|2:00:00|/home/me/work|my run" for _ in range(2))
    slurm.write("squeue", f'case "$*" in *--me*) ;; *) echo "gpu{leader}"; echo "cpu{other}";; esac')
    slurm.scontrol(requeue=FORBIDDEN)
    assert case.go_on() == 0
    (asked,) = slurm.asked("sbatch")
    assert asked.endswith("--partition=gpu --account=lab --time=2:00:00 --chdir=/home/me/work --job-name=my run")


def test_a_successor_whose_submission_gave_no_answer_is_found_and_not_submitted_again(case, slurm):
    slurm.scontrol(requeue=FORBIDDEN)
    slurm.sbatch("echo '8|8|afterany:7(unfulfilled)|my run' >> {folder}/queue; exit 1")
    assert case.go_on() == 0
    assert len(slurm.asked("sbatch")) == 1
    assert case.adopted == ["8"]


def test_jobs_that_only_resemble_a_successor_are_none(case, slurm, tmp_path):
    others = [
        "1|1|afterany:77(unfulfilled)|my run",
        "2|2|afterok:7(unfulfilled)|my run",
        "3|3|afterany:7(unfulfilled)|plots",
        "4|4||my run",
    ]
    (tmp_path / "queue").write_text("\n".join(others) + "\n")
    slurm.scontrol(requeue=FORBIDDEN)
    assert case.go_on() == 0
    assert case.adopted == ["8"]


def test_of_an_arrays_task_only_that_task_goes_on(slurm, tmp_path):
    case = Case(tmp_path, job_id="7_3")
    slurm.scontrol(requeue=FORBIDDEN)
    assert case.go_on() == 0
    assert "--dependency=afterany:7_3" in slurm.asked("sbatch")[0]
    assert slurm.asked("sbatch")[0].endswith("--array=3")
    assert case.adopted == ["8_3"]


def test_where_slurm_takes_neither_it_is_said_how_to_go_on(case, slurm, capsys):
    slurm.scontrol(requeue=FORBIDDEN)
    slurm.sbatch("echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1")
    assert case.go_on() == 75
    assert len(slurm.asked("sbatch")) == 1, "asked again in vain"
    said = capsys.readouterr().out
    assert "presently disabled" in said
    assert "violates accounting/QOS policy" in said
    assert "To go on: start the same command again" in said
    assert [event["event"] for event in case.events()] == ["requeue", "ended"]
    assert case.adopted == []


@pytest.mark.parametrize(("restarts", "requests"), [(0, 2), (1, 1)])
def test_a_request_that_was_ended_by_the_jobs_own_end_is_made_again_only_if_it_was_lost(case, slurm, restarts, requests):
    """A job that is preempted without a grace time is COMPLETING, and SIGTERM comes to scontrol, too: both prove nothing."""
    ended = f"[ -e {{folder}}/tried ] && exit 0; echo > {{folder}}/tried; echo {restarts} > {{folder}}/restarts; kill -TERM $$"
    slurm.scontrol(requeue=ended, state="COMPLETING", preempted="2999-01-01T11:00:00")
    assert case.go_on() == 0
    assert len(slurm.asked("scontrol requeue")) == requests


def test_a_run_that_is_through_is_not_requeued_any_more(case, slurm):
    case.requeue.settle()
    assert case.go_on() == 0
    assert slurm.asked("s") == []
    assert case.events() == []


@pytest.mark.parametrize(("grace_s", "waited_s", "cause"), [(0, 0.5, "preemption"), (20, 0.5, "cancelled"), (20, 21.0, "preemption")])
def test_a_job_that_ends_in_the_second_of_its_preemption_was_cancelled_if_that_had_a_grace_time(case, slurm, grace_s, waited_s, cause):
    slurm.scontrol(state="COMPLETING", preempted="2999-01-01T11:00:00", grace_s=grace_s)
    assert case.requeue.decide(["TERM"], 5, waited_s).cause == cause


def test_what_slurm_said_last_counts_down_while_it_says_nothing(case, slurm):
    slurm.scontrol(preempted="2026-01-01T10:00:00")
    first = case.requeue.look().remaining_s
    slurm.write("scontrol", BUSY)
    time.sleep(0.2)
    later = case.requeue.look(0.0)
    assert later.job is not None
    assert 0.2 <= first - later.remaining_s < 30
    assert case.events("scheduler_error")


def test_a_termination_is_not_taken_for_the_end_before_slurm_has_said_why(slurm, tmp_path):
    """A preemption of many jobs at once: the controller is slow, and without an answer the run would be over."""
    case = Case(tmp_path, lead_time_s=20)
    slurm.scontrol(preempted="2026-01-01T10:00:00")
    (slurm.bin / "scontrol").rename(slurm.folder / "later")
    slurm.write("scontrol", f'echo >> {{folder}}/asked; [ $(wc -l < {{folder}}/asked) -gt 7 ] && exec {slurm.folder}/later "$@"; {BUSY}')
    assert case.requeue.decide(["TERM"], 5).cause == "preemption"


def test_where_nobody_knows_whether_it_was_requeued_there_is_no_successor(case, slurm, capsys):
    slurm.scontrol(requeue=BUSY)
    assert case.go_on() == 75
    assert slurm.asked("sbatch") == []
    assert "Slurm did not requeue it (scontrol requeue 7: Unable to contact slurm controller)" in capsys.readouterr().out


def test_a_decision_not_to_go_on_asks_for_nothing(case, slurm, capsys):
    assert case.go_on(StopDecision(False, "enough", 76)) == 76
    assert slurm.asked("s") == []
    assert "saved at step 5 and not requeued: enough. To go on: " in capsys.readouterr().out


def test_submitits_local_controller_is_asked_by_an_exit_code(slurm, tmp_path):
    case = Case(tmp_path, "local")
    assert case.go_on() == 144
    assert slurm.asked("s") == []
    assert len(case.events("requeue")) == 1
