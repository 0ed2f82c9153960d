"""`python -m hpcckpt.submit` on this machine: real processes, real signals, submitit's real controller."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
SUBMIT = [sys.executable, "-m", "hpcckpt.submit"]


class LocalRun:
    """One run directory, and the submissions to it."""

    def __init__(self, folder: Path, environ, wait_until) -> None:
        self.environ, self.wait_until = environ, wait_until
        self.run_dir = folder / "run"
        self.conf = folder / "exp.yaml"
        self.conf.write_text(f"entrypoint: exact:main\nrun_dir: {self.run_dir}\ncluster: local\nslurm: {{tasks_per_node: 2}}\n")
        self.watchers: list[subprocess.Popen[str]] = []

    @classmethod
    def of(cls, run: "LocalRun", run_dir: Path) -> "LocalRun":
        """Return a point of a sweep."""
        point = copy.copy(run)
        point.run_dir = run_dir
        return point

    def start(self, *settings: str, **extra: str) -> subprocess.Popen[str]:
        """Submit, and return the process that watches the run."""
        watcher = subprocess.Popen(
            [*SUBMIT, f"conf={self.conf}", *settings],
            cwd=SCRIPTS,
            env=self.environ(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.watchers.append(watcher)
        return watcher

    def submit(self, *settings: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Submit and watch to the end."""
        watcher = self.start(*settings, **extra)
        out, err = watcher.communicate(timeout=240)
        return subprocess.CompletedProcess(watcher.args, watcher.returncode, out, err)

    def events(self, kind: str = "") -> list[dict[str, object]]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if kind in ("", event["event"])]

    def wait_for(self, kind: str, count: int = 1) -> dict[str, object]:
        self.wait_until(lambda: len(self.events(kind)) >= count, f"{count} x {kind} in {self.events()}")
        return self.events(kind)[count - 1]

    def latest(self):
        pointer = json.loads((self.run_dir / "checkpoints" / "latest.json").read_text())
        return torch.load(self.run_dir / "checkpoints" / pointer["file"], weights_only=True)

    def controller(self) -> int:
        return int(str(self.events("submitted")[-1]["job_id"]))

    def stop(self) -> None:
        for watcher in self.watchers:
            if watcher.poll() is None:
                watcher.kill()
            watcher.communicate()
        for event in self.events("attempt"):
            kill_group_of(int(str(event["pid"])))


def kill_group_of(pid: int) -> None:
    """Kill a rank and all of its session; the supervisor made one for each submission."""
    try:
        os.killpg(os.getpgid(pid), signal.SIGKILL)
    except ProcessLookupError:
        return


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def run(tmp_path, environ, wait_until):
    local = LocalRun(tmp_path, environ, wait_until)
    yield local
    local.stop()


def test_a_run_that_is_signalled_requeues_itself_and_ends_with_the_bits_of_one_that_was_not(run, tmp_path, environ, wait_until):
    done = run.submit(HPCCKPT_TEST_STOPS="1@3 0@9")
    assert done.returncode == 0, done
    job_id = done.stdout.splitlines()[0]
    assert job_id.isdigit()
    assert [event["job_id"] for event in run.events("attempt")] == [job_id] * 3
    assert [event["restart_count"] for event in run.events("attempt")] == [0, 1, 2]
    assert [event["step"] for event in run.events("stop")] == [event["step"] for event in run.events("restored")][1:]

    (tmp_path / "other").mkdir()
    other = LocalRun(tmp_path / "other", environ, wait_until)
    assert other.submit().returncode == 0
    ours, theirs = run.latest(), other.latest()
    assert ours["step"] == theirs["step"] == 14
    assert all(torch.equal(ours["model_state_dict"][key], value) for key, value in theirs["model_state_dict"].items())


def test_more_requeues_than_submitits_controller_allows_still_finish(run):
    done = run.submit("args.epochs=3", HPCCKPT_TEST_STOPS=" ".join(f"0@{step}" for step in range(2, 17, 2)))
    assert done.returncode == 0, done
    assert len(run.events("attempt")) > 6, "submitit's controller starts tasks six times"
    assert run.latest()["step"] == 21


def test_an_exception_in_one_rank_fails_the_run_on_all_ranks_and_is_not_requeued(run):
    done = run.submit(HPCCKPT_TEST_RAISES="1@4")
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug in the training script" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    job_id = done.stdout.splitlines()[0]
    log = (run.run_dir / "logs" / f"{job_id}_1_log.out").read_text()
    assert 'raise ZeroDivisionError("a bug in the training script")' in log
    assert len(run.events("attempt")) == 1
    assert not run.events("requeue")
    assert not run.events("finished")


def test_a_rank_that_is_killed_ends_the_run_and_the_same_command_goes_on(run):
    done = run.submit("checkpoint.every_steps=2", HPCCKPT_TEST_KILLS="1@6")
    assert done.returncode == 1
    assert not run.events("finished")
    again = run.submit("checkpoint.every_steps=2")
    assert again.returncode == 0, again
    assert run.events("restored")[-1]["step"] == 4
    assert run.latest()["step"] == 14


def test_ctrl_c_stops_watching_only_and_says_how_to_come_back(run):
    watcher = run.start("args.step_s=0.1")
    run.wait_for("restored")
    watcher.send_signal(signal.SIGINT)
    _out, err = watcher.communicate(timeout=20)
    assert watcher.returncode == 130
    assert "goes on" in err
    assert "tail -f" in err
    run.wait_for("finished")
    assert run.latest()["step"] == 14


def test_a_second_submission_to_a_directory_in_use_is_refused_with_the_first_ones_job_id(run):
    run.start("args.step_s=0.2")
    run.wait_for("restored")
    config = (run.run_dir / "config.yaml").read_bytes()
    second = run.submit("args.step_s=0")
    assert second.returncode == 2
    assert f"job {run.controller()} still waits or runs" in second.stderr
    assert (run.run_dir / "config.yaml").read_bytes() == config
    assert len(run.events("submitted")) == 1


def test_resume_epoch_goes_on_after_that_epoch_and_later_checkpoints_are_kept_apart(run):
    assert run.submit("args.epochs=4", "checkpoint.keep_last=4").returncode == 0
    whole = run.latest()
    again = run.submit("args.epochs=4", "checkpoint.keep_last=4", "resume.epoch=1", HPCCKPT_TEST_STOPS="0@24")
    assert again.returncode == 0, again
    assert [event["epoch"] for event in run.events("restored")] == [0, 2, 3], "the requeue must not rewind again"
    superseded = {path.name for path in (run.run_dir / "checkpoints" / "superseded").glob("*.pt")}
    assert superseded == {"checkpoint_epoch0002.pt", "checkpoint_epoch0003.pt"}
    assert all(torch.equal(run.latest()["model_state_dict"][key], value) for key, value in whole["model_state_dict"].items())
    assert "resume:\n  from: latest\n  epoch: null" in (run.run_dir / "config.yaml").read_text()


def test_a_finished_run_ends_at_once_and_goes_on_when_epochs_are_raised(run):
    assert run.submit().returncode == 0
    assert run.submit().returncode == 0
    assert run.latest()["step"] == 14
    assert run.submit("args.epochs=3").returncode == 0
    assert run.latest()["step"] == 21


def test_a_run_without_progress_gives_up_and_says_why(run):
    # Signalled in what comes before the first step, in every attempt.
    done = run.submit("requeue.max_stalled=2", "args.poll_first=true", HPCCKPT_TEST_STOPS="0@first0 0@first1 0@first2 0@first3")
    assert done.returncode == 1
    assert "2 attempts in a row got no step further (requeue.max_stalled)" in done.stderr
    assert len(run.events("attempt")) == 2


def test_requeueing_can_be_turned_off(run):
    done = run.submit("requeue.enabled=false", HPCCKPT_TEST_STOPS="0@3")
    assert done.returncode == 1
    assert "requeue.enabled is false" in done.stderr
    assert len(run.events("attempt")) == 1
    assert run.latest()["step"] in (3, 4)


def test_the_points_of_a_sweep_run_one_after_another_and_one_that_fails_is_no_reason_to_leave_out_the_next(run):
    done = run.submit("--sweep", "args.step_s=text,0", "args.epochs=1", "slurm.tasks_per_node=1", "slurm.nodes=1-4")
    assert done.returncode == 1, done
    points = [LocalRun.of(run, run.run_dir / f"args.step_s={value}") for value in ("text", "0")]
    ids = [str(point.controller()) for point in points]
    lines = done.stdout.splitlines()
    assert lines[:2] == [ids[0], f"{ids[0]} {points[0].run_dir}"]
    assert lines.index(f"{ids[1]} {points[1].run_dir}") == lines.index(ids[1]) + 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("hpcckpt: the run did not finish: rank 0 failed: TypeError")
    assert not points[0].events("finished")
    assert points[1].events("finished")
    assert points[1].events("submitted")[0]["time"] > points[0].events("failed")[0]["time"]


def test_no_process_outlives_a_run(run):
    assert run.submit().returncode == 0
    pids = [int(str(event["pid"])) for event in run.events("attempt")] + [run.controller()]
    run.wait_until(lambda: not any(is_alive(pid) for pid in pids), f"{pids} to end")
