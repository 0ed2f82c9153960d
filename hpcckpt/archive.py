"""The zip file that torch.save writes, byte for byte, from memory that lies where it lies.

Stored entries whose data begin at multiples of 64, sizes and CRC in data descriptors behind the data, zip64 where a size or
an offset needs it (APPNOTE.TXT of PKWARE, 4.3 and 4.5; PyTorch's caffe2/serialize/inline_container.cc for the padding). Where
each entry lies follows from names and sizes alone; only the CRCs wait for the data.
"""

import bisect
import operator
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

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
        extra = b"" if size < _LARGE and offset < _LARGE else _zip64_extra(size, size, offset)
        start = _data_offset(offset, len(name), len(extra))
        small += _header(name, size, len(extra), offset, start)
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
        descriptor = _descriptor(size, crc, is_large=bool(extra))
        small += descriptor
        central += _listed(name, size, extra, offset, crc)
        offset = start + size + len(descriptor)
        count += 1
        if len(small) >= _PIECE_BYTES:
            yield small
            small.clear()
    yield small
    yield central
    yield _end(count, len(central), offset)


class Layout:
    """Where everything lies in the zip file of some entries; any part of it can be had, by whoever has the data in that part."""

    def __init__(self, entries: Iterable[tuple[str, int]]) -> None:
        """Take name and size in bytes of each entry."""
        self._places: list[_Place] = []
        self.central_at = central_bytes = 0
        for name, size in entries:
            place = _Place.of(name, size, self.central_at)
            self._places.append(place)
            self.central_at = place.end
            central_bytes += _CENTRAL.size + len(place.name) + len(place.extra)
        self.size_bytes = self.central_at + central_bytes + _END64.size + _LOCATOR.size + _END.size

    def part(
        self, first: int, last: int, load: Callable[[int], memoryview], crcs: dict[int, int], seen: Callable[[int, memoryview], object]
    ) -> Iterator[bytes | memoryview]:
        """Yield the bytes from `first` up to `last`, all before the central directory, in pieces; each is used before the next one.

        A CRC that stands in the part is that of the whole entry, which is read from its beginning for that, wherever the part begins.

        Args:
            first: where it begins.
            last: where it ends.
            load: gives the data of an entry by its number.
            crcs: gets those that stand in the part, by number.
            seen: is shown all data that were read, in the order of `read_for`.
        """
        for number, place, low, high in self._overlaps(first, last):
            if first < place.start:
                yield place.header()[max(first - place.offset, 0) : last - place.offset]
            begin = max(first - place.start, 0)
            crc = 0
            if low < high:
                data = load(number)
                if len(data) != place.size:
                    raise ValueError(f"{place.name.decode()} has {len(data)} bytes, but {place.size} were said")
                for at in (*range(low, min(begin, high), _PIECE_BYTES), *range(min(begin, high), high, _PIECE_BYTES)):
                    is_written = at >= begin
                    piece = data[at : min(at + _PIECE_BYTES, high if is_written else begin)]
                    if last > place.data_end:
                        crc = zlib.crc32(piece, crc)
                    seen(number, piece)
                    if is_written:
                        yield piece
                    del piece
                del data  # may be a copy from another device
            if place.size and last > place.data_end:
                crcs[number] = crc
                yield place.descriptor(crc)[max(first - place.data_end, 0) : last - place.data_end]

    def read_for(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield what `part` reads: number of an entry, and from where to where of its data."""
        for number, _, low, high in self._overlaps(first, last):
            if low < high:
                yield number, low, high

    def ending(self, crcs: Mapping[int, int]) -> bytes:
        """Return what stands behind the entries, which names the CRCs of all that are not empty."""
        central = b"".join(place.listed(crcs[number] if place.size else 0) for number, place in enumerate(self._places))
        return central + _end(len(self._places), len(central), self.central_at)

    def _overlaps(self, first: int, last: int) -> Iterator[tuple[int, "_Place", int, int]]:
        """Yield entries that have bytes in a part, and from where to where their data are needed for it."""
        begin = bisect.bisect_right(self._places, first, key=operator.attrgetter("end"))
        for number in range(begin, len(self._places) if first < last else begin):
            place = self._places[number]
            if place.offset >= last:
                return
            needs_crc = last > place.data_end
            high = max(min(last - place.start, place.size), 0)
            low = 0 if needs_crc else min(max(first - place.start, 0), high)
            yield number, place, low, high


class _Place(NamedTuple):
    """Where an entry lies: its header, its data, and the descriptor behind them, which an empty one does not have."""

    name: bytes
    size: int
    extra: bytes
    offset: int
    start: int
    data_end: int
    end: int

    @classmethod
    def of(cls, name: str, size: int, offset: int) -> Self:
        """Return the place of an entry whose header is at `offset`."""
        encoded = name.encode()
        extra = b"" if size < _LARGE and offset < _LARGE else _zip64_extra(size, size, offset)
        start = _data_offset(offset, len(encoded), len(extra))
        return cls(encoded, size, extra, offset, start, start + size, start + size + len(_descriptor(size, 0, is_large=bool(extra))))

    def header(self) -> bytes:
        """Return what stands before the data."""
        return _header(self.name, self.size, len(self.extra), self.offset, self.start)

    def descriptor(self, crc: int) -> bytes:
        """Return what stands behind the data."""
        return _descriptor(self.size, crc, is_large=bool(self.extra))

    def listed(self, crc: int) -> bytes:
        """Return its line of the central directory."""
        return _listed(self.name, self.size, self.extra, self.offset, crc)


def _header(name: bytes, size: int, extra_bytes: int, offset: int, start: int) -> bytes:
    padding = _PADDINGS[start - offset - _LOCAL.size - len(name) - extra_bytes]
    flags = _UTF8_NAME | _SIZES_BEHIND if size else _UTF8_NAME
    header = _LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(name), extra_bytes + len(padding)) + name
    # Of what is stored, torch knows the size behind it only.
    return header + _zip64_extra(size, 0, offset) + padding if extra_bytes else header + padding


def _descriptor(size: int, crc: int, *, is_large: bool) -> bytes:
    return (_DESCRIPTOR64 if is_large else _DESCRIPTOR).pack(b"PK\7\x08", crc, size, size) if size else b""


def _listed(name: bytes, size: int, extra: bytes, offset: int, crc: int) -> bytes:
    flags = _UTF8_NAME | _SIZES_BEHIND if size else _UTF8_NAME
    said, at = (min(size, _LARGE), min(offset, _LARGE)) if extra else (size, offset)
    return _CENTRAL.pack(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, said, said, len(name), len(extra), 0, 0, 0, 0, at) + name + extra


def _end(count: int, central_bytes: int, offset: int) -> bytes:
    end = _END64.pack(b"PK\6\6", _END64.size - 12, 0x031E, 45, 0, 0, count, count, central_bytes, offset)
    end += _LOCATOR.pack(b"PK\6\7", 0, offset + central_bytes, 1)
    end += _END.pack(b"PK\5\6", 0, 0, min(count, _MANY), min(count, _MANY), min(central_bytes, _LARGE), min(offset, _LARGE), 0)
    return end


def _data_offset(offset: int, name_bytes: int, extra_bytes: int) -> int:
    """Return where the data of an entry begin whose header is at `offset`."""
    least = offset + _LOCAL.size + name_bytes + extra_bytes + _PADDING.size
    return least + -least % _ALIGNMENT_BYTES


def _zip64_extra(size: int, stored: int, offset: int) -> bytes:
    numbers = [size, stored] * (size >= _LARGE) + [offset] * (offset >= _LARGE)
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
