"""What a batch script does behind a failed srun, over commands that answer as Slurm does; tests/slurm kills real ranks."""

import os
import socket
import subprocess
import sys

import pytest
from submitit.core.utils import DelayedSubmission

from hpcckpt.layout import RunLayout
from hpcckpt.policy import last_attempt
from hpcckpt.store.ledger import Ledger
from hpcckpt.task import RankTask
from support.fake_slurm import FakeSlurm

CONFIG = "name: some\nentrypoint: train:main\n"


class Case:
    """A run directory with a ledger, and a batch script whose srun has failed."""

    def __init__(self, tmp_path):
        self.slurm = FakeSlurm(tmp_path)
        self.layout = RunLayout(tmp_path / "run")
        self.layout.root.mkdir()
        self.layout.config.write_text(CONFIG)
        self.ledger = Ledger(self.layout.events)
        self.ledger.append("submitted", job_id="7")

    def attempt(self, *events, start=0, **fields):
        """Note an attempt of job 7, and what it said last."""
        self.ledger.append("attempt", generation=start + 1, job_id="7", incarnation=[start])
        for event in events:
            self.ledger.append(event, generation=start + 1, **fields)

    def after(self, status=1, start=0, **environ):
        """Return what `python -m hpcckpt.after` did, as the job's start number `start`."""
        asked = {"SLURM_JOB_ID": "7", **({"SLURM_RESTART_COUNT": str(start)} if start else {}), **environ}
        return subprocess.run(
            [sys.executable, "-m", "hpcckpt.after", str(self.layout.root), str(status)],
            env={**os.environ, "PATH": str(self.slurm.bin), **asked},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def allow(self, times):
        self.layout.config.write_text(f"{CONFIG}requeue: {{on_failure: {times}, lead_time_s: 1}}\n")

    def kinds(self):
        """Return the events that it has noted."""
        return [event["event"] for event in self.ledger.events() if event["event"] in ("requeue", "ended", "lost")]


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def test_a_failure_is_not_requeued_by_itself(case):
    case.attempt("failed", rank=1, error="ZeroDivisionError: x")
    done = case.after()
    assert done.returncode == 1
    assert case.slurm.asked("scontrol requeue") == []
    assert "not requeued: a failure is requeued 0 times (requeue.on_failure). To go on: cd " in done.stdout
    assert case.kinds() == ["ended"]


def test_a_failure_is_requeued_as_often_as_it_may_be(case):
    case.allow(1)
    case.attempt("failed", rank=1, error="ZeroDivisionError: x")
    assert case.after().returncode == 0
    assert case.slurm.asked("scontrol requeue") == ["scontrol requeue 7"]
    case.slurm.scontrol(restarts=1)
    case.attempt("failed", rank=1, error="ZeroDivisionError: x", start=1)
    done = case.after(start=1)
    assert done.returncode == 1
    assert len(case.slurm.asked("scontrol requeue")) == 1
    assert "a failure is requeued 1 times (requeue.on_failure), and it was 1 times" in done.stdout
    assert case.kinds() == ["requeue", "ended"]


@pytest.mark.parametrize("word", ["requeue", "ended", "finished", "left"])
def test_what_an_attempt_has_decided_for_itself_stands(case, word):
    case.allow(5)
    case.attempt(word)
    before = case.kinds()
    done = case.after(status=75)
    assert (done.returncode, done.stdout) == (75, "")
    assert case.slurm.asked("scontrol requeue") == []
    assert case.kinds() == before


@pytest.mark.parametrize(
    ("status", "state", "fate"), [(137, "", "killed"), (137, "OUT_OF_MEMORY", "out_of_memory"), (1, "FAILED", "killed"), (1, "", "killed")]
)
def test_processes_that_ended_without_a_word_are_noted(case, status, state, fate):
    case.slurm.write("sacct", f"echo RUNNING; echo {state}")
    case.attempt()
    assert case.after(status).returncode == status
    assert [(event["fate"], event["exit_code"]) for event in case.ledger.events() if event["event"] == "lost"] == [(fate, status)]


def test_the_others_that_fail_of_a_killed_rank_are_not_taken_for_the_cause(case):
    case.attempt("failed", rank=0, error="RuntimeError: Connection closed by peer")
    case.after(137)
    assert case.kinds() == ["lost", "ended"]


def test_ranks_that_did_not_get_as_far_as_an_attempt_have_failed(case):
    case.allow(1)
    case.attempt("requeue")  # the start before this one
    case.slurm.scontrol(restarts=1)
    assert case.after(start=1).returncode == 0
    assert case.slurm.asked("scontrol requeue") == ["scontrol requeue 7"]


def test_a_job_in_preemption_is_requeued_whatever_its_ranks_died_of(case):
    case.slurm.scontrol(preempted="2026-01-01T10:00:00")
    case.attempt("failed", rank=1, error="RuntimeError: x")
    assert case.after().returncode == 0
    assert case.slurm.asked("scontrol requeue") == ["scontrol requeue 7"]
    assert [event["cause"] for event in case.ledger.events() if event["event"] == "requeue"] == ["preemption"]


def test_a_cancelled_job_stays_cancelled(case):
    case.allow(5)
    case.slurm.scontrol(state="COMPLETING")
    case.attempt()
    done = case.after(143)
    assert done.returncode == 143
    assert case.slurm.asked("scontrol requeue") == []
    assert "the job was cancelled" in done.stdout


def test_on_a_lost_node_the_start_that_has_taken_over_is_left_alone(case):
    case.allow(5)
    case.slurm.scontrol(restarts=1)
    case.attempt()
    case.after()
    assert case.slurm.asked("scontrol requeue") == []


@pytest.mark.parametrize("is_up", [False, True])
def test_a_node_that_is_gone_is_no_failure_of_the_runs(case, is_up):
    with socket.create_server(("127.0.0.1", 0)) as here, socket.create_server(("127.0.0.1", 0)) as there:
        ports = [server.getsockname()[1] for server in (here, there)]
        if not is_up:
            there.close()
        case.slurm.scontrol(node="\n".join(f"NodeName=n{number} NodeAddr=127.0.0.1 Port={port}" for number, port in enumerate(ports, 1)))
        case.attempt("failed", rank=0, error="RuntimeError: Connection closed by peer")
        done = case.after(SLURM_JOB_NODELIST="n[1-2]")
    assert done.returncode == (1 if is_up else 0)
    assert case.slurm.asked("scontrol requeue") == ([] if is_up else ["scontrol requeue 7"])
    requeues = [event["cause"] for event in case.ledger.events() if event["event"] == "requeue"]
    assert requeues == ([] if is_up else ["node_failure"]), "not a failure: it is not counted by requeue.on_failure"
    assert [(event["fate"], event["nodes"]) for event in case.ledger.events() if event["event"] == "lost"] == (
        [] if is_up else [("node_failure", ["n2"])]
    )


def test_what_torchruns_ranks_have_decided_stands_in_later_starts_too(case):
    """Their restart_count is torchrun's own, and begins at 0 in each start of the job."""
    case.allow(5)
    case.ledger.append("attempt", generation=2, job_id="7", restart_count=0, incarnation=[1, 0])
    case.ledger.append("ended", generation=2)
    assert case.after(status=75, start=1).returncode == 75
    assert case.slurm.asked("scontrol requeue") == []


def test_a_successor_of_a_script_of_ones_own_needs_nothing_of_submitits(case):
    case.allow(1)
    case.slurm.scontrol(requeue="echo 'Requested operation is presently disabled for job 7' >&2; exit 1")
    case.attempt("failed")
    done = case.after()
    assert (done.returncode, done.stderr) == (0, "")
    assert [event["job_id"] for event in case.ledger.events() if event["event"] == "successor"] == ["8"]


def test_a_successor_of_submitits_finds_its_task(case):
    case.allow(1)
    case.slurm.scontrol(requeue="echo 'Requested operation is presently disabled for job 7' >&2; exit 1")
    case.layout.logs.mkdir()
    (case.layout.logs / "7_submitted.pkl").touch()
    case.attempt("failed")
    assert case.after().returncode == 0
    task = DelayedSubmission.load(case.layout.logs / "8_submitted.pkl")
    assert task.function == RankTask(str(case.layout.root))


def test_nodes_that_cannot_be_reached_at_all_tell_nothing(case):
    """In a container without names, or behind a firewall: a failure of the script's own is no lost node."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    lines = [f"NodeName=n1 NodeAddr=127.0.0.1 Port={port}", "NodeName=n2 NodeAddr=no-such-host.invalid Port=1"]
    case.slurm.scontrol(node="\n".join(lines))
    case.attempt("failed", rank=0, error="ValueError: x")
    assert case.after(SLURM_JOB_NODELIST="n[1-2]").returncode == 1
    assert case.slurm.asked("scontrol requeue") == []


@pytest.mark.parametrize("live", [{"job_id": "8", "incarnation": [0]}, {"job_id": "7", "incarnation": [1]}])
def test_the_word_of_one_that_was_refused_or_overtaken_is_not_taken_for_the_live_attempts(case, live):
    """A second job in the same directory, or an older start on a lost node, fails: that says nothing of who trains there."""
    case.allow(5)
    case.ledger.append("attempt", generation=2, **live)
    assert case.after().returncode == 1
    assert case.slurm.asked("scontrol requeue") == []
    assert last_attempt(case.ledger.events())[1] is None


def test_what_fails_behind_the_agreement_to_be_requeued_is_requeued(case):
    case.attempt()
    case.ledger.append("stop", generation=1, cause="time_limit", requeue=True)
    case.ledger.append("failed", generation=1, rank=0, error="RuntimeError: Connection closed by peer")
    assert case.after().returncode == 0
    assert [event["cause"] for event in case.ledger.events() if event["event"] == "requeue"] == ["time_limit"]


def test_it_needs_no_torch(case):
    case.attempt("failed")
    done = case.after(PYTHONPROFILEIMPORTTIME="1")
    assert "hpcckpt.requeue" in done.stderr
    assert " torch" not in done.stderr


def test_a_configuration_that_cannot_be_read_is_told_without_a_traceback(case):
    case.layout.config.write_text("requeue: {on_failure: often}\nname: x\nentrypoint: a:b\n")
    done = case.after()
    assert done.returncode == 2
    assert "on_failure" in done.stderr
    assert "Traceback" not in done.stderr
