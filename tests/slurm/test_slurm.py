"""The whole loop on a real Slurm of four nodes. Nothing here is simulated."""

import re
import sys
from pathlib import Path

import pytest
import torch

from hpcckpt.environment import expand_nodelist

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS_AN_EPOCH = 12


def test_a_cancelled_job_saves_and_stays_cancelled(start):
    job = start("args.step_s=0.2")
    job.wait_for("restored")
    job.cluster.run("scancel", job.job_id)
    assert job.cluster.wait_for_end(job.job_id) == "CANCELLED"
    assert job.wait_for("stop")["cause"] == "cancelled"
    assert not job.events("requeue")
    assert job.latest()["step"] == job.events("stop")[0]["step"]
    assert re.search(r"not requeued: the job was cancelled\. To go on: cd \S+ && python -m hpcckpt\.submit conf=", job.log(0))


def test_a_checkpoint_by_hand_requeues_the_same_job_and_goes_on_at_the_same_step(start):
    job = start("args.step_s=0.05", "args.epochs=8")
    job.wait_for("restored")
    job.cluster.run("scancel", "--signal=USR1", job.job_id)
    job.wait_for("finished")
    assert job.cluster.wait_for_end(job.job_id) == "COMPLETED"
    assert [event["cause"] for event in job.events("stop")] == ["by_hand"]
    assert [event["job_id"] for event in job.events("attempt")] == [job.job_id] * 2
    assert [event["restart_count"] for event in job.events("attempt")] == [0, 1]
    assert job.events("restored")[1]["step"] == job.events("stop")[0]["step"]
    # Both attempts of every rank are in its one log.
    assert job.log(0).count("hpcckpt: attempt") == 2


@pytest.fixture
def preempt(cluster, shared):
    """A function that takes a job's nodes away from it with a job of higher priority, and waits until Slurm has begun to."""
    script = shared / "urgent.sh"
    script.write_text("#!/bin/bash\n#SBATCH --partition=high --nodes=2 --nodelist=n3,n4 --exclusive --time=1 --output=/dev/null\nsleep 1\n")
    urgent = []

    def take(job):
        urgent.append(cluster.run("sbatch", "--parsable", str(script)).stdout.strip())
        show = ("scontrol", "show", "job", job.job_id)
        cluster.wait_until(
            lambda: re.search(r" PreemptTime=\d| Restarts=[1-9]", cluster.run(*show).stdout), f"job {job.job_id} to be preempted"
        )

    yield take
    for job_id in urgent:
        cluster.run("scancel", job_id)


def test_a_preempted_job_saves_and_requeues_itself_and_ends_as_if_it_had_not_been(start, preempt):
    job = start("slurm.exclude='n1,n2'", "args.step_s=0.2", "args.epochs=5")
    job.wait_for("restored")
    preempt(job)
    job.wait_for("finished")
    assert [stop["cause"] for stop in job.events("stop")] == ["preemption"]
    assert {event["job_id"] for event in job.events("attempt")} == {job.job_id}
    assert job.events("restored")[1]["step"] == job.events("stop")[0]["step"]
    whole = start("args.epochs=5")
    whole.wait_for("finished")
    assert all(torch.equal(job.latest()["model_state_dict"][key], value) for key, value in whole.latest()["model_state_dict"].items())


def test_a_job_that_is_cancelled_while_it_is_being_preempted_stays_cancelled(start, preempt):
    job = start("slurm.exclude='n1,n2'", "args.step_s=3")  # a step long enough for both to come within it
    job.wait_for("restored")
    preempt(job)
    job.cluster.run("scancel", job.job_id)
    assert job.cluster.wait_for_end(job.job_id) == "CANCELLED"
    assert [stop["cause"] for stop in job.events("stop")] == ["cancelled"]
    assert not job.events("requeue")


def test_an_exception_in_one_rank_fails_the_job_on_all_ranks_and_is_not_requeued(cluster, start):
    scripts = Path(__file__).parents[1] / "scripts"
    job = start("entrypoint=raising:on_rank_2", PYTHONPATH=str(scripts))
    assert cluster.wait_for_end(job.job_id) == "FAILED"
    assert "ZeroDivisionError: a bug in the training script" in job.log(2, "err")
    assert next(event["rank"] for event in job.events("failed")) == 2
    assert not job.events("requeue")
    assert len(job.events("attempt")) == 1


def test_ranks_are_spread_over_the_nodes_as_slurm_says(start):
    job = start("args.epochs=1")
    job.wait_for("finished")
    (attempt,) = job.events("attempt")
    assert (attempt["world_size"], attempt["num_nodes"]) == (4, 2)
    for rank, place in enumerate(["0(2), node=0(2)", "1(2), node=0(2)", "0(2), node=1(2)", "1(2), node=1(2)"]):
        assert f"local_rank={place}" in job.log(rank, "err") + job.log(rank)


def test_variables_of_a_surrounding_allocation_do_not_reach_the_job(start):
    leaked = {"SLURM_NTASKS": "7", "SLURM_CPU_BIND": "map_cpu:99", "SLURM_JOB_ID": "1", "SBATCH_SIGNAL": "HUP@1", "SLURM_MEM_PER_NODE": "1"}
    job = start("args.epochs=1", **leaked)
    job.wait_for("finished")
    assert job.events("attempt")[0]["world_size"] == 4


def test_two_jobs_on_the_same_nodes_do_not_meet(start):
    jobs = [start("args.epochs=2", "args.step_s=0.05") for _ in range(2)]
    for job in jobs:
        job.wait_for("finished")
        assert job.cluster.wait_for_end(job.job_id) == "COMPLETED"
        assert job.latest()["step"] == 2 * STEPS_AN_EPOCH


def test_a_refusal_by_sbatch_is_passed_on_and_leaves_nothing(cluster, shared):
    done = cluster.submit(f"run_dir={shared}/refused", "slurm.partition=nowhere")
    assert done.returncode == 3
    assert done.stderr.startswith("hpcckpt: sbatch refused the job: ")
    assert "invalid partition specified: nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (shared / "refused").exists()


def test_a_directory_in_use_is_refused_with_the_job_that_uses_it(start):
    job = start("args.step_s=0.5")
    config = (job.run_dir / "config.yaml").read_bytes()
    done = job.cluster.submit(f"run_dir={job.run_dir}")
    assert done.returncode == 2
    assert f"job {job.job_id} still waits or runs" in done.stderr
    assert (job.run_dir / "config.yaml").read_bytes() == config


def test_a_script_started_without_srun_is_told_so(cluster, shared):
    script = shared / "no-srun.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH -N2 --ntasks-per-node=2\n{sys.executable} -c '{WITHOUT_SRUN}'\n")
    done = cluster.run("sbatch", "--parsable", f"--output={shared}/no-srun.out", str(script))
    assert done.returncode == 0, done.stderr
    assert cluster.wait_for_end(done.stdout.strip()) == "FAILED"
    assert "this process was not started by srun and would train alone: put `srun` before `python`" in (shared / "no-srun.out").read_text()


WITHOUT_SRUN = "import os; from hpcckpt import TaskEnvironment; TaskEnvironment.from_environ(os.environ)"


@pytest.mark.parametrize("nodelist", ["n1", "n[1-4]", "n[03-07,9],m1", "rack1n[2,5-6]", "login1,n[1-2]", "a[1-2]b[3-4]"])
def test_the_hosts_of_a_node_list_are_those_that_slurm_names(cluster, nodelist):
    assert expand_nodelist(nodelist) == cluster.run("scontrol", "show", "hostnames", nodelist).stdout.split()


def test_time_limits_requeue_the_same_job_and_the_weights_are_those_of_an_uninterrupted_run(start, long_job):
    """The mission, whole: 2 nodes x 2 tasks, a limit of two minutes, a run longer than that."""
    whole = start("args.epochs=18")
    whole.wait_for("finished")
    long_job.wait_for("finished", timeout_s=400)
    assert long_job.cluster.wait_for_end(long_job.job_id) == "COMPLETED"

    stops = long_job.events("stop")
    assert len(stops) >= 2
    assert {stop["cause"] for stop in stops} == {"time_limit"}
    assert {event["job_id"] for event in long_job.events("attempt")} == {long_job.job_id}
    assert [event["restart_count"] for event in long_job.events("attempt")] == list(range(len(stops) + 1))
    assert [event["step"] for event in long_job.events("restored")] == [0, *(stop["step"] for stop in stops)]

    ours, theirs = long_job.latest(), whole.latest()
    assert ours["step"] == theirs["step"] == 18 * STEPS_AN_EPOCH
    assert ours["model_state_dict"].keys() == theirs["model_state_dict"].keys()
    assert all(torch.equal(ours["model_state_dict"][key], value) for key, value in theirs["model_state_dict"].items())


def test_resume_epoch_goes_on_after_the_chosen_epoch(start):
    first = start("args.epochs=4", "checkpoint.keep_last=4", run_dir="chosen")
    assert first.cluster.wait_for_end(first.job_id) == "COMPLETED"
    whole = first.latest()
    refused = first.cluster.submit(f"run_dir={first.run_dir}", "resume.epoch=7")
    assert refused.returncode == 2
    assert "there are the epochs 0, 1, 2, 3" in refused.stderr

    second = start("args.epochs=4", "checkpoint.keep_last=4", "resume.epoch=1", run_dir="chosen")
    assert second.cluster.wait_for_end(second.job_id) == "COMPLETED"
    assert second.events("restored")[-1]["epoch"] == 2
    assert re.search(r"goes on behind the end of epoch 1, step 24 of .*checkpoint_epoch0001\.pt", second.log(0))
    assert sorted(path.name for path in (second.run_dir / "checkpoints" / "superseded").glob("*.pt")) == [
        "checkpoint_epoch0002.pt",
        "checkpoint_epoch0003.pt",
    ]
    assert all(torch.equal(second.latest()["model_state_dict"][key], value) for key, value in whole["model_state_dict"].items())
