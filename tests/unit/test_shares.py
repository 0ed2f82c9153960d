"""A file that several fill together: the bytes and the digest are those of one who writes alone, however it is cut."""

import errno
import itertools
import os
import threading
import zipfile
import zlib

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcckpt import archive
from hpcckpt.archive import Layout, Record, archived
from hpcckpt.store import digest, direct, shares
from hpcckpt.store.digest import Blocks
from hpcckpt.store.shares import Share, divided, fill, fill_at, fill_end, seen_for
from support.limits import full_disk

# Two pages.
BLOCK = 8192


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (digest, shares):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(archive, "_PIECE_BYTES", 1000)


def data_of(number, size):
    return bytes((number * 31 + index * 7 + index // 251) % 256 for index in range(size))


class File:
    """One file, and what one writer alone makes of it."""

    def __init__(self, entries):
        self.layout = Layout(entries)
        self.data = [data_of(number, size) for number, (_, size) in enumerate(entries)]
        self.records = [Record.of(name, data) for (name, _), data in zip(entries, self.data, strict=True)]
        self.whole = b"".join(bytes(piece) for piece in archived(self.records))
        self.large = [number for number, (_, size) in enumerate(entries) if size >= 1500]

    def load(self, number):
        return memoryview(self.data[number])

    def digest(self):
        tree = Blocks()
        tree.update(memoryview(self.whole))
        return tree.text()


entries = st.lists(
    st.tuples(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.integers(0, 3 * BLOCK) | st.just(0)),
    max_size=20,
)
larges = st.sampled_from([2**32 - 1, 300, 2000, 10000, 30000])


@given(entries, larges, st.lists(st.integers(0, 2**20), min_size=2, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_of_a_zip_file_is_that_of_the_whole(monkeypatch, entries, large, borders):
    """Also where sizes and offsets are of the kind that zip64 is for, which here begins earlier."""
    monkeypatch.setattr(archive, "_LARGE", large)
    file = File(entries)
    layout = file.layout
    assert layout.size_bytes == len(file.whole)
    at = [0, *sorted(border % (layout.central_at + 1) for border in borders), layout.central_at]
    crcs = {}
    for first, last in itertools.pairwise(at):
        read = []
        pieces = layout.part(first, last, file.load, crcs, lambda number, piece, read=read: read.append((number, bytes(piece))))
        assert b"".join(bytes(piece) for piece in pieces) == file.whole[first:last]
        told = [(number, file.data[number][low:high]) for number, low, high in layout.read_for(first, last)]
        assert [number for number, _ in told] == sorted({number for number, _ in read})
        assert b"".join(data for _, data in told) == b"".join(data for _, data in read)
    assert crcs == {number: zlib.crc32(data) for number, data in enumerate(file.data) if data}
    assert layout.ending(crcs) == file.whole[layout.central_at :]


@given(entries, larges, st.integers(1, 6), st.randoms(use_true_random=False))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_file_and_its_digest_are_those_of_one_who_writes_alone(monkeypatch, tmp_path, entries, large, writers, random):
    monkeypatch.setattr(archive, "_LARGE", large)
    file = File(entries)
    path = tmp_path / "a"
    path.write_bytes(b"")
    given_out = divided(file.layout, writers)
    filled = {share: fill_at(path, file.layout, share, file.load, file.large) for share in random.sample(given_out, len(given_out))}
    tree, crcs = Blocks(), {}
    for share in given_out:
        tree.append(filled[share].leaves)
        crcs |= filled[share].crcs
        assert filled[share].seen == seen_for(file.layout, share, file.load, file.large)
    descriptor = os.open(path, os.O_WRONLY)
    tree.append(fill_end(descriptor, file.layout, filled[given_out[-1]].rest, crcs))
    os.close(descriptor)
    assert path.read_bytes() == file.whole
    assert tree.text() == file.digest()


@given(entries, st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shares_are_whole_blocks_and_nobody_has_two_more_than_another(entries, writers):
    layout = Layout(entries)
    found = divided(layout, writers)
    blocks = -(-layout.size_bytes // BLOCK)
    assert len(found) == min(writers, blocks)
    assert [share.first for share in found] == [0, *(share.last for share in found[:-1])]
    assert not any(share.first % BLOCK for share in found)
    assert found[-1].last == layout.central_at
    counts = [(share.last - share.first) // BLOCK for share in found]
    counts[-1] = blocks - sum(counts[:-1])
    if blocks == layout.central_at // BLOCK + 1:  # else the end has blocks of its own
        assert max(counts) - min(counts) <= 1


def test_zip_readers_read_what_was_written_in_shares(tmp_path):
    file = File([("a", 5000), ("b", 0), ("c", 30000)])
    crcs = {}
    path = tmp_path / "a.zip"
    with path.open("wb") as target:
        for share in divided(file.layout, 4):
            filled = fill(target.fileno(), file.layout, share, file.load, ())
            crcs |= filled.crcs
        fill_end(target.fileno(), file.layout, filled.rest, crcs)
    with zipfile.ZipFile(path) as read:
        assert read.testzip() is None
        assert read.read("c") == file.data[2]


@given(st.integers(0, 40000 - 1))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_bit_that_differs_is_seen_by_whoever_writes_it_or_its_crc(tmp_path, at):
    file, other = File([("a", 40000), ("b", 9)]), File([("a", 40000), ("b", 9)])
    changed = bytearray(other.data[0])
    changed[at] ^= 1
    other.data[0] = bytes(changed)
    (tmp_path / "a").write_bytes(b"")
    for share in divided(file.layout, 3):
        filled = fill_at(tmp_path / "a", file.layout, share, other.load, file.large)
        is_right = filled.seen == seen_for(file.layout, share, file.load, file.large)
        last = share.last - (len(filled.rest.unwritten) if filled.rest else 0)
        is_same = (tmp_path / "a").read_bytes()[share.first : last] == file.whole[share.first : last]
        assert is_right == (is_same and filled.crcs.get(0) in (None, zlib.crc32(file.data[0])))


def test_data_of_another_size_are_refused(tmp_path):
    file = File([("a", 40000)])
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match="a has 5 bytes, but 40000 were said"):
        fill_at(tmp_path / "a", file.layout, Share(0, BLOCK), lambda _: memoryview(b"short"), ())


@pytest.mark.parametrize("at_byte", [0, 3 * BLOCK, 7 * BLOCK, 7 * BLOCK + 100])
def test_a_full_disk_is_an_oserror_and_nothing_goes_on(tmp_path, at_byte):
    file = File([("a", 64000)])
    (tmp_path / "a").write_bytes(b"")
    with full_disk(at_byte), pytest.raises(OSError, match="File too large") as error:
        fill_at(tmp_path / "a", file.layout, Share(0, file.layout.central_at), file.load, ())
    assert error.value.errno == errno.EFBIG
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hpcckpt-share")]


def test_one_that_fails_late_is_heard_of_too(tmp_path, monkeypatch):
    file = File([("a", 64000)])
    (tmp_path / "a").write_bytes(b"")

    def write_all(descriptor, view, offset, write=direct.write_all):
        if offset == 6 * BLOCK:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor, view, offset)

    monkeypatch.setattr(direct, "write_all", write_all)
    with pytest.raises(OSError, match="No space left"):
        fill_at(tmp_path / "a", file.layout, Share(0, 7 * BLOCK), file.load, ())


@pytest.mark.parametrize("kind", ["nothing", "a link"])
def test_only_the_file_itself_is_written_to(tmp_path, kind):
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    if kind == "a link":
        (tmp_path / "a").symlink_to(target)
    file = File([("a", 40000)])
    with pytest.raises(OSError, match="No such file" if kind == "nothing" else "symbolic link"):
        fill_at(tmp_path / "a", file.layout, Share(0, BLOCK), file.load, ())
    assert target.read_bytes() == b"mine"
    assert kind == "a link" or not (tmp_path / "a").exists()


def test_leaves_make_the_digest_that_the_bytes_make():
    data = os.urandom(3 * BLOCK + 5)
    leaves = [xxhash.xxh3_128_digest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
    alone, half, told = Blocks(), Blocks(), Blocks()
    alone.update(memoryview(data))
    half.update(memoryview(data)[: 2 * BLOCK])
    half.append(leaves[2:])
    told.append(leaves)
    assert alone.text() == half.text() == told.text()
    with pytest.raises(ValueError, match="behind whole blocks only"):
        alone.append(leaves)
