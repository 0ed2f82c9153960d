"""What several groups of tests share: real ranks as processes, and waiting for a condition."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings

# A loaded machine is no finding; pytest's own timeout ends what hangs.
settings.register_profile("hpcckpt", deadline=None)
settings.load_profile("hpcckpt")

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent / "scripts"
REQUEUE_EXIT_CODE = 144
RANKS_TIMEOUT_S = 120.0
_IMPATIENT = {"RES_OPTIONS": "timeout:1 attempts:1"}


def clean_environ(**extra: str) -> dict[str, str]:
    """Return this process's environment without launchers' variables, one thread per rank, and `extra`.

    torch's store looks up the name of whoever connects; without a name server to answer, each would wait ten seconds.
    """
    prefixes = ("SLURM_", "SBATCH_", "SUBMITIT_", "HPCCKPT_", "TORCHELASTIC_")
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes) and name not in dropped}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **_IMPATIENT, **extra}


def wait_until(condition: Callable[[], object], what: str | Callable[[], str], timeout_s: float = 60.0) -> None:
    """Wait for a condition, looking often; fail with `what`, or what it returns then, at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain: {what if isinstance(what, str) else what()}")
        time.sleep(0.02)


@dataclass
class Attempt:
    """Ranks that ran once to their end."""

    codes: list[int]
    outputs: list[str] = field(default_factory=list)


class RankLauncher:
    """Starts a script as N ranks, as submitit's local launcher would."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, argv: Sequence[str], world_size: int, environ: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
        """Start the ranks and return their processes."""
        job_id = uuid.uuid4().hex
        started = []
        for rank in range(world_size):
            place = {
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_JOB_ID": job_id,
                "SUBMITIT_LOCAL_NTASKS": str(world_size),
                "SUBMITIT_LOCAL_GLOBALID": str(rank),
                "SUBMITIT_LOCAL_LOCALID": str(rank),
            }
            started.append(
                subprocess.Popen(
                    [sys.executable, "-X", "faulthandler", *argv],
                    env=clean_environ(**place, **(environ or {})),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        self.processes += started
        return started

    def finish(self, processes: Sequence[subprocess.Popen[str]], timeout_s: float = RANKS_TIMEOUT_S) -> Attempt:
        """Wait for ranks to end; a rank that hangs fails the test with everything that was printed."""
        deadline = time.monotonic() + timeout_s
        outputs = []
        for process in processes:
            try:
                outputs.append(process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0])
            except subprocess.TimeoutExpired:
                self.stop()
                pytest.fail(f"rank {len(outputs)} did not end in {timeout_s:g} s\n" + "\n".join([*outputs, process.communicate()[0]]))
        return Attempt([process.returncode for process in processes], outputs)

    def run(self, argv: Sequence[str], world_size: int, environ: Mapping[str, str] | None = None) -> Attempt:
        """Run the ranks once."""
        return self.finish(self.start(argv, world_size, environ))

    def run_to_the_end(self, argv: Sequence[str], world_size: int, environ: Mapping[str, str] | None = None) -> list[Attempt]:
        """Run the ranks again as long as they leave with the code that asks for it."""
        attempts = [self.run(argv, world_size, environ)]
        while set(attempts[-1].codes) == {REQUEUE_EXIT_CODE}:
            assert len(attempts) < 50, "requeues forever"
            attempts.append(self.run(argv, world_size, environ))
        assert set(attempts[-1].codes) == {0}, attempts[-1]
        return attempts

    wait_until = staticmethod(wait_until)

    def stop(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="session", name="environ")
def environ_fixture() -> Callable[..., dict[str, str]]:
    """The function clean_environ."""
    return clean_environ


@pytest.fixture(scope="session", name="wait_until")
def wait_until_fixture() -> Callable[..., None]:
    """The function wait_until."""
    return wait_until


def _launcher() -> Iterator[RankLauncher]:
    launcher = RankLauncher()
    yield launcher
    launcher.stop()
    for process in launcher.processes:
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


# Real ranks; none outlives its test, or its module.
ranks = pytest.fixture(_launcher, name="ranks")
module_ranks = pytest.fixture(_launcher, scope="module", name="module_ranks")
