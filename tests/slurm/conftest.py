"""One real Slurm for all tests here: slurm/devcluster, started once a session."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
DEVCLUSTER = REPOSITORY / "slurm" / "devcluster"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


@dataclass
class Cluster:
    """Commands on the cluster, and what came of jobs."""

    environ: dict[str, str]
    wait_until: Callable[..., None]

    def run(self, *argv: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a command from the login node, the repository as working directory."""
        return subprocess.run(argv, cwd=REPOSITORY, env={**self.environ, **extra}, capture_output=True, text=True, timeout=120, check=False)

    def submit(self, *settings: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m hpcckpt.submit` for the digits example on 2 nodes x 2 tasks."""
        return self.run(sys.executable, "-m", "hpcckpt.submit", "conf=digits", "slurm.nodes=2", *settings, **extra)

    def state(self, job_id: str) -> str:
        """Return JobState; "" when Slurm has forgotten the job."""
        words = self.run("scontrol", "show", "job", job_id).stdout.split()
        return next((word.partition("=")[2] for word in words if word.startswith("JobState=")), "")

    def wait_for_end(self, job_id: str, timeout_s: float = 120) -> str:
        """Wait until a job is over, and return its state."""
        self.wait_until(lambda: self.state(job_id) in OVER, f"job {job_id} to end, it is {self.state(job_id)}", timeout_s)
        return self.state(job_id)


@dataclass
class Job:
    """A submitted run."""

    cluster: Cluster
    run_dir: Path
    job_id: str

    def events(self, kind: str = "") -> list[dict[str, object]]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if kind in ("", event["event"])]

    def wait_for(self, kind: str, count: int = 1, timeout_s: float = 120) -> dict[str, object]:
        self.cluster.wait_until(lambda: len(self.events(kind)) >= count, f"{count} x {kind}", timeout_s)
        return self.events(kind)[count - 1]

    def log(self, rank: int, kind: str = "out") -> str:
        return (self.run_dir / "logs" / f"{self.job_id}_{rank}_log.{kind}").read_text()

    def latest(self) -> Mapping[str, object]:
        pointer = json.loads((self.run_dir / "checkpoints" / "latest.json").read_text())
        content: Mapping[str, object] = torch.load(self.run_dir / "checkpoints" / pointer["file"], weights_only=True)
        return content


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that login and compute nodes share: they are one machine."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def cluster(environ: Callable[..., dict[str, str]], wait_until: Callable[..., None]) -> Iterator[Cluster]:
    """The cluster; where it cannot be had the tests skip, or fail with HPCCKPT_REQUIRE_SLURM=1."""
    root = Path(f"/tmp/hpcckpt-tests-{os.getpid()}")
    up = subprocess.run([DEVCLUSTER, "up", "--root", root, "--json"], capture_output=True, text=True, timeout=120, check=False)
    if up.returncode != 0:
        reason = f"no Slurm here ({up.stderr.strip()}); to enable these tests: sudo slurm/install"
        pytest.fail(reason) if os.environ.get("HPCCKPT_REQUIRE_SLURM") == "1" else pytest.skip(reason)
    try:
        yield Cluster(environ(SLURM_CONF=json.loads(up.stdout)["slurm_conf"]), wait_until)
    finally:
        subprocess.run([DEVCLUSTER, "down", "--root", root], capture_output=True, timeout=120, check=True)


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
