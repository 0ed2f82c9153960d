"""What goes and what stays: full disks, readers, what a start went on from, damaged files, saves over a file of the same name."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hpcckpt.errors import CheckpointCorruptError, CheckpointSaveError, RunDirectoryError
from hpcckpt.layout import RunLayout, manifest_name
from hpcckpt.policy import Retention
from hpcckpt.store import checkpoints, guard
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import file_digest, is_being_read, read_json, reading
from support.checkpoints import BEST, claimed, commit, files, name_of, newest


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path / "run")


def epochs_of(layout):
    return sorted(int(path.stem[-4:]) for path in layout.checkpoints.glob("checkpoint_*.pt"))


def recovered(store):
    problems = []
    info = store.recover(problems.append)
    return (None if info is None else info.name), problems


# A full disk


def free_bytes(monkeypatch, amounts):
    """Have the file system say these amounts of free bytes, one after the other, the last one for ever."""
    left = list(amounts)

    def statvfs(_path):
        free = left.pop(0) if len(left) > 1 else left[0]
        return SimpleNamespace(f_frsize=1, f_bfree=free, f_bavail=free)

    monkeypatch.setattr(os, "statvfs", statvfs)


def test_where_there_is_room_nothing_goes_before_the_save(layout, monkeypatch):
    store = claimed(layout, Retention(keep_last=2))
    commit(store, 0)
    commit(store, 1)
    free_bytes(monkeypatch, [10**9])
    seen = []
    store.commit(2, 30, epoch_finished=True, write=lambda _file: seen.append(epochs_of(layout)), manifest={"metrics": {}})
    assert seen == [[0, 1]]


def test_where_there_is_none_what_the_policy_allows_goes_first(layout, monkeypatch):
    store = claimed(layout, Retention(keep_last=2))
    commit(store, 0)
    commit(store, 1)
    free_bytes(monkeypatch, [100, 10**9])
    seen = []
    store.commit(2, 30, epoch_finished=True, write=lambda _file: seen.append(epochs_of(layout)), manifest={"metrics": {}})
    assert seen == [[1]]
    assert epochs_of(layout) == [1, 2]


def test_where_that_is_not_enough_the_error_says_how_much_is_missing_and_what_is_there_is_intact(layout, monkeypatch):
    store = claimed(layout, BEST)
    for epoch in range(4):
        commit(store, epoch, loss=float(epoch))
    assert epochs_of(layout) == [0, 2, 3]
    free_bytes(monkeypatch, [1000])
    with pytest.raises(CheckpointSaveError, match=r"too full for checkpoint_epoch0004\.pt: 0\.0 MB are free, the last one took 0\.3 MB"):
        commit(store, 4, loss=9.0)
    # Not the best one, and not the pointer's.
    assert epochs_of(layout) == [0, 3]
    assert newest(layout) == (name_of(3), [])


def test_room_that_only_the_write_shows_to_be_missing_is_made_in_the_same_way(layout):
    store = claimed(layout, Retention(keep_last=2))
    commit(store, 0)
    commit(store, 1)

    def write(file):
        if 0 in epochs_of(layout):  # a quota
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        file.write(b"new")

    store.commit(2, 30, epoch_finished=True, write=write, manifest={"metrics": {}})
    assert epochs_of(layout) == [1, 2]


def test_a_quota_that_stays_full_is_an_error_and_the_newest_stays(layout):
    store = claimed(layout, Retention(keep_last=2))
    commit(store, 0)
    commit(store, 1)

    def write(_file):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.raises(CheckpointSaveError, match="Disk quota exceeded"):
        store.commit(2, 30, epoch_finished=True, write=write, manifest={"metrics": {}})
    assert newest(layout) == (name_of(1), [])


def test_another_error_than_a_full_disk_deletes_nothing(layout):
    store = claimed(layout, Retention(keep_last=2))
    commit(store, 0)
    commit(store, 1)

    def write(_file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(CheckpointSaveError):
        store.commit(2, 30, epoch_finished=True, write=write, manifest={"metrics": {}})
    assert epochs_of(layout) == [0, 1]


# Readers

READ = """
import sys
from pathlib import Path
from hpcckpt.store.durable import reading
with reading(Path(sys.argv[1])):
    print("reading", flush=True)
    sys.stdin.read()
"""


def test_a_file_that_another_process_reads_is_not_deleted_until_it_is_done(layout, environ):
    store = claimed(layout, Retention(keep_last=2))
    commit(store, 0)
    command = [sys.executable, "-c", READ, str(layout.checkpoints / name_of(0))]
    with subprocess.Popen(command, env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "reading\n"
        assert is_being_read(layout.checkpoints / name_of(0))
        for epoch in (1, 2, 3):
            commit(store, epoch)
        assert epochs_of(layout) == [0, 2, 3]
        reader.stdin.close()
        reader.wait()
    assert not is_being_read(layout.checkpoints / name_of(0))
    commit(store, 4)
    assert epochs_of(layout) == [3, 4]


def test_several_may_read_at_once(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    with reading(path), reading(path):
        assert file_digest(path)[0] == 1
        assert is_being_read(path)
    assert not is_being_read(path)
    assert not is_being_read(tmp_path / "none")


# What a start went on from


def test_what_was_gone_on_from_stays_as_long_as_the_attempt(layout):
    store = claimed(layout, Retention(keep_last=2))
    commit(store, 0)
    again = claimed(layout, Retention(keep_last=2))
    assert recovered(again) == (name_of(0), [])
    for epoch in range(1, 5):
        commit(again, epoch)
    assert epochs_of(layout) == [0, 3, 4]
    commit(claimed(layout, Retention(keep_last=2)), 5)
    assert epochs_of(layout) == [4, 5]


# Damaged files


def test_a_damaged_file_is_set_aside_with_its_manifest_and_the_pointer_names_the_good_one(layout):
    store = claimed(layout)
    for epoch in range(2):
        commit(store, epoch)
    path = layout.checkpoints / name_of(1)
    path.write_bytes(b"damaged")
    name, problems = recovered(claimed(layout))
    assert name == name_of(0)
    assert len(problems) == 1
    assert (layout.damaged / name_of(1)).read_bytes() == b"damaged"
    assert json.loads((layout.damaged / manifest_name(name_of(1))).read_text())["epoch"] == 1
    assert read_json(layout.latest)["file"] == name_of(0)
    assert epochs_of(layout) == [0]
    assert newest(layout) == (name_of(0), [])
    assert layout.best.read_bytes() == b"epoch 0"


def test_a_pointer_that_is_damaged_is_written_anew_and_nothing_is_moved(layout):
    store = claimed(layout)
    commit(store, 0)
    layout.latest.write_text("{")
    name, problems = recovered(claimed(layout))
    assert (name, len(problems)) == (name_of(0), 1)
    assert newest(layout) == (name_of(0), [])
    assert not layout.damaged.exists()


def test_where_all_are_damaged_none_is_moved(layout):
    store = claimed(layout)
    commit(store, 0)
    (layout.checkpoints / name_of(0)).write_bytes(b"")
    before = files(layout)
    with pytest.raises(CheckpointCorruptError, match="no checkpoint here is intact"):
        recovered(claimed(layout))
    assert files(layout) == before


def test_looking_moves_nothing(layout):
    store = claimed(layout)
    for epoch in range(2):
        commit(store, epoch)
    (layout.checkpoints / name_of(1)).write_bytes(b"damaged")
    before = files(layout)
    assert newest(layout)[0] == name_of(0)
    assert files(layout) == before


def test_an_epoch_can_be_damaged_twice(layout):
    store = claimed(layout)
    commit(store, 0)
    for content in (b"first", b"second"):
        commit(store, 1)
        (layout.checkpoints / name_of(1)).write_bytes(content)
        recovered(store)
    assert {path.read_bytes() for path in layout.damaged.glob("*.pt*")} == {b"first", b"second"}


# One directory, two runs

HOLD = """
import sys
from pathlib import Path
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention
from hpcckpt.store.checkpoints import CheckpointStore
store = CheckpointStore(RunLayout(Path(sys.argv[1])), Retention())
store.claim(sys.argv[2], int(sys.argv[3]))
print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def live_run(layout, environ):
    """A process that has claimed the directory, as the second start of job 7."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(layout.root), "7", "1"], env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("live_run")
def test_a_second_run_is_refused_with_the_first_ones_job_id_and_changes_nothing(layout, monkeypatch):
    monkeypatch.setattr(guard, "ATTEMPT_TIMEOUT_S", 0.2)
    before = (layout.generation.read_bytes(), files(layout))
    for job_id, restart_count in (("8", 0), (None, None), ("7", 1)):
        with pytest.raises(RunDirectoryError, match=r"job 7 on .* is running in this directory; wait for it, end it, or choose another"):
            CheckpointStore(layout, BEST).claim(job_id, restart_count)
    assert (layout.generation.read_bytes(), files(layout)) == before


@pytest.mark.usefixtures("live_run")
def test_the_next_start_of_the_same_job_takes_over_from_one_that_is_lost(layout):
    assert CheckpointStore(layout, BEST).claim("7", 2) == 2


def test_a_run_that_was_killed_is_in_nobodys_way(layout, live_run):
    live_run.kill()
    assert CheckpointStore(layout, BEST).claim("8", 0) == 2


def test_a_run_that_is_released_is_in_nobodys_way_while_its_process_lives(layout, environ):
    store = claimed(layout)
    command = [sys.executable, "-c", HOLD, str(layout.root), "7", "0"]
    store.release()
    with subprocess.Popen(command, env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        other.kill()


@pytest.mark.usefixtures("live_run")
def test_without_locking_the_generation_alone_decides(layout):
    store = CheckpointStore(layout, BEST, locking="off")
    assert store.claim("8", 0) == 2
    commit(store, 0)
    assert newest(layout) == (name_of(0), [])


def test_a_folder_that_is_a_symlink_is_not_followed(layout, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    layout.root.mkdir()
    layout.checkpoints.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirectoryError, match="is a symlink; set run_dir to a place where it can be a directory"):
        claimed(layout)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# A save over a file of the same name


def test_a_manifest_that_was_written_before_its_file_does_not_damage_the_one_that_is_there(layout, monkeypatch):
    store = claimed(layout)
    commit(store, 0, loss=1.0, content=b"old")

    def fail(_draft):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("hpcckpt.store.durable.Draft.publish", fail)
    with pytest.raises(CheckpointSaveError):
        commit(store, 0, loss=2.0, content=b"new")
    monkeypatch.undo()
    info = CheckpointStore(layout, BEST).infos()[0]
    assert info.metrics == {"loss": 1.0}
    assert newest(layout) == (name_of(0), [])
    commit(store, 0, loss=3.0, content=b"newer")
    assert "replaces" not in json.loads((layout.checkpoints / manifest_name(name_of(0))).read_text())


@pytest.mark.parametrize("margin", [0, 1])
def test_the_margin_is_what_decides(layout, monkeypatch, margin):
    store = claimed(layout)
    path = commit(store, 0)
    enough = path.stat().st_size + checkpoints._MARGIN_BYTES
    free_bytes(monkeypatch, [enough - margin])
    if margin:
        with pytest.raises(CheckpointSaveError):
            commit(store, 1)
    else:
        commit(store, 1)
