"""A process that is stopped in a save, overtaken, and wakes up: a node that was lost and is back."""

import fcntl
import os
import shutil
import signal

import pytest

from support.faults import Findings, RunLayout, Strace, assert_sound, calls_in, copied, scaled, tree

pytestmark = [pytest.mark.usefixtures("strace"), pytest.mark.timeout(900)]
LOCKS = ("latest.json.lock", "attempt.lock")


def is_locked(layout):
    """Return whether somebody is changing the directory at this moment."""
    descriptor = os.open(layout.lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def stop_points(calls):
    """Return the calls behind which the old one is stopped: where something has just changed, or is open.

    All before it takes the pointer lock, where it can be overtaken, and some of those behind that.
    """
    points = [call for call in calls if call.is_change and call.name not in ("close", "fcntl", "ioctl")]
    locked = next(index for index, call in enumerate(points) if call.name == "flock" and "latest.json.lock" in call.text)
    return points[:locked] + points[locked :: scaled(2, 1)]


@pytest.mark.parametrize("same_step", [True, False], ids=["the same save", "another save"])
def test_an_attempt_that_was_overtaken_in_its_sleep_changes_nothing(server, committed, tmp_path, wait_until, same_step, figure):
    root = copied(committed, committed.parent / "traced")
    writer = server.start("writer", root=str(root))
    writer.hear()
    strace = Strace(writer.pid, tmp_path / "trace", "trace=%file,%desc,%network")
    assert writer.ask(step=40, loss=0.1)["acknowledged"] == 40
    writer.end()
    strace.wait()
    calls = calls_in(tmp_path / "trace")
    calls = calls[: next(index for index, call in enumerate(calls) if call.name == "sendto")]
    findings, overtaken, in_time = Findings(), 0, 0
    for call in stop_points(calls):
        root, output = copied(committed, committed.parent / "woken"), tmp_path / "woken"
        layout = RunLayout(root)
        old = server.start("writer", root=str(root))
        old.hear()
        strace = Strace(old.pid, output, f"trace={call.name}", f"inject={call.name}:signal=SIGSTOP:when={call.number}")
        old.tell(step=40, loss=0.1)
        wait_until(lambda output=output: "stopped by SIGSTOP" in output.read_text(), f"a stop at {call}")
        new = server.start("writer", root=str(root))
        step = 40 if same_step else 35
        with findings.trial(f"stopped behind {call}"):
            if is_locked(layout):
                # It is within the few changes that belong together: the new one waits for it.
                assert not new.has_news()
                old.signal(signal.SIGCONT)
                assert "generation" in new.hear()
                answer = old.hear()
                assert answer is not None
                assert answer.get("acknowledged") == 40 or answer["failed"] == "FencedError", answer
                in_time += "acknowledged" in answer
                assert new.ask(step=50)["acknowledged"] == 50
                acknowledged = [10, 20, 30, 50, *([40] if "acknowledged" in answer else [])]
                old.end()
                new.end()
                strace.wait()
                assert_sound(server, root, acknowledged, next_step=57)
            else:
                assert "generation" in new.hear()
                assert new.ask(step=step, loss=0.2)["acknowledged"] == step
                before = tree(root, but=LOCKS)
                old.signal(signal.SIGCONT)
                answer = old.hear()
                assert answer is not None
                # It had done all there is to do, but for saying so.
                done = [40] if "acknowledged" in answer else []
                assert done or answer["failed"] == "FencedError", answer
                overtaken += not done
                assert tree(root, but=LOCKS) == before, "the old one has changed something"
                assert old.ask(step=50)["failed"] == "FencedError"
                assert tree(root, but=LOCKS) == before, "the old one has changed something in its next save"
                assert new.ask(step=50)["acknowledged"] == 50
                old.end()
                new.end()
                strace.wait()
                assert_sound(server, root, [10, 20, 30, step, 50, *done], next_step=57)
        old.kill()
        new.kill()
        strace.stop()
        shutil.rmtree(root)
    findings.assert_none()
    figure(f"stopped at {len(stop_points(calls))} points: {overtaken} fenced, {in_time} came through before the new one could claim")
    assert overtaken >= 3
    assert in_time > 0


def test_an_attempt_that_lost_its_lock_with_its_node_does_not_move_the_pointer(server, committed, tmp_path, wait_until, figure):
    """The lock is gone, as a file server gives it away when it has not heard of a node for long; the number is all there is."""
    root = copied(committed, committed.parent / "traced")
    writer = server.start("writer", root=str(root))
    writer.hear()
    strace = Strace(writer.pid, tmp_path / "trace", "trace=%file,%desc,%network")
    assert writer.ask(step=40, loss=0.1)["acknowledged"] == 40
    writer.end()
    strace.wait()
    calls = calls_in(tmp_path / "trace")
    pointer = next(index for index, call in enumerate(calls) if call.name.startswith("rename") and '/latest.json")' in call.text)
    moved = sum(call.name == "fsync" for call in calls[:pointer])
    # Behind a file's fsync the next is a change of name, behind a directory's the next file.
    calls = [call for call in calls if call.name == "fsync"]
    findings = Findings()
    for call in calls:
        root, output = copied(committed, committed.parent / "lost"), tmp_path / "lost"
        layout = RunLayout(root)
        old = server.start("writer", root=str(root))
        old.hear()
        strace = Strace(old.pid, output, "trace=fsync", f"inject=fsync:signal=SIGSTOP:when={call.number}")
        old.tell(step=40, loss=0.1)
        wait_until(lambda output=output: "stopped by SIGSTOP" in output.read_text(), f"a stop at {call}")
        for lock in LOCKS:
            (layout.checkpoints / lock).unlink(missing_ok=True)
        new = server.start("writer", root=str(root))
        with findings.trial(f"stopped behind {call}"):
            new.hear()
            for step in (50, 60):
                assert new.ask(step=step)["acknowledged"] == step
            before = tree(root, but=LOCKS)
            old.signal(signal.SIGCONT)
            answer = old.hear()
            assert tree(root, but=LOCKS) == before, f"the old one has changed something; it said {answer}"
            facts = server.play("observer", root=str(root))[0]
            assert (facts["newest"], facts["wrong"], facts["error"]) == (60, [], None)
            assert answer.get("failed") == "FencedError" or (call.number > moved and "acknowledged" in answer), answer
        old.kill()
        new.kill()
        strace.stop()
        shutil.rmtree(root)
    findings.assert_none()
    figure(f"stopped behind {len(calls)} fsyncs, without a lock: fenced")
