"""A real Slurm for tests, slurm/devcluster, and the runs on it."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    root: Path
    # What `devcluster up --json` said: nodes, interfaces, processes.
    said: dict[str, Any]

    def run(self, *argv: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a command from the login node, the repository as working directory."""
        return subprocess.run(argv, cwd=REPOSITORY, env={**self.environ, **extra}, capture_output=True, text=True, timeout=120, check=False)

    def submit(self, *settings: str, conf: str = "digits", **extra: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m hpcckpt.submit`, for the digits example on 2 nodes x 2 tasks if nothing else is said."""
        return self.run(sys.executable, "-m", "hpcckpt.submit", f"conf={conf}", "slurm.nodes=2", *settings, **extra)

    def devcluster(self, command: str) -> dict[str, Any]:
        """Run `devcluster up` or `status`; returns what it says."""
        argv = [DEVCLUSTER, command, "--root", self.root, "--json"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def state(self, job_id: str) -> str:
        """Return JobState; "" when Slurm has forgotten the job."""
        words = self.run("scontrol", "show", "job", job_id).stdout.split()
        return next((word.partition("=")[2] for word in words if word.startswith("JobState=")), "")

    def wait_for_end(self, job_id: str, timeout_s: float = 120) -> str:
        """Wait until a job is over, and return its state."""
        self.wait_until(lambda: self.state(job_id) in OVER, lambda: f"job {job_id} to end, it is {self.state(job_id)!r}", timeout_s)
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
        self.cluster.wait_until(lambda: len(self.events(kind)) >= count, lambda: f"{count} x {kind}\n{self.story()}", timeout_s)
        return self.events(kind)[count - 1]

    def story(self) -> str:
        """Return what is known of the run, for who has waited for it in vain."""
        slurm = self.cluster.run("scontrol", "show", "job", self.job_id)
        nodes = self.cluster.run("sinfo", "--Node", "--noheader", "--format=%N %T %E")
        return "\n".join([*map(json.dumps, self.events()), slurm.stdout + slurm.stderr, nodes.stdout + nodes.stderr])

    def log(self, rank: int, kind: str = "out") -> str:
        return (self.run_dir / "logs" / f"{self.job_id}_{rank}_log.{kind}").read_text()

    def latest(self) -> Mapping[str, object]:
        pointer = json.loads((self.run_dir / "checkpoints" / "latest.json").read_text())
        content: Mapping[str, object] = torch.load(self.run_dir / "checkpoints" / pointer["file"], weights_only=True)
        return content


@contextlib.contextmanager
def devcluster(name: str, environ: Callable[..., dict[str, str]], wait_until: Callable[..., None], *options: str) -> Iterator[Cluster]:
    """A cluster of its own; where it cannot be had the tests skip, or fail with HPCCKPT_REQUIRE_SLURM=1."""
    root = Path(f"/tmp/hpcckpt-{name}-{os.getpid()}")
    argv = [DEVCLUSTER, "up", "--root", root, "--json", *options]
    up = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if up.returncode != 0:
        reason = f"no Slurm here ({up.stderr.strip()}); to enable these tests: sudo slurm/install"
        pytest.fail(reason) if os.environ.get("HPCCKPT_REQUIRE_SLURM") == "1" else pytest.skip(reason)
    said = json.loads(up.stdout)
    try:
        yield Cluster(environ(SLURM_CONF=said["slurm_conf"]), wait_until, root, said)
    finally:
        subprocess.run([DEVCLUSTER, "down", "--root", root], capture_output=True, timeout=120, check=True)
