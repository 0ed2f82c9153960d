"""Whatever Slurm does to a job, case by case, on a real Slurm.

The run goes on, ends with the same weights, and never goes on when it should not. The cases wait far more than they work, so several
run at a time; each test looks at what became of its case. What was lost and how long it took is printed (`pytest -rP`).
"""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support.slurm_jobs import Cluster, Job, devcluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

EPOCHS, STEPS = 4, 32
SCRIPTS = Path(__file__).parents[1] / "scripts"
# Of two ranks each; the signal of a preemption is SIGTERM here, as it is on most clusters.
OPTIONS = ("--nodes", "16", "--set", "SlurmdTimeout=5", "--set", "SlurmctldParameters=cloud_dns")
PARTITIONS = {
    "no_grace": "PreemptMode=REQUEUE GraceTime=0",
    "cancels": "PreemptMode=CANCEL GraceTime=20",
    "cancels_no_grace": "PreemptMode=CANCEL GraceTime=0",
}


@dataclass
class Lab:
    """A cluster on which things go wrong, and the runs on it."""

    cluster: Cluster
    folder: Path
    # The run that is interrupted in one place after the other.
    chain: Job | None = None

    def submit(self, name: str, *settings: str, entrypoint: str = "main", nodes: int = 1, **extra: str) -> Job:
        """Submit a run of two ranks."""
        folder = self.folder / name
        file = folder.with_suffix(".yaml")
        file.write_text(f"name: {name}\nentrypoint: interrupted:{entrypoint}\nargs: {{epochs: {EPOCHS}, step_s: 0.3, places: []}}\n")
        done = self.cluster.submit(
            # What is preempted is all jobs on a node.
            "slurm.extra.exclusive=true",
            *(f"run_dir={folder}", f"slurm.nodes={nodes}", f"slurm.tasks_per_node={2 // nodes}", "slurm.time_min=10", *settings),
            conf=str(file),
            PYTHONPATH=str(SCRIPTS),
            **extra,
        )
        assert done.returncode == 0, done.stderr
        return Job(self.cluster, folder, done.stdout.splitlines()[0])

    def run(self, *argv: str) -> str:
        """Run a command of Slurm's; returns what it says."""
        done = self.cluster.run(*argv)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def preempt(self, job: Job) -> None:
        """Have a job of higher priority take the nodes of a job."""
        nodes = self.fields(job)["NodeList"]
        count = str(len(self.run("scontrol", "show", "hostnames", nodes).split()))
        self.run(
            *("sbatch", "--parsable", "--partition=high", f"--nodelist={nodes}", f"--nodes={count}", "--exclusive", "--time=1"),
            *("--output=/dev/null", "--wrap=sleep 1"),
        )

    def fields(self, job: Job) -> dict[str, str]:
        """Return what Slurm says of a job."""
        words = self.run("scontrol", "show", "job", job.job_id).split()
        return dict(word.split("=", maxsplit=1) for word in words if "=" in word)

    def wait_for_steps(self, job: Job, steps: int) -> None:
        """Wait until a run has made that many steps, over all attempts."""
        self.cluster.wait_until(lambda: made(job) >= steps, lambda: f"{steps} steps, has made {made(job)}\n{job.story()}", 120)

    def pids(self, job: Job, rank: int) -> list[int]:
        """Return the processes of one rank, wherever they run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes().split(b"\0")
                is_rank = f"SLURM_PROCID={rank}".encode() in environ and b"SLURM_CONF=" + self.conf in environ
                if is_rank and f"SLURM_JOB_ID={job.job_id}".encode() in environ and b"submitit" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def daemons(self, job: Job, node: str) -> list[int]:
        """Return Slurm's own processes for a job on a node."""
        net = os.stat(f"/proc/{self.cluster.said['processes'][f'holder-{node}']['pid']}/ns/net").st_ino
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_of_job = (folder / "cmdline").read_bytes().startswith(f"slurmstepd: [{job.job_id}.".encode())
                if is_of_job and (folder / "ns" / "net").stat().st_ino == net:
                    found.append(int(folder.name))
        return found

    @property
    def conf(self) -> bytes:
        return self.cluster.environ["SLURM_CONF"].encode()

    def kill(self, process: str) -> None:
        """Kill one of the cluster's own programs."""
        os.kill(self.cluster.said["processes"][process]["pid"], signal.SIGKILL)


# Of interrupted.py; one of two ranks is signalled.
CHAIN = ["step", "restore", "evaluation", "save", "step step", "epoch", "start step evaluation"]

CASES: dict[str, Callable[[Lab], Job]] = {}


def case(function: Callable[[Lab], Job]) -> Callable[[Lab], Job]:
    """Have a case begun with the others."""
    CASES[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def lab(environ: Callable[..., dict[str, str]], wait_until: Callable[..., None], shared: Path) -> Iterator[Lab]:
    with devcluster("causes", environ, wait_until, *OPTIONS) as cluster:
        one = Lab(cluster, shared)
        for name, options in PARTITIONS.items():
            one.run("scontrol", "create", f"PartitionName={name}", "Nodes=ALL", "PriorityTier=1", *options.split())
        # Takes minutes, most of which the scheduler waits: beside the others, from the beginning.
        one.chain = one.submit("chain", "args.epochs=16", "args.step_s=0", f"args.places={CHAIN * 3}", "requeue.max_stalled=30", nodes=2)
        yield one


@pytest.fixture(scope="module")
def become(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Job]]:
    """A function that returns the run of a case, when the case is over; those of the chosen tests are begun together."""
    chosen = {item.originalname.removeprefix("test_") for item in request.session.items if isinstance(item, pytest.Function)}
    # First those that Slurm takes its time to notice.
    slow = {"a_rank_is_frozen_when_all_are_to_stop", "slurmd_dies_and_its_ranks_live_on", "a_node_dies", "the_network_of_a_node_is_cut"}
    with ThreadPoolExecutor(5) as pool:
        names = sorted(chosen & CASES.keys(), key=lambda name: name not in slow)
        futures: dict[str, Future[Job]] = {name: pool.submit(CASES[name], lab) for name in names}
        try:
            yield lambda name: futures[name].result()
        finally:
            for future in futures.values():
                future.cancel()


@pytest.fixture
def job(become: Callable[[str], Job], request: pytest.FixtureRequest) -> Job:
    """The run of the case that is named as the test is."""
    return become(request.node.originalname.removeprefix("test_"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Job:
    """The run that nothing happens to."""
    one = lab.submit("whole", "args.step_s=0")
    one.wait_for("finished")
    return one


def made(job: Job) -> int:
    """Return how many steps were made, those made again counted again."""
    path = job.run_dir / "steps"
    return path.stat().st_size if path.exists() else 0


def assert_same(job: Job, whole: Job, lost: int = 0) -> None:
    """Assert that a run has finished with the weights of the undisturbed one, having lost at most so many steps."""
    ours, theirs = job.latest(), whole.latest()
    assert ours["step"] == theirs["step"] == STEPS
    assert all(torch.equal(ours["model_state_dict"][key], value) for key, value in theirs["model_state_dict"].items())
    assert len(job.events("finished")) == 1
    again = made(job) - STEPS
    causes = [
        f"{event['event']}: {event.get('cause') or event.get('fate')}"
        for event in job.events()
        if event["event"] in ("stop", "lost", "failed")
    ]
    requeues, attempts = [event["time"] for event in job.events("requeue")], [event["time"] for event in job.events("attempt")][1:]
    signalled = [event["time"] - event["waited_s"] for event in job.events("stop") if event.get("waited_s") is not None]
    to_requeue = [f"{requeue - first:.2f}" for first, requeue in zip(signalled, requeues, strict=False)]
    print(f"{job.run_dir.name}: {causes}, steps lost {again}, signal to requeue {to_requeue} s, requeue to restart "
          f"{[f'{start - asked:.0f}' for asked, start in zip(requeues, attempts, strict=False)]} s")  # fmt: skip
    assert 0 <= again <= lost


def ids(job: Job) -> list[str]:
    """Return the job ids of all attempts."""
    return [str(event["job_id"]) for event in job.events("attempt")]


def submit_and_train(lab: Lab, name: str, *settings: str, steps: int = 5, **options: object) -> Job:
    """Submit a run, and wait until it has made some steps."""
    job = lab.submit(name, *settings, **options)  # type: ignore[arg-type]
    lab.wait_for_steps(job, steps)
    return job


# A job of higher priority ---------------------------------------------------------------------------------------------


@case
def preempted_with_sigterm_and_a_grace_time(lab: Lab) -> Job:
    job = submit_and_train(lab, "sigterm", "slurm.partition=low")
    lab.preempt(job)
    job.wait_for("finished")
    return job


def test_preempted_with_sigterm_and_a_grace_time(job, whole):
    assert [(stop["cause"], stop["signals"]) for stop in job.events("stop")] == [("preemption", ["TERM"])]
    assert ids(job) == [job.job_id] * 2
    assert_same(job, whole)


@case
def preempted_without_a_grace_time(lab: Lab) -> Job:
    job = submit_and_train(lab, "no-grace", "slurm.partition=no_grace")
    lab.preempt(job)
    job.wait_for("finished")
    return job


def test_preempted_without_a_grace_time(job, whole):
    """Slurm has requeued it before the first signal came; what is between SIGTERM and SIGKILL is enough for a checkpoint."""
    assert [stop["cause"] for stop in job.events("stop")] == ["requeued"]
    assert [event["by"] for event in job.events("requeue")] == ["Slurm"]
    assert ids(job) == [job.job_id] * 2
    assert [event["restart_count"] for event in job.events("attempt")] == [0, 1]
    assert_same(job, whole)


@case
def preempted_where_preemption_cancels(lab: Lab) -> Job:
    job = submit_and_train(lab, "cancels", "slurm.partition=cancels")
    lab.preempt(job)
    job.wait_for("finished")
    return job


def test_preempted_where_preemption_cancels(job, whole):
    assert [stop["cause"] for stop in job.events("stop")] == ["preemption"]
    assert ids(job) == [job.job_id] * 2
    assert_same(job, whole)


@case
def preempted_where_preemption_cancels_without_a_grace_time(lab: Lab) -> Job:
    job = submit_and_train(lab, "cancels-no-grace", "slurm.partition=cancels_no_grace")
    lab.preempt(job)
    job.wait_for("finished")
    return job


def test_preempted_where_preemption_cancels_without_a_grace_time(job, whole):
    assert {stop["cause"] for stop in job.events("stop")} == {"preemption"}
    assert ids(job) == [job.job_id] * 2
    assert_same(job, whole)


@case
def preempted_while_a_rank_hangs(lab: Lab) -> Job:
    job = submit_and_train(lab, "hangs", "slurm.partition=low", "args.places=[hang]", steps=1)
    lab.preempt(job)
    job.wait_for("finished")
    return job


def test_preempted_while_a_rank_hangs(job, whole):
    """It can never come to the stop, nor can the others: rank 0 goes on from the newest checkpoint before its time is over."""
    (overdue,) = job.events("overdue")
    assert re.fullmatch(r"rank 0 at .*; rank 1 at interrupted\.py:\d+ in hang", str(overdue["where"]))
    assert f"the job's time is over\nhpcckpt: not all ranks have come to the stop: {overdue['where']}" in job.log(0)
    assert [stop["cause"] for stop in job.events("stop")] == ["preemption"]
    assert len(job.events("requeue")) == 1
    assert ids(job) == [job.job_id] * 2
    assert_same(job, whole, lost=8)


@case
def a_rank_is_frozen_when_all_are_to_stop(lab: Lab) -> Job:
    job = lab.submit("frozen", entrypoint="stuck")
    job.wait_for("restored")
    os.kill(lab.pids(job, 1)[0], signal.SIGSTOP)
    lab.run("scancel", "--signal=USR1", job.job_id)
    job.wait_for("restored", 2)
    lab.run("scancel", job.job_id)
    return job


def test_a_rank_is_frozen_when_all_are_to_stop(job):
    """The others are held at a `run.poll` until it is given up: long before the job's time is over, and a stop is what was asked for."""
    (overdue,) = job.events("overdue")
    assert re.search(r"there is no answer in 60 s from rank 1 \(.*\): gone, or it hangs", str(overdue["where"]))
    assert [event["cause"] for event in job.events("requeue")] == ["by_hand"]
    assert [event["restart_count"] for event in job.events("attempt")] == [0, 1]
    assert job.cluster.wait_for_end(job.job_id) == "CANCELLED"


# No way back for the same job -----------------------------------------------------------------------------------------


@case
def requeueing_is_forbidden(lab: Lab) -> Job:
    job = submit_and_train(lab, "forbidden")
    lab.run("scontrol", "update", f"JobId={job.job_id}", "Requeue=0")
    for _ in range(2):
        lab.run("scancel", "--signal=USR1", job.job_id)
    job.wait_for("finished")
    return job


def test_requeueing_is_forbidden(job, whole):
    (successor,) = job.events("successor")
    assert "presently disabled" in str(successor["refusal"])
    assert ids(job) == [job.job_id, successor["job_id"]]
    assert job.cluster.wait_for_end(job.job_id) == "COMPLETED"
    assert_same(job, whole)


@case
def requeueing_is_not_permitted(lab: Lab) -> Job:
    """Requests by another user than the job's."""
    folder = lab.folder / "nobody"
    folder.mkdir()
    for closed in (lab.cluster.root, lab.cluster.root / "etc", lab.cluster.root / "run"):
        closed.chmod(0o755)
    scontrol = lab.run("which", "scontrol")
    script = folder / "scontrol"
    nobody = "setpriv --reuid=65534 --clear-groups"
    script.write_text(f'#!/bin/sh\ncase $1 in requeue) exec {nobody} {scontrol} "$@";; *) exec {scontrol} "$@";; esac\n')
    script.chmod(0o755)
    job = submit_and_train(lab, "not-permitted", PATH=f"{folder}:{lab.cluster.environ['PATH']}")
    lab.run("scancel", "--signal=USR1", job.job_id)
    job.wait_for("finished")
    return job


def test_requeueing_is_not_permitted(job, whole):
    (successor,) = job.events("successor")
    assert "Access/permission denied" in str(successor["refusal"])
    assert ids(job) == [job.job_id, successor["job_id"]]
    assert_same(job, whole)


# Ranks and nodes that die ---------------------------------------------------------------------------------------------


@case
def a_rank_is_killed_twice(lab: Lab) -> Job:
    job = submit_and_train(lab, "killed", "requeue.on_failure=1", "checkpoint.every_steps=4", steps=6)
    for attempt in (1, 2):
        job.wait_for("restored", attempt)
        lab.wait_for_steps(job, made(job) + 2)
        for pid in lab.pids(job, 1):
            os.kill(pid, signal.SIGKILL)
    job.wait_for("ended")
    return job


def test_a_rank_is_killed_twice(job):
    """As the kernel does for want of memory. A failure is requeued as often as `requeue.on_failure` says, by the batch script."""
    assert job.cluster.wait_for_end(job.job_id) == "FAILED"
    assert [(event["fate"], event["exit_code"]) for event in job.events("lost")] == [("killed", 137)] * 2
    assert [event["cause"] for event in job.events("requeue")] == ["failure"]
    assert ids(job) == [job.job_id] * 2
    saved = [event["step"] for event in job.events("saved") if event["generation"] == 1]
    assert job.events("restored")[1]["step"] == saved[-1] >= 4, "what the last checkpoint has"
    assert "requeue.on_failure" in str(job.events("ended")[0]["reason"])


@case
def slurmd_dies_and_its_ranks_live_on(lab: Lab) -> Job:
    job = submit_and_train(lab, "slurmd", "checkpoint.every_steps=4", "args.step_s=1.5", nodes=2, steps=2)
    lab.kill(f"slurmd-{lab.run('scontrol', 'show', 'hostnames', lab.fields(job)['NodeList']).split()[0]}")
    job.wait_for("finished", timeout_s=200)
    return job


def test_slurmd_dies_and_its_ranks_live_on(job, whole):
    """The job starts on other nodes while rank 0 of its first life still runs: that one is fenced off, and requeues nothing."""
    assert [event["restart_count"] for event in job.events("attempt")] == [0, 1]
    assert ids(job) == [job.job_id] * 2
    assert len({event["host"] for event in job.events("attempt")}) == 2
    assert_same(job, whole, lost=STEPS)
    assert job.cluster.wait_for_end(job.job_id) == "COMPLETED"


@case
def a_node_dies(lab: Lab) -> Job:
    job = submit_and_train(lab, "node", "checkpoint.every_steps=4", nodes=2, steps=6)
    node = lab.run("scontrol", "show", "hostnames", lab.fields(job)["NodeList"]).split()[1]
    lab.kill(f"slurmd-{node}")
    for pid in (*lab.daemons(job, node), *lab.pids(job, 1)):
        os.kill(pid, signal.SIGKILL)
    job.wait_for("finished", timeout_s=200)
    return job


def test_a_node_dies(job, whole):
    """Rank 0 fails of it within milliseconds, and Slurm would call that a failure of the job's own."""
    lost = [event["fate"] for event in job.events("lost")]
    # On a busy machine Slurm may find the node gone and start the job again before srun has given up.
    assert lost in (["node_failure"], [])
    assert len(job.events("requeue")) == len(lost)
    assert ids(job) == [job.job_id] * 2
    assert_same(job, whole, lost=8)


@case
def the_network_of_a_node_is_cut(lab: Lab) -> Job:
    job = submit_and_train(lab, "network", "checkpoint.every_steps=4", nodes=2, steps=6)
    node = lab.run("scontrol", "show", "hostnames", lab.fields(job)["NodeList"]).split()[1]
    interface = lab.cluster.said["interfaces"][node]
    subprocess.run(["ip", "link", "set", interface, "down"], check=True)
    job.wait_for("finished", timeout_s=200)
    subprocess.run(["ip", "link", "set", interface, "up"], check=True)
    return job


def test_the_network_of_a_node_is_cut(job, whole):
    assert ids(job) == [job.job_id] * 2
    assert_same(job, whole, lost=STEPS)


# By hand --------------------------------------------------------------------------------------------------------------


@case
def asked_by_the_stop_file(lab: Lab) -> Job:
    job = submit_and_train(lab, "file")
    (job.run_dir / "stop").write_text("requeue\n")
    job.wait_for("restored", 2)
    (job.run_dir / "stop").touch()
    job.wait_for("ended")
    return job


def test_asked_by_the_stop_file(job):
    assert job.cluster.wait_for_end(job.job_id) == "FAILED"  # exit code 75: somebody has to start it again
    assert [stop["cause"] for stop in job.events("stop")] == ["by_hand", "stop_file"]
    assert ids(job) == [job.job_id] * 2
    assert job.latest()["step"] == job.events("stop")[1]["step"]
    assert not (job.run_dir / "stop").exists()


@case
def no_attempt_gets_any_further(lab: Lab) -> Job:
    job = lab.submit("stuck", "requeue.max_stalled=2", entrypoint="stuck")
    for number in (1, 2):
        job.wait_for("restored", number)
        lab.run("scancel", "--signal=USR1", job.job_id)
        job.wait_for("stop", number)
    job.wait_for("ended")
    return job


def test_no_attempt_gets_any_further(lab, job):
    assert job.cluster.wait_for_end(job.job_id) == "FAILED"
    assert [event["requeue"] for event in job.events("stop")] == [True, False]
    assert "2 attempts in a row got no step further (requeue.max_stalled)" in job.log(0)
    assert "ExitCode=76:0" in lab.run("scontrol", "show", "job", job.job_id)


def test_interrupted_again_and_again_in_all_places(lab):
    """Signals during a step, a restore, an evaluation, a save, before the first step, twice: 21 requeues of one job, and the same bits."""
    chain = lab.chain
    chain.wait_for("finished", timeout_s=500)
    whole = lab.submit("chain-whole", "args.epochs=16", "args.step_s=0")
    whole.wait_for("finished")
    stops = chain.events("stop")
    assert len(stops) == 3 * len(CHAIN) >= 20
    assert {stop["cause"] for stop in stops} == {"by_hand"}
    assert set(ids(chain)) == {chain.job_id}
    assert [event["restart_count"] for event in chain.events("attempt")] == list(range(len(stops) + 1))
    assert [event["step"] for event in chain.events("restored")] == [0, *(stop["step"] for stop in stops)]
    assert all(event["bit_exact"] for event in chain.events("restored")[1:])
    assert made(chain) == 4 * STEPS, "no step was made twice"
    ours, theirs = chain.latest(), whole.latest()
    assert ours["step"] == theirs["step"] == 4 * STEPS
    assert all(torch.equal(ours["model_state_dict"][key], value) for key, value in theirs["model_state_dict"].items())


# The controller -------------------------------------------------------------------------------------------------------


def test_the_controller_is_gone_when_a_run_wants_to_be_requeued(lab, whole):
    """The last test: the others must be over."""
    job = submit_and_train(lab, "controller", "requeue.lead_time_s=60")
    # A controller that is killed has forgotten what it did not write down.
    lab.run("scontrol", "update", f"JobId={job.job_id}", "Comment=written-down")
    lab.cluster.wait_until(lambda: b"written-down" in (lab.cluster.root / "state" / "job_state").read_bytes(), "the state to be saved")
    lab.kill("slurmctld")
    # By itself: a controller that is killed as it is told to does not pass it on.
    os.kill(lab.pids(job, 1)[0], signal.SIGUSR1)
    job.wait_for("scheduler_error")  # it has asked in vain
    lab.cluster.devcluster("up")
    job.wait_for("finished")
    assert ids(job) == [job.job_id] * 2
    assert [event["restart_count"] for event in job.events("attempt")] == [0, 1]
    assert_same(job, whole)
