"""One run directory, several attempts: only the newest one changes anything."""

import errno
import fcntl
import os
import signal
import time

import pytest

from hpcckpt.errors import CheckpointSaveError, FencedError, RunDirectoryError
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention
from hpcckpt.store import guard
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import read_json

BEST = Retention(keep_last=2, keep_best=1, monitor="loss")


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path)


def claimed(layout, job_id="7"):
    store = CheckpointStore(layout, BEST)
    store.claim(job_id)
    return store


def commit(store, epoch, loss, content=b"bytes"):
    manifest = {"metrics": {"loss": loss}}
    return store.commit(epoch, (epoch + 1) * 10, epoch_finished=True, write=lambda file: file.write(content) and None, manifest=manifest)


def name_of(epoch):
    return f"checkpoint_epoch{epoch:04d}.pt"


def files(layout):
    """All files below checkpoints/ but the lock, with their content."""
    folder = layout.checkpoints
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != layout.lock}


def newest(store):
    """Return the newest good checkpoint's name; nothing may be wrong."""
    problems = []
    info = store.newest_good(problems.append)
    assert problems == []
    return None if info is None else info.name


def test_a_claim_takes_the_next_generation_and_removes_what_was_half_written(layout):
    assert CheckpointStore(layout, BEST).claim("7") == 1
    (layout.checkpoints / ".tmp-checkpoint_epoch0000.pt.abcd").write_text("half")
    assert CheckpointStore(layout, BEST).claim("8") == 2
    assert list(layout.checkpoints.glob(".tmp-*")) == []
    assert read_json(layout.generation)["job_id"] == "8"


OVERTAKEN = {
    "commit of a new epoch": lambda store: commit(store, 7, 0.1),
    "commit of the same epoch": lambda store: commit(store, 1, 0.1, content=b"other bytes"),
    "rewind": lambda store: store.rewind(name_of(0)),
    "rewind to nothing": lambda store: store.rewind(None),
    "question whether it may": lambda store: store.refuse_if_fenced(),
}


@pytest.mark.parametrize("act", OVERTAKEN.values(), ids=OVERTAKEN)
def test_an_overtaken_attempt_changes_nothing(layout, act):
    old = claimed(layout, job_id="7")
    commit(old, 0, 2.0)
    commit(claimed(layout, job_id="8"), 1, 1.0)
    before = files(layout)
    with pytest.raises(FencedError, match=r"attempt 1 is not the newest any more: attempt 2 \(job 8 on "):
        act(old)
    assert files(layout) == before


def test_who_is_the_newest_or_has_claimed_nothing_is_not_refused(layout):
    CheckpointStore(layout, BEST).refuse_if_fenced()
    old = claimed(layout)
    old.refuse_if_fenced()
    new = claimed(layout, job_id="8")
    new.refuse_if_fenced()
    CheckpointStore(layout, BEST).refuse_if_fenced()
    with pytest.raises(FencedError):
        old.refuse_if_fenced()


@pytest.mark.parametrize("moment", ["while it writes", "when its bytes are durable", "when its file is published"])
def test_an_attempt_that_is_overtaken_within_a_commit_changes_nothing(layout, monkeypatch, moment):
    # With locks the last moment cannot come.
    locking = "off" if moment == "when its file is published" else "flock"
    old, new = CheckpointStore(layout, BEST, locking), CheckpointStore(layout, BEST, locking)
    old.claim("7")
    commit(old, 0, 2.0)
    before = {}

    def overtake():
        new.claim("8")
        commit(new, 1, 1.0, content=b"of the new attempt")
        before.update(files(layout))

    def write(file):
        file.write(b"of the old attempt")
        if moment == "while it writes":
            overtake()

    at = {"when its bytes are durable": 1, "when its file is published": 2}.get(moment)
    fsync, count = os.fsync, [0]

    def fsync_and_overtake(descriptor):
        fsync(descriptor)
        count[0] += 1
        if count[0] == at:
            overtake()

    monkeypatch.setattr(os, "fsync", fsync_and_overtake)
    with pytest.raises(FencedError):
        old.commit(1, 20, epoch_finished=True, write=write, manifest={"metrics": {"loss": 0.1}})
    assert files(layout) == before
    assert newest(new) == name_of(1)


@pytest.fixture
def lock_holder(layout):
    """Another process that holds the lock."""
    layout.checkpoints.mkdir(parents=True, exist_ok=True)
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(said, b"x")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(said)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_lock_that_is_held_is_not_waited_for_for_ever_and_the_holder_is_named(layout, monkeypatch, request):
    store = claimed(layout, job_id="4711")
    request.getfixturevalue("lock_holder")
    monkeypatch.setattr(guard, "LOCK_TIMEOUT_S", 0.1)
    began = time.monotonic()
    for act in (lambda: commit(store, 0, 1.0), lambda: store.rewind(None), lambda: store.claim("8")):
        with pytest.raises(RunDirectoryError, match=rf"held this lock for 0\.1 s; the last attempt was job 4711 on {os.uname().nodename}"):
            act()
    assert time.monotonic() - began < 5
    assert newest(store) is None


def break_flock(monkeypatch, number):
    def flock(_descriptor, _operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], ids=errno.errorcode.get)
def test_a_file_system_without_flock_is_refused_with_advice(layout, monkeypatch, number):
    store = claimed(layout)
    commit(store, 0, 1.0)
    before = files(layout)
    break_flock(monkeypatch, number)
    advice = (
        r"cannot be locked \(.+\); put run_dir on a file system that has flock \(Lustre: mounted with -o flock\), "
        r"or set checkpoint\.locking=off and never start two runs in one directory$"
    )
    for act in (lambda: commit(store, 1, 1.0), lambda: store.rewind(None), lambda: store.claim("8")):
        with pytest.raises(RunDirectoryError, match=advice) as caught:
            act()
        assert str(caught.value).startswith(f"{layout.lock}: ")
    assert {name: files(layout)[name] for name in before} == before
    assert newest(store) == name_of(0)


def test_another_failure_of_the_lock_is_not_taken_for_a_file_system_without_flock(layout, monkeypatch):
    store = claimed(layout)
    break_flock(monkeypatch, errno.EIO)
    with pytest.raises(RunDirectoryError, match=r"cannot be claimed \(Input/output error\)"):
        store.claim("8")
    with pytest.raises(CheckpointSaveError, match="Input/output error"):
        commit(store, 0, 1.0)
