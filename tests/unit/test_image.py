"""Memory as large as a checkpoint: it grows with what is in it, is another process's too, and goes away."""

import errno
import mmap
import os

import pytest

from hpcckpt.store import image as module
from hpcckpt.store.image import Image
from support.limits import memory_files

MIB = 1024 * 1024


@pytest.fixture
def image():
    image = Image()
    yield image
    image.close()


def test_it_grows_and_keeps_what_is_in_it(image):
    image.reserve(5)
    image.memory[:5] = b"first"
    image.reserve(9 * MIB)
    assert image.size_bytes >= 9 * MIB
    assert image.memory[:5] == b"first"
    image.memory[9 * MIB - 4 : 9 * MIB] = b"last"
    size_bytes, memory = image.size_bytes, image.memory
    image.reserve(3)
    assert (image.size_bytes, image.memory) == (size_bytes, memory), "it does not shrink, and what fits is not mapped anew"


def test_another_process_has_the_same_memory(image):
    image.reserve(MIB)
    if not (child := os.fork()):
        with mmap.mmap(image.fileno(), MIB) as theirs:
            theirs[:5] = b"hello"
        os._exit(0)
    os.waitpid(child, 0)
    assert image.memory[:5] == b"hello"


def test_its_pages_are_there_before_they_are_used(image):
    before = memory_files()
    image.reserve(64 * MIB)
    size_bytes = sum(memory_files().values()) - sum(before.values())
    assert 64 * MIB <= size_bytes < 70 * MIB
    image.warm()
    image.memory[: 64 * MIB] = bytes(64 * MIB)
    assert sum(memory_files().values()) - sum(before.values()) == size_bytes
    image.close()
    assert sum(memory_files().values()) == sum(before.values())


def test_where_that_is_not_wanted_they_come_with_their_use(image):
    before = sum(memory_files().values())
    image.reserve(64 * MIB, touched=False)
    assert sum(memory_files().values()) - before < MIB
    image.memory[:MIB] = bytes(MIB)
    assert MIB <= sum(memory_files().values()) - before < 3 * MIB


def test_a_view_that_somebody_holds_keeps_nobody_from_growing_or_closing(image):
    image.reserve(MIB)
    with memoryview(image.memory)[:4] as view:
        view[:] = b"view"
        image.reserve(9 * MIB)
        assert image.memory[:4] == b"view"
        image.memory[:4] = b"both"
        assert bytes(view) == b"both"
        image.close()
        assert bytes(view) == b"both"
    image.close()


def test_what_is_not_to_be_had_is_not_touched(image, monkeypatch):
    image.reserve(MIB)
    size_bytes = image.size_bytes
    monkeypatch.setattr(module, "available_bytes", lambda: 300 * MIB)
    with pytest.raises(OSError, match="can be had") as error:
        image.reserve(100 * MIB)
    assert error.value.errno == errno.ENOMEM
    assert image.size_bytes == size_bytes
    image.reserve(20 * MIB)


def test_without_any_there_is_none_to_look_at(image):
    with pytest.raises(ValueError, match="reserve some"):
        image.memory  # noqa: B018 - raises
