"""A disk that gets full at any byte of a save, in any way in which a kernel says so."""

import os
import shutil

import pytest

from support.fault_roles import fill
from support.faults import Findings, Strace, assert_sound, calls_in, contents, copied, scaled

pytestmark = pytest.mark.timeout(900)
POINTS = scaled(8, 34)


# A full disk lets the one go that the save would have made surplus; these stay whatever happens: the newest and the best so far.
KEPT = ("checkpoint_epoch0000.pt", "checkpoint_epoch0000.json", "checkpoint_epoch0002.pt", "checkpoint_epoch0002.json")


def assert_failed_well(server, root, answer, before, reason):
    """Assert that a save failed with the right error, and that everything older that matters is as it was."""
    assert answer is not None, "the process has died"
    assert "failed" in answer, "the save is said to have succeeded"
    assert answer["is_save_error"], answer
    assert str(root / "checkpoints") in answer["message"], answer
    assert any(words in answer["message"] for words in reason), answer
    after = contents(root)
    assert [name for name in KEPT if after.get(name) != before[name]] == [], "something older was touched"
    facts = server.play("observer", root=str(root))[0]
    assert (facts["problems"], facts["wrong"], facts["error"]) == ([], [], None), facts
    # Where the pointer had moved before the failure, what it names is whole.
    assert facts["newest"] in (30, 40), facts
    assert facts["best"] in (10, 40), facts


NO_SPACE = ("No space left on device", "too full")


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request, file_systems, memory):
    """A file system of a few MB."""
    if request.param == "tmpfs":
        mounted = file_systems.tmpfs("small", size="6m", nr_inodes=200)
    else:
        mounted = file_systems.ext4("small", file_systems.image(memory / "small.img", size_mb=8))
    yield mounted
    file_systems.unmount(mounted)
    (memory / "small.img").unlink(missing_ok=True)


@pytest.mark.parametrize("when", ["before it begins", "while it writes"])
def test_a_disk_that_gets_full_at_any_byte_of_a_save_leaves_all_that_is_older(server, committed, small_disk, when, figure):
    findings, outcomes = Findings(), []
    size = contents(committed)["checkpoint_epoch0002.pt"]
    # From the first byte over each tensor to the last byte, then manifest, pointer and names; last, room for all.
    leave = sorted({round(len(size) * point / (POINTS - 5)) // 4096 * 4096 for point in range(POINTS - 4)})
    leave += [len(size) // 4096 * 4096 + extra * 4096 for extra in (1, 2, 3)] + [2 * len(size) + 512 * 1024]
    for left in leave:
        root, ballast = copied(committed, small_disk / "run"), small_disk / "ballast"
        before = contents(root)
        writer = server.start("writer", root=str(root))
        writer.hear()
        if when == "before it begins":
            fill(ballast, left)
            answer = writer.ask(step=40, loss=0.5)
        else:
            answer = writer.ask(step=40, loss=0.5, ballast=[str(ballast), left])
        with findings.trial(f"{left} bytes free {when}"):
            failed = "failed" in answer
            outcomes.append(failed)
            if failed:
                assert_failed_well(server, root, answer, before, NO_SPACE)
            ballast.unlink(missing_ok=True)
            assert writer.ask(step=40, loss=0.5) == {"acknowledged": 40, "path": str(root / "checkpoints" / "checkpoint_epoch0003.pt")}
            assert_sound(server, root, [10, 20, 30, 40], next_step=57)
        writer.end()
        ballast.unlink(missing_ok=True)
        shutil.rmtree(root)
    findings.assert_none()
    figure(f"full at {len(leave)} offsets: {sum(outcomes)} saves failed, {len(outcomes) - sum(outcomes)} found room")
    # Known before, the lack of room is met by deleting what will be surplus, which is nearly always enough.
    assert sum(outcomes) >= (len(outcomes) // 3 if when == "while it writes" else 1)
    assert not outcomes[-1]


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_gets_full_in_a_large_save_leaves_all_that_is_older(server, committed, file_systems, memory, kind):
    """A thread finds out, past the page cache or through it."""
    if kind == "tmpfs":
        large = file_systems.tmpfs("large", size="64m")
    else:
        large = file_systems.ext4("large", file_systems.image(memory / "large.img", size_mb=80))
    order, findings = {"step": 40, "loss": 0.5, "kib": 40 * 1024}, Findings()
    try:
        for left_mb in (1, 15, 17, 33, 39):
            root, ballast = copied(committed, large / "run"), large / "ballast"
            before = contents(root)
            writer = server.start("writer", root=str(root))
            writer.hear()
            answer = writer.ask(**order, ballast=[str(ballast), left_mb << 20])
            with findings.trial(f"{left_mb} MB free"):
                assert_failed_well(server, root, answer, before, NO_SPACE)
                ballast.unlink()
                assert writer.ask(**order)["acknowledged"] == 40
                assert_sound(server, root, [10, 20, 30, 40], next_step=57)
            writer.end()
            ballast.unlink(missing_ok=True)
            shutil.rmtree(root)
    finally:
        server.end_children()
        file_systems.unmount(large)
        (memory / "large.img").unlink(missing_ok=True)
    findings.assert_none()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_has_no_more_files_to_give_leaves_all_that_is_older(server, committed, file_systems, memory, kind, figure):
    findings, outcomes = Findings(), []
    if kind == "tmpfs":
        small = file_systems.tmpfs("inodes", size="16m", nr_inodes=64)
    else:
        small = file_systems.ext4("inodes", file_systems.image(memory / "inodes.img", "-N", "64", size_mb=16))
    try:
        for free in range(6):
            root = copied(committed, small / "run")
            before = contents(root)
            writer = server.start("writer", root=str(root))
            writer.hear()
            take = os.statvfs(small).f_ffree - free
            eaten = [small / f"eaten{number}" for number in range(take)]
            for path in eaten:
                path.touch()
            answer = writer.ask(step=40, loss=0.01)
            with findings.trial(f"{free} inodes free"):
                outcomes.append("failed" in answer)
                if "failed" in answer:
                    assert_failed_well(server, root, answer, before, NO_SPACE)
                for path in eaten:
                    path.unlink()
                assert writer.ask(step=40, loss=0.01)["acknowledged"] == 40
                assert_sound(server, root, [10, 20, 30, 40], next_step=57)
            writer.end()
            for path in eaten:
                path.unlink(missing_ok=True)
            shutil.rmtree(root)
    finally:
        server.end_children()
        file_systems.unmount(small)
    findings.assert_none()
    figure(f"0 to 5 files left to make: {sum(outcomes)} saves failed")
    assert outcomes[0]
    assert not outcomes[-1]


def test_a_limit_of_file_size_at_any_byte_leaves_all_that_is_older(server, committed, figure):
    findings, size = Findings(), len(contents(committed)["checkpoint_epoch0002.pt"])
    limits = sorted({0, 1, 63, 64, 4095, size // 2, size - 1, *(round(size * point / POINTS) for point in range(POINTS))})
    for limit in limits:
        root = copied(committed, committed.parent / "limited")
        before = contents(root)
        writer = server.start("writer", root=str(root))
        writer.hear()
        answer = writer.ask(step=40, loss=0.5, limit_bytes=limit)
        with findings.trial(f"no byte behind {limit} of {size}"):
            assert_failed_well(server, root, answer, before, ["File too large"])
            assert writer.ask(step=40, loss=0.5)["acknowledged"] == 40
            assert_sound(server, root, [10, 20, 30, 40], next_step=57)
        writer.end()
        shutil.rmtree(root)
    findings.assert_none()
    figure(f"{len(limits)} limits of file size, from byte 0 to the last")


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(("error", "reason"), [("EDQUOT", "Disk quota exceeded"), ("ENOSPC", "No space left on device")])
def test_a_quota_that_is_used_up_at_any_call_leaves_all_that_is_older(server, committed, tmp_path, error, reason, lasting, figure):
    findings, failed = Findings(), 0
    calls = [
        call
        for call in saved_calls(server, committed, tmp_path)
        if call.name in ("openat", "pwrite64", "fsync", "rename", "linkat", "mkdir")
    ]
    calls = [call for call in calls if call.is_change]
    writes = [call for call in calls if call.name == "pwrite64"]
    calls = [call for call in calls if call.name != "pwrite64"] + writes[:: scaled(max(len(writes) // 3, 1), 1)] + writes[-1:]
    for call in calls:
        root = copied(committed, committed.parent / "quota")
        before = contents(root)
        writer = server.start("writer", root=str(root))
        writer.hear()
        when = f"{call.number}+" if lasting else call.number
        strace = Strace(writer.pid, tmp_path / "out", f"trace={call.name}", f"inject={call.name}:error={error}:when={when}")
        answer = writer.ask(step=40, loss=0.5)
        with findings.trial(f"{error} at {call}"):
            if answer is None or "failed" in answer:
                failed += 1
                assert_failed_well(server, root, answer, before, [reason])
        strace.stop()
        with findings.trial(f"the save after {error} at {call}"):
            assert writer.ask(step=40, loss=0.5)["acknowledged"] == 40
            assert_sound(server, root, [10, 20, 30, 40], next_step=57)
        writer.end()
        shutil.rmtree(root)
    findings.assert_none()
    figure(f"{error} at {len(calls)} calls{' and from then on' if lasting else ''}: {failed} saves failed, the others found a way")
    assert failed or not lasting


def saved_calls(server, committed, tmp_path):
    """Return the system calls of one save."""
    root = copied(committed, committed.parent / "traced")
    writer = server.start("writer", root=str(root))
    writer.hear()
    strace = Strace(writer.pid, tmp_path / "trace", "trace=%file,%desc")
    assert writer.ask(step=40, loss=0.5)["acknowledged"] == 40
    writer.end()
    strace.wait()
    shutil.rmtree(root)
    return calls_in(tmp_path / "trace")
