"""What goes and what stays: full disks, readers, what a start went on from, damaged files, saves over a file of the same name."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from hpcckpt.errors import CheckpointCorruptError, CheckpointSaveError, FencedError, RunDirectoryError
from hpcckpt.layout import RunLayout, manifest_name
from hpcckpt.policy import Retention
from hpcckpt.store import guard
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import Draft, file_digest, is_being_read, read_json, reading
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
        return SimpleNamespace(f_frsize=1, f_blocks=10**12, f_bfree=free, f_bavail=free)

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


def test_neither_the_best_one_nor_the_pointers_goes_first_and_a_smaller_one_may_fit_all_the_same(layout, monkeypatch):
    store = claimed(layout, BEST)
    for epoch in range(4):
        commit(store, epoch, loss=float(epoch))
    assert epochs_of(layout) == [0, 2, 3]
    free_bytes(monkeypatch, [1000])
    seen = []
    store.commit(4, 50, epoch_finished=True, write=lambda _file: seen.append(epochs_of(layout)), manifest={"metrics": {"loss": 9.0}})
    assert seen == [[0, 3]]
    assert epochs_of(layout) == [0, 3, 4]


def test_a_file_system_that_does_not_say_how_large_it_is_is_not_taken_to_be_full(layout, monkeypatch):
    store = claimed(layout, Retention(keep_last=2))
    commit(store, 0)
    commit(store, 1)
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_frsize=0, f_blocks=0, f_bfree=0, f_bavail=0))
    seen = []
    store.commit(2, 30, epoch_finished=True, write=lambda _file: seen.append(epochs_of(layout)), manifest={"metrics": {}})
    assert seen == [[0, 1]]


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
from contextlib import contextmanager
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


def test_a_file_that_cannot_be_read_for_once_is_passed_over_and_stays(layout, monkeypatch):
    store = claimed(layout)
    for epoch in range(2):
        commit(store, epoch)
    real, failed = os.open, []

    def failing(path, *arguments, **options):
        if str(path).endswith(name_of(1)) and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    assert recovered(claimed(layout))[0] == name_of(0)
    assert not layout.damaged.exists()
    assert epochs_of(layout) == [0, 1]


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
    assert {path.read_bytes() for path in layout.damaged.iterdir() if path.suffix != ".json"} == {b"first", b"second"}


# One directory, two runs

HOLD = """
import sys
from contextlib import contextmanager
from pathlib import Path
from hpcckpt.store import guard
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention
from hpcckpt.store.checkpoints import CheckpointStore
store = CheckpointStore(RunLayout(Path(sys.argv[1])), Retention())
store.claim(sys.argv[2], [int(sys.argv[3])])
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
    for job_id, incarnation in (("8", (0,)), ("8", (2,)), (None, ()), ("7", (1,)), ("7", (0,))):
        with pytest.raises(RunDirectoryError, match=r"job 7 on .* is running in this directory; wait for it, end it, or choose another"):
            CheckpointStore(layout, BEST).claim(job_id, incarnation)
    assert (layout.generation.read_bytes(), files(layout)) == before


@pytest.mark.usefixtures("live_run")
def test_the_next_start_of_the_same_job_takes_over_from_one_that_is_lost(layout):
    assert CheckpointStore(layout, BEST).claim("7", (2,)) == 2


def test_an_earlier_start_that_comes_late_is_refused_also_when_the_later_one_is_gone(layout, live_run, monkeypatch):
    monkeypatch.setattr(guard, "ATTEMPT_TIMEOUT_S", 0.1)
    with pytest.raises(RunDirectoryError):
        CheckpointStore(layout, BEST).claim("7", (0,))
    live_run.kill()
    live_run.wait()
    with pytest.raises(FencedError, match=r"start \[0\] of job 7 comes too late: start \[1\] has claimed it"):
        CheckpointStore(layout, BEST).claim("7", (0,))


def test_who_took_over_without_the_lock_has_it_once_it_is_given_back(layout, live_run, environ):
    store = CheckpointStore(layout, BEST)
    store.claim("7", (2,))
    live_run.kill()
    live_run.wait()
    commit(store, 0)
    command = [sys.executable, "-c", HOLD.replace("store.claim", "guard.ATTEMPT_TIMEOUT_S = 0.1; store.claim"), str(layout.root), "8", "0"]
    other = subprocess.run(command, env=environ(), input="", capture_output=True, text=True, check=False)
    assert "is running in this directory" in other.stderr


def test_an_attempt_whose_number_was_lost_is_not_taken_for_the_one_that_got_it_again(layout):
    old = claimed(layout)
    layout.generation.unlink()
    new = claimed(layout)
    commit(new, 0)
    with pytest.raises(FencedError):
        commit(old, 1)
    assert newest(layout) == (name_of(0), [])


def test_an_overtaken_attempt_that_meets_a_full_disk_deletes_nothing(layout):
    old = claimed(layout, Retention(keep_last=2))
    commit(old, 0)
    commit(old, 1)

    def write(_file):
        claimed(layout, Retention(keep_last=2))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FencedError):
        old.commit(2, 30, epoch_finished=True, write=write, manifest={"metrics": {}})
    assert epochs_of(layout) == [0, 1]


def test_a_full_disk_at_the_claim_is_told_and_lets_the_directory_go(layout, monkeypatch):
    def fail(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(guard, "write_json", fail)
        with pytest.raises(RunDirectoryError, match=r"cannot be claimed \(No space left on device\)"):
            claimed(layout)
    assert layout.checkpoints not in {path for _, path in guard._held}


def test_a_run_that_was_killed_is_in_nobodys_way(layout, live_run):
    live_run.kill()
    assert CheckpointStore(layout, BEST).claim("8", (0,)) == 2


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
    assert store.claim("8", (0,)) == 2
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


@pytest.fixture
def interrupted(monkeypatch):
    """Let a save be interrupted where its file gets its name: before, or behind that."""
    publish = Draft.publish

    @contextmanager
    def at(*, has_name):
        def fail(draft):
            if draft.path.suffix != ".pt":
                return publish(draft)
            if has_name:
                publish(draft)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(Draft, "publish", fail)
            with pytest.raises(CheckpointSaveError):
                yield

    return at


def manifest_of(layout, epoch):
    return json.loads((layout.checkpoints / manifest_name(name_of(epoch))).read_text())


def test_a_manifest_that_was_written_before_its_file_does_not_damage_the_one_that_is_there(layout, interrupted):
    store = claimed(layout)
    commit(store, 0, loss=1.0, content=b"old")
    with interrupted(has_name=False):
        commit(store, 0, loss=2.0, content=b"new")
    assert manifest_of(layout, 0)["replaces"]["metrics"] == {"loss": 1.0}
    info = CheckpointStore(layout, BEST).infos()[0]
    assert info.metrics == {"loss": 1.0}
    assert newest(layout) == (name_of(0), [])
    commit(store, 0, loss=3.0, content=b"newer")
    assert "replaces" not in manifest_of(layout, 0)


@pytest.mark.parametrize("has_name", [False, True], ids=["the old file", "the new file"])
def test_a_save_that_was_interrupted_within_its_two_names_is_settled_once(layout, interrupted, has_name):
    store = claimed(layout)
    commit(store, 0, loss=1.0, content=b"old")
    with interrupted(has_name=has_name):
        commit(store, 0, loss=2.0, content=b"new")
    commit(store, 1)
    assert "replaces" not in manifest_of(layout, 0)
    assert [info.metrics["loss"] for info in store.infos()] == [2.0 if has_name else 1.0, 1.0]
    assert store.find("epoch 0", epoch=0).name == name_of(0)


def test_a_file_that_cannot_be_read_for_a_moment_is_not_given_the_manifest_of_the_one_it_has_replaced(layout, interrupted, monkeypatch):
    def unreadable(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = claimed(layout)
    commit(store, 0, content=b"old")
    with interrupted(has_name=True):
        commit(store, 0, content=b"new")
    with monkeypatch.context() as patch:
        patch.setattr("hpcckpt.store.shelf.file_digest", unreadable)
        commit(store, 1)
    assert "replaces" in manifest_of(layout, 0)
    assert store.find("epoch 0", epoch=0).name == name_of(0)
    commit(store, 2)
    assert "replaces" not in manifest_of(layout, 0)
