"""What is written is what torch.save writes, byte for byte."""

import io
import os
import zipfile
from collections import Counter, OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt.archive import Record, archived
from hpcckpt.state.pickled import Pickled, pickled, write_as_torch

ID = "archive/.data/serialization_id"
COMMON = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128,
)  # fmt: skip


def by_torch(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def by_us(content, identity):
    """Return what we write, but with the identity that torch has given the file: nobody reads it, and it is made in another way."""
    found = [replace(record, load=lambda: memoryview(identity)) if record.name == ID else record for record in pickled(content)]
    return b"".join(bytes(piece) for piece in archived(found))


def assert_same_bytes(content):
    theirs = by_torch(content)
    with zipfile.ZipFile(io.BytesIO(theirs)) as archive:
        assert by_us(content, archive.read(ID)) == theirs


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    whole = torch.arange(120).reshape(4, 5, 6).to(draw(st.sampled_from(COMMON)))
    kind = draw(st.sampled_from(["new", "view", "transposed", "expanded", "trained"]))
    if kind == "new":
        return torch.zeros(shape, dtype=whole.dtype)
    if kind == "view":
        return whole[draw(st.integers(0, 3)), draw(st.integers(0, 4)) :]
    if kind == "transposed":
        return whole.transpose(0, draw(st.integers(0, 2)))
    if kind == "expanded":
        return whole[:1].expand(3, 5, 6)
    return torch.ones(shape, requires_grad=True)


numbers = st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
plain = st.none() | numbers | st.text(max_size=5) | st.binary(min_size=1, max_size=5)
contents = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict)
        | inner.map(lambda shared: {"a": shared, "b": [shared, shared]})
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(contents)
def test_any_content_is_written_as_torch_writes_it(content):
    assert_same_bytes(content)


def test_a_training_state_is_written_as_torch_writes_it():
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 300))
    model[2].weight = torch.nn.Parameter(model[0].weight.t())  # one storage
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "counter": Counter({2: 1}), "step": 3}
    state["model"] = dict(state["model"])
    assert_same_bytes(state)


def test_what_is_larger_than_a_piece_is_written_as_torch_writes_it():
    assert_same_bytes({name: torch.rand(size) for name, size in (("a", 3), ("b", 262_144), ("c", 262_143), ("d", 700_001), ("e", 0))})


def test_many_small_ones_are_written_as_torch_writes_them():
    assert_same_bytes([torch.full((7,), float(number)) for number in range(70_000)])  # more than a plain zip file can count


class Sparse(io.RawIOBase):
    """A file that leaves out what is zero: 4 GiB take no room."""

    zeros = bytes(1 << 20)

    def __init__(self, path):
        super().__init__()
        self.file = path.open("wb", buffering=0)

    def writable(self):
        return True

    def write(self, data):
        view = memoryview(data).cast("B")
        for start in range(0, len(view), 1 << 20):
            piece = bytes(view[start : start + (1 << 20)])
            if piece == self.zeros:
                self.file.seek(len(piece), os.SEEK_CUR)
            else:
                self.file.write(piece)
        return len(view)

    def close(self):
        if not self.closed:
            self.file.truncate()
            self.file.close()
        super().close()


@pytest.mark.timeout(300)
def test_beyond_4_gib_it_is_written_as_torch_writes_it(tmp_path):
    # Memory that nobody has written to takes no room, either.
    content = {"large": torch.zeros(2**32 + 8, dtype=torch.uint8), "behind": torch.arange(5.0)}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with Sparse(theirs) as sink:
        torch.save(content, sink)
    with zipfile.ZipFile(theirs) as archive:
        identity = archive.read(ID)
    found = [replace(record, load=lambda: memoryview(identity)) if record.name == ID else record for record in pickled(content)]
    with Sparse(ours) as sink:
        for piece in archived(found):
            sink.write(piece)
    assert ours.stat().st_size == theirs.stat().st_size > 2**32
    assert ours.stat().st_blocks < 100_000
    assert data_in(ours) == data_in(theirs)


def data_in(path):
    """Return (offset, bytes) of all of a file that is no hole."""
    found, end = [], 0
    with path.open("rb", buffering=0) as file:
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return found
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, os.pread(file.fileno(), end - start, start)))


class Named(torch.Tensor):
    pass


UNCOMMON = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "negative": lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
    "on the meta device": lambda: torch.ones(2, device="meta"),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.ones(2, dtype=torch.uint16),
    "a subclass": lambda: torch.ones(2).as_subclass(Named),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "a storage": lambda: torch.ones(2).untyped_storage(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "with an attribute": lambda: setattr(tensor := torch.ones(2), "note", 1) or tensor,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", UNCOMMON.values(), ids=UNCOMMON)
def test_what_is_not_common_is_left_to_torch(make):
    content = {"plain": torch.ones(3), "x": make()}
    assert pickled(content) is None
    file = io.BytesIO()
    write_as_torch(content, file)
    assert file.getvalue() == by_torch(content)


def test_the_state_of_a_module_without_parameters_is_written_as_torch_writes_it():
    state = torch.nn.ReLU().state_dict()
    assert state._metadata
    assert_same_bytes({"model": state})


class OnAnotherDevice:
    """The storage of a GPU, as far as a writer sees it."""

    device = torch.device("cuda")

    def __init__(self, tensor):
        self.storage = tensor.untyped_storage()

    def nbytes(self):
        return self.storage.nbytes()

    def cpu(self):
        return self.storage.clone()


def test_a_copy_from_another_device_lives_until_it_is_written():
    tensors = [torch.full((size,), float(size)) for size in (5, 1_000, 300_000, 3_000_000)]
    written, noise = bytearray(), []
    for piece in archived(Pickled(b"", [OnAnotherDevice(tensor) for tensor in tensors])):
        noise.append(torch.rand(400_000))  # takes the place of what was freed
        written += piece
    with zipfile.ZipFile(io.BytesIO(written)) as archive:
        found = [torch.frombuffer(bytearray(archive.read(f"archive/data/{key}")), dtype=torch.float32) for key in range(4)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, tensors, strict=True))


def test_what_torch_refuses_is_refused():
    whole = torch.ones(4)
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        write_as_torch([whole, whole.view(torch.int32)], io.BytesIO())


def test_what_cannot_be_pickled_is_an_error():
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        write_as_torch({"x": lambda: None}, io.BytesIO())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it(tmp_path, mmap):
    whole = torch.randn(500, 300)
    content = {"a": whole, "view": whole[3:5], "i": torch.arange(7), "step": 3}
    with (tmp_path / "a.pt").open("wb") as file:
        write_as_torch(content, file)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert all(torch.equal(loaded[name], content[name]) for name in ("a", "view", "i"))
    assert loaded["view"].untyped_storage().data_ptr() == loaded["a"].untyped_storage().data_ptr()
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None


def test_no_storage_is_read_before_its_turn():
    """What is on a GPU is copied one by one."""
    order = []

    def load(name):
        order.append(name)
        return memoryview(b"x" * 100)

    found = [Record(name, 100, lambda name=name: load(name)) for name in ("a", "b")]
    pieces = archived(found)
    assert order == []
    assert b"".join(bytes(piece) for piece in pieces).count(b"x" * 100) == 2
    assert order == ["a", "b"]


def test_an_entry_of_another_size_than_was_said_is_an_error():
    with pytest.raises(ValueError, match="has 3 bytes, but 4 were said"):
        list(archived([Record("a", 4, lambda: memoryview(b"abc"))]))


def test_entries_that_are_large_storages_are_known_by_their_numbers():
    found = pickled({"a": torch.ones(3), "b": torch.ones(300), "words": "w" * 5000, "c": torch.ones(200)})
    records = list(found)
    assert [(records[number].name, records[number].size_bytes) for number in found.large(800)] == [
        ("archive/data/1", 1200),
        ("archive/data/2", 800),
    ]
