"""A disk that answers with an error, at any system call of a save: the save fails, or it is durable all the same.

A kernel may drop the pages that it could not write, and say so only once: a second fsync of the same file then succeeds although the
data is lost. So what could not be made durable is written anew.
"""

import re
import shutil

import pytest

from support.faults import Findings, Strace, assert_sound, calls_in, copied, scaled

pytestmark = [pytest.mark.usefixtures("strace"), pytest.mark.timeout(900)]
BROKEN = ("pwrite64", "fsync", "close", "rename", "open", "unlink", "link", "getdents64")


@pytest.fixture
def save(server, committed, tmp_path):
    """The system calls of one save, from the order to its end."""
    root = copied(committed, committed.parent / "traced")
    writer = server.start("writer", root=str(root))
    writer.hear()
    strace = Strace(writer.pid, tmp_path / "trace", "trace=%file,%desc,%network")
    assert writer.ask(step=40, loss=0.1)["acknowledged"] == 40
    writer.end()
    strace.wait()
    shutil.rmtree(root)
    calls = calls_in(tmp_path / "trace")
    return calls[: next(index for index, call in enumerate(calls) if call.name == "sendto")]


def essential(save):
    """Return the number of the last fsync without which the save is not durable: the directory's, behind the pointer's rename."""
    pointer = next(index for index, call in enumerate(save) if call.name.startswith("rename") and '/latest.json")' in call.text)
    return next(call.number for call in save[pointer:] if call.name == "fsync")


@pytest.mark.parametrize("name", BROKEN)
def test_an_input_output_error_at_any_call_is_a_failed_save_or_a_durable_one(server, committed, save, tmp_path, name, figure):
    calls = [call for call in save if call.name in (name, f"{name}at", f"{name}at2")]
    if name in ("pwrite64", "close", "open"):
        calls = calls[:: scaled(max(len(calls) // 6, 1), 1)]
    findings, failed = Findings(), 0
    for call in calls:
        root, output = copied(committed, committed.parent / "failing"), tmp_path / "out"
        writer = server.start("writer", root=str(root))
        writer.hear()
        watched = ",".join({call.name, "openat", "pwrite64", "fsync", "rename", "sendto"})
        strace = Strace(writer.pid, output, f"trace={watched}", f"inject={call.name}:error=EIO:when={call.number}")
        with findings.trial(f"EIO at {call}"):
            answer = writer.ask(step=40, loss=0.1)
            assert answer is not None, "the process has died"
            if "failed" in answer:
                failed += 1
                assert answer["is_save_error"], answer
                assert str(root / "checkpoints") in answer["message"], answer
                assert "Input/output error" in answer["message"], answer
            elif name == "fsync":
                assert call.number > essential(save), "an fsync has failed, and the save is said to be durable"
            facts = server.play("observer", root=str(root))[0]
            assert facts["newest"] in ((30, 40) if "failed" in answer else (40,)), facts
            assert (facts["problems"], facts["wrong"]) == ([], []), facts
            # The same process tries again.
            assert writer.ask(step=40, loss=0.1) == {"acknowledged": 40, "path": str(root / "checkpoints" / "checkpoint_epoch0003.pt")}
            writer.end()
            strace.wait()
            assert_sound(server, root, [10, 20, 30, 40], next_step=57)
            if name == "fsync" and "failed" in answer:
                assert_written_anew(calls_in(output), (committed / "checkpoints" / "checkpoint_epoch0002.pt").stat().st_size)
        writer.kill()
        strace.stop()
        shutil.rmtree(root)
    findings.assert_none()
    figure(f"EIO at {len(calls)} calls: {failed} saves failed")
    assert calls
    assert failed or name in ("close", "link")


def assert_written_anew(calls, size):
    """Assert that behind a failed fsync everything is written once more, to files that are new."""
    at = next(index for index, call in enumerate(calls) if call.name == "fsync" and "EIO" in call.text)
    path = re.search(r"fsync\(\d+<([^>]+)>", calls[at].text)[1]
    later = calls[at + 1 :]
    if path.rpartition("/")[2] != "checkpoints":
        assert not [call for call in later if call.name == "fsync" and f"<{path}>" in call.text], f"{path} is synced again"
        assert not [call for call in later if call.name == "rename" and f'"{path}"' in call.text], f"{path} is published all the same"
    written = sum(int(call.text.rpartition("= ")[2]) for call in later if call.name == "pwrite64")
    assert written > size, "what could not be made durable is not written anew"


def test_a_disk_that_fails_every_fsync_acknowledges_nothing(server, committed, tmp_path):
    root = copied(committed, committed.parent / "failing")
    writer = server.start("writer", root=str(root))
    writer.hear()
    strace = Strace(writer.pid, tmp_path / "out", "trace=fsync,fdatasync", "inject=fsync,fdatasync:error=EIO:when=1+")
    for step in (40, 50, 60):
        assert writer.ask(step=step)["is_save_error"]
    writer.end()
    strace.wait()
    assert assert_sound(server, root, [10, 20, 30], next_step=57)[0] == 30


def test_a_disk_that_becomes_read_only_acknowledges_nothing(server, committed, tmp_path):
    root = copied(committed, committed.parent / "failing")
    writer = server.start("writer", root=str(root))
    writer.hear()
    calls = "write,rename,unlink,link"
    strace = Strace(writer.pid, tmp_path / "out", f"trace={calls}", f"inject={calls}:error=EROFS:when=1+")
    answer = writer.ask(step=40)
    assert answer["is_save_error"]
    assert "Read-only file system" in answer["message"]
    writer.end()
    strace.wait()
    assert assert_sound(server, root, [10, 20, 30], next_step=57)[0] == 30
