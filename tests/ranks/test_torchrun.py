"""Under torchrun, whose agent serves the store for all attempts and starts the ranks again when one of them fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "exact.py"
pytestmark = pytest.mark.timeout(240)


def test_a_stop_is_gone_on_with_by_torchruns_next_attempt_and_is_not_heard_there_again(environ, same_state, ranks, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ranks.run_to_the_end([str(SCRIPT), str(whole)], 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(stopped)],
        env=environ() | {"HPCCKPT_TEST_STOPS": "1@4 0@9"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no Slurm job to requeue. To go on: start the same command again" in done.stdout
    events = [json.loads(line) for line in (stopped / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "attempt" for event in events) == 3
    same_state(whole, stopped)
