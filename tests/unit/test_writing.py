"""A file from memory that has its shape: the bytes are those of torch.save, whoever writes them, and whatever happens to whom."""

import errno
import os
import signal
import threading
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcckpt import archive
from hpcckpt.archive import Record, archived, placed
from hpcckpt.state.pickled import pickled
from hpcckpt.store import writing
from hpcckpt.store.digest import Blocks
from hpcckpt.store.image import Image
from hpcckpt.store.writing import Laid, Writer, written
from support.digests import digest_of
from support.limits import full_disk

MIB = 1024 * 1024


def content(size_bytes=3 * MIB):
    return {"a": torch.arange(size_bytes // 8), "b": [torch.ones(3), torch.zeros(0)], "c": "words"}


def laid_out(image, value):
    found = pickled(value)
    laid, starts = Laid.out(found.entries(), lambda size: image.reserve(size) or image)
    found.put(image.memory, starts)
    return laid


def bytes_of(value):
    return b"".join(bytes(piece) for piece in archived(pickled(value)))


def opened(path):
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)


@pytest.fixture
def image():
    image = Image()
    yield image
    image.close()


@pytest.fixture
def writer():
    writer = Writer()
    yield writer
    writer.close()


@pytest.fixture(params=["a process", "a thread"])
def by(request, monkeypatch):
    """Who writes: whatever the size."""
    monkeypatch.setattr(writing, "_WORTH_BYTES", 0 if request.param == "a process" else 2**60)
    return request.param


entries = st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.integers(0, 5000)), max_size=20)


@given(entries, st.sampled_from([2**32 - 1, 300, 2000, 10000]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_where_entries_lie_is_known_from_names_and_sizes(monkeypatch, tmp_path, entries, large):
    """Also where sizes and offsets are of the kind that zip64 is for, which here begins earlier."""
    monkeypatch.setattr(archive, "_LARGE", large)
    records = [Record.of(name, bytes([number % 256]) * size) for number, (name, size) in enumerate(entries)]
    data = b"".join(bytes(piece) for piece in archived(records))
    starts, size_bytes = placed(entries)
    assert size_bytes == len(data)
    for record, start in zip(records, starts, strict=True):
        assert start % 64 == 0
        assert data[start : start + record.size_bytes] == bytes(record.load())
    if large == 2**32 - 1 and len({name for name, _ in entries}) == len(entries):
        (tmp_path / "a.zip").write_bytes(data)
        with zipfile.ZipFile(tmp_path / "a.zip") as read:
            assert read.testzip() is None


@pytest.mark.parametrize("size", [8, 3 * MIB, 40 * MIB], ids=str)
def test_it_is_the_file_and_its_digest(image, writer, tmp_path, by, size):
    value = content(size)
    for _ in range(2):  # the second time what was put in before is still there
        path = tmp_path / "a.pt"
        laid = laid_out(image, value)
        descriptor = opened(path)
        size_bytes, digest = writer.write(image, laid, descriptor)
        os.close(descriptor)
        data = path.read_bytes()
        assert data == bytes_of(value)
        assert (size_bytes, digest) == (len(data), digest_of(data))
        value["a"] += 1
        value["c"] = "other words, and more of them"
    assert (writer.pid is not None) == (by == "a process")


@pytest.mark.parametrize("size", [0, 1, 4096, 16 * MIB, 33 * MIB + 5], ids=str)
def test_what_is_complete_already_is_written_as_it_is(image, tmp_path, size):
    image.reserve(max(size, 1))
    image.memory[:size] = os.urandom(size)
    descriptor = opened(tmp_path / "a")
    digest = written(image.memory, Laid(size), descriptor)
    os.close(descriptor)
    data = (tmp_path / "a").read_bytes()
    assert data == image.memory[:size]
    assert digest == digest_of(data)


def test_a_writing_process_that_is_killed_costs_nothing_but_time(image, writer, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_WORTH_BYTES", 0)
    value = content()
    pids = set()
    for number in range(3):
        descriptor = opened(tmp_path / "a.pt")
        writer.write(image, laid_out(image, value), descriptor)
        os.close(descriptor)
        assert (tmp_path / "a.pt").read_bytes() == bytes_of(value), number
        if writer.pid is not None:
            pids.add(writer.pid)
            os.kill(writer.pid, signal.SIGKILL)
    assert len(pids) == 2, "one that is gone is found out, and the next save has a new one"


def test_a_writing_process_that_is_killed_within_a_file_leaves_nothing_of_it(image, writer, tmp_path, monkeypatch, wait_until):
    """The file is begun anew, at its beginning; at whatever point that was."""
    monkeypatch.setattr(writing, "_WORTH_BYTES", 0)
    value = content(200 * MIB)
    laid = laid_out(image, value)
    descriptor = opened(tmp_path / "warm")
    writer.write(image, laid, descriptor)
    os.close(descriptor)
    path = tmp_path / "a.pt"
    descriptor, pid = opened(path), writer.pid

    def kill():
        wait_until(lambda: os.fstat(descriptor).st_size > 0, "some of the file")
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    size_bytes, digest = writer.write(image, laid, descriptor)
    killer.join()
    os.close(descriptor)
    data = path.read_bytes()
    assert data == bytes_of(value)
    assert (size_bytes, digest) == (len(data), digest_of(data))


@pytest.mark.parametrize("at_byte", [0, MIB, 17 * MIB, 39 * MIB])
def test_a_full_disk_is_the_callers_to_hear_of(image, writer, tmp_path, by, at_byte):
    """The process beside has this one's limits if it is started within them."""
    laid = laid_out(image, content(40 * MIB))
    descriptor = opened(tmp_path / "a.pt")
    with full_disk(at_byte), pytest.raises(OSError, match="File too large") as error:
        writer.write(image, laid, descriptor)
    os.close(descriptor)
    assert error.value.errno == errno.EFBIG
    assert (writer.pid is not None) == (by == "a process")


def test_nothing_more_is_written_for_one_who_is_gone(image, tmp_path):
    laid, asked = laid_out(image, content(80 * MIB)), []
    descriptor = opened(tmp_path / "a.pt")
    with pytest.raises(OSError, match="whom the file is for is gone"):
        written(image.memory, laid, descriptor, lambda: asked.append(1) or len(asked) > 2)
    os.close(descriptor)
    assert (tmp_path / "a.pt").stat().st_size <= 4 * 16 * MIB


def test_bytes_that_did_not_arrive_are_an_error(image, tmp_path, monkeypatch):
    monkeypatch.setattr(writing.Way, "write", lambda *_: None)
    laid = laid_out(image, content())
    descriptor = opened(tmp_path / "a.pt")
    with pytest.raises(OSError, match="0 bytes are there of"):
        written(image.memory, laid, descriptor)
    os.close(descriptor)


def test_a_thread_that_cannot_start_is_an_oserror(image, tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    laid = laid_out(image, content(40 * MIB))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    descriptor = opened(tmp_path / "a.pt")
    with pytest.raises(BlockingIOError, match="can't start new thread"):
        written(image.memory, laid, descriptor)
    os.close(descriptor)


def test_without_a_process_to_be_had_it_is_written_all_the_same(image, writer, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_WORTH_BYTES", 0)
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python"))
    value = content()
    descriptor = opened(tmp_path / "a.pt")
    _, digest = writer.write(image, laid_out(image, value), descriptor)
    os.close(descriptor)
    assert writer.pid is None
    assert (tmp_path / "a.pt").read_bytes() == bytes_of(value)
    tree = Blocks()
    tree.update(memoryview(bytes_of(value)))
    assert digest == tree.text()
