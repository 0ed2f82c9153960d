"""Bytes become content in one place: any kind of file, nothing executed, one clear error for what cannot be read."""

import argparse
import errno
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from hpcckpt import reading
from hpcckpt.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, CheckpointNotFoundError
from hpcckpt.reading import read_content
from support.hostile import FORMS, as_zip, pickles

STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.5], dtype=torch.bfloat16), "n": torch.tensor(7)}
HOSTILE = list(pickles(Path("mark")))


def zipped(path):
    torch.save({"model_state_dict": STATE}, path)


def legacy(path):
    torch.save({"model_state_dict": STATE}, path, _use_new_zipfile_serialization=False)


def deflated(path):
    zipped(path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def same(left, right):
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left)


def descriptors():
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("write", [zipped, legacy, deflated])
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
def test_whatever_torch_has_saved_is_read_whatever_it_is_called(tmp_path, write, mmap, name):
    write(tmp_path / name)
    before = descriptors()
    assert same(read_content(tmp_path / name, mmap=mmap)["model_state_dict"], STATE)
    assert descriptors() == before


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_are_known_by_their_bytes(tmp_path, mmap, name):
    save_file(STATE, tmp_path / name)
    assert same(read_content(tmp_path / name, mmap=mmap), STATE)


def test_names_that_safetensors_left_out_are_put_back(tmp_path):
    net = nn.Module()
    net.a = nn.Linear(2, 2, bias=False)
    net.b = nn.Linear(2, 2, bias=False)
    net.b.weight = net.a.weight
    save_model(net, tmp_path / "theirs.safetensors", metadata={"format": "pt", "note": "a.weight is fine", "x": "nothing"})
    assert same(read_content(tmp_path / "theirs.safetensors"), dict(net.state_dict()))
    (tmp_path / "odd").mkdir()
    for index, text in enumerate(["[1]", "{", '{"b.weight": 3}', "[" * 100_000, '{"b": "c", "a.weight": "b"}']):
        path = tmp_path / "odd" / f"{index}.safetensors"
        save_file({"a.weight": torch.ones(1)}, path, metadata={"hpcckpt.aliases": text})
        assert list(read_content(path)) == ["a.weight"]


def test_a_note_takes_no_tensors_place(tmp_path):
    state = {"a": torch.zeros(1), "b": torch.ones(1)}
    save_file(state, tmp_path / "x", metadata={"b": "a", "hpcckpt.aliases": '{"a": "b", "c": "b"}'})
    assert same(read_content(tmp_path / "x"), state | {"c": torch.ones(1)})


@pytest.mark.parametrize("write", [zipped, lambda path: save_file(STATE, path)])
def test_writing_to_what_was_read_changes_no_file(tmp_path, write):
    write(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    torch.serialization.set_default_mmap_options(reading.memory.MAP_SHARED)
    try:
        content = read_content(tmp_path / "x")
    finally:
        torch.serialization.set_default_mmap_options(reading.memory.MAP_PRIVATE)
    content.get("model_state_dict", content)["w"].zero_()
    assert (tmp_path / "x").read_bytes() == before


def test_tensors_stay_in_the_file_where_that_is_asked_for(tmp_path):
    zipped(tmp_path / "x.pt")
    mapped, copied = read_content(tmp_path / "x.pt"), read_content(tmp_path / "x.pt", mmap=False)
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "x.pt") in maps
    with (tmp_path / "x.pt").open("r+b") as file:
        data = file.read()
        at = data.index(STATE["w"].numpy().tobytes())
        file.seek(at)
        file.write(struct.pack("<f", 99.0))
    assert mapped["model_state_dict"]["w"][0, 0] == 99.0
    assert copied["model_state_dict"]["w"][0, 0] == 0.0


def test_where_nothing_can_be_mapped_it_is_read(tmp_path, monkeypatch):
    zipped(tmp_path / "x.pt")
    load, tried = torch.load, []

    def refusing(source, **options):
        tried.append(options["mmap"])
        if options["mmap"]:
            raise RuntimeError("unable to mmap 100 bytes from file </x>: No such device (19)")
        return load(source, **options)

    monkeypatch.setattr(torch, "load", refusing)
    assert same(read_content(tmp_path / "x.pt")["model_state_dict"], STATE)
    assert tried == [True, False]


def test_a_link_is_followed_where_the_path_is_the_users(tmp_path):
    zipped(tmp_path / "x.pt")
    (tmp_path / "link").symlink_to("x.pt")
    assert same(read_content(tmp_path / "link")["model_state_dict"], STATE)
    with pytest.raises(CheckpointCorruptError, match="is a symbolic link; give the path of the file itself"):
        read_content(tmp_path / "link", follow_symlinks=False)
    assert same(read_content(tmp_path / "x.pt", follow_symlinks=False)["model_state_dict"], STATE)


def test_what_is_not_there_is_not_found(tmp_path):
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "file").touch()
    for name in ("gone.pt", "dangling", "file/x.pt"):
        with pytest.raises(CheckpointNotFoundError, match="there is no such file"):
            read_content(tmp_path / name)


def test_of_a_directory_the_candidates_are_listed(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="is a directory; and there is no checkpoint in it"):
        read_content(tmp_path)
    for name in ("a.pt", "b.ckpt", "pytorch_model.bin", "model.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointNotFoundError, match=r"in it: a\.pt, b\.ckpt, model\.safetensors, pytorch_model\.bin$"):
        read_content(tmp_path)
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(CheckpointNotFoundError, match="only single files are read"):
        read_content(tmp_path)


def test_no_fifo_and_no_device_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointCorruptError, match="is a FIFO, not a file"):
        read_content(tmp_path / "fifo")
    with pytest.raises(CheckpointCorruptError, match="is a device, not a file"):
        read_content(Path("/dev/zero"))


def test_what_may_not_be_read_says_so(tmp_path, monkeypatch):
    zipped(tmp_path / "x.pt")

    def refuse(*_arguments):  # as the kernel does, but for root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointCorruptError, match="cannot be opened"):
        read_content(tmp_path / "x.pt")


def assert_one_line(error, path):
    text = str(error)
    assert text.startswith(f"{path}: ")
    assert len(text.splitlines()) == 1
    assert len(text) < 700
    assert text.isprintable()
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("write", [zipped, legacy, lambda path: save_file(STATE, path)], ids=["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_short_is_damaged(tmp_path, write, mmap):
    write(tmp_path / "whole")
    data, path = (tmp_path / "whole").read_bytes(), tmp_path / "short"
    for length in sorted({0, 1, 4, 8, 9, 10, 64, len(data) // 2, len(data) - 30, len(data) - 1}):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            read_content(path, mmap=mmap)
        # Within the name of a class, a shorter name is there: no one can tell.
        assert isinstance(caught.value, CheckpointCorruptError) or "holds collections.Order" in str(caught.value), length
        assert_one_line(caught.value, path)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is no checkpoint at all",
        b"PK\x03\x04 and then nothing of a zip file",
        b"\0" * 5000,
        b"\xff" * 5000,
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0{]",
        b"\x1b[31mred\x1b[0m\n" * 10,
        pickle.dumps({"w": 1}, 5),
        pickle.dumps({"w": 1}, 2),
        struct.pack("<Q", 2**63) + b"{",
        as_zip(b""),
        as_zip(b"\x80\x02" + b"(" * 100_000 + b"."),
        as_zip(b"\x80\x02X\xff\xff\xff\xffabc."),
        as_zip(pickle.dumps({"w": 1}, 4)),
    ],
)
@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_no_checkpoint_says_so(tmp_path, data, mmap):
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    try:
        content = read_content(path, mmap=mmap)
    except CheckpointError as error:
        assert_one_line(error, path)
    else:
        assert content == {}  # an empty safetensors file is one


def test_a_class_that_would_have_to_be_executed_is_named(tmp_path):
    path = tmp_path / "lightning.ckpt"
    torch.save({"state_dict": STATE, "hyper_parameters": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(CheckpointMismatchError) as caught:
        read_content(path)
    assert "holds argparse.Namespace, which is no tensor or plain value; nothing in it was executed" in str(caught.value)
    assert "torch.load(PATH, weights_only=False)" in str(caught.value)
    assert_one_line(caught.value, path)
    torch.save({"state_dict": STATE, "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2.5"}, path)
    assert same(read_content(path)["state_dict"], STATE)


def test_a_program_is_no_checkpoint(tmp_path):
    class Twice(nn.Module):
        def forward(self, x):
            return x * 2

    path = tmp_path / "program.pt"
    with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
        torch.jit.save(torch.jit.script(Twice()), path)
    with pytest.raises(CheckpointMismatchError, match=r"is a program \(TorchScript\), not a checkpoint; nothing in it was executed"):
        read_content(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_file_is_executed(tmp_path, name, form):
    mark, path, link = tmp_path / "mark", tmp_path / "x.pt", tmp_path / "link.safetensors"
    path.write_bytes(FORMS[form](pickles(mark)[name]))
    link.symlink_to(path)
    for target in (path, link):
        for mmap in (True, False):
            with pytest.raises((CheckpointCorruptError, CheckpointMismatchError)) as caught:
                read_content(target, mmap=mmap)
            assert_one_line(caught.value, target)
    assert not mark.exists()


def test_the_hostile_files_would_do_harm_where_they_are_trusted(tmp_path):
    """Else the test above would prove nothing."""
    code = """if True:
        import sys, torch
        for path in sys.argv[1:]:
            try:
                torch.load(path, weights_only=False)
            except Exception:
                pass
    """
    names = ("os.system by REDUCE", "builtins.eval", "builtins.exec in a state dict", "getattr chain", "torch.load of a torch file within")
    marks = [tmp_path / f"{form}-{index}" for form in ("zip", "legacy") for index in range(len(names))]
    for mark in marks:
        form, index = mark.name.split("-")
        mark.with_suffix(".pt").write_bytes(FORMS[form](pickles(mark)[names[int(index)]]))
    files = [mark.with_suffix(".pt") for mark in marks]
    subprocess.run([sys.executable, "-c", code, *files], capture_output=True, timeout=120, check=True)
    assert all(mark.exists() for mark in marks)


def test_a_setting_of_the_environment_makes_nothing_unsafe(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "mark"
    (tmp_path / "x.pt").write_bytes(as_zip(pickles(mark)["os.system by REDUCE"]))
    with pytest.raises(CheckpointMismatchError, match="nothing in it was executed"):
        read_content(tmp_path / "x.pt")
    assert not mark.exists()


@pytest.mark.parametrize("write", [zipped, legacy, lambda path: save_file(STATE, path)], ids=["zip", "legacy", "safetensors"])
def test_a_file_that_is_swapped_once_it_was_opened_is_not_read(tmp_path, write, monkeypatch):
    mark, path = tmp_path / "mark", tmp_path / "x.pt"
    write(path)
    (tmp_path / "evil").write_bytes(as_zip(pickles(mark)["os.system by REDUCE"]))
    opened = reading._is_safetensors

    def swapping(descriptor):
        (tmp_path / "evil").replace(path)
        return opened(descriptor)

    monkeypatch.setattr(reading, "_is_safetensors", swapping)
    content = read_content(path)
    assert same(content.get("model_state_dict", content), STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointMismatchError):
        read_content(path)
    assert not mark.exists()


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_unpacks_to_very_much_more_is_refused(tmp_path, mmap):
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(CheckpointCorruptError, match=r"is a zip file of \d+ bytes that would take 4\d+ in memory"):
        read_content(tmp_path / "x.pt", mmap=mmap)
    assert read_content(tmp_path / "plain.pt", mmap=mmap)["w"].numel() == 1_000_000
