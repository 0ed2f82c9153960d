"""Files that run something as they are read carelessly; each would create the file `mark`."""

import functools
import importlib
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

# torch's legacy format: magic number, protocol, system information, then the object and the list of its storages.
_LEGACY = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})


class _Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Only what can be called is pickled as a function."""


class _CallsByProtocol(_Calls):
    def __reduce_ex__(self, protocol):
        return self.call


class _Sets:
    """Pickled as an object whose state is set: __setstate__, or attributes."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return (functools.partial, (print,), self.state)


def _source(mark):
    return f"open({str(mark)!r}, 'w').close()"


def _text(module, name, argument):
    """As protocol 0 spells it: GLOBAL, MARK, string, TUPLE, REDUCE, STOP."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def _stack_global(module, name, argument):
    text = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def _inst(module, name, argument):
    """The INST opcode: a call without REDUCE."""
    return f"(V{argument}\ni{module}\n{name}\n.".encode()


def _build(mark):
    """BUILD on an allowed type, with a state that names a function."""
    return b"\x80\x02ccollections\nOrderedDict\n)R}X\x08\x00\x00\x00__call__cposix\nsystem\nsb." + str(mark).encode()


def _persistent(mark):
    """A persistent id that is an object to be called."""
    return b"\x80\x02" + _text("posix", "system", f"touch {mark}")[:-1] + b"Q."


def _nested(mark):
    inner = io.BytesIO()
    torch.save(_Calls(os.system, f"touch {mark}"), inner)
    return _Calls(functools.partial(torch.load, weights_only=False), io.BytesIO(inner.getvalue()))


def pickles(mark: Path) -> dict[str, bytes]:
    """Return name -> bytes of a pickle."""
    command = f"touch {mark}"
    objects = {
        "os.system by REDUCE": _Calls(os.system, command),
        "builtins.eval": _Calls(eval, _source(mark)),
        "builtins.exec in a state dict": {"state_dict": OrderedDict(w=_Calls(exec, _source(mark)))},
        "__reduce_ex__": _CallsByProtocol(os.system, command),
        "importlib": {"model": _Calls(importlib.import_module, "this"), "w": _Calls(exec, _source(mark))},
        "functools.partial, called": _Calls(_Calls(functools.partial, os.system, command)),
        "partial by BUILD with __setstate__": {"w": _Sets((exec, (_source(mark),), {}, None)), "x": _Calls(exec, _source(mark))},
        "getattr chain": _Calls(_Calls(getattr, _Calls(importlib.import_module, "builtins"), "exec"), _source(mark)),
        "torch.load of a torch file within": _nested(mark),
        "torch.hub": _Calls(torch.hub.load_state_dict_from_url, f"file://{mark}"),
        "torch.jit": _Calls(torch.jit.load, str(mark.parent / "program.pt")),
        "numpy.load by name": _text("numpy", "load", str(mark)),
        "subprocess": _text("subprocess", "check_output", command),
        "STACK_GLOBAL": _stack_global("os", "system", command),
        "STACK_GLOBAL of a dotted name": _stack_global("torch", "serialization.os.system", command),
        "INST": _inst("os", "system", command),
        "GLOBAL of a dotted name": _text("torch", "serialization.os.system", command),
        "GLOBAL under an allowed module": _text("torch._utils", "os.system", command),
        "BUILD of an allowed type": _build(mark),
        "persistent id": _persistent(mark),
    }
    return {name: value if isinstance(value, bytes) else _pickled(value) for name, value in objects.items()}


def _pickled(value):
    file = io.BytesIO()
    # Functions of torch.hub and torch.jit are pickled by name, as torch.save would.
    pickle.Pickler(file, 2).dump(value)
    return file.getvalue()


def as_zip(data: bytes) -> bytes:
    """Return a zip file as torch.save writes them, with this pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", b"\0" * 64)):
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def as_legacy(data: bytes) -> bytes:
    """Return a file of torch before 1.6 with this pickle in it."""
    return b"".join(pickle.dumps(part, 2) for part in _LEGACY) + data + pickle.dumps([], 2)


def as_tar(data: bytes) -> bytes:
    """Return a file of torch before 0.1.10 with this pickle in it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


FORMS = {"zip": as_zip, "legacy": as_legacy, "tar": as_tar, "plain pickle": bytes}
