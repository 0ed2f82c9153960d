"""Damaged files are never trusted, and a rewind deletes nothing."""

import hashlib
import json
import os
import shutil

import pytest

from hpcckpt.errors import CheckpointCorruptError, CheckpointNotFoundError
from hpcckpt.layout import RunLayout, manifest_name
from hpcckpt.policy import Retention
from hpcckpt.store.durable import read_json, write_json
from support.checkpoints import claimed, commit, files, name_of, newest
from support.digests import digest_of


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path)


@pytest.fixture
def three(layout):
    store = claimed(layout, Retention(keep_last=9, monitor="loss"))
    for epoch in range(3):
        commit(store, epoch, loss=3.0 - epoch)
    return store


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def with_field(name, value):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def replaced_by(make):
    def replace(path):
        path.unlink()
        make(path)

    return replace


DAMAGE = {
    "truncated": (".pt", lambda path: os.truncate(path, 3)),
    "emptied": (".pt", lambda path: os.truncate(path, 0)),
    "longer": (".pt", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "flipped": (".pt", flip),
    "deleted": (".pt", os.unlink),
    "symlink": (".pt", replaced_by(lambda path: path.symlink_to(name_of(1)))),
    "fifo": (".pt", replaced_by(os.mkfifo)),
    "directory": (".pt", replaced_by(os.mkdir)),
    "manifest deleted": (".json", os.unlink),
    "manifest torn": (".json", lambda path: os.truncate(path, 20)),
    "manifest a list": (".json", lambda path: path.write_text("[]")),
    "manifest of another": (".json", with_field("file", name_of(1))),
    "manifest without a digest": (".json", with_field("digest", None)),
    "manifest with words for numbers": (".json", with_field("step", "many")),
    "manifest without metrics": (".json", with_field("metrics", None)),
}


@pytest.mark.timeout(20)
@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(("suffix", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_is_reported_and_the_one_before_it_is_taken(layout, suffix, damage):
    damage(layout.checkpoints / f"checkpoint_epoch0002{suffix}")
    name, problems = newest(layout)
    assert name == name_of(1)
    assert len(problems) == 1
    assert "checkpoint_epoch0002.pt" in problems[0]


def test_each_damaged_one_is_reported(layout, three):
    flip(layout.checkpoints / name_of(2))
    os.truncate(layout.checkpoints / name_of(1), 0)
    name, problems = newest(layout)
    assert name == name_of(0)
    assert [name_of(2) in problems[0], name_of(1) in problems[1]] == [True, True]
    with pytest.raises(CheckpointCorruptError, match=r"resume\.epoch=1: .* choose another one; there are the epochs 0, 1, 2"):
        three.find("resume.epoch=1", epoch=1)


@pytest.mark.usefixtures("three")
def test_where_all_are_damaged_nothing_begins_anew_by_itself(layout):
    for epoch in range(3):
        flip(layout.checkpoints / name_of(epoch))
    with pytest.raises(CheckpointCorruptError, match=r"no checkpoint here is intact; submit with resume\.from=none"):
        newest(layout)


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("pointer", [None, b"garbage"], ids=["named", "garbage pointer"])
def test_where_all_manifests_are_gone_nothing_begins_anew_by_itself(layout, pointer):
    for epoch in range(3):
        (layout.checkpoints / manifest_name(name_of(epoch))).unlink()
    if pointer is not None:
        layout.latest.write_bytes(pointer)
    with pytest.raises(CheckpointCorruptError):
        newest(layout)


POINTERS = {
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(os.urandom(100)),
    "a list": lambda path: path.write_text('["x"]'),
    "no name": lambda path: path.write_text("{}"),
    "a name that is a list": with_field("file", ["x"]),
    "a number": with_field("file", 7),
    "a way out": with_field("file", "../checkpoint_epoch0001.pt"),
    "an absolute path": with_field("file", "/etc/passwd"),
    "a file that is gone": with_field("file", "checkpoint_epoch0099.pt"),
    "itself": with_field("file", "latest.json"),
    "symlink": replaced_by(lambda path: path.symlink_to("checkpoint_epoch0000.json")),
    "fifo": replaced_by(os.mkfifo),
    "directory": replaced_by(os.mkdir),
}


@pytest.mark.timeout(20)
@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("damage", POINTERS.values(), ids=POINTERS)
def test_a_pointer_that_cannot_be_followed_is_reported_and_the_newest_is_taken(layout, damage):
    damage(layout.latest)
    name, problems = newest(layout)
    assert name == name_of(2)
    assert len(problems) == 1
    assert "latest.json" in problems[0]


def test_the_pointer_counts_and_not_a_newer_file_that_was_never_acknowledged(layout, three):
    before = layout.latest.read_bytes()
    commit(three, 3)
    layout.latest.write_bytes(before)
    assert newest(layout) == (name_of(2), [])
    flip(layout.checkpoints / name_of(2))
    assert newest(layout)[0] == name_of(3)


def test_a_rewind_moves_later_ones_with_their_manifests_and_deletes_nothing(layout, three):
    before, pointer = files(layout), read_json(layout.latest)
    three.rewind(name_of(0))
    after = files(layout)
    for epoch in (1, 2):
        for name in (name_of(epoch), manifest_name(name_of(epoch))):
            assert after[f"superseded/{name}"] == before[name]
            assert name not in after
    assert newest(layout) == (name_of(0), [])
    assert layout.best.samefile(layout.checkpoints / name_of(0))
    assert read_json(layout.latest) == pointer | {
        key: json.loads(before[manifest_name(name_of(0))])[key] for key in ("file", "size_bytes", "digest", "epoch", "step")
    }


@pytest.mark.parametrize("keep", [name_of(0), name_of(2), None], ids=["first", "newest", "nothing"])
def test_a_repeated_rewind_changes_nothing(layout, three, keep):
    three.rewind(keep)
    before = files(layout)
    three.rewind(keep)
    assert files(layout) == before


def test_a_rewind_to_nothing_begins_anew(layout, three):
    three.rewind(None)
    assert newest(layout) == (None, [])
    assert sorted(files(layout)) == sorted(
        f"superseded/{name}" for epoch in range(3) for name in (name_of(epoch), manifest_name(name_of(epoch)))
    )


def redigested(layout, epoch, digest):
    """Let a manifest have another digest, as another version would have written it."""
    path = layout.checkpoints / name_of(epoch).replace(".pt", ".json")
    write_json(path, {**read_json(path), "digest": digest})


def test_files_of_earlier_versions_are_verified_by_their_own_digest(layout, three):
    digest = "sha256:" + hashlib.sha256(b"epoch 2").hexdigest()
    redigested(layout, 2, digest)
    assert newest(layout) == (name_of(2), [])
    shutil.copy(layout.checkpoints / name_of(2), layout.checkpoints / "copy.pt")
    shutil.copy(layout.checkpoints / name_of(1), layout.checkpoints / "another.pt")
    assert three.own(layout.checkpoints / "copy.pt").epoch == 2
    assert three.own(layout.checkpoints / "another.pt").epoch == 1
    (layout.checkpoints / name_of(2)).write_bytes(b"epoch 3")
    assert newest(layout)[0] == name_of(1)
    with pytest.raises(CheckpointCorruptError, match="or no checkpoint of this run"):
        three.own(layout.checkpoints / name_of(2))


def test_what_a_later_version_has_committed_is_passed_over_but_not_set_aside(layout, three):
    redigested(layout, 2, "blake9:00")
    said = []
    assert three.recover(said.append).name == name_of(1)
    assert "cannot compute ('blake9:00')" in said[0]
    assert (layout.checkpoints / name_of(2)).exists()


def test_an_epoch_can_be_superseded_twice(layout, three):
    three.rewind(name_of(1))
    commit(three, 2, content=b"the second")
    three.rewind(name_of(1))
    assert (layout.superseded / "checkpoint_epoch0002.pt").read_bytes() == b"epoch 2"
    assert (layout.superseded / "checkpoint_epoch0002.pt.1").read_bytes() == b"the second"
    digest = digest_of(b"the second")
    assert json.loads((layout.superseded / "checkpoint_epoch0002.pt.1.json").read_text())["digest"] == digest


def test_a_rewind_to_what_is_not_there_any_more_is_refused_and_moves_nothing(layout, three):
    (layout.checkpoints / name_of(1)).unlink()
    before = files(layout)
    with pytest.raises(CheckpointNotFoundError, match=r"checkpoint_epoch0001\.pt is not there any more"):
        three.rewind(name_of(1))
    assert files(layout) == before
