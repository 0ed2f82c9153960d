"""A process that works for this one: what it answers, what it survives, and when it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hpcckpt.companion import Companion

ENDING = ("TERM", "USR1", "USR2", "INT", "HUP")


@pytest.fixture
def companion():
    """Make companions that are closed behind the test."""
    made = []

    def make(task, **arguments):
        made.append(Companion(f"support.companions:{task}", **arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_it_is_given_requests_and_files_and_answers_each(companion, tmp_path):
    echo = companion("echo")
    for number in range(3):
        path = tmp_path / str(number)
        path.write_text(f"text {number}")
        with path.open() as file:
            answer = echo.ask({"number": number}, (file.fileno(),))
        assert answer == {"request": {"number": number}, "said": [f"text {number}"], "gone": False}


def test_its_errors_are_raised_where_it_is_asked_and_it_goes_on(companion):
    failing = companion("fail")
    with pytest.raises(OSError, match="No space left on device") as full:
        failing.ask({"kind": "full"})
    assert full.value.errno == 28
    with pytest.raises(RuntimeError, match="KeyError: 'other'"):
        failing.ask({"kind": "other"})
    with pytest.raises(OSError, match="No space left on device"):
        failing.ask({"kind": "full"})


def test_it_has_no_torch_and_keeps_no_file_that_it_was_given(companion, tmp_path):
    about = companion("about")
    first = about.ask({})
    assert first["torch"] is False
    assert first["pid"] == about.pid
    with (tmp_path / "a").open("w") as file:
        about.ask({}, [file.fileno()] * 5)
    assert about.ask({})["open"] == first["open"]


def test_one_that_is_killed_is_gone_and_says_so(companion):
    dying = companion("die")
    for _ in range(2):
        with pytest.raises(EOFError, match=r"is gone \(exit code -9\)"):
            dying.ask({})


def test_signals_for_every_process_of_a_job_do_not_reach_it(companion):
    """From the first instant on, while it starts and later."""
    echo = companion("echo")
    for name in ("TERM", "USR1"):
        os.kill(echo.pid, signal.Signals[f"SIG{name}"])
    assert echo.ask({"n": 1})["request"] == {"n": 1}
    for name in ENDING:
        os.kill(echo.pid, signal.Signals[f"SIG{name}"])
    assert echo.ask({"n": 2})["request"] == {"n": 2}


def test_closing_it_ends_it_also_at_work(companion, tmp_path, wait_until):
    path = tmp_path / "said"
    with path.open("w") as file:
        with pytest.raises(EOFError):
            companion("die").ask({})
        working = companion("work")
        pid = working.pid
        answering = os.fork()
        if not answering:
            with contextlib.suppress(BaseException):
                working.ask({}, (file.fileno(),))
            os._exit(0)
        wait_until(lambda: path.read_text() == "begun\n", "work")
        # The fork has the other end open, as a DataLoader's worker would: the companion sees by its parent that nobody asks.
        os.kill(answering, signal.SIGKILL)
        os.waitpid(answering, 0)
        working.close()
    wait_until(lambda: not is_alive(pid), "its end")
    assert path.read_text() == "begun\ngone\n"


@pytest.mark.parametrize("state", ["idle", "at work"])
def test_it_ends_with_the_process_that_has_started_it_whatever_that_dies_of(tmp_path, environ, wait_until, state):
    """Even if a forked worker of that, which lives a little longer, holds the other end open."""
    said, script = tmp_path / "said", tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, signal, time
            from hpcckpt.companion import Companion
            working = Companion("support.companions:{"work" if state == "at work" else "echo"}")
            print(working.pid, flush=True)
            if os.fork() == 0:
                time.sleep(600)
            print("forked", flush=True)
            if {state == "at work"}:
                working.ask({{}}, [os.open({str(said)!r}, os.O_RDWR | os.O_CREAT)])
            else:
                working.ask({{}})
                signal.pause()
            """)
    )
    with subprocess.Popen(
        [sys.executable, script],
        env=environ(PYTHONPATH=os.pathsep.join(sys.path)),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        try:
            pid = int(parent.stdout.readline())
            parent.stdout.readline()
            if state == "at work":
                wait_until(lambda: said.exists() and said.read_text() == "begun\n", "work")
            parent.kill()
            wait_until(lambda: not is_alive(pid), "the companion's end")
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
    if state == "at work":
        assert said.read_text() == "begun\ngone\n"
