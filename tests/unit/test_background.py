"""Saves beside the training: nothing that changes behind the copy is in the file, one is on its way at a time, errors are heard of."""

import errno
import os
import signal
import threading

import pytest
import torch
from torch import nn

from hpcckpt.background import Background
from hpcckpt.errors import CheckpointSaveError, FencedError
from hpcckpt.store import image as image_module
from hpcckpt.store import writing
from hpcckpt.store.durable import file_digest, write_durably

MIB = 1024 * 1024


class Notes(list):
    """What the user is told."""

    def __call__(self, text):
        self.append(text)


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def background(notes):
    background = Background(("USR1", "TERM"), notes)
    yield background
    background.close()


def training():
    """Return a trained model, its optimizer and the content of a checkpoint, of which all tensors are those of the training."""
    model = nn.Sequential(nn.Linear(700, 600), nn.BatchNorm1d(600), nn.Linear(600, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 700)).square().sum().backward()
    optimizer.step()
    return model, optimizer, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "words": ["some"]}


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from tensors_in(inner)


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def assert_equal(first, second):
    """Assert that two contents are the same, bit for bit."""
    if isinstance(second, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(second, dict):
        assert first.keys() == second.keys()
        for key, value in second.items():
            assert_equal(first[key], value)
    elif isinstance(second, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


def spoil(content):
    """Change everything in place, in the way that no version counter sees, and the words."""
    for tensor in tensors_in(content):
        flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        flat.fill_(255)
    content["words"].append("spoiled")


@pytest.mark.parametrize("worth", [0, 2**60], ids=["a process", "a thread"])
def test_everything_may_change_as_soon_as_it_is_staged(background, tmp_path, monkeypatch, worth):
    monkeypatch.setattr(writing, "_WORTH_BYTES", worth)
    for number in range(3):
        _, _, content = training()
        expected, path = copied(content), tmp_path / f"{number}.pt"
        write = background.stage(content)
        spoil(content)
        background.start(lambda path=path, write=write: write_durably(path, write))
        background.settle()
        assert_equal(torch.load(path, weights_only=True), expected)


@pytest.mark.parametrize("worth", [0, 2**60], ids=["a process", "a thread"])
def test_so_may_what_only_torch_can_write(background, tmp_path, monkeypatch, worth):
    """A sparse tensor makes that of everything beside it."""
    monkeypatch.setattr(writing, "_WORTH_BYTES", worth)
    whole = torch.arange(3 * MIB, dtype=torch.float32)
    content = {"sparse": torch.eye(3).to_sparse(), "large": whole}
    for number in range(2):
        path, expected = tmp_path / f"{number}.pt", whole.clone()
        write = background.stage(content)
        whole.add_(1)
        background.start(lambda path=path, write=write: write_durably(path, write))
        background.settle()
        loaded = torch.load(path, weights_only=True)
        assert_equal(loaded["large"], expected)
        assert_equal(loaded["sparse"].to_dense(), torch.eye(3))


def test_what_is_written_is_what_its_digest_says(background, tmp_path):
    write = background.stage(training()[2])
    said = write_durably(tmp_path / "a.pt", write)
    assert said == file_digest(tmp_path / "a.pt")


def test_a_second_try_of_one_save_writes_the_same(background, tmp_path):
    """A store that finds the disk full makes room, and writes again."""
    content = training()[2]
    write = background.stage(content)
    spoil(content)
    assert write_durably(tmp_path / "a.pt", write) == write_durably(tmp_path / "b.pt", write)


def test_memory_is_used_again_and_grows_with_the_state(background, tmp_path):
    sizes = []
    for count in (2, 1, 3, 2):
        content = {"a": torch.full((count * MIB,), float(count))}
        write_durably(tmp_path / "a.pt", background.stage(content))
        assert_equal(torch.load(tmp_path / "a.pt", weights_only=True), content)
        sizes.append(background._image.size_bytes)
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]


def test_prepared_memory_is_what_the_first_save_uses(background, tmp_path):
    background.prepare(8 * MIB)
    content = {"a": torch.ones(MIB)}
    write_durably(tmp_path / "a.pt", background.stage(content))
    assert background._image.size_bytes == 8 * MIB
    assert_equal(torch.load(tmp_path / "a.pt", weights_only=True), content)


def test_memory_that_no_thread_can_prepare_comes_with_the_first_save(background, tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        background.prepare(8 * MIB)
    content = {"a": torch.ones(3)}
    write_durably(tmp_path / "a.pt", background.stage(content))
    assert_equal(torch.load(tmp_path / "a.pt", weights_only=True), content)


def test_without_memory_it_says_so_once_and_the_caller_saves_itself(background, notes, monkeypatch):
    monkeypatch.setattr(image_module, "available_bytes", lambda: 260 * MIB)
    background.prepare(8 * MIB)
    assert background.stage({"a": torch.ones(8 * MIB)}) is None
    (told,) = notes
    assert "checkpoint.async_save: saved while the training waits" in told
    assert "33554432 bytes" not in told, "it is the file's size, not the tensor's"
    assert "can be had" in told
    assert background._image is None, "what there was is given back"
    monkeypatch.setattr(image_module, "available_bytes", lambda: 2**40)
    assert background.stage({"a": torch.ones(8 * MIB)}) is not None, "as soon as there is some, it is used"


def test_without_such_memory_at_all_the_same(background, notes, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert background.stage({"a": torch.ones(3)}) is None
    assert "Function not implemented" in notes[0]


def test_what_torch_cannot_write_only_for_lack_of_memory_is_saved_by_the_caller(background, monkeypatch):
    monkeypatch.setattr(image_module, "available_bytes", lambda: 258 * MIB)
    assert background.stage({"sparse": torch.eye(3).to_sparse(), "large": torch.ones(2 * MIB)}) is None


def test_what_cannot_be_pickled_is_the_callers_mistake(background):
    with pytest.raises((TypeError, AttributeError)):
        background.stage({"lock": threading.Lock()})


@pytest.mark.parametrize("error", [CheckpointSaveError("the disk is full"), FencedError("overtaken"), KeyError("bug")], ids=repr)
def test_a_save_that_fails_is_heard_of_at_once_and_raised_once(background, wait_until, error):
    def save():
        raise error

    assert not background.has_failed
    background.start(save)
    wait_until(lambda: background.has_failed, "the failure")
    wait_until(lambda: not background.is_busy, "the end of it")
    with pytest.raises(type(error)) as raised:
        background.settle()
    assert raised.value is error
    assert not background.has_failed
    background.settle()
    background.start(lambda: None)
    background.settle()


def test_it_is_busy_as_long_as_a_save_is_on_its_way(background):
    go_on = threading.Event()
    assert not background.is_busy
    background.start(go_on.wait)
    assert background.is_busy
    go_on.set()
    background.settle()
    assert not background.is_busy


def test_where_no_thread_can_be_had_the_training_waits(background, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    done = []
    monkeypatch.setattr(threading.Thread, "start", refuse)
    background.start(lambda: done.append(1))
    assert done == [1]
    background.settle()


def test_closing_waits_for_what_is_on_its_way_whatever_becomes_of_it(notes, tmp_path):
    background, done = Background(("USR1",), notes), []
    write = background.stage({"a": torch.ones(MIB)})

    def save():
        write_durably(tmp_path / "a.pt", write)
        done.append(1)
        raise CheckpointSaveError("and then it fails")

    background.start(save)
    background.close()
    background.close()
    assert done == [1]


def test_a_writing_process_that_was_killed_meanwhile_is_replaced(background, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_WORTH_BYTES", 0)
    content = training()[2]
    for number in range(3):
        write_durably(tmp_path / "a.pt", background.stage(content))
        assert_equal(torch.load(tmp_path / "a.pt", weights_only=True), content)
        if background._writer.pid is not None:
            os.kill(background._writer.pid, signal.SIGKILL)
        assert number < 3


class Cuda:
    """Notes what would be asked of CUDA: there is no GPU here."""

    def __init__(self):
        self.asked = []

    def cudaHostRegister(self, start, size_bytes, flags):  # noqa: N802 - CUDA's name
        self.asked.append(("register", start, size_bytes, flags))
        return 0

    def cudaHostUnregister(self, start):  # noqa: N802 - as above
        self.asked.append(("unregister", start))
        return 0


def test_with_cuda_its_memory_is_pinned_once_and_not_beyond_its_life(background, monkeypatch):
    cuda = Cuda()
    for name, value in (("is_available", lambda: True), ("is_initialized", lambda: True), ("cudart", lambda: cuda)):
        monkeypatch.setattr(torch.cuda, name, value)
    for count in (1, 1, 3):
        assert background.stage({"a": torch.ones(count * MIB)}) is not None
    background.close()
    (_, first, small, _), *_ = cuda.asked
    assert [entry[:2] for entry in cuda.asked[:2]] == [("register", first), ("unregister", first)], "before it is mapped anew"
    (_, second, large, _), last = cuda.asked[2:]
    assert last == ("unregister", second)
    assert small < large
