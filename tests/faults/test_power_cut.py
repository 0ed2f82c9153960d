"""The power goes: all there is, is what had reached the disk.

The disk is a file, with an ext4 that writes nothing back by itself for ten minutes. A copy of the file, taken while nothing runs, is
what a machine would find after its power came back; it is mounted elsewhere, which replays the journal. What a disk itself reorders
in its own cache is not simulated; ext4 answers for that with its barriers.
"""

import contextlib
import filecmp
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from support.faults import assert_sound, scaled

pytestmark = pytest.mark.timeout(900)
AT_SAVES = scaled(4, 30)
BETWEEN = scaled(4, 30)
SEED = 7


class Machine:
    """A small disk that a writer fills, and what is left of it after a power cut."""

    def __init__(self, server, file_systems, memory, name):
        self.server = server
        self.file_systems = file_systems
        self.image = file_systems.image(memory / f"{name}.img")
        self.cut_image = memory / f"{name}-cut.img"
        self.disk = file_systems.ext4(name, self.image)
        self.name = name

    def writer(self, role, **options):
        return self.server.start(role, root=str(self.disk / "run"), **options)

    def cut(self):
        """Copy the disk as it is now; nobody may be writing."""
        while True:
            shutil.copyfile(self.image, self.cut_image)
            if filecmp.cmp(self.image, self.cut_image, shallow=False):
                return

    @contextlib.contextmanager
    def started_again(self):
        """The machine after its power came back, from the copy."""
        after = self.file_systems.ext4(f"{self.name}-after", self.cut_image)
        try:
            yield after / "run"
        finally:
            self.file_systems.unmount(after)

    def check(self, acknowledged, **options):
        with self.started_again() as root:
            return assert_sound(self.server, root, acknowledged, **options)

    def remove(self):
        self.server.end_children()
        self.file_systems.unmount(self.disk)
        self.image.unlink()
        self.cut_image.unlink(missing_ok=True)


@pytest.fixture
def machine(server, file_systems, memory):
    made = Machine(server, file_systems, memory, "power")
    yield made
    made.remove()


def stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_power_cut_right_after_a_save_does_not_lose_it(machine, figure):
    writer = machine.writer("writer")
    writer.hear()
    for count in range(1, AT_SAVES + 1):
        assert writer.ask(step=count * 7)["acknowledged"] == count * 7
        machine.cut()
        assert machine.check([count * 7, *range(7, count * 7, 7)])[0] == count * 7
    figure(f"{AT_SAVES} power cuts right after a save: each found")


def test_a_power_cut_at_any_instant_loses_nothing_that_was_acknowledged(machine, wait_until, figure):
    chance, acknowledged, between = random.Random(SEED), [], 0
    looper = machine.writer("looper", step=1)
    looper.hear()
    acknowledged.append(looper.hear()["acknowledged"])
    for _ in range(BETWEEN):
        time.sleep(chance.uniform(0, 0.03))  # the instant is what is random here
        looper.signal(signal.SIGSTOP)
        wait_until(lambda: stopped(looper.pid), "the writer to stop")
        while looper.has_news():
            acknowledged.append(looper.hear()["acknowledged"])
        machine.cut()
        found, _ = machine.check(acknowledged, in_flight=[acknowledged[-1] + 1])
        between += found != acknowledged[-1]
        looper.signal(signal.SIGCONT)
    figure(f"{BETWEEN} power cuts at random instants (seed {SEED}), {len(acknowledged)} saves: {between} found one newer than acknowledged")


@pytest.mark.parametrize("left_out", ["everything", "files", "directories"])
def test_this_test_would_notice_a_writer_that_leaves_out_fsync(server, machine, left_out, figure):
    writer = machine.writer("writer", without_fsync=left_out)
    writer.hear()
    lost = []
    for step in (10, 20, 30):
        assert writer.ask(step=step)["acknowledged"] == step
        machine.cut()
        with machine.started_again() as root:
            facts = server.play("observer", root=str(root))[0]
        if facts["newest"] != step or facts["wrong"]:
            lost.append(step)
    figure(f"without fsync of {left_out}: {len(lost)} of 3 saves lost")
    assert lost
