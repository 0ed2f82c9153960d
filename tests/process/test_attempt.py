"""How one attempt begins and ends where Slurm's part is played by commands that answer as it does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcckpt.layout import RunLayout
from hpcckpt.store.ledger import Ledger
from support.fake_slurm import FakeSlurm

SCRIPT = Path(__file__).parents[1] / "scripts" / "attempt.py"


class Case:
    """A run directory, and starts of its job."""

    def __init__(self, folder, environ):
        self.slurm, self.layout, self.environ = FakeSlurm(folder), RunLayout(folder / "run"), environ
        self.layout.root.mkdir()
        self.ledger = Ledger(self.layout.events)

    def start(self, what, number=0, job_id="7"):
        """Run one rank as start `number` of a job."""
        place = {"SLURM_JOB_ID": job_id, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": str(number)}
        environ = self.environ(PATH=f"{self.slurm.bin}:{os.environ['PATH']}", **place)
        argv = [sys.executable, SCRIPT, self.layout.root, what]
        return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120, check=False)

    def kinds(self):
        return [event["event"] for event in self.ledger.events()]


@pytest.fixture
def case(tmp_path, environ):
    return Case(tmp_path, environ)


def test_a_job_that_slurm_starts_again_and_again_without_a_step_forward_ends(case):
    """A preemption without a grace time: nobody who is killed can decide that it was once too often."""
    for generation in range(1, 4):
        case.ledger.append("attempt", generation=generation, job_id="7", incarnation=[generation - 1])
        case.ledger.append("lost", generation=generation, fate="preemption", restarted=True)
    done = case.start("train", number=3)
    assert done.returncode == 76, done.stderr
    assert "nothing was done and not requeued: 3 attempts in a row got no step further (requeue.max_stalled)" in done.stdout
    assert case.kinds()[-2:] == ["attempt", "ended"]
    assert case.slurm.asked("scontrol requeue") == []
    assert case.start("train", job_id="8").returncode == 0, "a person who starts it means it"


def test_what_became_of_an_attempt_without_a_word_is_noted_by_the_next(case):
    case.slurm.write("sacct", "echo NODE_FAIL; echo RUNNING")
    case.ledger.append("attempt", generation=1, job_id="7", incarnation=[0])
    assert case.start("train", number=1).returncode == 0
    (lost,) = [event for event in case.ledger.events() if event["event"] == "lost"]
    assert (lost["fate"], lost["restarted"], lost["generation"]) == ("node_failure", True, 1)
    assert case.kinds()[-1] == "finished"


def test_a_full_disk_at_a_stop_keeps_no_run_from_going_on(case):
    done = case.start("full disk")
    assert done.returncode == 0, done.stderr
    assert "could not be saved; requeueing job 7" in done.stdout
    assert "going on from the checkpoint before" in done.stdout
    assert case.kinds()[-3:] == ["save_failed", "stop", "requeue"]
    assert case.slurm.asked("scontrol requeue") == ["scontrol requeue 7"]


def test_a_script_that_leaves_with_an_exit_code_of_its_own_has_not_been_killed(case):
    assert case.start("leave").returncode == 3
    (failed,) = [event for event in case.ledger.events() if event["event"] == "failed"]
    assert failed["error"] == "SystemExit: 3"
