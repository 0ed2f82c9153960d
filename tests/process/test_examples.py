"""The examples do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_demonstration_sees_everything_it_promises(environ):
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo"], cwd=REPOSITORY, env=environ(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ">>> kill -USR1" in done.stdout
    assert "attempts: 2; stopped at step" in done.stdout
    assert "each trained once: none lost, none repeated" in done.stdout
    assert done.stdout.rstrip().endswith("weights equal, bit for bit, to those of the run that was not interrupted: yes")
