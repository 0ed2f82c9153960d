"""A file that is written once: its bytes, its digest, its failures, and what it costs in memory."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcckpt.store import direct, sink
from hpcckpt.store.digest import Blocks
from hpcckpt.store.sink import Sink
from support.digests import digest_of
from support.limits import full_disk

BUFFER = 8192
# A disk; a file system in memory, which may or may not take O_DIRECT.
FOLDERS = ["disk", "memory"]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(sink, "_BUFFER_BYTES", BUFFER)
    monkeypatch.setattr(sink, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(sink, "_SPARE", [])
    monkeypatch.setattr(direct, "_BUFFERED_DEVICES", set())


def replace_writing(monkeypatch, write):
    """Have a small file (sink) and a large one (direct) written by something else."""
    for module in (sink, direct):
        monkeypatch.setattr(module, "write_all", write)


@pytest.fixture(params=FOLDERS)
def path(request, tmp_path):
    if request.param == "disk":
        yield tmp_path / "a"
    else:
        found = Path(f"/dev/shm/hpcckpt-sink-{os.getpid()}")
        yield found
        found.unlink(missing_ok=True)


def opened(path):
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def write(path, pieces):
    with Sink(opened(path)) as file:
        for piece in pieces:
            file.write(piece)
        file.finish()
        return file.size_bytes, file.digest


sizes = st.integers(0, 4 * BUFFER) | st.sampled_from([BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER, 5 * BUFFER])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sizes, max_size=6), st.integers(0, 255))
def test_the_file_is_what_was_written_however_it_was_cut(path, sizes, seed):
    pieces = [bytes((seed + number + index) % 256 for index in range(size)) for number, size in enumerate(sizes)]
    data = b"".join(pieces)
    assert write(path, pieces) == (len(data), digest_of(data))
    assert path.read_bytes() == data


def test_what_changes_behind_a_write_is_not_torn(path):
    data = bytearray(b"a" * 3 * BUFFER)
    with Sink(opened(path)) as file:
        for letter in b"bcdef":
            file.write(data)
            data[:] = bytes([letter]) * len(data)
        file.finish()
    assert path.read_bytes() == b"".join(letter * 3 * BUFFER for letter in (b"a", b"b", b"c", b"d", b"e"))


@pytest.mark.parametrize("at_byte", [0, 100, BUFFER, BUFFER + 4096, 3 * BUFFER, 7 * BUFFER + 10])
def test_a_full_disk_is_an_oserror_and_is_remembered(path, at_byte):
    def fill(file):
        for _ in range(7):
            file.write(b"x" * BUFFER)
        file.write(b"x" * 100)
        file.finish()

    with Sink(opened(path)) as file:
        with full_disk(at_byte), pytest.raises(OSError, match="File too large") as raised:
            fill(file)
        assert file.failure is raised.value
        # Who does not listen hears it again.
        with pytest.raises(OSError, match="File too large"):
            file.write(b"x" * 2 * BUFFER)
        with pytest.raises(OSError, match="File too large"):
            file.finish()
    assert not writers()
    assert len({id(buffer) for buffer in sink._SPARE}) == 3


def test_who_leaves_early_leaves_nothing_running(path):
    with Sink(opened(path)) as file:
        file.write(b"x" * 5 * BUFFER)
    assert not writers()
    spare = {id(buffer) for buffer in sink._SPARE}
    assert len(spare) == 3
    with Sink(opened(path)) as file:
        file.write(b"y" * 5 * BUFFER)
        file.finish()
    assert path.read_bytes() == b"y" * 5 * BUFFER
    assert {id(buffer) for buffer in sink._SPARE} == spare


def test_it_may_be_finished_twice(path):
    with Sink(opened(path)) as file:
        file.write(b"y" * 5 * BUFFER + b"z")
        file.finish()
        file.finish()
    assert path.read_bytes() == b"y" * 5 * BUFFER + b"z"


@pytest.mark.parametrize("buffers", [1, 2, 7])
@pytest.mark.parametrize("error", [MemoryError("no memory"), ValueError("bug"), KeyboardInterrupt()], ids=repr)
def test_whatever_a_writer_dies_of_is_raised(tmp_path, monkeypatch, error, buffers):
    def fail(*_):
        raise error

    replace_writing(monkeypatch, fail)
    with Sink(opened(tmp_path / "a")) as file, pytest.raises(type(error)):
        fill(file, buffers)
    assert not writers()


def fill(file, buffers):
    for _ in range(buffers):
        file.write(b"x" * BUFFER)
    file.write(b"x")
    file.finish()


def test_bytes_that_did_not_arrive_are_an_error(tmp_path, monkeypatch):
    replace_writing(monkeypatch, lambda *_: None)
    with Sink(opened(tmp_path / "a")) as file, pytest.raises(OSError, match="0 bytes are there of 24577"):
        fill(file, 3)


def test_a_thread_that_cannot_start_is_an_oserror(tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Sink(opened(tmp_path / "a")) as file, pytest.raises(BlockingIOError, match="can't start new thread"):
        fill(file, 3)


def test_a_file_that_cannot_be_taken_over_is_closed(tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(sink, "take_buffer", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="allocate"):
        Sink(opened(tmp_path / "a"))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("spare", [False, True], ids=["in use", "spare"])
def test_a_forked_process_has_buffers_of_its_own(tmp_path, spare):
    if spare:
        write(tmp_path / "b", [b"first"])
    with Sink(opened(tmp_path / "a")) as file:
        file.write(b"parent" * 100)
        child = os.fork()
        if child == 0:
            try:
                file.write(b"CHILD!" * 200)
                write(tmp_path / "b", [b"CHILD!" * 300])
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        file.finish()
        assert file.digest == digest_of(b"parent" * 100)
    assert (tmp_path / "a").read_bytes() == b"parent" * 100


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "hpcckpt-writer"]


@pytest.mark.parametrize("how", ["as a flag", "at the first write", "at a later write"])
def test_a_file_system_without_direct_writing_is_written_to_all_the_same(tmp_path, monkeypatch, how):
    asked, path = [], tmp_path / "a"
    set_flags, pwrite = fcntl.fcntl, os.pwrite

    def refuse_flag(descriptor, command, *flags):
        if command == fcntl.F_SETFL and flags[0] & os.O_DIRECT:
            asked.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        return set_flags(descriptor, command, *flags)

    def refuse_write(descriptor, data, offset):
        if set_flags(descriptor, fcntl.F_GETFL) & os.O_DIRECT and (how == "at the first write" or offset):
            asked.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, offset)

    if how == "as a flag":
        monkeypatch.setattr(fcntl, "fcntl", refuse_flag)
    else:
        monkeypatch.setattr(os, "pwrite", refuse_write)
    data = bytes(range(256)) * 200
    for _ in range(2):
        assert write(path, [data]) == (len(data), digest_of(data))
        assert path.read_bytes() == data
    # Asked once; a write that failed half-way says nothing about the next file.
    assert len(asked) == (2 if how == "at a later write" else 1)


def test_short_writes_are_gone_on_with(path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:4096], offset))
    data = bytes(range(256)) * 200
    write(path, [data])
    assert path.read_bytes() == data


def test_a_closed_descriptor_is_an_error_in_the_first_place(tmp_path):
    descriptor = opened(tmp_path / "a")
    file = Sink(descriptor)
    os.close(descriptor)
    file.write(b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.finish()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.close()


SAVE = """
import os, resource, sys
from hpcckpt.store.sink import Sink
data = memoryview(bytearray(os.urandom(1 << 20) * 400))
def resident():
    open("/proc/self/clear_refs", "w").write("5")
    return lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
peak = resident()
before = peak()
with Sink(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o600)) as file:
    file.write(data)
    file.finish()
print(peak() - before)
"""


def test_a_large_file_takes_little_memory_and_leaves_the_page_cache_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", SAVE, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024  # KiB
    if not takes_direct_writes(tmp_path):
        pytest.skip("this file system is written to through the page cache")
    cached = 0
    with (tmp_path / "a").open("rb", buffering=0) as file:
        for offset in range(0, 400 << 20, 1 << 20):
            try:
                cached += os.preadv(file.fileno(), [bytearray(4096)], offset, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                continue
            except OSError as error:
                pytest.skip(f"this file system does not say what is in the page cache ({error})")
    assert cached < 40


def takes_direct_writes(folder):
    try:
        os.close(os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), max_size=20))
def test_the_digest_does_not_depend_on_how_the_bytes_come(cuts):
    data = bytes(range(256)) * 70_000  # a block and a part
    digest, start = Blocks(), 0
    for size in cuts:
        digest.update(memoryview(data)[start : start + size * 60_000])
        start += size * 60_000
    digest.update(memoryview(data)[start:])
    assert digest.text() == digest_of(data)
    assert digest.text() == digest_of(data)  # asking changes nothing
