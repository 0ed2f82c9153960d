"""The checkpoints of a run: what is committed is found again, whatever was interrupted, damaged or started twice."""

import errno
import json
import os
import resource

import pytest
import torch

from hpcckpt.errors import CheckpointNotFoundError, CheckpointSaveError
from hpcckpt.layout import RunLayout, manifest_name
from hpcckpt.policy import Retention
from hpcckpt.store.checkpoints import CheckpointStore, free_name
from hpcckpt.store.durable import file_digest, read_json

BEST = Retention(keep_last=2, keep_best=1, monitor="loss")


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path)


def claimed(layout, retention=BEST, job_id="7"):
    store = CheckpointStore(layout, retention)
    store.claim(job_id)
    return store


def commit(store, epoch, loss=None, *, step=None, content=None):
    """Commit the end of `epoch` (10 steps each), or `step` within it."""
    data = f"epoch {epoch} step {step}".encode() if content is None else content
    return store.commit(
        epoch,
        (epoch + 1) * 10 if step is None else step,
        epoch_finished=step is None,
        write=lambda file: file.write(data) and None,
        manifest={"metrics": {} if loss is None else {"loss": loss}, "world_size": 1},
    )


def name_of(epoch, step=None):
    return f"checkpoint_epoch{epoch:04d}{'' if step is None else f'_step{step:09d}'}.pt"


def files(layout):
    """All files below checkpoints/ but the lock, with their content."""
    folder = layout.checkpoints
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != layout.lock}


def checkpoint_names(folder):
    return sorted(path.name for path in folder.glob("checkpoint_*.pt"))


def newest(store):
    """Return the newest good checkpoint's name; nothing may be wrong."""
    problems = []
    info = store.newest_good(problems.append)
    assert problems == []
    return None if info is None else info.name


def test_an_empty_run_has_no_checkpoint(layout):
    store = CheckpointStore(layout, BEST)
    assert store.infos() == []
    assert newest(store) is None
    store.claim(None)
    assert newest(store) is None


def test_a_commit_is_found_with_its_manifest_and_the_pointer_names_it(layout):
    store = claimed(layout)
    path = commit(store, 4, 0.5)
    assert path == layout.checkpoints / "checkpoint_epoch0004.pt"
    size, digest = file_digest(path)
    pointer = read_json(layout.latest)
    entry = {"file": path.name, "size_bytes": size, "digest": digest, "epoch": 4, "step": 50, "epoch_finished": True, "generation": 1}
    assert pointer == entry
    manifest = read_json(layout.checkpoints / manifest_name(path.name))
    assert manifest | entry | {"metrics": {"loss": 0.5}, "world_size": 1} == manifest
    assert set(manifest) - set(entry) == {"metrics", "world_size", "save_s", "time"}
    assert newest(store) == path.name


def test_the_names_come_in_the_order_of_the_guarantee(layout, monkeypatch):
    store = claimed(layout, Retention(keep_last=1, monitor="loss"))
    commit(store, 0, 2.0)
    calls = []
    for function in ("rename", "unlink", "link"):
        real = getattr(os, function)

        def recorded(path, *rest, _real=real, _name=function, **options):
            target = os.path.basename(rest[0] if rest else path)
            calls.append(f"{_name} {'.tmp' if target.startswith('.tmp') else target}")
            return _real(path, *rest, **options)

        monkeypatch.setattr(os, function, recorded)
    commit(store, 1, 1.0)
    assert calls == [
        "rename checkpoint_epoch0001.json",
        "rename checkpoint_epoch0001.pt",
        "rename latest.json",
        "link .tmp",
        "rename best_model.pt",
        "rename best_model.pt.json",
        "unlink checkpoint_epoch0000.pt",
        "unlink checkpoint_epoch0000.json",
    ]


def test_every_file_is_private(layout):
    commit(claimed(layout), 0, 1.0)
    assert {path.stat().st_mode & 0o777 for path in layout.checkpoints.iterdir()} == {0o600}
    assert layout.checkpoints.stat().st_mode & 0o777 == 0o700


def test_the_end_of_an_epoch_comes_behind_a_stop_at_its_last_step(layout):
    store = claimed(layout)
    commit(store, 0, step=10)
    commit(store, 0)
    assert newest(store) == name_of(0)
    assert [info.name for info in store.infos()] == [name_of(0, 10), name_of(0)]


LOOKUPS = {
    "epoch": ({"epoch": 1}, name_of(1)),
    "step at an end": ({"step": 10}, name_of(0)),
    "step within": ({"step": 25}, name_of(2, 25)),
    "best": ({"best": True}, name_of(1)),
}


@pytest.fixture
def filled(layout):
    store = claimed(layout, Retention(keep_last=9, monitor="loss"))
    commit(store, 0, 3.0)
    commit(store, 1, 1.0)
    commit(store, 2, 2.0, step=25)
    return store


@pytest.mark.parametrize(("asked", "name"), LOOKUPS.values(), ids=LOOKUPS)
def test_a_checkpoint_is_found_by(filled, asked, name):
    assert filled.find("this one", **asked).name == name


MISSES = {
    "epoch": ({"epoch": 2}, r"this one: .* has no such checkpoint; there are the epochs 0, 1$"),
    "step": ({"step": 11}, r"this one: .*; there are the steps 10, 20, 25$"),
}


@pytest.mark.parametrize(("asked", "message"), MISSES.values(), ids=MISSES)
def test_one_that_is_not_there_is_answered_with_those_there_are(filled, asked, message):
    with pytest.raises(CheckpointNotFoundError, match=message):
        filled.find("this one", **asked)


def test_there_may_be_none_at_all(layout):
    store = CheckpointStore(layout, Retention())
    with pytest.raises(CheckpointNotFoundError, match="there are no epochs yet"):
        store.find("this one", epoch=0)
    with pytest.raises(CheckpointNotFoundError, match=r"this one: .* no checkpoint here has the metric checkpoint\.monitor"):
        store.find("this one", best=True)


@pytest.mark.parametrize("name", ["../x.pt", "/etc/passwd", "latest.json", "best_model.pt", "checkpoint_epoch007.pt", ""])
def test_only_a_checkpoints_name_has_a_path(layout, name):
    with pytest.raises(CheckpointNotFoundError):
        CheckpointStore(layout, BEST).path(name)


def test_retention_keeps_the_last_and_the_best_also_in_a_new_process(layout):
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, 6.0]
    kept = []
    for epoch, loss in enumerate(losses):
        commit(claimed(layout), epoch, loss)  # a new store each time: nothing is known from memory
        kept.append(checkpoint_names(layout.checkpoints))
    assert kept[-1] == [name_of(1), name_of(4), name_of(5)]
    assert kept[2] == [name_of(1), name_of(2)]
    assert sorted(path.stem for path in layout.checkpoints.glob("*.json")) == [
        *("best_model.pt", "checkpoint_epoch0001", "checkpoint_epoch0004", "checkpoint_epoch0005", "generation", "latest")
    ]


def test_what_the_pointer_names_is_kept_though_it_is_not_the_last_in_training(layout):
    store = claimed(layout, Retention(keep_last=1))
    commit(store, 9)
    commit(store, 3)  # another timeline, after a fall back
    assert newest(store) == name_of(3)
    assert name_of(3) in checkpoint_names(layout.checkpoints)


def test_the_best_is_a_second_name_of_its_file_and_changes_with_it(layout):
    store = claimed(layout)
    best = []
    for epoch, loss in enumerate([2.0, 3.0, float("nan"), 1.0, 1.0]):
        commit(store, epoch, loss)
        best.append(next(name for name in checkpoint_names(layout.checkpoints) if layout.best.samefile(layout.checkpoints / name)))
    assert best == [name_of(0), name_of(0), name_of(0), name_of(3), name_of(3)]
    assert layout.best.stat().st_nlink == 2


def test_a_metric_that_is_no_number_is_never_the_best(layout):
    store = claimed(layout)
    commit(store, 0, float("nan"))
    assert not layout.best.exists()
    assert newest(store) == name_of(0)
    commit(store, 1, float("inf"))
    assert layout.best.samefile(layout.checkpoints / name_of(1))


def test_without_hard_links_the_best_is_a_copy_that_changes_with_it(layout, monkeypatch):
    def refuse(*_names, **_options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = claimed(layout)
    for epoch, loss in enumerate([2.0, 1.0, 3.0]):
        commit(store, epoch, loss)
    assert layout.best.read_bytes() == (layout.checkpoints / name_of(1)).read_bytes()
    assert layout.best.stat().st_nlink == 1


def test_files_of_other_names_are_left_alone(layout):
    store = claimed(layout, Retention(keep_last=1))
    foreign = ["notes.txt", "checkpoint_epoch1.pt", "checkpoint_epoch0001.pt.bak", "checkpoint_epoch00001.pt", "model.pt", "a.json"]
    for name in foreign:
        (layout.checkpoints / name).write_text("mine")
    for epoch in range(4):
        commit(store, epoch)
    claimed(layout).rewind(name_of(3))
    claimed(layout).rewind(None)
    assert {name: (layout.checkpoints / name).read_text() for name in foreign} == dict.fromkeys(foreign, "mine")


@pytest.mark.parametrize("after", [0, 1, 17, 4096])
def test_a_full_disk_leaves_everything_older_intact(layout, after):
    store = claimed(layout)
    commit(store, 0, 1.0)
    before = files(layout)

    def write(file):
        file.write(b"x" * after)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        CheckpointSaveError, match=r"checkpoint_epoch0001\.pt: .*\(No space left on device\); the ones before it are intact"
    ):
        store.commit(1, 20, epoch_finished=True, write=write, manifest={"metrics": {}})
    assert files(layout) == before
    assert newest(store) == name_of(0)


@pytest.mark.parametrize("at_byte", [0, 500, 60_000, 399_000])
def test_a_full_disk_behind_torch_save_is_the_same_error(layout, at_byte):
    store = claimed(layout)
    commit(store, 0, 1.0)
    before = files(layout)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at_byte, hard))
    try:
        with pytest.raises(CheckpointSaveError, match="File too large"):
            store.commit(1, 20, epoch_finished=True, write=lambda file: torch.save(torch.zeros(100_000), file), manifest={"metrics": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(layout) == before


def test_a_failed_commit_can_be_tried_again(layout):
    store = claimed(layout)
    (layout.checkpoints / name_of(0)).mkdir()
    with pytest.raises(CheckpointSaveError, match="Is a directory"):
        commit(store, 0)
    (layout.checkpoints / name_of(0)).rmdir()
    commit(store, 0)
    assert newest(store) == name_of(0)


def test_a_free_name_is_the_first_that_is_not_taken(tmp_path):
    taken = []
    for _ in range(3):
        path = free_name(tmp_path / "a.pt")
        path.write_text("")
        taken.append(path.name)
    assert taken == ["a.pt", "a.pt.1", "a.pt.2"]


def test_the_manifest_is_json_that_others_read(layout):
    path = commit(claimed(layout), 0, 0.25)
    assert json.loads((layout.checkpoints / manifest_name(path.name)).read_text())["metrics"] == {"loss": 0.25}
