"""Whatever is interrupted, and when: there is a good checkpoint, and none older than the last that was acknowledged."""

import json
import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcckpt.errors import CheckpointSaveError, FencedError
from hpcckpt.layout import RunLayout
from support.checkpoints import claimed, commit, files, name_of, newest
from support.digests import digest_of

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
# Every way in which the package changes a directory or makes something durable.
CALLS = ("open", "fsync", "rename", "unlink", "link", "mkdir")


def patch_calls(before_each):
    """Have `before_each(number of the call)` called before each of CALLS."""
    count = [0]

    def patch(name):
        real = getattr(os, name)

        def counted(*arguments, **options):
            count[0] += 1
            before_each(count[0])
            return real(*arguments, **options)

        setattr(os, name, counted)

    for name in CALLS:
        patch(name)


def killed_at(number, act):
    """Run `act` in a process that is killed before its call `number`; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        patch_calls(lambda count: os._exit(9) if count == number else None)
        try:
            act()
        except FencedError:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_kill_at_any_instant_of_a_commit_leaves_a_good_checkpoint(tmp_path):
    seen = set()
    for number in range(1, 100):
        layout = RunLayout(tmp_path / str(number))
        store = claimed(layout)
        for epoch in range(3):
            commit(store, epoch, loss=3.0 - epoch)
        finished = killed_at(number, lambda store=store: commit(store, 3, loss=0.1))
        name, problems = newest(layout)
        assert problems == []
        assert name in (name_of(2), name_of(3))
        seen.add(name)
        again = claimed(layout)
        commit(again, 3, loss=0.1, content=b"other bytes")
        assert newest(layout) == (name_of(3), [])
        assert layout.best.read_bytes() == b"other bytes"
        assert list(layout.checkpoints.glob(".tmp-*")) == []
        if finished:
            break
    assert number > 20
    assert seen == {name_of(2), name_of(3)}


def test_a_kill_at_any_instant_of_a_save_over_the_newest_leaves_the_one_or_the_other(tmp_path):
    seen = set()
    for number in range(1, 100):
        layout = RunLayout(tmp_path / str(number))
        store = claimed(layout)
        commit(store, 0)
        commit(store, 1, content=b"old bytes")
        finished = killed_at(number, lambda store=store: commit(store, 1, content=b"new bytes"))
        assert newest(layout) == (name_of(1), [])
        seen.add((layout.checkpoints / name_of(1)).read_bytes())
        commit(claimed(layout), 1, content=b"newer bytes")
        assert newest(layout) == (name_of(1), [])
        if finished:
            break
    assert number > 15
    assert seen == {b"old bytes", b"new bytes"}


def test_a_kill_at_any_instant_of_setting_a_damaged_file_aside_is_finished_by_the_next_start(tmp_path):
    for number in range(1, 100):
        layout = RunLayout(tmp_path / str(number))
        store = claimed(layout)
        for epoch in range(3):
            commit(store, epoch)
        (layout.checkpoints / name_of(2)).write_bytes(b"damaged")
        finished = killed_at(number, lambda store=store: store.recover(lambda _problem: None))
        assert claimed(layout).recover(lambda _problem: None).name == name_of(1)
        assert newest(layout) == (name_of(1), [])
        assert (layout.damaged / name_of(2)).read_bytes() == b"damaged"
        assert list(layout.checkpoints.glob("checkpoint_epoch0002*")) == []
        if finished:
            break
    assert number > 8


def test_a_failing_file_system_at_any_instant_of_a_commit_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    for number in range(1, 100):
        layout = RunLayout(tmp_path / str(number))
        store = claimed(layout)
        for epoch in range(3):
            commit(store, epoch, loss=3.0 - epoch)

        def fail(count, at=number):
            if count == at:
                raise OSError(5, "Input/output error")

        message = None
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, getattr(os, name))  # put back at the end
            patch_calls(fail)
            try:
                commit(store, 3, loss=0.1)
            except CheckpointSaveError as error:
                message = str(error)
        failed = message is not None
        assert not failed or "Input/output error" in message
        name, problems = newest(layout)
        assert problems == []
        assert name in ((name_of(2), name_of(3)) if failed else (name_of(3),))
        commit(store, 3, loss=0.1)
        assert newest(layout) == (name_of(3), [])
        if not failed and number > 30:
            break


@pytest.mark.parametrize("keep", [name_of(0), None], ids=["first", "nothing"])
def test_a_rewind_that_was_killed_at_any_instant_is_finished_by_the_next(tmp_path, keep):
    contents = []
    for number in range(1, 100):
        layout = RunLayout(tmp_path / str(number))
        store = claimed(layout)
        for epoch in range(3):
            commit(store, epoch, loss=float(epoch))
        finished = killed_at(number, lambda store=store: store.rewind(keep))
        claimed(layout).rewind(keep)
        assert newest(layout) == (keep, [])
        contents.append({name for name in files(layout) if name != "latest.json"})
        if finished:
            break
    assert number > 10
    assert all(found == contents[-1] for found in contents)


class Life(RuleBasedStateMachine):
    """A run that commits, is killed, overtaken, damaged and rewound in any order."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.layout = RunLayout(Path(self.folder.name))
        self.store = claimed(self.layout)
        self.old = None
        self.epoch = -1  # of the position
        self.pointed = None
        self.contents = {}
        self.count = 0

    def teardown(self):
        self.folder.cleanup()

    def intact(self):
        """Return the epochs whose bytes are those of their manifest, or of the one that an interrupted save would replace."""
        found = []
        for path in self.layout.checkpoints.glob("checkpoint_*.pt"):
            if path.with_suffix(".json").exists():
                manifest = json.loads(path.with_suffix(".json").read_text())
                digests = [manifest["digest"], manifest.get("replaces", {}).get("digest")]
                if digest_of(path.read_bytes()) in digests:
                    found.append(int(path.stem[-4:]))
        return found

    def expected(self):
        intact = self.intact()
        return self.pointed if self.pointed in intact else max(intact, default=None)

    def next_content(self):
        self.count += 1
        return f"content {self.count}".encode()

    @rule(loss=st.sampled_from([0.1, 0.2, 0.3, float("nan")]))
    def commit(self, loss):
        self.epoch += 1
        self.contents[self.epoch] = self.next_content()
        commit(self.store, self.epoch, loss, self.contents[self.epoch])
        self.pointed = self.epoch

    @rule(number=st.integers(1, 40))
    def killed_in_a_commit(self, number):
        content, before = self.next_content(), self.expected()
        killed_at(number, lambda: commit(self.store, self.epoch + 1, 0.1, content))
        pointer = json.loads(self.layout.latest.read_text()) if self.layout.latest.exists() else {}
        if pointer.get("digest") == digest_of(content):
            self.pointed = self.epoch + 1
        elif self.pointed is not None and before == self.pointed:
            assert self.expected() == before
        path = self.layout.checkpoints / name_of(self.epoch + 1)
        if path.exists() and path.read_bytes() == content:
            self.contents[self.epoch + 1] = content
        self.restart()

    @rule()
    def restart(self):
        self.old, self.store = self.store, claimed(self.layout)
        if self.expected() is not None:
            self.epoch = self.expected()

    @precondition(lambda self: self.old is not None)
    @rule(rewinds=st.booleans())
    def overtaken(self, rewinds):
        before = files(self.layout)
        with pytest.raises(FencedError):
            self.old.rewind(None) if rewinds else commit(self.old, self.epoch + 1)
        assert files(self.layout) == before

    @precondition(lambda self: len(self.intact()) > 1)
    @rule(seed=st.integers(0, 99))
    def damaged(self, seed):
        epoch = random.Random(seed).choice(sorted(self.intact()))
        path = self.layout.checkpoints / name_of(epoch)
        path.write_bytes(path.read_bytes() + b"!")
        self.restart()

    @precondition(lambda self: self.intact())
    @rule(seed=st.integers(0, 99))
    def rewound(self, seed):
        epoch = random.Random(seed).choice(sorted(self.intact()))
        self.store.rewind(name_of(epoch))
        self.pointed = self.epoch = epoch
        assert max(self.intact()) == epoch

    @invariant()
    def the_newest_is_found_with_its_bytes(self):
        expected = self.expected()
        name, _ = newest(self.layout)
        assert name == (None if expected is None else name_of(expected))
        if expected is not None:
            assert (self.layout.checkpoints / name).read_bytes() == self.contents[expected]

    @invariant()
    def the_folder_does_not_grow(self):
        assert len(list(self.layout.checkpoints.iterdir())) < 25


def test_a_save_killed_over_one_that_was_never_acknowledged_leaves_that_one_behind_the_damaged_newest():
    outcomes = set()
    for number in range(1, 40):
        life = Life()
        life.commit(loss=0.1)
        life.commit(loss=0.1)
        life.killed_in_a_commit(number=18)  # between the file's name and the pointer
        life.killed_in_a_commit(number=number)
        life.damaged(seed=0)
        life.the_newest_is_found_with_its_bytes()
        outcomes.add(newest(life.layout)[0])
        life.teardown()
    assert name_of(2) in outcomes


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestLife.pytestmark = pytestmark
