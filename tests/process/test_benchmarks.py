"""The benchmarks run, on states that take no time."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_every_contender_saves_a_state_that_is_read_back(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.checkpoints", "--state", "tiny", "--rounds", "2", "--settle-s", "0"]
    done = subprocess.run(
        [*command, "--folder", tmp_path, "--json", figures], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["figures"]["tiny"]
    assert len(found) >= 10
    assert all(len(measured["wall_s"]) == 2 for measured in found.values())
    assert all(f"| {name} |" in done.stdout for name in found)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
