"""A sweep on a real Slurm: one array, whose tasks are runs that requeue by themselves."""

import json
import sys

import pytest
import torch

from support.slurm_jobs import Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SWEEP = ("--sweep", "args.lr=0.01,0.003", "seed=1,2")
SIZE = ("slurm.nodes=1", "slurm.tasks_per_node=1", "args.epochs=4")
OWN = [f"args.lr={lr},seed={seed}" for lr in (0.01, 0.003) for seed in (1, 2)]
STEPS = 4 * 47


def test_of_an_array_of_four_the_two_that_are_hit_requeue_by_themselves_and_all_end_with_the_bits_of_single_runs(cluster, shared):
    done = cluster.submit(*SWEEP, *SIZE, f"run_dir={shared / 'array'}", "args.step_s=0.08")
    assert done.returncode == 0, done.stderr
    array, *points = done.stdout.splitlines()
    jobs = [Job(cluster, shared / "array" / own, f"{array}_{index}") for index, own in enumerate(OWN)]
    assert points == [f"{job.job_id} {job.run_dir}" for job in jobs]

    hit = [jobs[1], jobs[2]]
    # The second with all of its processes: the batch shell, too.
    for job, options in zip(hit, ([], ["--full"]), strict=True):
        job.wait_for("restored")
        assert cluster.run("scancel", "--signal=USR1", *options, job.job_id).returncode == 0
    single = cluster.submit(*SWEEP, *SIZE, f"run_dir={shared / 'single'}", "cluster=local")
    assert single.returncode == 0, single.stderr
    for job in jobs:
        job.wait_for("finished")
        assert cluster.wait_for_end(job.job_id) == "COMPLETED"

    for job in jobs:
        assert [event["cause"] for event in job.events("stop")] == ["by_hand"] * (job in hit)
        assert [event["restart_count"] for event in job.events("attempt")] == [0, 1][: 1 + (job in hit)]
        assert {event["job_id"] for event in job.events("attempt")} == {job.job_id}
        # Both attempts in one log, in the run's own folder, and nobody else's.
        assert job.log(0).count("hpcckpt: attempt") == 1 + (job in hit)
        assert not [path.name for path in (job.run_dir / "logs").glob("*_log.*") if not path.name.startswith(f"{job.job_id}_0_log.")]
        ours, theirs = job.latest(), Job(cluster, shared / "single" / job.run_dir.name, "").latest()
        assert ours["step"] == theirs["step"] == STEPS
        assert all(torch.equal(ours["model_state_dict"][key], value) for key, value in theirs["model_state_dict"].items())

    told = cluster.run(sys.executable, "-m", "hpcckpt.cli.main", "status", "--json", str(shared / "array"))
    rows = {row["run"]: (row["state"], row["job"], row["attempts"], row["step"]) for row in json.loads(told.stdout)}
    assert rows == {str(job.run_dir): ("finished", job.job_id, 1 + (job in hit), STEPS) for job in jobs}


def test_a_point_of_an_array_that_fails_is_looked_after_and_the_others_go_on(cluster, shared):
    done = cluster.submit("--sweep", "args.lr=0.01,text", *SIZE, f"run_dir={shared / 'failing'}")
    assert done.returncode == 0, done.stderr
    array = done.stdout.splitlines()[0]
    good, bad = (Job(cluster, shared / "failing" / f"args.lr={lr}", f"{array}_{index}") for index, lr in enumerate(("0.01", "text")))
    assert cluster.wait_for_end(bad.job_id) == "FAILED"
    assert cluster.wait_for_end(good.job_id) == "COMPLETED"
    assert "TypeError" in bad.log(0, "err")
    # Of the batch shell, whose words are beside those of the rank.
    assert f"hpcckpt.submit conf={bad.run_dir}/config.yaml" in bad.log(0).replace("'", "")
    assert not bad.events("requeue")
    assert not good.events("ended")


def test_any_number_of_nodes_of_a_range_will_do(cluster, shared):
    done = cluster.submit("slurm.nodes=2-3", "slurm.tasks_per_node=1", "args.epochs=1", f"run_dir={shared / 'range'}")
    assert done.returncode == 0, done.stderr
    job = Job(cluster, shared / "range", done.stdout.strip())
    assert cluster.wait_for_end(job.job_id) == "COMPLETED"
    (attempt,) = job.events("attempt")
    assert attempt["num_nodes"] == attempt["world_size"]
    assert attempt["num_nodes"] in (2, 3)
