"""The one sentence: the same bits as if nothing had interrupted the run. Real gloo ranks, real signals.

Every workload and every place in which a stop can fall, in ranks that are cheaper to start: test_exactness_matrix.py.
"""

import json
import signal
from pathlib import Path

import psutil
import pytest

from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention, outcome
from hpcckpt.store.checkpoints import CheckpointStore

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "exact.py")
pytestmark = pytest.mark.timeout(400)


def steps_an_epoch(world_size: int) -> int:
    return -(-52 // (4 * world_size))


def metrics(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoints_of(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "checkpoints").iterdir() if not path.name.endswith(".lock")}


def trained_ids(run_dir: Path, world_size: int) -> list[list[str]]:
    return [(run_dir / f"ids.{rank}").read_text().splitlines() for rank in range(world_size)]


@pytest.mark.parametrize(
    ("world_size", "stops", "workers"),
    [
        pytest.param(2, "1@2 0@7 1@11 1@14", 2, id="two ranks, either is signalled, loader with workers, the very last step"),
        pytest.param(4, "3@2 1@4 0@4 2@6", 0, id="four ranks, one or two are signalled"),
    ],
)
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(ranks, same_state, tmp_path, world_size, stops, workers):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ranks.run([SCRIPT, str(whole)], world_size).codes == [0] * world_size

    attempts = ranks.run_to_the_end([SCRIPT, str(broken), f"args.workers={workers}"], world_size, {"HPCCKPT_TEST_STOPS": stops})

    # Each stop falls one step behind the signal at the latest, so those a step apart may share an attempt.
    assert len(attempts) > len(stops.split()) / 2 + 1
    same_state(whole, broken)
    assert trained_ids(whole, world_size) == trained_ids(broken, world_size)
    assert metrics(whole) == metrics(broken)
    assert [line["step"] for line in metrics(whole) if line["kind"] == "log"] == list(range(1, 2 * steps_an_epoch(world_size) + 1))


def test_a_stop_in_the_evaluation_resumes_as_if_the_schedulers_step_had_not_been_made(ranks, same_state, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ranks.run_to_the_end([SCRIPT, str(whole)], 1)
    attempts = ranks.run_to_the_end([SCRIPT, str(broken)], 1, {"HPCCKPT_TEST_STOPS": "0@poll"})
    assert "goes on behind epoch 0, step 13 of" in attempts[1].outputs[0]
    same_state(whole, broken)
    assert trained_ids(whole, 1) == trained_ids(broken, 1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_signal_to_every_process_of_the_job_workers_included_still_saves(ranks, same_state, tmp_path, number):
    """Slurm's way: slurmstepd signals ranks and their children alike."""
    workers = "args.workers=2"
    ranks.run_to_the_end([SCRIPT, str(tmp_path / "whole"), workers], 2)
    run_dir = tmp_path / "signalled"
    started = ranks.start([SCRIPT, str(run_dir), workers, "args.step_s=0.1"], 2)
    ranks.wait_until(lambda: any(run_dir.glob("ids.1")) and (run_dir / "ids.1").read_text(), "the first batch of rank 1")
    processes = [psutil.Process(process.pid) for process in started]
    everyone = [*processes, *(child for process in processes for child in process.children(recursive=True))]
    assert len(everyone) >= 6, "two ranks with two workers each"
    for process in everyone:
        process.send_signal(number)
    attempt = ranks.finish(started)
    assert attempt.codes == ([144, 144] if number == signal.SIGUSR1 else [143, 0]), attempt.outputs
    assert psutil.wait_procs(everyone, timeout=10)[1] == [], "a worker outlived its rank"
    ranks.run_to_the_end([SCRIPT, str(run_dir), workers], 2)
    same_state(tmp_path / "whole", run_dir)
    assert trained_ids(tmp_path / "whole", 2) == trained_ids(run_dir, 2)


def test_a_signal_while_a_finished_run_exits_does_not_make_it_a_failed_one(ranks, environ, tmp_path):
    (tmp_path / "config.yaml").write_text("entrypoint: exact:main\n")
    code = f"from hpcckpt.task import RankTask; RankTask({str(tmp_path)!r})()"
    (process,) = ranks.start(["-c", code], 1, {"PYTHONPATH": f"{Path(SCRIPT).parent}:{environ()['PYTHONPATH']}"})
    events = tmp_path / "events.jsonl"
    ranks.wait_until(lambda: events.exists() and '"finished"' in events.read_text(), "the run to finish")
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
    assert ranks.finish([process]).codes == [0]


def test_every_sample_is_trained_on_once_an_epoch_when_the_number_of_ranks_changes_within_it(ranks, tmp_path):
    for world_size, stop in ((2, "0@2"), (1, "0@4"), (3, "")):
        attempt = ranks.run([SCRIPT, str(tmp_path), "args.epochs=1"], world_size, {"HPCCKPT_TEST_STOPS": stop})
        assert set(attempt.codes) == ({144} if stop else {0}), attempt.outputs
    seen = [int(word) for rank in range(3) for line in (tmp_path / f"ids.{rank}").read_text().splitlines() for word in line.split()[1:]]
    assert sorted(seen) == list(range(52))
    assert "NOT bit-exact from here on: saved by 1 ranks, restored on 3" in attempt.outputs[0]
    assert "the global batch is 9 now (3 ranks x 3), not 8 as before" in attempt.outputs[0]


def test_a_killed_run_loses_what_was_behind_its_last_checkpoint_and_nothing_else(ranks, same_state, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ranks.run_to_the_end([SCRIPT, str(whole)], 2)
    attempt = ranks.run([SCRIPT, str(killed), "checkpoint.every_steps=3"], 2, {"HPCCKPT_TEST_KILLS": "1@8"})
    assert attempt.codes[1] == -9
    assert attempt.codes[0] not in (0, 144), "rank 0 must notice that rank 1 is gone"
    ranks.run_to_the_end([SCRIPT, str(killed), "checkpoint.every_steps=3"], 2)
    same_state(whole, killed)
    assert metrics(whole) == metrics(killed)


def test_an_attempt_that_was_overtaken_changes_requeues_and_hangs_nothing(ranks, tmp_path, wait_until):
    """A node that was lost comes back while the run goes on elsewhere."""
    folder = tmp_path / "run"
    old = ranks.start([SCRIPT, str(folder), "args.step_s=0.05", "args.epochs=100"], 2)
    wait_until((folder / "checkpoints" / "checkpoint_epoch0000.pt").exists, "a first checkpoint")
    job_id = json.loads((folder / "checkpoints" / "generation.json").read_text())["job_id"]
    newer = CheckpointStore(RunLayout(folder), Retention())
    newer.claim(job_id)
    before = checkpoints_of(folder)
    old[1].send_signal(signal.SIGUSR1)
    attempt = ranks.finish(old)
    assert all(code not in (0, 144) for code in attempt.codes), attempt
    assert all("took over; this one stops without touching anything" in output for output in attempt.outputs)
    assert checkpoints_of(folder) == before
    assert "requeue" not in [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_second_run_in_the_same_directory_is_refused_on_all_ranks_and_the_first_goes_on(ranks, same_state, tmp_path, wait_until):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    first = ranks.start([SCRIPT, str(folder), "args.step_s=1.5"], 2)
    wait_until((folder / "checkpoints" / "generation.json").exists, "a claim")
    job_id = json.loads((folder / "checkpoints" / "generation.json").read_text())["job_id"]
    second = ranks.run([SCRIPT, str(folder)], 2)
    assert all(code != 0 for code in second.codes)
    assert all(f"job {job_id} on " in output and "is running in this directory" in output for output in second.outputs)
    assert ranks.finish(first).codes == [0, 0]
    assert ranks.run([SCRIPT, str(whole)], 2).codes == [0, 0]
    same_state(whole, folder)


def test_a_module_that_cannot_be_imported_where_the_job_runs_is_in_the_ledger(ranks, environ, tmp_path):
    (tmp_path / "broken_here.py").write_text("import a_package_that_the_login_node_has\n")
    (tmp_path / "config.yaml").write_text("entrypoint: broken_here:main\n")
    code = f"from hpcckpt.task import RankTask; RankTask({str(tmp_path)!r})()"
    attempt = ranks.finish(ranks.start(["-c", code], 1, {"PYTHONPATH": f"{tmp_path}:{environ()['PYTHONPATH']}"}))
    assert attempt.codes == [1]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert outcome(events) == ("unfinished", "rank 0 failed: ModuleNotFoundError: No module named 'a_package_that_the_login_node_has'")
