"""The last thing an attempt does; tests/ranks, tests/process and tests/slurm have the whole of it."""

import pytest

from hpcckpt import requeue
from hpcckpt.config import RequeueConfig
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import FencedError
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention, StopDecision
from hpcckpt.requeue import Stop
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.ledger import Ledger


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A claimed run directory, and an scontrol that writes down what it is asked for."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    script.chmod(0o700)
    monkeypatch.setenv("PATH", str(script.parent))
    layout = RunLayout(tmp_path / "run")
    store = CheckpointStore(layout, Retention())
    store.claim("7", (0,))
    return layout, store


def leave(run, launcher, rank=0):
    layout, store = run
    task = TaskEnvironment(launcher, rank=rank, world_size=2, local_world_size=2, job_id="7", restart_count=0)
    stop = Stop("time_limit", StopDecision(True, "time_limit", 0))
    requeue.leave(stop, task, RequeueConfig(), Ledger(layout.events), store, 5, "submit again")


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


def test_the_newest_attempt_asks_slurm_and_notes_it_before(run, tmp_path):
    with pytest.raises(SystemExit) as left:
        leave(run, "slurm")
    assert left.value.code == 0
    assert calls(tmp_path) == ["requeue 7"]
    assert [event["event"] for event in Ledger(run[0].events).events()] == ["requeue"]


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_an_attempt_that_was_overtaken_requeues_nothing_and_notes_nothing(run, tmp_path, launcher):
    CheckpointStore(run[0], Retention()).claim("7", (1,))
    with pytest.raises(FencedError, match=r"attempt 1 is not the newest any more: attempt 2 \(job 7 on "):
        leave(run, launcher)
    assert calls(tmp_path) == []
    assert Ledger(run[0].events).events() == []


def test_other_ranks_ask_for_nothing(run, tmp_path):
    with pytest.raises(SystemExit) as left:
        leave(run, "slurm", rank=1)
    assert left.value.code == 0
    assert calls(tmp_path) == []
