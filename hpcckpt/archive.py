"""The zip file that torch.save writes, byte for byte, from memory that lies where it lies.

Stored entries whose data begin at multiples of 64, sizes and CRC in data descriptors behind the data, zip64 where a size or
an offset needs it (APPNOTE.TXT of PKWARE, 4.3 and 4.5; PyTorch's caffe2/serialize/inline_container.cc for the padding). Where
each entry lies follows from names and sizes alone; only the CRCs wait for the data.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_ALIGNMENT_BYTES = 64
# So much is checked at a time that it is still in the CPU's cache when it is copied, and small entries are gathered up to it.
_PIECE_BYTES = 1024 * 1024
_UTF8_NAME = 0x0800
_SIZES_BEHIND = 0x0008
_LARGE = 0xFFFFFFFF
_MANY = 0xFFFF

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_PADDING = struct.Struct("<2sH")
# By length; none is shorter than its own header.
_PADDINGS = [
    _PADDING.pack(b"FB", max(size - _PADDING.size, 0)) + b"Z" * (size - _PADDING.size) for size in range(_PADDING.size + _ALIGNMENT_BYTES)
]


@dataclass(frozen=True, slots=True)
class Record:
    """One entry: its name, its size, and what gives its bytes when they are needed."""

    name: str
    size_bytes: int
    load: Callable[[], memoryview]

    @classmethod
    def of(cls, name: str, data: bytes) -> "Record":
        """Return a record of these bytes."""
        return cls(name, len(data), lambda: memoryview(data))


def placed(entries: Iterable[tuple[str, int]]) -> tuple[list[int], int]:
    """Return where the data of each entry (name, size in bytes) begin in their zip file, and how large that is."""
    offset = central = 0
    starts = []
    for name, size in entries:
        name_bytes = len(name) if name.isascii() else len(name.encode())
        is_small = size < _LARGE and offset < _LARGE
        extra_bytes = 0 if is_small else len(_zip64_extra(size, size, offset))
        start = _data_offset(offset, name_bytes, extra_bytes)
        starts.append(start)
        central += _CENTRAL.size + name_bytes + extra_bytes
        offset = start + size + ((_DESCRIPTOR64 if extra_bytes else _DESCRIPTOR).size if size else 0)
    return starts, offset + central + _END64.size + _LOCATOR.size + _END.size


def archived(records: Iterable[Record]) -> Iterator[bytes | bytearray | memoryview]:
    """Yield the zip file of these records in pieces; each is used before the next one is asked for, and may change then."""
    offset = 0
    central = bytearray()
    small = bytearray()
    count = 0
    for record in records:
        name, size = record.name.encode(), record.size_bytes
        is_small = size < _LARGE and offset < _LARGE
        extra = b"" if is_small else _zip64_extra(size, size, offset)
        start = _data_offset(offset, len(name), len(extra))
        padding = _PADDINGS[start - offset - _LOCAL.size - len(name) - len(extra)]
        flags = _UTF8_NAME | _SIZES_BEHIND if size else _UTF8_NAME
        small += _LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(extra) + len(padding))
        small += name
        if extra:
            small += _zip64_extra(size, 0, offset)  # of what is stored, torch knows the size behind it only
        small += padding
        data = record.load()
        if len(data) != size:
            raise ValueError(f"{record.name} has {len(data)} bytes, but {size} were said")
        if size < _PIECE_BYTES:
            crc = zlib.crc32(data)
            small += data
        else:
            yield small
            small.clear()
            crc = 0
            for first in range(0, size, _PIECE_BYTES):
                piece = data[first : first + _PIECE_BYTES]
                crc = zlib.crc32(piece, crc)
                yield piece
                del piece
        del data  # may be a copy from another device
        descriptor = (_DESCRIPTOR64 if extra else _DESCRIPTOR).pack(b"PK\7\x08", crc, size, size) if size else b""
        small += descriptor
        said, at = (size, offset) if is_small else (min(size, _LARGE), min(offset, _LARGE))
        central += _CENTRAL.pack(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, said, said, len(name), len(extra), 0, 0, 0, 0, at)
        central += name
        central += extra
        offset = start + size + len(descriptor)
        count += 1
        if len(small) >= _PIECE_BYTES:
            yield small
            small.clear()
    end = _END64.pack(b"PK\6\6", _END64.size - 12, 0x031E, 45, 0, 0, count, count, len(central), offset)
    end += _LOCATOR.pack(b"PK\6\7", 0, offset + len(central), 1)
    end += _END.pack(b"PK\5\6", 0, 0, min(count, _MANY), min(count, _MANY), min(len(central), _LARGE), min(offset, _LARGE), 0)
    yield small
    yield central
    yield end


def _data_offset(offset: int, name_bytes: int, extra_bytes: int) -> int:
    """Return where the data of an entry begin whose header is at `offset`."""
    least = offset + _LOCAL.size + name_bytes + extra_bytes + _PADDING.size
    return least + -least % _ALIGNMENT_BYTES


def _zip64_extra(size: int, stored: int, offset: int) -> bytes:
    numbers = [size, stored] * (size >= _LARGE) + [offset] * (offset >= _LARGE)
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
