"""SIGKILL at every system call of a save."""

import shutil
import signal

import pytest

from support.faults import CHAOS, Findings, Strace, assert_sound, calls_in, copied, scaled

pytestmark = [pytest.mark.usefixtures("strace"), pytest.mark.timeout(900)]
WATCHED = "trace=%file,%desc,%network"


def traced_save(server, root, output, *expressions, **order):
    """Order a save from a process that strace looks at; returns (the process, strace)."""
    writer = server.start("writer", root=str(root))
    assert "generation" in writer.hear()
    strace = Strace(writer.pid, output, *expressions)
    writer.tell(**order)
    return writer, strace


# The killed save is the new best one, or it is not; it ends an epoch, or it comes with a warning within one.
@pytest.mark.parametrize(("step", "loss"), [(40, 0.1), (35, 0.95)], ids=["new best", "within an epoch"])
def test_a_kill_at_any_system_call_of_a_save_loses_nothing_that_was_acknowledged(server, committed, tmp_path, step, loss, figure):
    order = {"step": step, "loss": loss}
    calls = calls_of_a_save(server, committed, tmp_path, order)
    if not CHAOS:
        calls = [call for call in calls if call.is_change and call.name not in ("close", "fcntl", "ioctl")] + calls[-1:]
    assert len(calls) > scaled(20, 60)
    came = killed_at_each(calls, server, committed, tmp_path, order)
    figure(f"killed at {len(calls)} system calls; found {came[30]} times the one before, {came[step]} times the new one")


def test_a_kill_at_any_write_of_a_large_save_loses_nothing_that_was_acknowledged(server, committed, tmp_path, figure):
    """One that a thread writes, past the page cache or through it."""
    order = {"step": 40, "loss": 0.1, "kib": 40 * 1024}
    calls = calls_of_a_save(server, committed, tmp_path, order)
    assert len({call.thread for call in calls if call.name == "pwrite64"}) == 2
    # The n-th of the thread comes before the n-th of the one that goes on behind it.
    points = {(call.name, call.number): call for call in reversed(calls) if call.name in ("pwrite64", "fsync", "fcntl", "fadvise64")}
    came = killed_at_each([*points.values()], server, committed, tmp_path, order)
    figure(f"killed at {len(points)} system calls; found {came[30]} times the one before, {came[40]} times the new one")


def calls_of_a_save(server, committed, tmp_path, order):
    """Return the system calls of a save that nothing happens to, up to the one by which it says so."""
    root = copied(committed, committed.parent / "traced")
    writer, strace = traced_save(server, root, tmp_path / "trace", WATCHED, **order)
    assert writer.hear()["acknowledged"] == order["step"]
    writer.end()
    strace.wait()
    calls = [call for call in calls_in(tmp_path / "trace") if call.name not in ("recvfrom", "shutdown", "mmap")]
    said = next(index for index, call in enumerate(calls) if call.name == "sendto")
    return calls[: said + 1]


def killed_at_each(calls, server, committed, tmp_path, order):
    """Let a save be killed at each of these system calls; returns how often which step was found then, which must be sound."""
    outcomes, findings, step = {}, Findings(), order["step"]
    for call in calls:
        root = copied(committed, committed.parent / "killed")
        output = tmp_path / "killed"
        writer, strace = traced_save(
            server, root, output, f"trace={call.name}", f"inject={call.name}:signal=SIGKILL:when={call.number}", **order
        )
        assert writer.hear() is None, f"it was not killed at {call}"
        assert writer.end() == -signal.SIGKILL, call
        strace.wait()
        with findings.trial(f"killed at {call}"):
            newest, _ = assert_sound(server, root, [10, 20, 30], in_flight=[step], next_step=50)
            outcomes.setdefault(newest, []).append(call)
        shutil.rmtree(root)
    findings.assert_none()
    assert set(outcomes) == {30, step}
    return {newest: len(found) for newest, found in outcomes.items()}
