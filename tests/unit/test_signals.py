"""Real signals to this process: each is noted, none is lost, and the former handlers come back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcckpt.errors import UsageError
from hpcckpt.signals import SignalLatch, children_protected, ignore_termination, interrupt_raises

USED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def former() -> Iterator[list[int]]:
    """Have handlers of our own before each test, which note what they get, and the real ones after it."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: seen.append(number)) for number in USED}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_each_signal_has_a_note_of_its_own() -> None:
    with SignalLatch() as latch:
        assert (latch.fired, latch.received()) == (False, ())
        send(signal.SIGTERM)
        assert (latch.fired, latch.received()) == (True, ("TERM",))
        send(signal.SIGUSR1)
        assert sorted(latch.received()) == ["TERM", "USR1"]


def test_only_the_names_that_are_asked_for_are_latched(former: list[int]) -> None:
    with SignalLatch(("USR2",)) as latch:
        send(signal.SIGUSR1, signal.SIGUSR2)
    assert latch.received() == ("USR2",)
    assert former == [signal.SIGUSR1]


def test_a_second_signal_is_counted_and_harmless() -> None:
    with SignalLatch() as latch:
        send(*[signal.SIGTERM] * 3, signal.SIGUSR1)
    assert latch._counts == {signal.SIGTERM: 3, signal.SIGUSR1: 1}
    assert sorted(latch.received()) == ["TERM", "USR1"]


def test_notes_stay_after_the_former_handlers_are_back(former: list[int]) -> None:
    with SignalLatch() as latch:
        send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert latch.received() == ("USR1",)
    assert former == [signal.SIGTERM]


def test_installing_twice_still_gives_the_former_handlers_back() -> None:
    before = [signal.getsignal(number) for number in USED]
    latch = SignalLatch()
    latch.install()
    latch.install()
    latch.restore()
    latch.restore()
    assert [signal.getsignal(number) for number in USED] == before


def test_installing_again_takes_back_what_a_library_took(former: list[int]) -> None:
    before, library = signal.getsignal(signal.SIGUSR1), []
    latch = SignalLatch()
    latch.install()
    signal.signal(signal.SIGUSR1, lambda number, _frame: library.append(number))
    latch.install()
    send(signal.SIGUSR1)
    latch.restore()
    assert (latch.received(), library, former) == (("USR1",), [], [])
    assert signal.getsignal(signal.SIGUSR1) == before


def test_an_exception_gives_the_former_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), SignalLatch():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_is_refused_and_takes_nothing_over() -> None:
    before, problems = signal.getsignal(signal.SIGUSR1), []

    def install() -> None:
        try:
            SignalLatch().install()
        except UsageError as error:
            problems.append(str(error))

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert problems == ["signals can only be latched from the main thread; create the Run there"]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_name_that_is_no_signal_is_refused_before_anything_is_taken_over() -> None:
    with pytest.raises(KeyError):
        SignalLatch(("USR1", "NONE"))


def start_child(first: str = "") -> "subprocess.Popen[str]":
    """Start a Python that answers each line, with default handlers, after it has run `first`."""
    program = f"{first}\nimport sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)"
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answers(child: "subprocess.Popen[str]") -> bool:
    try:
        child.stdin.write("still here\n")
        child.stdin.flush()
    except BrokenPipeError:
        return False
    return child.stdout.readline() == "still here\n"


def test_a_child_that_is_started_inside_survives_the_warning() -> None:
    with children_protected(), start_child() as child:
        assert answers(child)
        child.send_signal(signal.SIGUSR1)
        child.send_signal(signal.SIGTERM)
        assert answers(child)
        child.stdin.close()
        assert child.wait() == 0


def test_a_child_that_is_started_outside_does_not() -> None:
    with children_protected():
        pass
    with start_child() as child:
        assert answers(child)
        child.send_signal(signal.SIGUSR1)
        assert child.wait() == -signal.SIGUSR1


def test_a_child_can_still_be_terminated_where_only_the_warning_is_kept_off() -> None:
    with children_protected(("USR1",)), start_child() as child:
        assert answers(child)
        child.send_signal(signal.SIGUSR1)
        assert answers(child)
        child.terminate()
        assert child.wait() == -signal.SIGTERM


OBEY = "from hpcckpt.signals import obey_parent_only; obey_parent_only()"


def terminate_from_a_sibling(child: "subprocess.Popen[str]") -> None:
    """Send SIGTERM from another process, and wait until it has been taken."""
    subprocess.run(["/bin/sh", "-c", f"kill -TERM {child.pid}"], check=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status = Path(f"/proc/{child.pid}/status").read_text()
        if all(int(line.split()[1], 16) == 0 for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))):
            return
        time.sleep(0.01)
    pytest.fail("the signal stayed pending")


def test_a_child_that_obeys_its_parent_only_ends_on_its_sigterm_and_on_no_other() -> None:
    with children_protected(), start_child(OBEY) as child:
        assert answers(child)
        for _ in range(3):
            terminate_from_a_sibling(child)
            assert answers(child)
        child.send_signal(signal.SIGUSR1)
        assert answers(child)
        child.terminate()
        assert child.wait(30) == 0


def test_a_child_that_obeys_its_parent_only_ends_by_itself_as_ever() -> None:
    with children_protected(), start_child(OBEY) as child:
        assert answers(child)
        child.stdin.close()
        assert child.wait(30) == 0


def test_a_child_that_obeys_its_parent_only_ends_also_while_it_is_busy() -> None:
    with children_protected(), start_child(f"{OBEY}\nprint('on', flush=True)\nwhile True: pass") as child:
        assert child.stdout.readline() == "on\n"
        terminate_from_a_sibling(child)
        assert child.poll() is None
        child.terminate()
        assert child.wait(30) == 0


def test_a_termination_that_is_ignored_passes_this_process_and_those_it_starts(former: list[int]) -> None:
    ignore_termination()
    send(signal.SIGTERM)
    with start_child() as child:
        assert answers(child)
        child.terminate()
        assert answers(child)
        child.stdin.close()
        assert child.wait(30) == 0
    assert former == []


def test_a_child_may_decide_otherwise_about_a_termination_that_is_ignored() -> None:
    ignore_termination()
    with start_child("import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL)") as child:
        assert answers(child)
        child.terminate()
        assert child.wait(30) == -signal.SIGTERM


def test_a_latch_takes_over_from_an_ignored_termination_and_gives_back() -> None:
    ignore_termination()
    with SignalLatch() as latch:
        send(signal.SIGTERM)
    assert latch.received() == ("TERM",)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_what_arrives_inside_is_delivered_on_leaving(former: list[int]) -> None:
    with SignalLatch() as latch:
        with children_protected():
            # To this very thread: another one, which a test runner may have, would take it at once.
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.pthread_kill(threading.get_ident(), number)
            assert latch.received() == ()
        assert sorted(latch.received()) == ["TERM", "USR1"]
    assert former == []


def test_the_mask_is_as_it_was_also_when_nested_or_left_by_an_exception() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with children_protected(("USR1",)):
        with pytest.raises(KeyError), children_protected():
            raise KeyError
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR1}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
def test_ctrl_c_raises_inside_whatever_the_parent_wanted(handler: object) -> None:
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(KeyboardInterrupt), interrupt_raises():
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_signal_that_is_blocked_while_the_process_starts_is_latched_and_not_lost():
    """`env --block-signal` in the batch script: Python takes seconds to import torch, and Slurm's warning may come then."""
    script = (
        "import os, signal\n"
        "from hpcckpt.signals import SignalLatch\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"  # would end a process that has not blocked it
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "latch = SignalLatch()\n"
        "assert not latch.fired\n"
        "latch.install()\n"
        "print(*latch.received())\n"
        "assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()\n"
    )
    argv = ["env", "--block-signal=USR1,TERM", sys.executable, "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "USR1 TERM\n"), done.stderr


def test_a_request_is_latched_under_its_own_name_and_the_time_since_counts_from_the_first(former: list[int]) -> None:
    with SignalLatch() as latch:
        assert latch.waited_s() == 0
        threading.Thread(target=latch.request, args=("stop file",)).start()
        deadline = time.monotonic() + 10
        while not latch.fired:
            assert time.monotonic() < deadline
        before = latch.waited_s()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert latch.received() == ("USR1", "stop file")
        assert latch.waited_s() >= before
    assert former == []


def test_behind_a_run_a_warning_that_nobody_handles_is_spared_and_a_termination_is_not() -> None:
    before = [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGUSR1, signal.SIGTERM)]
    try:
        latch = SignalLatch()
        latch.install()
        latch.restore(spare=True)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
