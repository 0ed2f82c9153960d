"""A name shows the old content or the new one, durable, and nothing in between."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt.errors import CheckpointCorruptError, RunDirectoryError
from hpcckpt.store import durable
from hpcckpt.store.durable import drafted, file_digest, make_private_directory, read_json, write_bytes, write_durably, write_json
from support.digests import digest_of
from support.limits import full_disk

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user")


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_content_size_and_digest_are_those_of_the_file(tmp_path_factory, pieces):
    path = tmp_path_factory.getbasetemp() / "pieces"
    size, digest = write_durably(path, lambda file: [file.write(piece) for piece in pieces] and None)
    assert path.read_bytes() == b"".join(pieces)
    assert (size, digest) == (len(b"".join(pieces)), digest_of(path.read_bytes())) == file_digest(path)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_a_file_is_private_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a") == 0o600


@pytest.mark.parametrize("data", [memoryview(b"abcdef"), bytearray(b"abcdef"), torch.arange(3).numpy()], ids=["view", "bytes", "array"])
def test_a_writer_may_write_any_buffer(tmp_path, data):
    written = []
    size, digest = write_durably(tmp_path / "a", lambda file: written.append(file.write(data)))
    assert written == [memoryview(data).nbytes] == [size]
    assert digest == digest_of((tmp_path / "a").read_bytes())
    assert (tmp_path / "a").read_bytes() == bytes(data)


def test_torch_saves_into_the_file_and_loads_it_again(tmp_path):
    state = {"weight": torch.randn(300, 70), "empty": torch.empty(0), "step": 3}
    size, digest = write_durably(tmp_path / "a.pt", lambda file: torch.save(state, file))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(loaded["weight"], state["weight"])
    assert loaded["step"] == 3
    assert (size, digest) == ((tmp_path / "a.pt").stat().st_size, digest_of((tmp_path / "a.pt").read_bytes()))


def test_the_bytes_are_those_of_a_plain_torch_save(tmp_path):
    state = {"weight": torch.arange(1000.0)}
    write_durably(tmp_path / "archive", lambda file: torch.save(state, file))
    with (tmp_path / "plain").open("wb") as file:
        torch.save(state, file)
    assert (tmp_path / "archive").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("bug"), SystemExit(1), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("before", [None, b"old"], ids=["new name", "old content"])
def test_a_writer_that_raises_leaves_everything_as_it_was(tmp_path, before, error):
    if before is not None:
        (tmp_path / "a").write_bytes(before)

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_durably(tmp_path / "a", write)
    assert names_in(tmp_path) == ([] if before is None else ["a"])
    assert before is None or (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize("at_byte", [0, 1, 100, 5_000, 100_000, 399_990])
def test_a_full_disk_is_an_oserror_also_behind_torch_save(tmp_path, at_byte):
    (tmp_path / "a").write_bytes(b"old")
    state = {"weight": torch.zeros(100_000)}
    with full_disk(at_byte), pytest.raises(OSError, match="File too large"):
        write_durably(tmp_path / "a", lambda file: torch.save(state, file))
    assert names_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_failed_write_that_the_writer_keeps_to_itself_is_found(tmp_path):
    def write(file):
        try:
            file.write(b"x" * 100)
        except OSError:
            file.write(b"y")

    with full_disk(50), pytest.raises(OSError, match="File too large"):
        write_durably(tmp_path / "a", write)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("refused", [False, True], ids=["not published", "refused"])
def test_a_draft_that_gets_no_name_leaves_everything_as_it_was(tmp_path, refused):
    (tmp_path / "a").write_bytes(b"old")
    with suppress(PermissionError), drafted(tmp_path / "a", lambda file: file.write(b"new") and None) as draft:
        assert draft.temporary.read_bytes() == b"new"
        assert (draft.size_bytes, draft.digest) == file_digest(draft.temporary)
        if refused:
            raise PermissionError("not any more")
    assert names_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_symlink_at_the_name_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("plant", ["symlink", "file"])
def test_whatever_lies_at_the_temporary_name_is_refused(tmp_path, monkeypatch, plant):
    monkeypatch.setattr(durable.secrets, "token_hex", lambda _count: "guessed")
    (tmp_path / "victim").write_bytes(b"precious")
    planted = tmp_path / ".tmp-a.guessed"
    planted.symlink_to(tmp_path / "victim") if plant == "symlink" else planted.write_bytes(b"other's")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "a").exists()
    assert os.path.lexists(planted)


def test_a_directory_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "none" / "a", b"")


WRITE_ONE = "import sys, pathlib; from hpcckpt.store.durable import write_bytes; write_bytes(pathlib.Path(sys.argv[1]), b'data')"


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_kernel_sees_data_then_fsync_then_rename_then_fsync_of_the_directory(tmp_path):
    target, trace = tmp_path / "run" / "a", tmp_path / "trace"
    target.parent.mkdir()
    command = [
        "strace",
        "-y",
        "-e",
        "trace=openat,pwrite64,fsync,rename,renameat,renameat2",
        "-o",
        trace,
        sys.executable,
        "-c",
        WRITE_ONE,
        target,
    ]
    traced = subprocess.run(command, capture_output=True, text=True, check=False)
    if "ptrace" in traced.stderr.lower():
        pytest.skip("ptrace is not allowed here")
    calls = [line for line in trace.read_text().splitlines() if str(target.parent) in line and "O_DIRECTORY" not in line]
    names = [re.sub(r"^rename.*", "rename", call.split("(")[0]) for call in calls]
    assert names == ["openat", "pwrite64", "fsync", "rename", "fsync"]
    assert "O_WRONLY|O_CREAT|O_EXCL|O_NOFOLLOW|O_CLOEXEC, 0600" in calls[0]
    assert f"<{target.parent}/.tmp-a." in calls[2]
    assert f'"{target}"' in calls[3]
    assert f"<{target.parent}>" in calls[4]


def test_the_order_is_data_fsync_rename_fsync_of_the_directory(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor):
        calls.append(
            "fsync of directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"fsync of {os.fstat(descriptor).st_size} bytes"
        )
        fsync(descriptor)

    def recorded_rename(source, target):
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    write_json(tmp_path / "a.json", {"a": 1})
    assert calls == [f"fsync of {(tmp_path / 'a.json').stat().st_size} bytes", "rename", "fsync of directory"]


def test_json_is_read_back_and_no_file_is_none(tmp_path):
    assert read_json(tmp_path / "a") is None
    value = {"ü": [1, None, float("inf")], "metrics": {"loss": 0.1 + 0.2}}
    write_json(tmp_path / "a", value)
    assert read_json(tmp_path / "a") == value


GARBAGE = {
    "empty": b"",
    "torn": b'{"file": "check',
    "binary": b"\x00\xff\xfe" * 50,
    "no object": b"[1, 2]",
    "a string": b'"../x"',
    "null": b"null",
    "deeply nested": b"[" * 200_000,
    "huge": b'{"a": "' + b"x" * (17 * 1024 * 1024) + b'"}',
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_what_is_not_ours_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(tmp_path / "a.json"))):
        read_json(tmp_path / "a.json")


PLANTS = {
    "symlink": lambda path: path.symlink_to(path.with_name("good")),
    "fifo": os.mkfifo,
    "directory": lambda path: path.mkdir(),
}


@pytest.mark.timeout(20)  # a reader of a FIFO without a writer waits for ever
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, plant):
    (tmp_path / "good").write_text(json.dumps({"file": "x"}))
    plant(tmp_path / "a")
    with pytest.raises(CheckpointCorruptError):
        read_json(tmp_path / "a")


@pytest.mark.timeout(20)
def test_a_digest_waits_for_no_fifo_and_follows_no_symlink(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert file_digest(tmp_path / "fifo")[0] == 0
    (tmp_path / "good").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    with pytest.raises(OSError, match="symbolic links"):
        file_digest(tmp_path / "link")


def test_a_private_directory_is_made_with_its_parents_and_accepted_again(tmp_path):
    before = os.umask(0)
    try:
        make_private_directory(tmp_path / "runs" / "digits")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "runs" / "digits") == 0o700
    make_private_directory(tmp_path / "runs" / "digits")


@needs_root
def test_a_directory_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 12345, -1)
    with pytest.raises(RunDirectoryError, match=r"run: belongs to user 12345, not to you; choose another run_dir"):
        make_private_directory(tmp_path / "run")


@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_a_file_in_the_way_is_refused(tmp_path, below):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot be made \((File exists|Not a directory)\)"):
        make_private_directory(tmp_path / "run" / below)
