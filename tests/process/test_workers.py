"""Workers of a rank: they see no signal of Slurm's, and none is left behind, however the rank ends. Real processes."""

import signal
from pathlib import Path

import psutil
import pytest

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "workers.py")
# A worker looks for its parent every five seconds.
GONE_S = 25.0
SIGNALS = pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGUSR1, "persistent"), (signal.SIGTERM, "of an epoch")], ids=["USR1", "TERM"]
)
KINDS = pytest.mark.parametrize("kind", ["persistent", "of an epoch"])


class Rank:
    """One rank with two workers, which is ready when it has made three steps."""

    def __init__(self, ranks, folder, how, kind):
        self.ranks, self.folder = ranks, folder
        (self.process,) = ranks.start([SCRIPT, str(folder), how, kind], 1)
        ranks.wait_until(lambda: (folder / "ready").exists() or self.process.poll() is not None, "three steps")

    def workers(self):
        """Return the processes in which samples were fetched, as far as they are there."""
        return [psutil.Process(pid) for pid in self.pids() if psutil.pid_exists(pid)]

    def pids(self):
        return [int(path.name) for path in (self.folder / "workers").iterdir()]

    def finish(self):
        attempt = self.ranks.finish([self.process])
        return attempt.codes[0], attempt.outputs[0]

    def assert_all_gone(self):
        assert len(self.pids()) >= 2
        alive = psutil.wait_procs(self.workers(), timeout=GONE_S)[1]
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture
def rank(ranks, tmp_path):
    return lambda how, kind: Rank(ranks, tmp_path, how, kind)


@SIGNALS
def test_a_warning_to_every_process_of_the_job_stops_the_rank_and_not_its_workers(rank, kind, number):
    started = rank("signal", kind)
    workers = started.workers()
    for worker in workers:
        worker.send_signal(number)
    assert len(workers) == 2
    started.process.send_signal(number)
    (started.folder / "go").touch()
    code, output = started.finish()
    assert "DataLoader worker" not in output
    assert "Traceback" not in output
    assert code != -number
    started.assert_all_gone()


@SIGNALS
def test_workers_that_alone_are_signalled_go_on(rank, kind, number):
    started = rank("signal", kind)
    for worker in started.workers():
        worker.send_signal(number)
    (started.folder / "go").touch()
    code, output = started.finish()
    assert code == 0, output
    started.assert_all_gone()


@pytest.mark.parametrize(("how", "kind"), [("kill", "persistent"), ("slow", "of an epoch")], ids=["persistent", "in a slow sample"])
def test_of_a_rank_that_is_killed_no_worker_is_left(rank, kind, how):
    started = rank(how, kind)
    assert len(started.workers()) == 2
    started.process.kill()
    started.assert_all_gone()


@KINDS
def test_an_exception_in_the_training_leaves_no_worker_and_does_not_wait_for_them(rank, kind):
    started = rank("raise", kind)
    code, output = started.finish()
    assert code == 1
    assert "ArithmeticError: not finite" in output
    started.assert_all_gone()


@KINDS
def test_a_break_leaves_no_worker(rank, kind):
    started = rank("break", kind)
    code, output = started.finish()
    assert code == 0, output
    assert (started.folder / "broken").exists()
    assert len(started.pids()) == (2 if kind == "persistent" else 4)
    started.assert_all_gone()
