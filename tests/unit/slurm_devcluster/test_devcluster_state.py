"""What `cluster.json` keeps, and what is taken from it."""

import json
import os
from pathlib import Path

from devclusterlib.processes import Process, identify
from devclusterlib.settings import Settings
from devclusterlib.state import FILE, State, load


def saved(root: Path, **changes: object) -> State:
    """Write a cluster whose one process is this one; `changes` are made to the file."""
    settings = Settings(root, nodes=2, overrides=(("KillWait", "3"),), slot=9, slurm_version=(24, 11))
    state = State(settings, {"munged": identify(os.getpid())}, ready=True)
    state.save()
    path = root / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return state


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    state = saved(tmp_path)
    assert load(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_after_a_reboot_process_ids_mean_nothing(tmp_path: Path) -> None:
    saved(tmp_path, boot="another")
    state = load(tmp_path)
    assert state
    assert state.processes == {}
    assert not state.running


def test_a_cluster_runs_while_one_of_its_processes_lives(tmp_path: Path) -> None:
    state = saved(tmp_path)
    state.processes["slurmctld"] = Process(os.getpid(), 0)
    assert state.running
    assert state.dead == ["slurmctld"]
    del state.processes["munged"]
    assert not state.running


def test_an_unfinished_up_left_nothing_that_runs(tmp_path: Path) -> None:
    saved(tmp_path, ready=False)
    state = load(tmp_path)
    assert state
    assert not state.running
    assert state.processes


def test_of_a_broken_file_the_root_is_known(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "{}", '{"settings": {}}'):
        (tmp_path / FILE).write_text(text)
        assert load(tmp_path) == State(Settings(tmp_path))


def test_the_file_cannot_point_to_another_folder(tmp_path: Path) -> None:
    raw = saved(tmp_path).to_json()["settings"]
    saved(tmp_path, settings=raw | {"root": "/home"})
    state = load(tmp_path)
    assert state
    assert state.settings.root == tmp_path


def test_the_json_is_what_tests_of_jobs_rely_on(tmp_path: Path) -> None:
    data = json.loads(json.dumps(saved(tmp_path).to_json()))
    assert data["slurm_conf"] == str(tmp_path / "etc" / "slurm.conf")
    assert data["nodes"] == list(data["addresses"]) == list(data["interfaces"]) == ["n1", "n2"]
    assert data["partitions"] == ["low", "high"]
    assert (data["namespaces"], data["accounting"]) == (True, False)
    assert data["processes"]["munged"]["pid"] == os.getpid()
