"""The one place where the bytes of a checkpoint become its content. Nothing in a file is ever executed.

A file is opened once, and what was opened is what is checked and read: swapping the name for another file meanwhile has no
effect. Its kind is told from its first bytes, not from its name.
"""

import errno
import json
import mmap as memory
import os
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from hpcckpt.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, CheckpointNotFoundError
from hpcckpt.state.foreign import NotedTensors
from hpcckpt.state.text import listed, printable

# Of a safetensors file: names that were left out because another name's tensor is theirs.
ALIASES_KEY: Final = "hpcckpt.aliases"
_CANDIDATES = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth")
_SHARDED = "*.index.json"
_ZIP_MAGIC = b"PK\x03\x04"
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# How the weights_only unpickler says that it met a class or function it does not build or call.
_REFUSED = re.compile(
    r"GLOBAL (?P<name>.+?)(?: was not an allowed| whose module )|reduce for unrecognized|Can only (?:build|create)|must be imported",
    re.DOTALL,
)
# What a zip file may say that it holds, times its own size: nothing of torch.save is compressed at all.
_LARGEST_RATIO = 20


def read_content(path: Path, *, mmap: bool = True, follow_symlinks: bool = True, source: str | None = None) -> Any:
    """Return what a file of torch.save (zip or legacy) or safetensors holds, with all tensors on the CPU.

    Args:
        path: the file; its suffix does not matter.
        mmap: leave tensors in the file until they are used, where the file allows it. They are private copies as soon as
            they are written to. Only for content that is copied elsewhere soon: a file that is cut short while it is
            mapped ends the process (SIGBUS).
        follow_symlinks: whether `path` itself may be a symbolic link.
        source: where its bytes are in memory already, under a name that can be opened; messages speak of `path`.

    Raises:
        CheckpointNotFoundError: there is no such file, or it is a directory; lists the candidates in it.
        CheckpointMismatchError: it holds objects of classes that would have to be executed to be read; names the first one.
        CheckpointCorruptError: it cannot be read, is cut short, or is no checkpoint.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO's writer is not waited for
    try:
        descriptor = os.open(source or path, flags if follow_symlinks or source else flags | os.O_NOFOLLOW)
    except OSError as error:
        raise _not_opened(path, error) from None
    try:
        kind = next((what for is_kind, what in _KINDS if is_kind(os.fstat(descriptor).st_mode)), None)
        if kind == "a directory":
            raise _is_directory(path)
        if kind is not None:
            raise CheckpointCorruptError(f"{path}: is {kind}, not a file; give the path of a checkpoint")
        if _is_safetensors(descriptor):
            return _read_safetensors(path, descriptor, mmap=mmap)
        return _read_torch(path, descriptor, mmap=mmap)
    finally:
        os.close(descriptor)


def _not_opened(path: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return CheckpointNotFoundError(f"{path}: there is no such file; look for the checkpoint with ls, then give its path")
    if error.errno == errno.ELOOP:
        return CheckpointCorruptError(f"{path}: is a symbolic link; give the path of the file itself")
    return CheckpointCorruptError(f"{path}: cannot be opened ({error.strerror}); mend that, or give another path")


def _is_directory(path: Path) -> CheckpointNotFoundError:
    if any(path.glob(_SHARDED)):
        return CheckpointNotFoundError(
            f"{path}: is a directory with a checkpoint in several files (*.index.json), and only single files are read; load it with the "
            "library that wrote it and save it as one file"
        )
    found = sorted({candidate.name for pattern in _CANDIDATES for candidate in path.glob(pattern)})
    there = f"give the path of a file in it: {listed(found)}" if found else "and there is no checkpoint in it"
    return CheckpointNotFoundError(f"{path}: is a directory; {there}")


def _is_safetensors(descriptor: int) -> bool:
    head = os.pread(descriptor, 9, 0)
    # 8 bytes of length, then that much JSON. No zip file or pickle begins so: their first 8 bytes are a length beyond any file.
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] + 8 <= os.fstat(descriptor).st_size


def _read_safetensors(path: Path, descriptor: int, *, mmap: bool) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(f"/proc/self/fd/{descriptor}", framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointCorruptError(f"{path}: is damaged ({_short(error)}); take another copy of it") from None
    if not mmap:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    ours, theirs = _aliases(metadata)
    content = NotedTensors(tensors, theirs)
    content.update({name: tensors[kept] for name, kept in ours.items() if kept in tensors and name not in tensors})
    content.noted -= ours.keys()
    return content


def _aliases(metadata: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return name -> name of the tensor that is its own, as noted by hpcckpt, and as safetensors' save_model notes it.

    Of the latter a note that is no name cannot be told for certain.
    """
    try:
        ours = json.loads(metadata.get(ALIASES_KEY, "{}"))
    except (ValueError, RecursionError):
        ours = {}
    theirs = {name: kept for name, kept in metadata.items() if name not in ("format", ALIASES_KEY)}
    return {name: kept for name, kept in (ours.items() if isinstance(ours, dict) else ()) if isinstance(kept, str)}, theirs


def _read_torch(path: Path, descriptor: int, *, mmap: bool) -> Any:
    with open(descriptor, "rb", closefd=False) as file:
        entries = _entries(file)
        size, unpacked = os.fstat(descriptor).st_size, sum(entry.file_size for entry in entries)
        if unpacked > _LARGEST_RATIO * size:
            raise CheckpointCorruptError(
                f"{path}: is a zip file of {size} bytes that would take {unpacked} in memory, which no checkpoint does; if you trust where "
                "it comes from, unzip it and zip it again without compression (zip -0)"
            )
        # torch maps compressed entries without looking.
        can_be_mapped = mmap and bool(entries) and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        file.seek(0)
        if can_be_mapped:
            try:
                # By the descriptor, not by the name: that may be another file by now.
                return _load(path, f"/proc/self/fd/{descriptor}", mmap=True)
            except OSError:  # no /proc here, or a file system that maps nothing
                file.seek(0)
        try:
            return _load(path, file, mmap=False)
        except OSError as error:
            raise CheckpointCorruptError(f"{path}: cannot be read ({error.strerror or _short(error)})") from None


def _entries(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """Return what a zip file holds; nothing for any other file."""
    if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
        return []
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except Exception:  # noqa: BLE001 - whatever is wrong with it, torch.load says so
        return []


def _load(path: Path, source: Any, *, mmap: bool) -> Any:
    """Load with weights_only; an OSError is passed on."""
    try:
        with warnings.catch_warnings(), torch.serialization.set_default_mmap_options(memory.MAP_PRIVATE):
            warnings.simplefilter("ignore")  # what they say of a file's protocol or kind, the error says
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - it raises many kinds for bytes it cannot read
        text = str(error)
        if mmap and isinstance(error, RuntimeError) and "mmap" in text:
            raise OSError(errno.ENODEV, text) from None
        raise _refusal(path, text) or CheckpointCorruptError(
            f"{path}: is damaged, cut short, or no checkpoint at all ({_short(error)}); take another copy of it, or another file"
        ) from None


def _refusal(path: Path, text: str) -> CheckpointMismatchError | None:
    """Return the error for a file that would have to be executed, in whole or in part; None for a file that is just bad."""
    if "TorchScript" in text:
        what = "is a program (TorchScript), not a checkpoint"
    elif found := _REFUSED.search(text):
        what = f"holds {printable(found['name'] or 'an object')}, which is no tensor or plain value"
    elif "legacy .tar format" in text:
        what = "is in the tar format of PyTorch before 0.1.10"
    else:
        return None
    return CheckpointMismatchError(
        f"{path}: {what}; nothing in it was executed. If you trust where it comes from, convert it once, where it may run code: "
        "content = torch.load(PATH, weights_only=False); torch.save(content['state_dict'], NEW_PATH), then load NEW_PATH"
    )


def _short(error: Exception) -> str:
    """Return torch's own reason, on one line and without its advice."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    line = (text.splitlines() or [""])[0].partition(" This is an internal miniz error")[0].rstrip(".")
    return f"{type(error).__name__}: {printable(line)}" if line else type(error).__name__
