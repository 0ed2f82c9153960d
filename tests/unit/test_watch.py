"""Rank 0's watch, with real signals, and a main thread that is busy."""

import ctypes
import os
import signal
import threading
import time

import pytest

from hpcckpt import watch
from hpcckpt.policy import RESERVE_S
from hpcckpt.signals import SignalLatch
from hpcckpt.watch import Watch


@pytest.fixture(autouse=True)
def _look_often(monkeypatch):
    monkeypatch.setattr(watch, "POLL_S", 0.02)


@pytest.fixture
def begin(tmp_path):
    """A function that begins a watch for whom Slurm gives answers in turn, the last one for ever; (watch, latch, asked, overdue, acted)."""
    watches, latches = [], []

    def make(*left_s: float | None):
        latch = SignalLatch()
        latch.install()
        latches.append(latch)
        answers, asked, overdue, acted = list(left_s), [], [], threading.Event()

        def killed_in_s(names):
            asked.append(set(names))
            return answers.pop(0) if len(answers) > 1 else answers[0]

        def act(names):
            overdue.append(set(names))
            acted.set()

        watches.append(Watch(tmp_path / "stop", latch, killed_in_s, act))
        return watches[-1], latch, asked, overdue, acted

    yield make
    for one in watches:
        one.close(10)
    for latch in latches:
        latch.restore()


def test_it_acts_while_the_main_thread_waits_in_c_code_and_no_handler_runs(tmp_path):
    seen: list[tuple[bool, float]] = []
    with SignalLatch() as latch:
        one = Watch(tmp_path / "stop", latch, lambda _: 0.0, lambda _: seen.append((latch.fired, time.monotonic())))
        # A collective that waits for a rank that hangs: it goes on waiting, whatever interrupts it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        ctypes.CDLL(None).usleep(900_000)
        returned = time.monotonic()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        one.close(10)
    ((fired, acted),) = seen
    assert not fired
    assert acted < returned


def test_it_asks_at_once_and_acts_when_only_the_reserve_is_left(begin):
    _, _, asked, overdue, acted = begin(RESERVE_S + 0.3, RESERVE_S + 0.1, 0.0)
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert acted.wait(10)
    assert 0.35 < time.monotonic() - began < 5
    assert asked == [{"USR1"}] * 3, "asked again when the time is over: it may have been prolonged"
    assert overdue == [{"USR1"}]


def test_a_second_signal_changes_what_it_waits_for(begin):
    _, _, asked, _, acted = begin(3600.0, 0.0)
    os.kill(os.getpid(), signal.SIGUSR1)
    _wait_until(lambda: asked == [{"USR1"}])
    assert not acted.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert acted.wait(10)
    assert asked[-1] == {"USR1", "TERM"}


def test_a_signal_that_came_before_it_began_counts(tmp_path):
    latch = SignalLatch()
    acted = threading.Event()
    with latch:
        os.kill(os.getpid(), signal.SIGUSR1)
        one = Watch(tmp_path / "stop", latch, lambda _: 0.0, lambda _: acted.set())
        assert acted.wait(10)
        one.close(10)


@pytest.mark.parametrize("left_s", [None, 3600.0])
def test_it_does_nothing_while_there_is_time_and_ends_when_closed(begin, left_s):
    one, _, asked, overdue, _ = begin(left_s)
    os.kill(os.getpid(), signal.SIGTERM)
    _wait_until(lambda: asked)
    one.close(10)
    one.close(10)
    assert not one._thread.is_alive()
    assert overdue == []


@pytest.mark.parametrize(("content", "word"), [("", "stop file"), ("end\n", "stop file"), ("requeue\n", "stop file: requeue")])
def test_the_stop_file_asks_the_training_to_stop(begin, tmp_path, content, word):
    one, latch, _, overdue, _ = begin(None)
    assert not latch.fired
    (tmp_path / "stop").write_text(content)
    _wait_until(lambda: latch.fired)
    assert latch.received() == (word,)
    one.close(10)
    one.take_back()
    assert not (tmp_path / "stop").exists()
    assert overdue == []


def test_a_stop_file_that_is_being_written_is_read_when_it_is_whole(begin, tmp_path):
    _, latch, *_ = begin(None)
    path = tmp_path / "stop"
    for part in ("r", "re", "req", "requ", "reque", "requeu", "requeue"):
        path.write_text(part)
        time.sleep(0.001)  # less than between two looks
    _wait_until(lambda: latch.fired)
    assert latch.received() == ("stop file: requeue",)


def test_a_stop_file_that_cannot_be_read_stops_nothing(begin, tmp_path):
    (tmp_path / "stop").mkdir()
    one, latch, *_ = begin(None)
    time.sleep(0.2)  # several looks
    one.take_back()
    assert not latch.fired


def test_the_former_wakeup_descriptor_is_put_back(tmp_path):
    reader, writer = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(writer)
    try:
        with SignalLatch() as latch:
            one = Watch(tmp_path / "stop", latch, lambda _: None, lambda _: None)
            one.close(10)
            assert signal.set_wakeup_fd(writer) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def _wait_until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
