"""The sbatch scripts of slurm/templates/, as they are shipped, on a real Slurm: each is stopped once, goes on and finishes.

The runs wait far more than they work, so all are begun together; each test looks at what became of its own.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from support.slurm_jobs import REPOSITORY, Cluster, Job, devcluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

TEMPLATES = sorted((REPOSITORY / "slurm" / "templates").glob("*.sbatch"))
SCRIPT = REPOSITORY / "tests" / "scripts" / "template_train.py"
STEPS = 96
# The signal of a preemption is SIGTERM here, as it is on most clusters. The grace time is no cost: who is through with it leaves.
LOW = "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60"
OPTIONS = ("--nodes", "12", "--set", "SlurmctldParameters=cloud_dns", "--set", LOW)
# Another process, and another namespace, between srun and Python; it ignores SIGTERM while it waits, and dies of SIGUSR1.
CONTAINER = "unshare --user --map-root-user --mount --fork"
SAME = "# ---- From here on the same in every template"


class Desk:
    """Where somebody submits templates, with what he would write at their tops given as options and variables."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def submit(self, name: str, template: str, *options: str, hosts: tuple[str, ...] = (), **variables: str) -> Job:
        """Submit a template as a run of that name.

        Args:
            options: of sbatch; in the template's own place where it has one, since a successor knows nothing of the command line.
            hosts: of a heterogeneous job's groups, one each.
            variables: of the environment; they have precedence over what stands at the template's top.
        """
        text = (REPOSITORY / "slurm" / "templates" / f"{template}.sbatch").read_text()
        text = text.replace("#SBATCH --output=", f"#SBATCH --output={self.folder}/")
        rest = ["--time=10"]
        for option in (f"--job-name={name}", "--cpus-per-task=1", *options):
            changed = re.sub(rf"(?m)^#SBATCH {option.partition('=')[0]}=\S+", f"#SBATCH {option}", text)
            rest += [option] if changed == text else []
            text = changed
        names = iter(hosts)
        text = re.sub(r"(?m)^#SBATCH --nodes=\S+", lambda line: f"{line[0]} --nodelist={next(names)}" if hosts else line[0], text)
        script = self.folder / f"{name}.sbatch"
        script.write_text(text)
        done = self.cluster.run(
            *("sbatch", "--parsable", *rest, str(script)),
            **{"RUN_DIR": str(self.folder / name), "TRAIN": str(SCRIPT), "PYTHON": sys.executable, **variables},
        )
        assert done.returncode == 0, done.stderr
        return Job(self.cluster, self.folder / name, done.stdout.strip())

    def log(self, job: Job) -> str:
        """Return what all jobs of a run have printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{job.run_dir.name}-*.log")))

    def wait_for_file(self, job: Job, name: str) -> None:
        try:
            self.cluster.wait_until((job.run_dir / name).exists, name, 120)
        except pytest.fail.Exception:
            pytest.fail(f"{job.run_dir.name} did not come to {name}:\n{self.log(job)}")

    def signal(self, job: Job, name: str = "USR1") -> None:
        done = self.cluster.run("scancel", f"--signal={name}", job.job_id)
        assert done.returncode == 0, done.stderr

    def preempt(self, job: Job) -> None:
        """Have a job of higher priority take the node of a job."""
        node = self.cluster.run("squeue", "--noheader", "--format=%N", f"--jobs={job.job_id}").stdout.strip()
        options = ("--partition=high", f"--nodelist={node}", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1")
        done = self.cluster.run("sbatch", *options)
        assert done.returncode == 0, done.stderr

    def finish(self, job: Job) -> Job:
        """Let a run that has been stopped go on, and return it when it has finished."""
        job.wait_for("stop")
        (job.run_dir / "go").touch()
        job.wait_for("finished")
        return job


# How each run comes about.
RUNS: dict[str, Callable[[Desk], Job]] = {}


def run_of(function: Callable[[Desk], Job]) -> Callable[[Desk], Job]:
    """Have a run begun with the others, for the test of the same name."""
    RUNS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def desk(
    environ: Callable[..., dict[str, str]], wait_until: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    with devcluster("templates", environ, wait_until, *OPTIONS) as cluster:
        yield Desk(cluster, tmp_path_factory.mktemp("templates"))


@pytest.fixture(scope="module")
def become(desk: Desk, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Job]]:
    """A function that returns a run when it is over; those of the chosen tests are begun together."""
    chosen = {item.name.removeprefix("test_") for item in request.session.items} | {"array"}
    with ThreadPoolExecutor(len(RUNS)) as pool:
        futures: dict[str, Future[Job]] = {name: pool.submit(RUNS[name], desk) for name in RUNS if name in chosen}
        yield lambda name: futures[name].result()


@pytest.fixture
def job(become: Callable[[str], Job], request: pytest.FixtureRequest) -> Job:
    """The run that is named as the test is."""
    return become(request.node.name.removeprefix("test_"))


@pytest.fixture
def whole(become: Callable[[str], Job]) -> Job:
    """A run of one rank that nothing has happened to: the other one of the array."""
    array = become("array")
    return Job(array.cluster, array.run_dir.with_name("1"), array.job_id.replace("_0", "_1"))


def assert_gone_on(job: Job, cause: str, signals: list[str]) -> None:
    """Assert that a run was stopped once, for this cause, has gone on once and has finished, with exit code 0."""
    assert [(stop["cause"], stop["signals"], stop["requeue"]) for stop in job.events("stop")] == [(cause, signals, True)]
    first, second = job.events("restored")
    assert (first["step"], second["step"]) == (0, job.events("stop")[0]["step"])
    assert [event["step"] for event in job.events("finished")] == [STEPS]
    assert job.latest()["step"] == STEPS
    assert not [event for kind in ("failed", "lost", "ended") for event in job.events(kind)]
    last = str(job.events("attempt")[-1]["job_id"])
    assert job.cluster.wait_for_end(last) == "COMPLETED"


def assert_same_job(job: Job) -> None:
    assert [event["job_id"] for event in job.events("attempt")] == [job.job_id] * 2
    assert [event["job_id"] for event in job.events("requeue")] == [job.job_id]


def assert_same_weights(job: Job, whole: Job) -> None:
    ours, theirs = job.latest()["model_state_dict"], whole.latest()["model_state_dict"]
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def interrupted(desk: Desk, job: Job) -> Job:
    """Return a run that was asked by hand for a checkpoint, in its training, and has gone on."""
    desk.wait_for_file(job, "begun")
    desk.signal(job)
    return desk.finish(job)


# The templates --------------------------------------------------------------------------------------------------------


@run_of
def single_node(desk: Desk) -> Job:
    job = desk.submit("single", "single-node", HOLD_START="1")
    desk.wait_for_file(job, "starting")
    desk.signal(job)
    return desk.finish(job)


def test_single_node(job, whole, desk):
    """The warning comes while Python starts: it neither ends the process nor is lost."""
    assert_gone_on(job, "by_hand", ["USR1"])
    assert_same_job(job)
    assert_same_weights(job, whole)
    assert job.events("stop")[0]["step"] == 1  # its first chance
    # One log for both starts.
    assert "saved at step 1; requeueing job" in desk.log(job)
    assert f"finished: {STEPS} steps" in desk.log(job)


@run_of
def multi_node(desk: Desk) -> Job:
    return interrupted(desk, desk.submit("multi", "multi-node", "--ntasks-per-node=2"))


def test_multi_node(job):
    assert_gone_on(job, "by_hand", ["USR1"])
    assert_same_job(job)
    assert [(event["world_size"], event["num_nodes"]) for event in job.events("attempt")] == [(4, 2)] * 2


@run_of
def torchrun(desk: Desk) -> Job:
    return interrupted(desk, desk.submit("torchrun", "torchrun", RANKS_PER_NODE="1"))


def test_torchrun(job):
    assert_gone_on(job, "by_hand", ["USR1"])
    assert_same_job(job)
    assert [(event["world_size"], event["num_nodes"]) for event in job.events("attempt")] == [(2, 2)] * 2


@run_of
def heterogeneous(desk: Desk) -> Job:
    return interrupted(desk, desk.submit("heterogeneous", "heterogeneous", "--nodes=1", "--ntasks-per-node=1", hosts=("n12", "n11")))


def test_heterogeneous(job):
    """Two groups of one rank each: the leader is asked, and both start again. Rank 0 is not on the first host by name."""
    assert_gone_on(job, "by_hand", ["USR1"])
    assert_same_job(job)
    assert [(event["world_size"], event["num_nodes"]) for event in job.events("attempt")] == [(2, 2)] * 2


@run_of
def heterogeneous_without_requeue(desk: Desk) -> Job:
    job = desk.submit("heterogeneous-successor", "heterogeneous", "--nodes=1", "--ntasks-per-node=1")
    desk.wait_for_file(job, "begun")
    done = desk.cluster.run("scontrol", "update", f"JobId={job.job_id}", "Requeue=0")
    assert done.returncode == 0, done.stderr
    desk.signal(job)
    return desk.finish(job)


def test_heterogeneous_without_requeue(job):
    assert_gone_on(job, "by_hand", ["USR1"])
    (successor,) = job.events("successor")
    assert [event["job_id"] for event in job.events("attempt")] == [job.job_id, successor["job_id"]]
    assert [(event["world_size"], event["num_nodes"]) for event in job.events("attempt")] == [(2, 2)] * 2


@run_of
def array(desk: Desk) -> Job:
    job = desk.submit("array", "array", "--array=0-1", RUNS=str(desk.folder / "array"))
    mine, other = (Job(desk.cluster, job.run_dir / index, f"{job.job_id}_{index}") for index in ("0", "1"))
    desk.wait_for_file(other, "begun")
    (other.run_dir / "go").touch()
    interrupted(desk, mine)
    other.wait_for("finished")
    return mine


def test_array(job, whole):
    assert_gone_on(job, "by_hand", ["USR1"])
    assert_same_job(job)
    assert_same_weights(job, whole)
    assert [event["job_id"] for event in whole.events("attempt")] == [whole.job_id]
    assert not whole.events("stop")
    assert [event["step"] for event in whole.events("finished")] == [STEPS]


@run_of
def container(desk: Desk) -> Job:
    return interrupted(desk, desk.submit("container", "container", CONTAINER=CONTAINER))


def test_container(job, whole, desk):
    """The signal reaches Python, and does not end the program that is between."""
    assert_gone_on(job, "by_hand", ["USR1"])
    assert_same_job(job)
    assert_same_weights(job, whole)
    assert "User defined signal" not in desk.log(job)


@run_of
def preemptible(desk: Desk) -> Job:
    job = desk.submit("preemptible", "preemptible", "--partition=low", "--exclusive", HOLD_START="1")
    desk.wait_for_file(job, "starting")
    desk.preempt(job)
    return desk.finish(job)


def test_preemptible(job, whole):
    """Its SIGTERM comes while Python starts, too."""
    assert_gone_on(job, "preemption", ["TERM"])
    assert_same_job(job)
    assert_same_weights(job, whole)
    assert job.events("stop")[0]["step"] == 1


@run_of
def no_requeue(desk: Desk) -> Job:
    return interrupted(desk, desk.submit("no-requeue", "no-requeue"))


def test_no_requeue(job, whole):
    assert_gone_on(job, "by_hand", ["USR1"])
    (successor,) = job.events("successor")
    assert successor["job_id"] != job.job_id
    assert [event["job_id"] for event in job.events("attempt")] == [job.job_id, successor["job_id"]]
    assert job.cluster.state(job.job_id) == "COMPLETED"
    assert_same_weights(job, whole)


# Other ends ------------------------------------------------------------------------------------------------------------


@run_of
def a_rank_is_killed(desk: Desk) -> Job:
    run_dir = desk.folder / "killed"
    run_dir.mkdir(mode=0o700)
    (run_dir / "config.yaml").write_text("entrypoint: __main__:main\nrequeue: {on_failure: 1}\ncheckpoint: {every_steps: 1}\n")
    job = desk.submit("killed", "single-node")
    job.wait_for("saved")
    os.kill(int(str(job.events("attempt")[0]["pid"])), signal.SIGKILL)
    job.wait_for("lost")
    (run_dir / "go").touch()
    job.wait_for("finished")
    return job


def test_a_rank_is_killed(job, whole, desk):
    """The script has it requeued where the configuration says so, from the newest checkpoint."""
    assert [(event["fate"], event["exit_code"]) for event in job.events("lost")] == [("killed", 137)]
    assert [event["cause"] for event in job.events("requeue")] == ["failure"]
    assert_same_job(job)
    assert_same_weights(job, whole)
    assert "the attempt ended with exit code 137 (killed); requeueing job" in desk.log(job)
    assert job.cluster.wait_for_end(job.job_id) == "COMPLETED"


@run_of
def the_stop_file(desk: Desk) -> Job:
    job = desk.submit("stop-file", "container", CONTAINER=CONTAINER)
    desk.wait_for_file(job, "begun")
    (job.run_dir / "stop").touch()
    job.wait_for("ended")
    return job


def test_the_stop_file(job, desk):
    """The code says that somebody has to start it again; it passes through the container and the script."""
    assert job.cluster.wait_for_end(job.job_id) == "FAILED"
    assert "ExitCode=75:0" in job.cluster.run("scontrol", "show", "job", job.job_id).stdout
    assert [stop["cause"] for stop in job.events("stop")] == ["stop_file"]
    assert len(job.events("ended")) == 1
    assert "start the same command again" in desk.log(job)


# What they have in common ---------------------------------------------------------------------------------------------


def test_every_template_is_run_here():
    assert {path.stem.replace("-", "_") for path in TEMPLATES} <= set(RUNS)


def test_the_common_part_is_the_same():
    assert len({path.read_text().partition(SAME)[2] for path in TEMPLATES}) == 1
    for path in TEMPLATES:
        options = re.findall(r"^#SBATCH (\S+)", path.read_text(), flags=re.MULTILINE)
        asked = "--no-requeue" if path.stem == "no-requeue" else "--requeue"
        assert {asked, "--open-mode=append", "--signal=USR1@120"} <= set(options), path
