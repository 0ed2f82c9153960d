"""Many processes that claim one directory, over and over, while others read it."""

import os
import re
import shutil
import signal

import pytest

from hpcckpt.layout import RunLayout
from support.faults import Findings, Strace, assert_sound, calls_in, copied, scaled

pytestmark = pytest.mark.timeout(900)
WRITERS, READERS = 16, 4
UPDATES = scaled(10, 200)


@pytest.fixture
def shared_dir(request, tmp_path):
    """A place where fsync costs nothing, where there is one."""
    return request.getfixturevalue("memory") / "many" if os.geteuid() == 0 else tmp_path


def test_many_writers_and_readers_see_a_pointer_that_is_whole_and_never_goes_back(server, shared_dir, figure):
    readers = [server.start("reader", root=str(shared_dir)) for _ in range(READERS)]
    writers = [server.start("contender", root=str(shared_dir), updates=UPDATES, seed=seed) for seed in range(WRITERS)]
    said = [writer.rest(timeout_s=600) for writer in writers]
    assert [len(messages) for messages in said] == [1] * WRITERS
    said = [messages[0] for messages in said]
    assert [messages["acknowledged"] for messages in said] == [UPDATES] * WRITERS
    fenced = sum(messages["fenced"] for messages in said)
    seen = []
    for reader in readers:
        reader.tell(stop=True)
        seen.append(reader.hear())
    assert [messages["faults"] for messages in seen] == [[]] * READERS
    assert min(messages["verified"] for messages in seen) > 10
    assert fenced > WRITERS
    layout = RunLayout(shared_dir)
    newest = server.play("observer", root=str(shared_dir))[0]["newest"]
    assert newest >= WRITERS * UPDATES
    assert_sound(server, shared_dir, [*range(1, newest + 1)], kib=4)
    generation = int(re.search(r'"generation": (\d+)', layout.generation.read_text())[1])
    claims = sum(messages["claims"] for messages in said) + 1
    assert generation == claims, "two claims took the same generation, or one is lost"
    counts = {key: sum(messages[key] for messages in seen) for key in ("looks", "verified", "moved_on", "newest")}
    figure(f"{WRITERS} writers x {UPDATES} saves, {claims} claims, {fenced} fenced; {READERS} readers: {counts}")


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("saves", [1, 3])
def test_a_reader_that_is_overtaken_by_saves_at_any_call_finds_nothing_older(server, committed, tmp_path, wait_until, saves, figure):
    seeker = server.start("seeker", root=str(committed))
    seeker.hear()
    strace = Strace(seeker.pid, tmp_path / "trace", "trace=%file,%desc,%network")
    assert seeker.ask()["newest"] == 30
    seeker.end()
    strace.wait()
    calls = calls_in(tmp_path / "trace")
    calls = calls[: next(index for index, call in enumerate(calls) if call.name == "sendto")]
    calls = [call for call in calls if call.name in ("openat", "getdents64", "flock", "close")][:: scaled(2, 1)]
    findings = Findings()
    for call in calls:
        root, output = copied(committed, committed.parent / "read"), tmp_path / "read"
        writer = server.start("writer", root=str(root))
        writer.hear()
        seeker = server.start("seeker", root=str(root))
        seeker.hear()
        strace = Strace(seeker.pid, output, f"trace={call.name}", f"inject={call.name}:signal=SIGSTOP:when={call.number}")
        seeker.tell()
        wait_until(lambda output=output: "stopped by SIGSTOP" in output.read_text(), f"a stop at {call}")
        for step in range(40, 40 + saves):
            assert writer.ask(step=step)["acknowledged"] == step
        seeker.signal(signal.SIGCONT)
        with findings.trial(f"stopped behind {call}"):
            found = seeker.hear()
            assert found["error"] is None, found
            assert found["newest"] >= 30, f"found step {found['newest']}, but 30 was there before it looked: {found['problems']}"
        seeker.end()
        strace.wait()
        assert writer.end() == 0
        shutil.rmtree(root)
    findings.assert_none()
    figure(f"overtaken by {saves} saves at {len(calls)} calls")
