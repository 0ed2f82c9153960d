"""A file that is read once: its digest is that of its bytes, what is kept are the same bytes, and nothing is kept for ever."""

import errno
import mmap
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from hpcckpt.store import image as image_module
from hpcckpt.store import shelf as module
from hpcckpt.store.digest import Blocks
from hpcckpt.store.durable import file_digest, is_being_read
from hpcckpt.store.shelf import Shelf
from support.digests import digest_of
from support.limits import memory_files

MIB = 1024 * 1024


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path, tmpfs):
    """Where O_DIRECT is taken, and a file system in memory."""
    return tmp_path if request.param == "disk" else tmpfs


@pytest.fixture
def tmpfs():
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def shelf():
    shelf = Shelf()
    yield shelf
    shelf.close()


def made(path, size):
    data = os.urandom(size)
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return data


def uncached(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def kept(shelf, path):
    with open(shelf.source(path), "rb") as file:
        return file.read()


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("size", [1, 4095, 4096, 16 * MIB, 16 * MIB + 1, 53 * MIB + 77], ids=str)
def test_what_is_kept_is_the_file(shelf, folder, size, is_cached):
    path = folder / "a"
    data = made(path, size)
    if not is_cached:
        uncached(path)
    assert shelf.read(path) == (size, digest_of(data)) == file_digest(path)
    assert kept(shelf, path) == data, "as long as the file, to the byte: readers of zip files begin at the end"
    assert shelf.digest == digest_of(data)


def test_digests_of_earlier_versions_are_taken_in_the_same_way(shelf, tmp_path):
    made(tmp_path / "a", 3 * MIB)
    like = "sha256:0"
    assert shelf.read(tmp_path / "a", like) == file_digest(tmp_path / "a", like)
    assert shelf.digest.startswith("sha256:")


def test_an_empty_file_is_nothing_to_keep(shelf, tmp_path):
    made(tmp_path / "a", 0)
    assert shelf.read(tmp_path / "a") == (0, digest_of(b""))
    assert shelf.source(tmp_path / "a") is None


def test_one_file_is_kept_the_one_that_was_read_last(shelf, tmp_path):
    for name in "ab":
        made(tmp_path / name, 5000)
        shelf.read(tmp_path / name)
    assert shelf.source(tmp_path / "a") is None
    assert kept(shelf, tmp_path / "b") == (tmp_path / "b").read_bytes()


def test_what_becomes_of_the_file_later_changes_nothing(shelf, tmp_path):
    data = made(tmp_path / "a", 20 * MIB)
    shelf.read(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"other")
    (tmp_path / "a").unlink()
    assert kept(shelf, tmp_path / "a") == data


def test_memory_goes_away_when_it_is_closed_and_nothing_is_kept_any_more(shelf, tmp_path):
    made(tmp_path / "a", 64 * MIB)
    before = memory_files()
    shelf.read(tmp_path / "a")
    assert sum(memory_files().values()) - sum(before.values()) >= 64 * MIB
    shelf.close()
    assert memory_files() == before
    assert shelf.read(tmp_path / "a") == file_digest(tmp_path / "a")
    assert shelf.source(tmp_path / "a") is None


def test_another_process_opens_it(shelf, tmp_path):
    data = made(tmp_path / "a", 5000)
    shelf.read(tmp_path / "a")
    source, (reading, writing) = shelf.source(tmp_path / "a"), os.pipe()
    if not (child := os.fork()):
        os.closerange(3, writing)
        with open(source, "rb") as file:
            os.write(writing, file.read())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == data
    os.waitpid(child, 0)


@pytest.mark.parametrize(("where", "free"), [(image_module, 258 * MIB), (module, 9 * MIB)], ids=["for it", "for what it is loaded into"])
def test_without_memory_it_is_read_and_not_kept(shelf, tmp_path, monkeypatch, where, free):
    data = made(tmp_path / "a", 5 * MIB)
    monkeypatch.setattr(where, "available_bytes", lambda: free)
    assert shelf.read(tmp_path / "a") == (len(data), digest_of(data))
    assert shelf.source(tmp_path / "a") is None


def test_memory_that_runs_out_on_the_way_is_no_error(shelf, tmp_path, monkeypatch):
    data, write_all = made(tmp_path / "a", 40 * MIB), module.write_all

    def refuse(descriptor, view, offset):
        if offset >= 20 * MIB:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(descriptor, view, offset)

    monkeypatch.setattr(module, "write_all", refuse)
    before = len(os.listdir("/proc/self/fd"))
    assert shelf.read(tmp_path / "a") == (len(data), digest_of(data))
    assert shelf.source(tmp_path / "a") is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_buffers_are_used_again_only_when_they_are_copied(shelf, tmp_path, monkeypatch):
    data, update = made(tmp_path / "a", 9 * 16 * MIB + 5), Blocks.update

    def slow(self, piece):
        time.sleep(0.01)
        update(self, piece)

    monkeypatch.setattr(Blocks, "update", slow)
    assert shelf.read(tmp_path / "a") == (len(data), digest_of(data))
    assert kept(shelf, tmp_path / "a") == data


def test_without_huge_pages_it_is_read_all_the_same(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)  # as a kernel without them: EINVAL
    data = made(tmp_path / "a", 40 * MIB + 1)
    assert shelf.read(tmp_path / "a") == (len(data), digest_of(data))
    assert kept(shelf, tmp_path / "a") == data


def test_without_o_direct_it_is_read_all_the_same(shelf, tmp_path, monkeypatch):
    data, preadv, calls = made(tmp_path / "a", 40 * MIB), os.preadv, []

    def short(descriptor, buffers, offset):
        calls.append(offset)
        return preadv(descriptor, [memoryview(buffers[0])[: 3 * MIB]], offset)

    monkeypatch.setattr(module, "_opened_direct", lambda _: None)
    monkeypatch.setattr(os, "preadv", short)
    assert shelf.read(tmp_path / "a") == (len(data), digest_of(data))
    assert len(calls) > 13, "short reads are gone on with"


def test_it_is_marked_as_being_read_meanwhile(shelf, tmp_path, monkeypatch):
    made(tmp_path / "a", 5000)
    marked, blocks = [], module._blocks
    monkeypatch.setattr(module, "_blocks", lambda *arguments: marked.append(is_being_read(tmp_path / "a")) or blocks(*arguments))
    shelf.read(tmp_path / "a")
    assert marked == [True]
    assert not is_being_read(tmp_path / "a")


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error_and_leaves_nothing(shelf, tmp_path, monkeypatch):
    path = tmp_path / "a"
    made(path, 40 * MIB)
    blocks = module._blocks

    def cutting(*arguments):
        os.truncate(path, 17 * MIB)
        return blocks(*arguments)

    monkeypatch.setattr(module, "_blocks", cutting)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="has no more than 17825792 bytes any more"):
        shelf.read(path)
    assert shelf.source(path) is None
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hpcckpt-reader")]


def test_a_link_is_not_followed(shelf, tmp_path):
    made(tmp_path / "a", 10)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="Too many levels"):
        shelf.read(tmp_path / "b")


def test_what_it_takes_from_the_disk_leaves_no_trace_in_the_cache(shelf, tmp_path):
    made(tmp_path / "a", 40 * MIB)
    uncached(tmp_path / "a")
    shelf.read(tmp_path / "a")
    with (tmp_path / "a").open("rb") as file:
        assert not any(module._is_cached(file.fileno(), start, start + MIB) for start in range(0, 40 * MIB, MIB))
        file.read()
        assert all(module._is_cached(file.fileno(), start, start + MIB) for start in range(0, 40 * MIB, MIB))


def test_what_is_expected_is_read_before_it_is_asked_for(shelf, tmp_path, monkeypatch):
    data, began = made(tmp_path / "a", 20 * MIB), []
    read = module._blocks
    monkeypatch.setattr(module, "_blocks", lambda *arguments: began.append(1) or read(*arguments))
    like = digest_of(b"")
    shelf.begin(tmp_path / "a", like)
    assert shelf.source(tmp_path / "a") is None, "not before it is asked for"
    assert shelf.read(tmp_path / "a", like) == (len(data), digest_of(data))
    assert kept(shelf, tmp_path / "a") == data
    assert began == [1]


@pytest.mark.parametrize("expected", ["b", "not there", "a directory", "like another"])
def test_what_was_expected_in_vain_leaves_no_trace(shelf, tmp_path, expected):
    data = made(tmp_path / "a", 5000)
    made(tmp_path / "b", 6000)
    (tmp_path / "a directory").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    shelf.begin(tmp_path / ("a" if expected == "like another" else expected), "sha256:0")
    assert shelf.read(tmp_path / "a", "xxh3-16m:0") == (len(data), digest_of(data))
    assert kept(shelf, tmp_path / "a") == data
    shelf.begin(tmp_path / "b", "xxh3-16m:0")
    shelf.close()
    shelf.begin(tmp_path / "b", "xxh3-16m:0")
    assert shelf.source(tmp_path / "b") is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_no_thread_can_be_had_nothing_is_expected(shelf, tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    data = made(tmp_path / "a", 5000)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        shelf.begin(tmp_path / "a", "xxh3-16m:0")
    assert shelf.read(tmp_path / "a", "xxh3-16m:0") == (len(data), digest_of(data))
