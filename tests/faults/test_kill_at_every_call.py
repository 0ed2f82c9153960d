"""SIGKILL at every system call of a save."""

import shutil
import signal

import pytest

from support.faults import CHAOS, Findings, Strace, assert_sound, calls_in, copied, scaled

pytestmark = [pytest.mark.usefixtures("strace"), pytest.mark.timeout(900)]
WATCHED = "trace=%file,%desc,%network"


def traced_save(server, root, output, *expressions, step, loss):
    """Order a save from a process that strace looks at; returns (the process, strace)."""
    writer = server.start("writer", root=str(root))
    assert "generation" in writer.hear()
    strace = Strace(writer.pid, output, *expressions)
    writer.tell(step=step, loss=loss)
    return writer, strace


# The killed save is the new best one, or it is not; it ends an epoch, or it comes with a warning within one.
@pytest.mark.parametrize(("step", "loss"), [(40, 0.1), (35, 0.95)], ids=["new best", "within an epoch"])
def test_a_kill_at_any_system_call_of_a_save_loses_nothing_that_was_acknowledged(server, committed, tmp_path, step, loss, figure):
    root = copied(committed, committed.parent / "traced")
    writer, strace = traced_save(server, root, tmp_path / "trace", WATCHED, step=step, loss=loss)
    assert writer.hear()["acknowledged"] == step
    writer.end()
    strace.wait()
    calls = [call for call in calls_in(tmp_path / "trace") if call.name not in ("recvfrom", "shutdown", "mmap")]
    said = next(index for index, call in enumerate(calls) if call.name == "sendto")
    calls = calls[: said + 1]  # killed where it was about to say so
    if not CHAOS:
        changes = [call for call in calls if call.is_change]
        writes = [call for call in changes if call.name == "write"]
        rest = [call for call in changes if call.name not in ("write", "close", "fcntl", "ioctl")]
        calls = [*rest, *writes[:: max(len(writes) // 12, 1)], calls[-1]]
    outcomes, findings = {}, Findings()
    for call in calls:
        root = copied(committed, committed.parent / "killed")
        output = tmp_path / "killed"
        writer, strace = traced_save(
            server, root, output, f"trace={call.name}", f"inject={call.name}:signal=SIGKILL:when={call.number}", step=step, loss=loss
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
    came = {newest: len(found) for newest, found in outcomes.items()}
    figure(f"killed at {len(calls)} system calls; found {came[30]} times the one before, {came[step]} times the new one")
    assert len(calls) > scaled(30, 150)
