"""One real Slurm for all tests here: slurm/devcluster, started once a session."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.slurm_jobs import Cluster, Job, devcluster


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that login and compute nodes share: they are one machine."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def cluster(environ: Callable[..., dict[str, str]], wait_until: Callable[..., None]) -> Iterator[Cluster]:
    """The cluster of most tests."""
    # The long job is over long before it is looked at, and must not be forgotten by then.
    with devcluster("tests", environ, wait_until, "--set", "MinJobAge=3600") as one:
        yield one


@pytest.fixture
def start(cluster: Cluster, shared: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """Submit runs that end with the test at the latest."""
    jobs: list[Job] = []

    def submit(*settings: str, run_dir: str = "", **extra: str) -> Job:
        folder = shared / (run_dir or f"{request.node.name[:40]}-{len(jobs)}")
        done = cluster.submit(f"run_dir={folder}", *settings, **extra)
        assert done.returncode == 0, done.stderr
        jobs.append(Job(cluster, folder, done.stdout.splitlines()[0]))
        return jobs[-1]

    yield submit
    for job in jobs:
        cluster.run("scancel", "--signal=KILL", "--full", job.job_id)
        cluster.run("scancel", job.job_id)


@pytest.fixture(scope="session")
def long_job(cluster: Cluster, shared: Path) -> Job:
    """A run longer than its time limit of two minutes, started when the first test needs the cluster."""
    folder = shared / "long"
    done = cluster.submit(
        f"run_dir={folder}", "args.step_s=0.6", "args.epochs=18", "slurm.time_min=2", "requeue.lead_time_s=60", "slurm.exclude='n3,n4'"
    )
    assert done.returncode == 0, done.stderr
    return Job(cluster, folder, done.stdout.splitlines()[0])


@pytest.fixture(autouse=True)
def _long_job_runs_beside_the_other_tests(long_job: Job) -> None:
    """It takes minutes, and there are nodes for all."""
