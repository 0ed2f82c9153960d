"""What torch.save writes of some content, without the writing: entries of a zip file, whose data stay where they are.

torch.save asks Python several times a tensor; here a tensor of the common kind is put into words at once, which gives the
same pickle in a third of the time. What is not of the common kind is left to torch.save.
"""

import ctypes
import functools
import gc
import io
import mmap
import pickle
import sys
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Final

import torch

from hpcckpt.archive import Record, archived

# Types of elements that have a class of storage; the others are written in another way.
_CLASSES: Final = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}
_PROTOCOL = 2
_REBUILD = torch._utils._rebuild_tensor_v2  # noqa: SLF001 - its name is in every file
_EMPTY = (OrderedDict, ())
# Below, asking torch takes longer than the copy.
_SMALL_BYTES: Final = 256 * 1024


class _Uncommon(Exception):  # noqa: N818 - never leaves this module
    """Met something that torch.save has its own words for."""


class _Reference:
    """A storage in the pickle: what torch.save says of it there."""

    __slots__ = ("words",)

    def __init__(self, words: tuple[Any, ...]) -> None:
        self.words = words


class _Pickler(pickle.Pickler):
    """Pickles tensors as torch.save does, and collects their storages."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self.storages: list[torch.UntypedStorage] = []
        self._known: dict[tuple[Any, int, int], tuple[torch.dtype, _Reference]] = {}

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        kind = type(obj)
        if kind is _Reference:
            return (*obj.words,)  # a new one each time, as torch.save's are: the pickle would refer to the first one
        if kind is torch.UntypedStorage or kind is torch.TypedStorage:
            raise _Uncommon
        return None

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor:
            return _REBUILD, self._words(obj)
        if kind is OrderedDict and not obj and not obj.__dict__:
            return _EMPTY
        if isinstance(obj, torch.Tensor):
            raise _Uncommon
        return NotImplemented

    def _words(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        dtype, device = tensor.dtype, tensor.device
        is_common = tensor.layout is torch.strided and dtype in _CLASSES and device.type in ("cpu", "cuda")
        if not is_common or tensor.is_nested or tensor.is_conj() or tensor.is_neg() or tensor.__dict__:
            raise _Uncommon
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        # Nothing of an empty one is shared; its address is that of all of them.
        address = storage.data_ptr() if size else -len(self.storages)
        known = self._known.get((device, address, size))
        if known is None:
            location = "cpu" if device.type == "cpu" else str(device)
            reference = _Reference(("storage", _CLASSES[dtype], str(len(self.storages)), location, size // dtype.itemsize))
            self.storages.append(storage)
            self._known[device, address, size] = dtype, reference
        elif known[0] is not dtype:
            raise _Uncommon
        else:
            reference = known[1]
        return reference, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.requires_grad, OrderedDict()


@dataclass(frozen=True)
class Pickled:
    """Some content in torch.save's words, and the memory they speak of: that must live, and stay as it is, until it is written."""

    words: bytes
    storages: Sequence[torch.UntypedStorage]

    def __iter__(self) -> Iterator[Record]:
        """Yield the entries of the zip file, one by one: of a hundred thousand at once the garbage collector makes a second's work."""
        yield from self._head()
        for key, storage in enumerate(self.storages):
            yield Record(f"archive/data/{key}", storage.nbytes(), functools.partial(_bytes, storage))
        yield from self._tail()

    def entries(self) -> list[tuple[str, int]]:
        """Return name and size in bytes of each entry."""
        data = [(f"archive/data/{key}", storage.nbytes()) for key, storage in enumerate(self.storages)]
        head, tail = ([(record.name, record.size_bytes) for record in some] for some in (self._head(), self._tail()))
        return head + data + tail

    def large(self, least_bytes: int) -> list[int]:
        """Return the numbers of those entries that are storages of at least so many bytes."""
        first = len(self._head())
        return [first + key for key, storage in enumerate(self.storages) if storage.nbytes() >= least_bytes]

    def put(self, memory: mmap.mmap, starts: Sequence[int], later: Collection[int] = ()) -> list[tuple[torch.UntypedStorage, int]]:
        """Copy the data of each entry to its place in memory; behind that, what they were copied from may change.

        Storages whose address is in `later` are left out; returns them, each with its place.
        """
        left_out = []
        fixed = [*self._head(), *self._tail()]
        first = len(fixed) - 2
        for record, start in zip(fixed, (*starts[:first], *starts[-2:]), strict=True):
            memory[start : start + record.size_bytes] = record.load()
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        base = whole.data_ptr()
        is_waited_for = False
        for storage, start in zip(self.storages, starts[first:-2], strict=True):
            size = storage.nbytes()
            if size >= _SMALL_BYTES and storage.data_ptr() in later:
                left_out.append((storage, start))
            elif storage.device.type != "cpu":
                whole[start : start + size].copy_(_flat(storage), non_blocking=True)
                is_waited_for = True
            elif size < _SMALL_BYTES:
                ctypes.memmove(base + start, storage.data_ptr(), size)
            else:
                whole[start : start + size].copy_(_flat(storage))  # by several threads
        if is_waited_for:
            torch.cuda.synchronize()
        return left_out

    def _head(self) -> tuple[Record, ...]:
        return (
            Record.of("archive/data.pkl", self.words),
            Record.of("archive/.format_version", b"1"),
            Record.of("archive/.storage_alignment", b"64"),
            Record.of("archive/byteorder", sys.byteorder.encode()),
        )

    def _tail(self) -> tuple[Record, ...]:
        # torch's own tells files apart in its logs.
        told = f"{zlib.crc32(self.words):020}{len(self.words):020}".encode()
        return Record.of("archive/version", b"3\n"), Record.of("archive/.data/serialization_id", told)


def pickled(content: Any) -> Pickled | None:
    """Return what torch.save writes of `content`, or None where only torch.save can.

    Raises:
        TypeError, AttributeError, pickle.PicklingError: something in it cannot be pickled.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        with _without_collection():
            pickler.dump(content)
            pickler.clear_memo()  # before the collector looks
    except _Uncommon:
        return None
    return Pickled(file.getvalue(), pickler.storages)


def write_as_torch(content: Any, file: IO[bytes]) -> None:
    """Write `content` as torch.save does; it must not change meanwhile.

    Raises:
        OSError: from the file.
        RuntimeError, TypeError, pickle.PicklingError: as torch.save, of what it cannot save.
    """
    found = pickled(content)
    if found is None:
        torch.save(content, file)
    else:
        for piece in archived(found):
            file.write(piece)


def _flat(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    if storage.device.type != "cpu":
        storage = storage.cpu()  # type: ignore[no-untyped-call]
    size = storage.nbytes()
    if not size:
        return memoryview(b"")
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    memory.storage = storage  # type: ignore[attr-defined]  # a copy from another device lives as long as the view of it
    return memoryview(memory).cast("B")


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from looking through what is being made again and again: twice as fast."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
